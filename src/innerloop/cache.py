"""Views on Hugging Face KV caches: fork a prefix, regroup rows, one slot per (loop, layer).

All of them rely on one fact: a growing cache layer (`DynamicLayer`, `DynamicSlidingWindowLayer`) never writes in place.
Each update makes new key and value tensors by concatenation, so two caches may share the tensors of a common prefix,
and gradients flow through them.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from innerloop.errors import InputError


def new_cache(config: PreTrainedConfig, n_loops: int = 1) -> DynamicCache:
    """Make an empty cache with one slot per (loop, layer), loop-major: slot ``loop * n_layers + layer``."""
    cache = DynamicCache(config=config)
    for _ in range(n_loops - 1):
        cache.layers.extend(DynamicCache(config=config).layers)
    return cache


def fork(cache: AnyCache) -> AnyCache:
    """Return a cache with the same contents that grows on its own; no tensor is copied.

    Keeping a prefix and rolling back is: read into a fork, drop the fork.
    """
    if isinstance(cache, DepthCache):
        return cache.fork()
    view = copy.copy(cache)
    view.layers = [copy.copy(layer) for layer in cache.layers]
    return view


def select_rows(cache: AnyCache, rows: Tensor) -> AnyCache:
    """Return a cache with the batch rows ``rows`` (R,) of ``cache``, in that order; the original stays as it is."""
    if isinstance(cache, DepthCache):
        return cache.keep_rows(rows)
    view: DynamicCache = fork(cache)
    for layer in view.layers:
        if layer.get_seq_length() > 0:
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)
    return view


def join_rows(caches: Sequence[AnyCache], order: Tensor) -> AnyCache:
    """Put the rows of caches of the same length below each other, then in the order ``order``."""
    if isinstance(caches[0], DepthCache):
        raise InputError("rows of unlike depth cannot be put together again: set answer_context to refeed")
    plain: list[DynamicCache] = [cache for cache in caches if not isinstance(cache, DepthCache)]
    view: DynamicCache = fork(plain[0])
    for i, layer in enumerate(view.layers):
        if layer.get_seq_length() > 0:
            layer.keys = torch.cat([cache.layers[i].keys for cache in plain]).index_select(0, order)
            layer.values = torch.cat([cache.layers[i].values for cache in plain]).index_select(0, order)
    return view


def loop_slots(cache: DynamicCache, loop: int, n_layers: int, first_layer: int = 0) -> DynamicCache:
    """View loop ``loop``'s slots of a cache made by ``new_cache(config, n_loops)`` as an ordinary cache.

    What is written through the view is written into ``cache``. When only the layers from ``first_layer`` on will run,
    the entries below it are stood in for by a later layer of the same kind, because masks are sized by asking an early
    layer for its length.
    """
    slots = cache.layers[loop * n_layers : (loop + 1) * n_layers]
    if len(slots) != n_layers:
        raise IndexError(f"the cache has {len(cache.layers) // n_layers} loops of {n_layers} layers, loop {loop} asked")
    ran = slots[first_layer:]
    view = copy.copy(cache)
    view.layers = [ran[0]] * first_layer + ran
    return view


@dataclass
class Slot:
    """What some layers have read in one loop: keys and values, and which tokens they belong to.

    A column is one reading; where a row took no part in it, the column is not real.

    Attributes:
        layers: the layers.
        positions_BP: the tokens' positions.
        real_BP: which columns are real.
        is_dense: every token that the context has read is here, in the same columns.
        is_real: every column is real in every row.
        keys: of each layer (B, H, P, d); None before the first reading.
        values: likewise.
    """

    layers: range
    positions_BP: Tensor
    real_BP: Tensor
    is_dense: bool = True
    is_real: bool = True
    keys: list[Tensor | None] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.keys:
            self.keys, self.values = [None] * len(self.layers), [None] * len(self.layers)

    @property
    def length(self) -> int:
        """The number of columns."""
        return self.positions_BP.shape[1]

    def fork(self) -> Slot:
        """Return a slot with the same contents that grows on its own."""
        return replace(self, keys=list(self.keys), values=list(self.values))

    def keep_rows(self, rows: Tensor) -> Slot:
        """Return the slot of some rows."""
        keys, values = ([None if t is None else t[rows] for t in side] for side in (self.keys, self.values))
        return replace(self, positions_BP=self.positions_BP[rows], real_BP=self.real_BP[rows], keys=keys, values=values)

    def showing(self, visible_BP: Tensor) -> Slot:
        """Return the same contents, of which only some columns are seen."""
        return replace(self, real_BP=self.real_BP & visible_BP, is_real=False, is_dense=False)

    def cut(self, n_columns: int) -> None:
        """Forget all but the first columns."""
        self.positions_BP, self.real_BP = self.positions_BP[:, :n_columns], self.real_BP[:, :n_columns]
        for side in (self.keys, self.values):
            side[:] = [None if t is None else t[:, :, :n_columns] for t in side]

    def take_out(self, start: int, gone_BN: Tensor) -> Slot:
        """Hand some of the tokens in the columns from ``start`` on over to a slot of their own."""
        keys, values = ([None if t is None else t[:, :, start:] for t in side] for side in (self.keys, self.values))
        positions, real = self.positions_BP[:, start:], self.real_BP[:, start:]
        self.real_BP = torch.cat([self.real_BP[:, :start], real & ~gone_BN], dim=1)
        self.is_dense = self.is_real = False
        return Slot(self.layers, positions, real & gone_BN, False, False, keys, values)

    def append(self, other: Slot) -> None:
        """Take in the columns of another slot of the same layers."""
        self.positions_BP = torch.cat([self.positions_BP, other.positions_BP], dim=1)
        self.real_BP = torch.cat([self.real_BP, other.real_BP], dim=1)
        self.is_dense = self.is_real = False
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:] = [torch.cat([t for t in pair if t is not None], dim=2) for pair in zip(mine, theirs)]

    def extend(self, positions_RN: Tensor, real_RN: Tensor | None, rows_R: Tensor | None) -> None:
        """Note the tokens of a reading; rows other than ``rows_R`` (None: all) take no part."""
        self.is_real = self.is_real and real_RN is None and rows_R is None
        real = torch.ones_like(positions_RN, dtype=torch.bool) if real_RN is None else real_RN.bool()
        n_rows = len(self.positions_BP)
        self.positions_BP = torch.cat([self.positions_BP, _spread(positions_RN, rows_R, n_rows)], dim=1)
        self.real_BP = torch.cat([self.real_BP, _spread(real, rows_R, n_rows)], dim=1)


@dataclass
class DepthCache:
    """The caches of tokens of unlike depth: a slot for each (range of layers, loop), made when first asked for."""

    slots: dict[Hashable, Slot] = field(default_factory=dict)

    def fork(self) -> DepthCache:
        """Return a cache with the same contents that grows on its own."""
        return replace(self, slots={key: slot.fork() for key, slot in self.slots.items()})

    def keep_rows(self, rows: Tensor) -> DepthCache:
        """Return the cache of some rows."""
        return replace(self, slots={key: slot.keep_rows(rows) for key, slot in self.slots.items()})

    def slot(self, key: Hashable, layers: range, like_BL: Tensor) -> Slot:
        """Return the slot ``key`` of some layers; ``like_BL`` are positions of any tokens of the batch."""
        if key not in self.slots:
            none = like_BL[:, :0]
            self.slots[key] = Slot(layers, none, none.bool())
        return self.slots[key]


AnyCache: TypeAlias = DynamicCache | DepthCache


def view(slot: Slot, rows_R: Tensor | None = None, also: Sequence[Slot] = (), writes: bool = True) -> DynamicCache:
    """Return a slot as the cache of one pass of its layers, for the rows ``rows_R`` (None: all).

    Keys are those of the slot, the new ones, and then those of ``also``, slots of the same layers. With ``writes`` off
    new keys and values are ignored: the pass attends to what is there.
    """
    layers = [SlotLayer(slot, i, rows_R, also, writes) for i in range(len(slot.layers))]
    cache = DynamicCache()
    cache.layers = [layers[0]] * slot.layers.start + layers  # masks are sized by asking an early layer for its length
    return cache


class SlotLayer(DynamicLayer):
    """One layer of a slot during a pass."""

    def __init__(self, slot: Slot, index: int, rows_R: Tensor | None, also: Sequence[Slot], writes: bool):
        super().__init__()
        self.slot, self.index, self.rows, self.also, self.writes = slot, index, rows_R, also, writes
        self.length = slot.length
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **_: object) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (R, H, N, d); return all that the pass attends to."""
        sides = []
        for side, new in ((0, key_states), (1, value_states)):
            past = (self.slot.keys, self.slot.values)[side][self.index]
            n_rows = len(self.slot.positions_BP)
            parts = [self._mine(past)] if past is not None else []
            if self.writes:
                parts.append(new)
                spread = _spread(new, self.rows, n_rows)
                grown = spread if past is None else torch.cat([past, spread], dim=2)
                (self.slot.keys, self.slot.values)[side][self.index] = grown
                if self.rows is None:  # what is remembered is what is attended to
                    parts = [grown]
            for other in self.also:
                there = (other.keys, other.values)[side][self.index]
                if there is not None:
                    parts.append(self._mine(there))
            sides.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
        return sides[0], sides[1]

    def _mine(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]

    def get_seq_length(self) -> int:
        """Return the number of columns before the pass."""
        return self.length


def _spread(values: Tensor, rows_R: Tensor | None, n_rows: int) -> Tensor:
    """Return values (R, ...) of some rows as (B, ...), zero for the others."""
    if rows_R is None:
        return values
    return values.new_zeros(n_rows, *values.shape[1:]).index_copy(0, rows_R, values)

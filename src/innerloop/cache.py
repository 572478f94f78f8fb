"""Views on Hugging Face KV caches: fork a prefix, regroup rows, one slot per (loop, layer).

All of them rely on one fact: what a cache has read is never changed while it lives, so two caches may share the tensors
of a common prefix. Each update makes new key and value tensors by concatenation, through which gradients flow; compiled
passes (innerloop/compiled.py) write in place, behind the columns of everyone who shares the memory (`RoomLayer`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

COLUMNS = 64
"""Rooms have a multiple of so many columns, so that passes of a few shapes serve all lengths."""


class WindowLayer(DynamicSlidingWindowLayer):
    """A layer that forgets what lies behind its window, which is counted in real columns.

    Once columns may be padding (`expect_padding`) it forgets nothing until `keep_columns` says what no row sees.
    """

    keys: Tensor
    values: Tensor
    is_padded = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, H, L, d); return all that the pass attends to."""
        if not self.is_padded:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a pass attends to, and how many came before them."""
        if not self.is_padded:
            return super().get_mask_sizes(query_length)
        return self.n_kept + query_length, self.cumulative_length - self.n_kept

    @property
    def n_kept(self) -> int:
        """The number of columns that are remembered."""
        return self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0


class RoomLayer(DynamicLayer):
    """A growing layer whose keys and values may lie in a `Room` with more columns than it has; forks share the room."""

    keys: Tensor
    values: Tensor
    room: Room | None = None
    placed: Tensor | None = None  # the keys as they lie in the room; others may have been put in their place since

    def __copy__(self) -> RoomLayer:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if twin.room is not None:
            twin.room.guests.add(twin)
        return twin

    @property
    def n_placed(self) -> int:
        """The number of columns that lie in the room."""
        return 0 if self.placed is None or self.keys is not self.placed else self.placed.shape[2]

    def make_room(self, n_new: int) -> Room:
        """Return a room in which the columns lie and where nobody else's lie behind them, with space for ``n_new``."""
        n, room = self.get_seq_length(), self.room
        is_mine = room is not None and self.n_placed == n and n + n_new <= room.n_columns
        if room is None or not is_mine or any(guest.n_placed > n for guest in room.guests if guest is not self):
            room = Room(self.keys, self.values, -(-(n + n_new) // COLUMNS) * COLUMNS)
            room.guests.add(self)
            self.room = room
            self.place(n)
        return room

    def place(self, n_columns: int) -> None:
        """Let the first columns of the room be the layer's."""
        assert self.room is not None
        self.keys = self.placed = self.room.keys[:, :, :n_columns]
        self.values = self.room.values[:, :, :n_columns]


class Room:
    """Memory for keys and values (B, H, C, d) of ``n_columns`` columns, of which the first are known."""

    def __init__(self, keys: Tensor, values: Tensor, n_columns: int):
        n_more = n_columns - keys.shape[2]
        self.keys, self.values = pad(keys, (0, 0, 0, n_more)), pad(values, (0, 0, 0, n_more))
        self.n_columns = n_columns
        self.guests: weakref.WeakSet[RoomLayer] = weakref.WeakSet()


def new_cache(config: PreTrainedConfig, n_loops: int = 1) -> DynamicCache:
    """Make an empty cache with one slot per (loop, layer), loop-major: slot ``loop * n_layers + layer``."""
    cache = DynamicCache(config=config)
    for _ in range(n_loops - 1):
        cache.layers.extend(DynamicCache(config=config).layers)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = WindowLayer(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            cache.layers[i] = RoomLayer()
    return cache


def expect_padding(cache: DynamicCache) -> int | None:
    """Let layers with a window forget nothing; return how many columns they hold, None if there are none."""
    windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
    for layer in windows:
        layer.is_padded = True
    return max((layer.n_kept for layer in windows), default=None)


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


def join_rows(caches: Sequence[AnyCache], gaps: Sequence[int], order: Tensor) -> AnyCache:
    """Put the rows of caches below each other, then in the order ``order``.

    Caches of unlike length are made alike by ``gaps`` columns of padding before each.
    """
    first = caches[0]
    if isinstance(first, DepthCache):
        return first.joined([cache for cache in caches if isinstance(cache, DepthCache)], gaps, order)
    plain: list[DynamicCache] = [cache for cache in caches if not isinstance(cache, DepthCache)]
    view: DynamicCache = fork(first)
    for i, layer in enumerate(view.layers):
        if all(cache.layers[i].get_seq_length() == 0 for cache in plain):
            continue
        n_kept = n_all = max(cache.layers[i].get_seq_length() + gap for cache, gap in zip(plain, gaps))
        if layer.is_sliding:  # what a row has forgotten already it sees no more, whatever stands there
            n_kept = max(cache.layers[i].n_kept for cache in plain)
            layer.cumulative_length, layer.is_padded = n_all, any(gaps) or any(c.layers[i].is_padded for c in plain)
        layer.keys = torch.cat([_left_padded(cache.layers[i].keys, n_kept) for cache in plain]).index_select(0, order)
        layer.values = torch.cat([_left_padded(cache.layers[i].values, n_kept) for cache in plain])[order]
    return view


def keep_columns(cache: AnyCache, kept: Tensor, first_seen: int = 0, is_padded: bool = True) -> AnyCache:
    """Return a cache with some columns alone, in their order; the others are padding in every row.

    Layers with a window keep only what any row may yet see: the columns from the place ``first_seen`` of ``kept`` on.
    ``is_padded`` says whether any of ``kept`` is padding in some row.
    """
    if isinstance(cache, DepthCache):
        return cache.keep_columns(kept)
    view: DynamicCache = fork(cache)
    for layer in view.layers:
        if layer.get_seq_length() == 0:
            continue
        if layer.is_sliding:
            own = kept[first_seen:] - (layer.cumulative_length - layer.n_kept)
            layer.cumulative_length, layer.is_padded = len(kept), is_padded
            layer.keys, layer.values = layer.keys.index_select(2, own), layer.values.index_select(2, own)
        else:
            layer.keys, layer.values = layer.keys.index_select(2, kept), layer.values.index_select(2, kept)
    return view


def window_of(cache: AnyCache) -> int | None:
    """Return how many columns some layers of a cache look back, their own among them; None: all look at all."""
    layers = () if isinstance(cache, DepthCache) else cache.layers
    return next((layer.sliding_window for layer in layers if layer.is_sliding), None)


def _left_padded(tensor: Tensor, n_columns: int) -> Tensor:
    """Return keys or values (B, H, P, d) with zeros before them, ``n_columns`` in all."""
    return pad(tensor, (0, 0, n_columns - tensor.shape[2], 0))


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

    def padded(self, gap: int) -> Slot:
        """Return the slot with columns of padding before its own."""
        if gap == 0:
            return self
        keys, values = (
            [None if t is None else _left_padded(t, t.shape[2] + gap) for t in side]
            for side in (self.keys, self.values)
        )
        columns = {name: pad(t, (gap, 0)) for name, t in self.columns().items()}
        return replace(self, is_real=False, keys=keys, values=values, **columns)  # type: ignore[arg-type]

    def keep_columns(self, kept: Tensor) -> Slot:
        """Return the slot with some columns alone; the others must be padding in every row."""
        keys, values = (
            [None if t is None else t.index_select(2, kept) for t in side] for side in (self.keys, self.values)
        )
        columns = {name: t[:, kept] for name, t in self.columns().items()}
        return replace(self, is_real=bool(columns["real_BP"].all()), keys=keys, values=values, **columns)  # type: ignore[arg-type]

    def columns(self) -> dict[str, Tensor]:
        """Return what is known of the columns (B, P), by the names of the fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def joined(self, slots: Sequence[Slot], order: Tensor) -> Slot:
        """Return slots of the same layers and length, of which this is the first, as one; rows go in an order."""
        keys, values = (
            [None if any(t is None for t in parts) else torch.cat(parts)[order] for parts in zip(*sides)]
            for sides in ([slot.keys for slot in slots], [slot.values for slot in slots])
        )
        columns = {name: torch.cat([slot.columns()[name] for slot in slots])[order] for name in self.columns()}
        kinds = {name: all(getattr(slot, name) for slot in slots) for name in ("is_dense", "is_real")}
        return replace(self, keys=keys, values=values, **kinds, **columns)  # type: ignore[arg-type]

    def empty(self, n_rows: int, n_columns: int) -> Slot:
        """Return a slot shaped like this one for rows that have left nothing in it."""
        keys, values = (
            [None if t is None else t.new_zeros(n_rows, t.shape[1], n_columns, t.shape[3]) for t in side]
            for side in (self.keys, self.values)
        )
        columns = {name: t.new_zeros(n_rows, n_columns) for name, t in self.columns().items()}
        return replace(self, is_dense=False, is_real=False, keys=keys, values=values, **columns)  # type: ignore[arg-type]

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

    @property
    def joins(self) -> bool:
        """Whether the cache can be put together with others now."""
        return True

    def joined(self, caches: Sequence[DepthCache], gaps: Sequence[int], order: Tensor) -> DepthCache:
        """Return caches, of which this is the first, as one; see `join_rows`."""
        slots = {}
        n_rows = [cache.n_rows for cache in caches]
        for key in dict.fromkeys(key for cache in caches for key in cache.slots):
            found = [cache.slots.get(key) for cache in caches]
            like = max((slot for slot in found if slot is not None), key=lambda slot: slot.length)
            if all(slot is not None and slot.is_dense for slot in found):  # their columns are the contexts'
                parts = [slot.padded(gap) for slot, gap in zip(found, gaps) if slot is not None]
            else:
                n = like.length
                parts = [
                    like.empty(rows, n)
                    if slot is None or slot.length == 0
                    else replace(slot.padded(n - slot.length), is_dense=False)
                    for slot, rows in zip(found, n_rows)
                ]
            slots[key] = parts[0].joined(parts, order)
        return replace(self, slots=slots)

    @property
    def n_rows(self) -> int:
        """The number of rows, known once something has been read."""
        return next((len(slot.positions_BP) for slot in self.slots.values()), 0)

    def keep_columns(self, kept: Tensor) -> DepthCache:
        """Return the cache without columns that are padding in every row; slots of some tokens drop their own."""
        slots = {}
        for key, slot in self.slots.items():
            own = kept if slot.is_dense else torch.nonzero(slot.real_BP.any(0))[:, 0]
            slots[key] = slot.keep_columns(own)
        return replace(self, slots=slots)

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

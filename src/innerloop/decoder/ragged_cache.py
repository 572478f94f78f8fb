"""A cache of tokens of unlike depth: a slot holds the keys and values of some layers in one loop, and knows whose.

Shapes: `B` rows, `R` packed rows, `L` columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from innerloop.decoder.kv_buffer import FullLayer


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
        kept: the keys and values of each layer.
    """

    layers: range
    positions_BP: Tensor
    real_BP: Tensor
    is_dense: bool = True
    is_real: bool = True
    kept: list[FullLayer] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.kept:
            self.kept = [FullLayer() for _ in self.layers]

    @property
    def keys(self) -> list[Tensor | None]:
        """The keys (B, H, P, d) of each layer; None before the first reading."""
        return [layer.keys if layer.n_kept else None for layer in self.kept]

    @property
    def values(self) -> list[Tensor | None]:
        """Likewise the values."""
        return [layer.values if layer.n_kept else None for layer in self.kept]

    @property
    def length(self) -> int:
        """The number of columns."""
        return self.positions_BP.shape[1]

    @property
    def bias_BP(self) -> Tensor | None:
        """What is added to what every query makes of a column's key; None: nothing."""
        return None

    def fork(self) -> Slot:
        """Return a slot with the same contents that grows on its own."""
        return replace(self, kept=[copy.copy(layer) for layer in self.kept])

    def keep_rows(self, rows: Tensor) -> Slot:
        """Return the slot of some rows."""
        columns = {name: t[rows] for name, t in self.columns().items()}
        part = replace(self.fork(), **columns)  # type: ignore[arg-type]
        for layer in part.kept:
            layer.keep_rows(rows)
        return part

    def changed(self, change: Callable[[Tensor], Tensor]) -> list[FullLayer]:
        """Return what is made of the keys and values of each layer."""
        return [
            FullLayer.holding(change(layer.keys), change(layer.values)) if layer.n_kept else FullLayer()
            for layer in self.kept
        ]

    def padded(self, gap: int) -> Slot:
        """Return the slot with columns of padding before its own."""
        if gap == 0:
            return self
        kept = self.changed(lambda t: left_padded(t, t.shape[2] + gap))
        columns = {name: pad(t, (gap, 0)) for name, t in self.columns().items()}
        return replace(self, is_real=False, kept=kept, **columns)  # type: ignore[arg-type]

    def keep_columns(self, kept: Tensor) -> Slot:
        """Return the slot with some columns alone; the others must be padding in every row."""
        columns = {name: t[:, kept] for name, t in self.columns().items()}
        layers = self.changed(lambda t: t.index_select(2, kept))
        return replace(self, is_real=bool(columns["real_BP"].all()), kept=layers, **columns)  # type: ignore[arg-type]

    def columns(self) -> dict[str, Tensor]:
        """Return what is known of the columns (B, P), by the names of the fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def joined(self, slots: Sequence[Slot], order: Tensor) -> Slot:
        """Return slots of the same layers and length, of which this is the first, as one; rows go in an order."""
        kept = [
            FullLayer.holding(*(torch.cat([getattr(p, side) for p in parts])[order] for side in ("keys", "values")))
            if all(part.n_kept for part in parts)
            else FullLayer()
            for parts in zip(*(slot.kept for slot in slots))
        ]
        columns = {name: torch.cat([slot.columns()[name] for slot in slots])[order] for name in self.columns()}
        kinds = {name: all(getattr(slot, name) for slot in slots) for name in ("is_dense", "is_real")}
        return replace(self, kept=kept, **kinds, **columns)  # type: ignore[arg-type]

    def empty(self, n_rows: int, n_columns: int) -> Slot:
        """Return a slot shaped like this one for rows that have left nothing in it."""
        kept = self.changed(lambda t: t.new_zeros(n_rows, t.shape[1], n_columns, t.shape[3]))
        columns = {name: t.new_zeros(n_rows, n_columns) for name, t in self.columns().items()}
        return replace(self, is_dense=False, is_real=False, kept=kept, **columns)  # type: ignore[arg-type]

    def showing(self, visible_BP: Tensor) -> Slot:
        """Return the same contents, of which only some columns are seen."""
        return replace(self, real_BP=self.real_BP & visible_BP, is_real=False, is_dense=False)

    def cut(self, n_columns: int) -> None:
        """Forget all but the first columns."""
        self.positions_BP, self.real_BP = self.positions_BP[:, :n_columns], self.real_BP[:, :n_columns]
        for layer in self.kept:
            layer.cut(n_columns)

    def take_out(self, start: int, gone_BN: Tensor) -> Slot:
        """Hand some of the tokens in the columns from ``start`` on over to a slot of their own."""
        kept = self.changed(lambda t: t[:, :, start:].clone())  # what is there now may be written over
        positions, real = self.positions_BP[:, start:], self.real_BP[:, start:]
        self.real_BP = torch.cat([self.real_BP[:, :start], real & ~gone_BN], dim=1)
        self.is_dense = self.is_real = False
        return Slot(self.layers, positions, real & gone_BN, False, False, kept)

    def append(self, other: Slot) -> None:
        """Take in the columns of another slot of the same layers."""
        self.positions_BP = torch.cat([self.positions_BP, other.positions_BP], dim=1)
        self.real_BP = torch.cat([self.real_BP, other.real_BP], dim=1)
        self.is_dense = self.is_real = False
        for mine, theirs in zip(self.kept, other.kept):
            if theirs.n_kept:
                mine.update(theirs.keys, theirs.values)

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
        kept = self.slot.kept[self.index]
        if self.writes:
            n_rows = len(self.slot.positions_BP)
            kept.update(*(_spread(new, self.rows, n_rows) for new in (key_states, value_states)))
        seen = [kept, *(other.kept[self.index] for other in self.also)]
        sides = [[(layer.keys, layer.values)[side] for layer in seen if layer.n_kept] for side in (0, 1)]
        keys, values = ([self._mine(part) for part in parts] for parts in sides)
        return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys, dim=2), torch.cat(values, dim=2))

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


def left_padded(tensor: Tensor, n_columns: int) -> Tensor:
    """Return keys or values (B, H, P, d) with zeros before them, ``n_columns`` in all."""
    return pad(tensor, (0, 0, n_columns - tensor.shape[2], 0))

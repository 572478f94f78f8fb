"""A cache of tokens of unlike depth: a slot holds the keys and values of some layers in one loop, and knows whose.

Shapes: `B` rows, `R` packed rows, `L` columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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
            [None if t is None else left_padded(t, t.shape[2] + gap) for t in side] for side in (self.keys, self.values)
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


def left_padded(tensor: Tensor, n_columns: int) -> Tensor:
    """Return keys or values (B, H, P, d) with zeros before them, ``n_columns`` in all."""
    return pad(tensor, (0, 0, n_columns - tensor.shape[2], 0))

"""Duo-causal attention over (position, depth): keys and values that know at which depth they were made (tah.md, 3).

A token may be read several times by the whole decoder, at depth 1, 2, .. with the same position. The query of token i
at depth d sees the key of token j <= i at depth k

    duo: k <= d            depth1_only: k = 1            same_depth: k = d

All depths share one slot, whose columns are tagged with their depth: a pass adds a column for each token that it reads,
and rows may be at unlike depths in it. What a query sees is a mask; attention code is not touched.

Shapes: `B` rows, `P` columns of the slot, `R` and `N` rows and columns of a pass, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache, Slot, view
from innerloop.methods.depth.tah import DepthAttention
from innerloop.passes.tokens import CostScope, Tokens


@dataclass
class DuoSlot(Slot):
    """A slot whose columns are tagged with the depth they were read at; 0 where a row took no part."""

    depths_BP: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def visible(self, depth_R1: Tensor | int, rows_R: Tensor | None, attention: DepthAttention) -> Tensor:
        """Return which columns (R, P) queries at a depth may see, whatever their positions."""
        depths, real = self.depths_BP, self.real_BP
        if rows_R is not None:
            depths, real = depths[rows_R], real[rows_R]
        return real & sees(depths, depth_R1, attention)

    def note(self, tokens: Tokens, real_RN: Tensor | None, depth_R1: Tensor | int) -> None:
        """Note the tokens of a pass, and the depth that each row was at."""
        self.is_dense = self.is_dense and tokens.is_whole and isinstance(depth_R1, int) and depth_R1 == 1
        self.extend(tokens.positions_RN, real_RN, tokens.rows_R)
        new = torch.zeros_like(self.positions_BP[:, : tokens.positions_RN.shape[1]])
        if tokens.rows_R is None:
            new = new + depth_R1
        else:
            new[tokens.rows_R] = new[tokens.rows_R] + depth_R1
        self.depths_BP = torch.cat([self.depths_BP, new], dim=1)


@dataclass
class Unfinished:
    """Tokens that a pass left for the next one to read once more, at most one for each row.

    Attributes:
        active_B: the rows that have one.
        inputs_B1D: its input at the next depth.
        states_B1D: what it has come to so far.
        positions_B1: its position.
        depths_B1: the depth it was read at last; 0 where there is none.
        known_B1: how many iterations it shall have, as the method counts them.
    """

    active_B: Tensor
    inputs_B1D: Tensor
    states_B1D: Tensor
    positions_B1: Tensor
    depths_B1: Tensor
    known_B1: Tensor

    def keep_rows(self, rows: Tensor) -> Unfinished:
        """Return those of some rows."""
        return Unfinished(**{name: tensor[rows] for name, tensor in vars(self).items()})

    def none(self, n_rows: int) -> Unfinished:
        """Return what rows have that left nothing."""
        return Unfinished(**{name: tensor.new_zeros(n_rows, *tensor.shape[1:]) for name, tensor in vars(self).items()})


@dataclass
class DuoCache(DepthCache):
    """The one slot of all depths, and the tokens that are not finished."""

    unfinished: Unfinished | None = None

    def keep_rows(self, rows: Tensor) -> DuoCache:
        """Return the cache of some rows."""
        left = None if self.unfinished is None else self.unfinished.keep_rows(rows)
        return replace(super().keep_rows(rows), unfinished=left)  # type: ignore[call-arg, return-value]

    def joined(self, caches: Sequence[DepthCache], gaps: Sequence[int], order: Tensor) -> DuoCache:
        """Return caches, of which this is the first, as one."""
        left = [cache.unfinished if isinstance(cache, DuoCache) else None for cache in caches]
        like = next((one for one in left if one is not None), None)
        whole = None
        if like is not None:
            parts = [like.none(cache.n_rows) if one is None else one for one, cache in zip(left, caches)]
            whole = Unfinished(**{name: torch.cat([vars(one)[name] for one in parts])[order] for name in vars(like)})
        return replace(super().joined(caches, gaps, order), unfinished=whole)  # type: ignore[call-arg, return-value]

    def whole(self, n_layers: int, like_BL: Tensor) -> DuoSlot:
        """Return the slot; ``like_BL`` are positions of any tokens of the batch."""
        if "duo" not in self.slots:
            none = like_BL[:, :0]
            self.slots["duo"] = DuoSlot(range(n_layers), none, none.bool(), depths_BP=none)
        slot = self.slots["duo"]
        assert isinstance(slot, DuoSlot)
        return slot


def sees(key_depths: Tensor, depth: Tensor | int, attention: DepthAttention) -> Tensor:
    """Return whether queries at a depth may see keys of given depths."""
    if attention == "duo":
        return (key_depths > 0) & (key_depths <= depth)
    return key_depths == (1 if attention == "depth1_only" else depth)


def read_at(
    backbone: Backbone,
    tokens: Tokens,
    slot: DuoSlot,
    depth_R1: Tensor | int,
    attention: DepthAttention,
    cost_scope: CostScope | None = None,
    all_states: bool = False,
) -> tuple[Tensor, ...]:
    """Read tokens by the whole decoder at a depth, the same for all or one for each row (R, 1); the slot grows by them.

    The first pass over everything is the decoder's own, mask and all. Queries that may not see keys of their own depth
    leave none behind.

    Returns:
        The states (R, N, D) after the final norm; with ``all_states`` those after every layer (see `Backbone.forward`).
    """
    writes = isinstance(depth_R1, Tensor) or depth_R1 == 1 or attention != "depth1_only"
    rows, real_RN = tokens.rows_R, tokens.real_RN
    cache = view(slot, rows, (), writes)
    was_plain = slot.is_dense and isinstance(depth_R1, int) and depth_R1 == 1
    keys = slot.positions_BP if rows is None else slot.positions_BP[rows]
    seen = slot.visible(depth_R1, rows, attention)
    if writes:
        if isinstance(depth_R1, Tensor) and attention == "depth1_only":
            real_RN = tokens.real & (depth_R1 == 1)
        slot.note(tokens, real_RN, depth_R1)
        keys = torch.cat([keys, tokens.positions_RN], dim=1)
        own = torch.ones_like(tokens.positions_RN, dtype=torch.bool) if real_RN is None else real_RN
        seen = torch.cat([seen, own], dim=1)
    if cost_scope is not None:
        behind_RNK = tokens.positions_RN[:, :, None] >= keys[:, None, :]
        cost_scope.spend(tokens, (behind_RNK & seen[:, None, :]).sum(-1), backbone.n_layers)
    mask: Any
    if was_plain and slot.is_dense:
        mask = None if slot.is_real else seen.long()
    else:
        mask = backbone.mask_4d(tokens.positions_RN, keys, seen, tokens.states_RND.dtype)
    states = backbone(
        tokens.states_RND, mask=mask, positions_BL=tokens.positions_RN, cache=cache, all_states=all_states
    )
    return states if isinstance(states, tuple) else (states,)

"""Tokens of a pass that have unlike depth: packed parts of them, and a range of layers run on such a part.

Tokens that are chosen are computed alone: `Tokens.pick` packs them, `read_layers` runs them with their own positions on
the keys of the slot they belong to.

Shapes: `B` rows, `L` tokens of a pass, `R` rows and `N` columns of a packed part of them, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cost import CostMeter
from innerloop.decoder.ragged_cache import DepthCache, Slot, view
from innerloop.loop.trace import Trace


@dataclass
class CostScope:
    """Where the work of a pass is counted: for which rows of which meter."""

    meter: CostMeter
    rows: Tensor | None
    counted_B: Tensor | None

    def spend(self, tokens: Tokens, keys_RN: Tensor, n_layers: float, extra: float = 0.0) -> None:
        """Count ``n_layers`` layers run on some tokens, each over a number of keys."""
        real_RN = tokens.real_RN
        new_R = (
            torch.full((len(keys_RN),), keys_RN.shape[1], device=keys_RN.device) if real_RN is None else real_RN.sum(1)
        )
        keys_R = (keys_RN if real_RN is None else keys_RN * real_RN).sum(1)
        if self.counted_B is not None:
            counted = self.counted_B if tokens.rows_R is None else self.counted_B[tokens.rows_R]
            new_R, keys_R = new_R * counted, keys_R * counted
        rows = tokens.rows_R
        if rows is not None and self.rows is not None:
            rows = self.rows[rows]
        self.meter.spend(self.rows if rows is None else rows, new_R, keys_R, n_layers, extra)


@dataclass
class Tokens:
    """Some tokens of a pass, packed to the left of as many rows as have any.

    Attributes:
        states_RND: their states.
        positions_RN: their positions.
        real_RN: True where there is one; None: everywhere.
        rows_R: the rows of the pass that these are; None: all.
        columns_RN: the columns of the pass that these are; None: all.
    """

    states_RND: Tensor
    positions_RN: Tensor
    real_RN: Tensor | None = None
    rows_R: Tensor | None = None
    columns_RN: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether these are all tokens of the pass, where they were."""
        return self.columns_RN is None

    @property
    def real(self) -> Tensor:
        """True where there is a token (R, N)."""
        if self.real_RN is not None:
            return self.real_RN
        return torch.ones_like(self.positions_RN, dtype=torch.bool)

    def pick(self, chosen_RN: Tensor) -> Tokens | None:
        """Pack the chosen ones among these, in their order; None if there are none.

        Where all are chosen these tokens come back as they are. This asks the device once how many there are.
        """
        chosen_RN = chosen_RN & self.real
        n_R = chosen_RN.sum(1)
        most, total, n_all, n_rows = torch.stack([n_R.max(), n_R.sum(), self.real.sum(), (n_R > 0).sum()]).tolist()
        if total == n_all:
            return self
        if total == 0:
            return None
        part, order_RN = self, torch.argsort((~chosen_RN).byte(), dim=1, stable=True)[:, :most]
        if n_rows < len(n_R):
            kept = torch.nonzero(n_R > 0)[:, 0]
            part, order_RN, chosen_RN = self.keep_rows(kept), order_RN[kept], chosen_RN[kept]
        real_RN = chosen_RN.gather(1, order_RN)
        columns = order_RN if part.columns_RN is None else part.columns_RN.gather(1, order_RN)
        states = part.states_RND.gather(1, order_RN[..., None].expand(-1, -1, part.states_RND.shape[-1]))
        all_real = total == real_RN.numel()
        return Tokens(
            states, part.positions_RN.gather(1, order_RN), None if all_real else real_RN, part.rows_R, columns
        )

    def keep_rows(self, kept: Tensor) -> Tokens:
        """Return the tokens of some of these rows."""
        rows = kept if self.rows_R is None else self.rows_R[kept]
        real, columns = (None if t is None else t[kept] for t in (self.real_RN, self.columns_RN))
        return Tokens(self.states_RND[kept], self.positions_RN[kept], real, rows, columns)

    def put(self, whole: Tensor, values_RN: Tensor) -> Tensor:
        """Return a tensor over all tokens of the pass (B, L, ...) with these tokens' values (R, N, ...) in place."""
        if self.columns_RN is None and self.rows_R is None:
            if self.real_RN is None:
                return values_RN
            real = self.real_RN.reshape(*self.real_RN.shape, *[1] * (whole.ndim - 2))
            return torch.where(real, values_RN, whole)
        n_columns = whole.shape[1]
        flat = whole.flatten(0, 1)
        at = self.flat_index(n_columns)
        spare = flat.new_zeros(1, *flat.shape[1:])  # takes what is put for columns without a token
        at = torch.where(self.real.flatten(), at, len(flat))
        return torch.cat([flat, spare]).index_copy(0, at, values_RN.flatten(0, 1).to(flat.dtype))[:-1].view(whole.shape)

    def flat_index(self, n_columns: int) -> Tensor:
        """Return where these tokens are in the pass's (B * L), row by row (R * N,)."""
        device = self.positions_RN.device
        n_rows, n = self.positions_RN.shape
        rows = torch.arange(n_rows, device=device) if self.rows_R is None else self.rows_R
        columns = torch.arange(n, device=device).expand(n_rows, n) if self.columns_RN is None else self.columns_RN
        return (rows[:, None] * n_columns + columns).flatten()

    def take(self, whole: Tensor) -> Tensor:
        """Return what these tokens have in a tensor over all tokens of the pass: (B, L, ...) to (R, N, ...)."""
        if self.columns_RN is None and self.rows_R is None:
            return whole
        return whole.flatten(0, 1)[self.flat_index(whole.shape[1])].view(*self.positions_RN.shape, *whole.shape[2:])

    def with_states(self, states_RND: Tensor) -> Tokens:
        """Return the same tokens with other states."""
        return replace(self, states_RND=states_RND)


@dataclass
class PassInput:
    """One pass: what is read, on what, and where its work is counted.

    Attributes:
        tokens: all tokens of the pass; padding is not real.
        cache: what has been read before.
        loops: how many iterations; None: as the method says.
        n_read: how many columns of the row were read before this pass.
        cost_scope: where the work is counted, if anywhere.
        trace: filled with the iterations, if given.
        wanted_BL: how many iterations each token shall have, where that is known beforehand.
        choices: what was chosen in the pass, by name; a pass that is run again for its gradient finds it here.
        may_wait: whether a token may be left unfinished, for the next pass to go on with.
        asked_B: the position of each row's last token that was given, which predicts the first that is written; None:
            not known.
    """

    tokens: Tokens
    cache: DepthCache
    loops: int | None = None
    n_read: int = 0
    cost_scope: CostScope | None = None
    trace: Trace | None = None
    wanted_BL: Tensor | None = None
    choices: dict[Hashable, Tensor] = field(default_factory=dict)
    may_wait: bool = False
    asked_B: Tensor | None = None

    def choice(self, name: Hashable, choose: Callable[[], Tensor]) -> Tensor:
        """Return what ``choose`` makes, or made when the pass was run before."""
        if name not in self.choices:
            self.choices[name] = choose()
        return self.choices[name]


@dataclass
class PassOutput:
    """What a pass of unlike depth gave.

    Attributes:
        states_BLD: states after the final norm, the input of the head.
        depths_BL: how many iterations each token had.
        exits: states after the final norm at every way out (B, L, D), the last included, where the method's loss asks
            for them.
        gates: the logits (B, L) of a gate at each of them, where there is one.
        sums: what the method's own terms of the loss add up to, summed over rows.
        measured: what is worth reporting, such as the share of tokens that were chosen; training logs it.
        done_BL: where a pass may leave tokens unfinished: the tokens, of this pass or an earlier one, that it finished.
        logits_BV: the logits of the last column, where the pass has them already.
        shown: places of the pass (A,), numbered row by row, that it has read out, -1 for none, and their logits (A, V).
    """

    states_BLD: Tensor
    depths_BL: Tensor
    exits: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, Tensor] = field(default_factory=dict)
    done_BL: Tensor | None = None
    logits_BV: Tensor | None = None
    shown: tuple[Tensor, Tensor] | None = None


class DepthPass(Protocol):
    """Makes passes in the decoder's stead, for methods whose tokens have unlike depth."""

    waits: bool

    def __call__(self, reading: PassInput) -> PassOutput:
        """Make one pass."""

    def empty_cache(self) -> DepthCache:
        """Return a cache that has read nothing."""


def read_layers(
    backbone: Backbone,
    tokens: Tokens,
    slot: Slot,
    also: Sequence[Slot] = (),
    writes: bool = True,
    inner: bool = True,
    cost_scope: CostScope | None = None,
) -> Tensor:
    """Run a slot's layers on some tokens, which attend to what the slot holds, to each other and to ``also``.

    Args:
        backbone: whose layers these are.
        tokens: the tokens; they attend to keys at their own and earlier positions only.
        slot: grows by the tokens, unless ``writes`` is off.
        also: further slots of the same layers that are attended to.
        writes: False: the tokens are not remembered, and attend to what is there alone, keys of their own included.
        inner: the input are states between two layers; False: embeddings.
        cost_scope: where the work is counted.

    Returns:
        The states (R, N, D) after the last of the layers, before any final norm.
    """
    cache = view(slot, tokens.rows_R, also, writes)
    if writes:
        was_dense = slot.is_dense
        slot.extend(tokens.positions_RN, tokens.real_RN, tokens.rows_R)
        slot.is_dense = was_dense and tokens.is_whole
    keys, real = _seen(slot, tokens.rows_R, also)
    if cost_scope is not None:
        behind = tokens.positions_RN[:, :, None] >= keys[:, None, :]
        spared = 0.0 if writes else -2.0 * backbone.n_key_weights(slot.layers)
        cost_scope.spend(tokens, (behind & real[:, None, :]).sum(-1), len(slot.layers), spared)
    mask: Any
    n_new = tokens.positions_RN.shape[1]
    if slot.is_dense and writes and not also:  # just as the decoder itself would do it
        n_past = keys.shape[1] - n_new
        mask = None if slot.is_real else backbone.mask_of(real.long(), n_new, n_past, tokens.states_RND.dtype)
    else:
        mask = backbone.mask_4d(tokens.positions_RN, keys, real, tokens.states_RND.dtype, slot.bias_BP)
    return backbone(
        tokens.states_RND,
        mask=mask,
        positions_BL=tokens.positions_RN,
        cache=cache,
        layers=slot.layers,
        inner=inner,
        makes_keys=writes,
    )


def _seen(slot: Slot, rows_R: Tensor | None, also: Sequence[Slot]) -> tuple[Tensor, Tensor]:
    """Return the positions of the keys that a pass attends to, and which are real (R, K)."""
    slots = [slot, *also]
    positions = torch.cat([s.positions_BP for s in slots], dim=1)
    real = torch.cat([s.real_BP for s in slots], dim=1)
    return (positions, real) if rows_R is None else (positions[rows_R], real[rows_R])

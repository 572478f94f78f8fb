"""Routers: which tokens a block takes, and how much of what it makes of them is kept (mod.md, mor.md).

Shapes: `B` rows, `L` tokens, `D` width, `N` scores of a router.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from innerloop.config.routing import CapacityBase, Gate, GateTarget
from innerloop.loop.stabilize import at_least_fp32

ROUNDED = 1e-6  # shares such as 2/3 of 9 are whole numbers of tokens but for rounding


class Router(nn.Module):
    """r = W x, in fp32 or better whatever the states' type; its weights start as N(0, std) and do not decay.

    Args:
        width: D.
        n: how many scores a token gets.
        std: of the weights at the start; they are never all zero, or ties would choose by place.
    """

    decays = False

    def __init__(self, width: int, n: int = 1, std: float = 0.02):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(n, width))

    def forward(self, states_BLD: Tensor) -> Tensor:
        """Return the scores (B, L, N)."""
        with torch.autocast(states_BLD.device.type, enabled=False):
            weight = at_least_fp32(self.weight)
            return states_BLD.to(weight.dtype) @ weight.T

    @property
    def flops(self) -> float:
        """What a token's scores cost."""
        return 2.0 * self.weight.numel()


def gate_of(logits: Tensor, gate: Gate, alpha: float = 1.0) -> Tensor:
    """Return g of router logits: r, sigmoid(r), alpha sigmoid(r); st: sigmoid(r), for `mixed` to take as one."""
    if gate == "identity":
        return logits
    return logits.sigmoid() * (alpha if gate == "scaled_sigmoid" else 1.0)


def mixed(before: Tensor, after: Tensor, gate: Tensor, target: GateTarget, straight: bool = False) -> Tensor:
    """Return what becomes of tokens x (R, N, D) of which a block made y, with a gate g (R, N).

    delta: x + g (y - x); full: x + g y; replace: g y. With ``straight`` the value is that of g = 1 exactly, and the
    gradient by g as it would be.
    """
    moved = after - before if target == "delta" else after
    if straight:
        whole = before + after if target == "full" else after
        return whole + (gate - gate.detach())[..., None].to(after.dtype) * moved
    weighted = gate[..., None].to(after.dtype) * moved
    return weighted if target == "replace" else before + weighted


def top_k(scores_BL: Tensor, among_BL: Tensor, k_B: Tensor) -> Tensor:
    """Return which k of some tokens have the highest scores (B, L), all of them where they are fewer.

    Of equal scores the earlier token wins, so there are exactly k.
    """
    masked = scores_BL.detach().masked_fill(~among_BL, -torch.inf)
    order_BL = masked.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
    rank_BL = torch.empty_like(order_BL).scatter_(1, order_BL, places)
    return (rank_BL < k_B[:, None]) & among_BL


def tokens_in(real_BL: Tensor, base: CapacityBase) -> Tensor:
    """Return the length (B,) that a capacity is a share of: a row's own tokens, or the columns of the batch."""
    n_valid = real_BL.sum(1)
    return n_valid if base == "valid" else torch.full_like(n_valid, real_BL.shape[1])


def share_of(n_B: Tensor, share: float, rounds: Literal["up", "down"]) -> Tensor:
    """Return a share of some numbers of tokens (B,) as a whole number, at least 1."""
    exact = n_B.double() * share
    whole = torch.ceil(exact - ROUNDED) if rounds == "up" else torch.floor(exact + ROUNDED)
    return whole.long().clamp(min=1)


def warmed(share: float, step: int | None, n_steps: int, shape: Literal["linear", "cosine"]) -> float:
    """Return the capacity at an optimizer step, which falls from 1 to ``share`` in ``n_steps``; None: after them."""
    if step is None or step >= n_steps:
        return share
    done = step / n_steps
    left = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return share + (1 - share) * left


def membership_loss(logits_BL: Tensor, chosen_BL: Tensor, among_BL: Tensor) -> Tensor:
    """Return, summed over rows, the mean cross-entropy of "is among the chosen" over the tokens of ``among_BL``."""
    losses = binary_cross_entropy_with_logits(logits_BL, chosen_BL.to(logits_BL.dtype), reduction="none")
    return row_means(losses, among_BL).sum()


def row_means(values_BL: Tensor, among_BL: Tensor) -> Tensor:
    """Return each row's mean (B,) over some of its tokens; 0 where there is none."""
    n_B = among_BL.sum(1).clamp(min=1)
    return values_BL.masked_fill(~among_BL, 0.0).sum(1) / n_B


class Notes:
    """What the routers of a pass tell: sums of terms of the loss, and numbers of each router, in order."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._measured: dict[str, list[Tensor]] = {}

    def add(self, name: str, total: Tensor) -> None:
        """Add to a term of the loss."""
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def measure(self, name: str, value: Tensor) -> None:
        """Note a number of the next router."""
        self._measured.setdefault(name, []).append(value.detach())

    @property
    def measured(self) -> dict[str, Tensor]:
        """The numbers, one of each router."""
        return {name: torch.stack(values) for name, values in self._measured.items()}


def share_chosen(chosen_BL: Tensor, among_BL: Tensor) -> Tensor:
    """Return the share of some tokens that are chosen (scalar)."""
    return (chosen_BL & among_BL).sum() / among_BL.sum().clamp(min=1)

"""Losses of tokens, a number of rows of logits at a time, so that logits of all tokens never exist together.

With ``at_once`` rows, each chunk's logits are made, turned into losses and forgotten; the backward pass makes them
again (`torch.utils.checkpoint`). Memory then grows with at_once x V in place of U x V, for one more product with the
head. With ``at_once="fused"`` sums are left to a kernel (`innerloop.decoder.fused_loss`), and what it cannot sum is
made `ROWS` at a time.

Shapes: `U` tokens, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

LogitsFn = Callable[[slice], Tensor]
"""Makes the logits (u, V) of a slice of some tokens."""
AtOnce = int | Literal["fused"] | None
"""How many rows of logits may exist together; None: all."""
ALL = slice(None)
ROWS = 256


@dataclass(frozen=True)
class HeadInputs:
    """Shows states (U, D) through a head; ``summed`` is a kernel with their summed loss, but not all their logits."""

    head: Callable[[Tensor], Tensor]
    states_UD: Tensor
    summed: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, part: slice) -> Tensor:
        return self.head(self.states_UD[part])


def token_losses(show: LogitsFn, targets_U: Tensor, at_once: AtOnce, ignored: int = -100) -> Tensor:
    """Return the cross-entropy of each token (U,), in fp32; 0 where its target is ``ignored``."""

    def losses_of(part: slice) -> Tensor:
        return cross_entropy(show(part).float(), targets_U[part], reduction="none", ignore_index=ignored)

    return by_rows(losses_of, len(targets_U), at_once)


def summed_loss(show: LogitsFn, targets_U: Tensor, at_once: AtOnce) -> Tensor:
    """Return the summed cross-entropy of tokens, in fp32."""
    if at_once == "fused" and isinstance(show, HeadInputs) and show.summed is not None and len(targets_U):
        return show.summed(show.states_UD, targets_U)
    if at_once is None:
        return cross_entropy(show(ALL).float(), targets_U, reduction="sum")
    return token_losses(show, targets_U, at_once).sum()


def by_rows(losses_of: Callable[[slice], Tensor], n: int, at_once: AtOnce) -> Tensor:
    """Return the losses (n,) of all tokens, from what gives those of a slice; None: of all at once."""
    if at_once == "fused":
        at_once = ROWS
    if at_once is None or n <= at_once:
        return losses_of(ALL)
    parts = [slice(first, min(first + at_once, n)) for first in range(0, n, at_once)]
    if not torch.is_grad_enabled():
        return torch.cat([losses_of(part) for part in parts])
    return torch.cat([checkpoint(losses_of, part, use_reentrant=False) for part in parts])


def divergence(wanted_UV: Tensor, own_UV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return tau^2 KL(p || q) of the logits of tokens (U,), p the wanted ones, in fp32.

    Columns that only one of the two models has, which are padding of its vocabulary, are left out.
    """
    n = min(wanted_UV.shape[1], own_UV.shape[1])
    p, q = ((logits[:, :n].float() / temperature).log_softmax(-1) for logits in (wanted_UV, own_UV))
    return temperature**2 * kl_div(q, p, reduction="none", log_target=True).sum(-1)

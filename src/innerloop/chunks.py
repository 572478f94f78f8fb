"""Losses of tokens, a number of rows of logits at a time, so that logits of all tokens never exist together.

With ``at_once`` rows, each chunk's logits are made, turned into losses and forgotten; the backward pass makes them
again (`torch.utils.checkpoint`). Memory then grows with at_once x V in place of U x V, for one more product with the
head.

Shapes: `U` tokens, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

Show = Callable[[slice], Tensor]
"""Makes the logits (u, V) of a slice of some tokens."""
ALL = slice(None)


def shown_by(head: Callable[[Tensor], Tensor], states_UD: Tensor) -> Show:
    """Return what shows states through a head."""
    return lambda part: head(states_UD[part])


def token_losses(show: Show, targets_U: Tensor, at_once: int | None, ignored: int = -100) -> Tensor:
    """Return the cross-entropy of each token (U,), in fp32; 0 where its target is ``ignored``."""

    def losses_of(part: slice) -> Tensor:
        return cross_entropy(show(part).float(), targets_U[part], reduction="none", ignore_index=ignored)

    return by_rows(losses_of, len(targets_U), at_once)


def summed_loss(show: Show, targets_U: Tensor, at_once: int | None) -> Tensor:
    """Return the summed cross-entropy of tokens, in fp32."""
    if at_once is None:
        return cross_entropy(show(ALL).float(), targets_U, reduction="sum")
    return token_losses(show, targets_U, at_once).sum()


def by_rows(losses_of: Callable[[slice], Tensor], n: int, at_once: int | None) -> Tensor:
    """Return the losses (n,) of all tokens, from what gives those of a slice; None: of all at once."""
    if at_once is None or n <= at_once:
        return losses_of(ALL)
    parts = [slice(first, min(first + at_once, n)) for first in range(0, n, at_once)]
    if not torch.is_grad_enabled():
        return torch.cat([losses_of(part) for part in parts])
    return torch.cat([checkpoint(losses_of, part, use_reentrant=False) for part in parts])

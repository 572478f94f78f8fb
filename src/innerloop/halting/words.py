"""Scores of words: what the state shows through the head, and how that changes (halting.md, 3a).

Probabilities are taken in fp32 and at temperature 1, whatever the sampler uses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from innerloop.config.stopping import Agg
from innerloop.halting.evidence import aggregate, neglog

FLOOR = 0.1  # of the largest probability; what lies below it is noise to `without_tail`


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) at each position (B, N) from log-probabilities (B, N, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy at each position (B, N), in nats."""
    return -(log_p.exp() * log_p).sum(-1)


def spread(log_p: Tensor, agg: Agg, mask_BN: Tensor | None) -> Tensor:
    """Return -log10 of H / log V, which is between 0 (certain) and 1 (uniform)."""
    return neglog(aggregate((entropy(log_p) / math.log(log_p.shape[-1])).clamp(min=0), agg, mask_BN))


def uniform_like(log_p: Tensor) -> Tensor:
    """Return the log-probabilities of p_0, which knows nothing."""
    return torch.full_like(log_p, -math.log(log_p.shape[-1]))


def without_tail(log_p: Tensor) -> Tensor:
    """Return log-probabilities in which all below a tenth of the largest are 1 / V, normalised again."""
    p = log_p.exp()
    floored = torch.where(p < FLOOR * p.amax(-1, keepdim=True), 1 / p.shape[-1], p)
    return (floored / floored.sum(-1, keepdim=True)).log()


def top_two(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest probability at each position (B, N), and by how much it exceeds the next."""
    best = log_p.topk(2, dim=-1).values.exp()
    return best[..., 0], best[..., 0] - best[..., 1]


def certainty(share_BN: Tensor, agg: Agg, mask_BN: Tensor | None) -> Tensor:
    """Reduce probabilities to one per row: with ``max`` the least certain position decides."""
    return 1 - aggregate(1 - share_BN, agg, mask_BN)

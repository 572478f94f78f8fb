"""Controls: depths that look at nothing (halting.md, 3a). A rule is worth something only if it beats them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRIDE = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit numbers; the constants of splitmix64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def uniform(places_B: Tensor, seed: int) -> Tensor:
    """Draw a number in [0, 1) for each place (B,): the same for one place and seed, whatever stands there."""
    offset = (seed * MIX[0] + 2**63) % 2**64 - 2**63
    x = (places_B.long() + 1) * STRIDE + offset
    for shift, factor in zip((30, 27), MIX):
        x = (x ^ _shifted(x, shift)) * factor
    return _shifted(x ^ _shifted(x, 31), 40).float() / 2**24


def _shifted(x: Tensor, n: int) -> Tensor:
    """Shift to the right without the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def drawn_depths(places_B: Tensor, histogram: Sequence[float], seed: int) -> Tensor:
    """Draw a depth from 1 to T for each place with the chances of a histogram of T shares."""
    shares = torch.tensor(histogram, dtype=torch.float64)
    edges = (shares.cumsum(0) / shares.sum()).float().to(places_B.device)
    return 1 + torch.searchsorted(edges[:-1].contiguous(), uniform(places_B, seed), right=True)

"""The noise that states of recurrent depth begin with, and whether they have become alike.

s_0 ~ TruncNormal(0, 1, +-3), a function of a seed, the position and the channel  (recurrent_depth.md, 3, and pitfall 2)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CUT = 3.0  # standard deviations at which the noise ends
BELOW_CUT = 0.5 * math.erfc(CUT / math.sqrt(2))  # the share of a normal distribution below -CUT
N_UNIFORM = 2**24  # values of the uniform numbers; fp32 holds them exactly


def noise_at(seeds_B1: Tensor, positions_BL: Tensor, width: int) -> Tensor:
    """Return normal noise (B, L, D) in fp32, cut at three standard deviations.

    It depends on nothing but the row's seed, the position and the channel: a token gets the same whether it is read
    alone or with others, first or again.
    """
    tokens = _mix(_mix(seeds_B1) + positions_BL)
    cells = _mix(tokens[..., None] + torch.arange(width, device=positions_BL.device))
    uniform = (cells.remainder(N_UNIFORM).float() + 0.5) / N_UNIFORM
    share = BELOW_CUT + (1 - 2 * BELOW_CUT) * uniform
    return math.sqrt(2) * torch.erfinv(2 * share - 1)


def _mix(numbers: Tensor) -> Tensor:
    """Scatter 64-bit integers (the finaliser of SplitMix64; products wrap around)."""
    numbers = (numbers + 1) * -0x61C8864680B583EB
    numbers = (numbers ^ _right(numbers, 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ _right(numbers, 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ _right(numbers, 31)


def _right(numbers: Tensor, n_bits: int) -> Tensor:
    """Shift to the right, with zeros from the left."""
    return (numbers >> n_bits) & ((1 << (64 - n_bits)) - 1)


def mean_cosine(states_BLD: Tensor, real_BL: Tensor) -> Tensor:
    """Return the mean cosine of two tokens' states, over all pairs within a row and over rows (scalar); 1 is collapse.

    Rows with less than two tokens have none.
    """
    states = torch.nn.functional.normalize(states_BLD.float(), dim=-1) * real_BL[..., None]
    n_B = real_BL.sum(1)
    pairs_B = n_B * (n_B - 1)
    cosines_B = (states.sum(1).square().sum(-1) - n_B) / pairs_B.clamp(min=1)
    return (cosines_B * (pairs_B > 0)).sum() / (pairs_B > 0).sum().clamp(min=1)

"""Networks that score the masks of a canvas: by which order, or with which chance, they are filled.

    c    = MLP(waves of the time) + what a place is                              (dcolt.md, 3; unmasking_policy.md, 3)
    AdaLN(x, c) = LN(x) (1 + scale(c)) + shift(c)
    score = Linear(AdaLN(Block(AdaLN(x, c)), c))

The block is one of a decoder of Llama's kind that sees the whole canvas, and the canvas alone. All is in fp32.

Shapes: `R` canvases, `G` tokens of each, `D` width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

STD = 0.02
N_WAVES = 256  # of the time, as published for DCoLT
BASE = 10_000.0


def waves(at: Tensor, n: int) -> Tensor:
    """Return cosines and sines (.., n) of numbers (..)."""
    speeds = torch.exp(-math.log(BASE) * torch.arange(n // 2, device=at.device) / (n // 2))
    angles = at.float()[..., None] * speeds
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeMlp(nn.Sequential):
    """What a time (R,) is read as (R, D)."""

    def __init__(self, n_waves: int, width: int):
        super().__init__(_even(n_waves, width), nn.SiLU(), _even(width, width))
        self.n_waves = n_waves

    def forward(self, time_R: Tensor) -> Tensor:
        """Return the vector of each time."""
        return super().forward(waves(time_R, self.n_waves))


class AdaNorm(nn.Module):
    """A norm whose scale and shift depend on something else."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-4, elementwise_affine=False)
        self.map = _even(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return x (.., D) normed as c (.., D) says."""
        scale, shift = self.map(c).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """Attention over all places, with rotary positions counted from 0, and a gated MLP."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = _small(width, 3 * width), _small(width, width)
        self.gate, self.up, self.down = _small(width, inner), _small(width, inner), _small(inner, width)

    def forward(self, x_RGD: Tensor) -> Tensor:
        """Return the states behind the block."""
        n_rows, n, width = x_RGD.shape
        qkv = self.qkv(self.attention_norm(x_RGD)).view(n_rows, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        read = scaled_dot_product_attention(_rotated(qkv[0]), _rotated(qkv[1]), qkv[2])
        x_RGD = x_RGD + self.out(read.transpose(1, 2).reshape(n_rows, n, width))
        u_RGD = self.mlp_norm(x_RGD)
        return x_RGD + self.down(silu(self.gate(u_RGD)) * self.up(u_RGD))


class Scorer(nn.Module):
    """What all scorers end in."""

    decays = False

    def __init__(self, width: int, heads: int, n_waves: int):
        super().__init__()
        self.time = TimeMlp(n_waves, width)
        self.before, self.block, self.after = AdaNorm(width), Block(width, heads, 4 * width), AdaNorm(width)
        self.score = nn.Linear(width, 1)
        nn.init.trunc_normal_(self.score.weight, std=STD)
        nn.init.zeros_(self.score.bias)

    def scored(self, x_RGD: Tensor, c: Tensor) -> Tensor:
        """Return the score of each place (R, G)."""
        return self.score(self.after(self.block(self.before(x_RGD, c)), c))[..., 0]


class RankingScorer(Scorer):
    """DCoLT's unmasking policy module.

    Args:
        width: D of the backbone.
        heads: of its block.
        starts_sure: whether a place's score is the logarithm of its likeliest prediction, and what is learned on top.
        time_scale: see `Dcolt`.
    """

    def __init__(self, width: int, heads: int, starts_sure: bool = False, time_scale: float = 1000.0):
        super().__init__(width, heads, N_WAVES)
        self.starts_sure, self.time_scale = starts_sure, time_scale
        self.is_mask, self.in_block = nn.Embedding(2, width), nn.Embedding(2, width)
        for table in (self.is_mask, self.in_block):
            nn.init.trunc_normal_(table.weight, std=STD)
        if starts_sure:
            nn.init.zeros_(self.score.weight)

    def forward(
        self, states_RGD: Tensor, is_mask_RG: Tensor, in_block_RG: Tensor, time_R: Tensor, likeliest_RG: Tensor
    ) -> Tensor:
        """Return by what places are ranked (R, G).

        Args:
            states_RGD: of the backbone, after its final norm, at the places that predict.
            is_mask_RG: which places are masks.
            in_block_RG: which are of the active block.
            time_R: the share of the passes that are made.
            likeliest_RG: the log-probability of the likeliest token of each mask that may be filled.
        """
        time_RD = self.time(time_R * self.time_scale)
        c_RGD = time_RD[:, None] + self.is_mask(is_mask_RG.long()) + self.in_block(in_block_RG.long())
        score_RG = self.scored(states_RGD.float(), c_RGD)
        return score_RG + likeliest_RG if self.starts_sure else score_RG


class CommitScorer(Scorer):
    """The policy of learned unmasking.

    Args:
        width: of the network.
        heads: of its block.
        gen_length: G; at first about two places are filled in a pass over an empty canvas.
    """

    def __init__(self, width: int, heads: int, gen_length: int):
        super().__init__(width, heads, width)
        self.read = _even(2, width)
        start = min(2 / gen_length, 0.5)
        nn.init.constant_(self.score.bias, math.log(start / (1 - start)) if start < 0.5 else 0.0)

    def forward(self, confidence_RG: Tensor, is_mask_RG: Tensor, time_R: Tensor) -> Tensor:
        """Return the logits of filling places (R, G).

        Args:
            confidence_RG: the probability of each mask's likeliest token, 0 elsewhere.
            is_mask_RG: which places are masks.
            time_R: the share of the passes that are left.
        """
        x_RGD = self.read(torch.stack([confidence_RG, is_mask_RG.float()], dim=-1))
        places_GD = waves(torch.arange(x_RGD.shape[1], device=x_RGD.device), x_RGD.shape[2])
        return self.scored(x_RGD + places_GD, self.time(time_R * 1000)[:, None])


def _rotated(x: Tensor) -> Tensor:
    """Turn each pair of numbers (.., G, D) by its place."""
    half = x.shape[-1] // 2
    cos, sin = waves(torch.arange(x.shape[-2], device=x.device), 2 * half).chunk(2, dim=-1)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _even(n: int, m: int) -> nn.Linear:
    """Return a map whose weights are Xavier's, and its bias 0."""
    found = nn.Linear(n, m)
    nn.init.xavier_uniform_(found.weight)
    nn.init.zeros_(found.bias)
    return found


def _small(n: int, m: int) -> nn.Linear:
    """Return a map of the block."""
    found = nn.Linear(n, m, bias=False)
    nn.init.normal_(found.weight, std=STD)
    return found

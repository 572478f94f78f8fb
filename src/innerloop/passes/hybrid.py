"""Latents beside written tokens: how they are made of the distribution that a token is chosen from, and fed.

    h = (p @ E) / ||p||                                                 p: the distribution, E: the input embeddings
    r = sigmoid(W_r e + b_r),   i = sigmoid(W_i e + b_i)             e: the token's own embedding (hrpo.md, section 3)
    a = exp(-c softplus(-Lambda) r)                                     in (0, 1), c = 8
    x = a e + sqrt(1 - a^2 + eps) (i h)

Shapes: `R` rows, `L` positions, `D` width, `V` vocabulary, `K` tokens mixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from innerloop.config.hybrid import Hybrid
from innerloop.decoder.backbone import Backbone
from innerloop.loop.stabilize import at_least_fp32

SHARPNESS = 8.0  # c
MOST_OPEN = 1 - 1e-6  # a share of 1 would need an infinite Lambda
LEAST = 1e-38


@dataclass
class Fed:
    """What was fed while rows wrote: latents (B, L, D) where ``is_fed_BL``, of the columns of the suffix."""

    latents_BLD: Tensor
    is_fed_BL: Tensor


class GateLinear(nn.Linear):
    """A gate that looks at a token's embedding; it learns faster than the backbone, by the published ratio."""

    group: ClassVar[dict[str, float]] = {"times": 20.0}

    def forward(self, input: Tensor) -> Tensor:
        """Return what is asked of embeddings (..., D), in their precision whatever that of the weights."""
        return linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Openness(nn.Module):
    """Lambda (D,): how much of a token's embedding is kept where its gate is fully open."""

    group: ClassVar[dict[str, float]] = {"times": 200.0}

    def __init__(self, least: float, most: float, width: int):
        super().__init__()
        u_D = torch.empty(width, dtype=torch.float64).uniform_(least, most).clamp(max=MOST_OPEN)
        self.raw_D = nn.Parameter(-(u_D ** (-1 / SHARPNESS) - 1).log().float())

    def forward(self) -> Tensor:
        """Return log(a) at r = 1 (D,)."""
        return -SHARPNESS * softplus(-self.raw_D)


class Gate(nn.Module):
    """Mixes a token's embedding with a latent, in fp32; gates see the embedding alone."""

    def __init__(self, hybrid: Hybrid, width: int):
        super().__init__()
        assert hybrid.gate is not None
        self.eps = hybrid.gate_eps
        self.keeps, self.lets = GateLinear(width, width), GateLinear(width, width)
        for part in (self.keeps, self.lets):
            for weight in (part.weight, part.bias):
                nn.init.uniform_(weight, -1 / math.sqrt(width), 1 / math.sqrt(width))
        self.openness = Openness(*hybrid.gate, width)
        self.hidden_ratio: Tensor | None = None  # of the last pass

    def forward(self, embeds: Tensor, latents: Tensor, is_fed: Tensor) -> Tensor:
        """Return what is fed (..., D); the mean share of the latent where ``is_fed`` (...) is noted."""
        e = at_least_fp32(embeds)
        log_a = self.openness() * self.keeps(e).sigmoid()
        rest = self.eps - torch.expm1(2 * log_a)  # 1 - a^2 + eps
        share = torch.where(rest > 0, rest.clamp(min=LEAST).sqrt(), 0.0)
        a = log_a.exp()
        ratio = (1 - a.detach().mean(-1).square()).clamp(min=0).sqrt()
        self.hidden_ratio = (ratio * is_fed).sum() / is_fed.sum().clamp(min=1)
        return (a * e + share * (self.lets(e).sigmoid() * latents.to(e.dtype))).to(embeds.dtype)


class HybridFeed(nn.Module):
    """Makes latents, and what is fed of them and of the tokens beside them.

    Args:
        hybrid: what is fed.
        backbone: whose embeddings are mixed.
    """

    def __init__(self, hybrid: Hybrid, backbone: Backbone):
        super().__init__()
        self.hybrid = hybrid
        self.gate = None if hybrid.gate is None else Gate(hybrid, backbone.width).to(backbone.device)

    def forward(self, embeds: Tensor, latents: Tensor, is_fed: Tensor) -> Tensor:
        """Return what is fed (..., D): the embedding of each token, and where ``is_fed`` (...) what it is mixed to."""
        if self.hybrid.control == "shut":
            return embeds
        mixed = latents.to(embeds.dtype) if self.gate is None else self.gate(embeds, latents, is_fed)
        return torch.where(is_fed[..., None], mixed, embeds)

    @torch.no_grad()
    def latents(self, backbone: Backbone, logits_RV: Tensor, ids_R: Tensor, drawn_RK: Tensor | None = None) -> Tensor:
        """Return a latent for each row (R, D), at least in fp32.

        Args:
            backbone: whose embeddings are mixed.
            logits_RV: of the distribution that the tokens were chosen from, the temperature in them.
            ids_R: the tokens.
            drawn_RK: numbers in (0, 1) for the noise of each of the likeliest tokens.
        """
        hybrid = self.hybrid
        if hybrid.control == "argmax":
            return at_least_fp32(backbone.embed(logits_RV.argmax(-1)[:, None])[:, 0])
        p_RV = at_least_fp32(logits_RV).softmax(-1)
        k = p_RV.shape[1] if hybrid.top_k is None else min(hybrid.top_k, p_RV.shape[1])
        shares_RK, ids_RK = p_RV.topk(k, dim=-1)
        if hybrid.top_k is not None:
            shares_RK = shares_RK / shares_RK.sum(-1, keepdim=True)
        if hybrid.noise > 0 and drawn_RK is not None:
            shares_RK, ids_RK = perturbed(shares_RK, ids_RK, p_RV, ids_R, drawn_RK, hybrid.noise)
        latents_RD = at_least_fp32(backbone.embed_mix(ids_RK, shares_RK))
        if hybrid.norm == "l2p":
            latents_RD = latents_RD / shares_RK.norm(dim=-1, keepdim=True)
        elif hybrid.norm == "match_token":
            wanted_R1 = at_least_fp32(backbone.embed(ids_R[:, None])[:, 0]).norm(dim=-1, keepdim=True)
            latents_RD = latents_RD * wanted_R1 / latents_RD.norm(dim=-1, keepdim=True).clamp(min=LEAST)
        return latents_RD.roll(1, 0) if hybrid.control == "swap" else latents_RD


def as_fed(feed: HybridFeed | None, fed: Fed | None, embeds_BLD: Tensor) -> Tensor:
    """Return what is fed in the place of tokens with some embeddings (B, L, D)."""
    return embeds_BLD if feed is None or fed is None else feed(embeds_BLD, fed.latents_BLD, fed.is_fed_BL)


def perturbed(
    shares_RK: Tensor, ids_RK: Tensor, p_RV: Tensor, ids_R: Tensor, drawn_RK: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return shares with Gumbel noise, given that the token that was drawn has the largest, and the tokens (R, K).

    Tokens are drawn by p; noise under which log p + noise is largest for the token drawn is distributed as if the token
    had been drawn by it. Its largest value is Gumbel, and those of the others are Gumbel below it.
    """
    is_own_RK = ids_RK == ids_R[:, None]
    last_RK = torch.zeros_like(is_own_RK)
    last_RK[:, -1] = ~is_own_RK.any(1)  # a token that is not among the likeliest takes the place of the last
    ids_RK = torch.where(last_RK, ids_R[:, None], ids_RK)
    p_RK = p_RV.gather(1, ids_RK).clamp(min=LEAST)
    top_R1 = -(-drawn_RK[:, :1].log()).log()
    below_RK = -((-top_R1).exp() - drawn_RK.log() / p_RK).log()
    perturbed_RK = torch.where(is_own_RK | last_RK, top_R1, below_RK)
    return (perturbed_RK / temperature).softmax(-1).to(shares_RK.dtype), ids_RK

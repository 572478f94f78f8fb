"""Soft masks: the gate that a pass's predictions open, and the embeddings that the next pass reads (soft_masked.md, 3).

    lam = w_s sigmoid(w_a (sum_v p_v log p_v - w_b))                  p over all tokens but the mask
    x   = (1 - lam) E[mask] + lam sum_j pi_j E[v_j]                   pi: the k likeliest of p, to a sum of 1

Shapes: `B` rows, `L` positions, `A` masks, `K` tokens mixed in, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from innerloop.config.soft_masks import Mix, SoftSettings
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.token_losses import AtOnce

LEAST = 1e-6
CENTRE, STEEPNESS = -0.75, 10 / 1.5


@dataclass
class Seen:
    """What a pass predicts for masks: the entropy (A,) in nats, and the tokens (A, K) to be mixed by shares (A, K)."""

    entropy_A: Tensor
    ids_AK: Tensor
    shares_AK: Tensor


class SoftMask(nn.Module):
    """The gate, three numbers that are learned (four where all tokens are mixed), and the mixing.

    They are trained in a group of the optimizer of their own: at the published rate whatever that of the model, without
    decay, and with an epsilon that their first gradients, which carry the factor w_s, do not vanish beside.

    Args:
        settings: how masks are soft.
        mask_id: the mask, which is never fed back.
    """

    decays = False
    group: ClassVar[dict[str, float]] = {"lr": 1e-2, "eps": 1e-15}

    def __init__(self, settings: SoftSettings, mask_id: int):
        super().__init__()
        self.settings, self.mask_id = settings, mask_id
        start = min(max(settings.start, LEAST), 1 - LEAST)
        self.raw_scale = nn.Parameter(torch.tensor(start, dtype=torch.float64).logit().float())
        self.raw_centre = nn.Parameter(_below_softplus(-CENTRE))
        self.raw_steepness = nn.Parameter(_below_softplus(STEEPNESS))
        self.raw_temperature = nn.Parameter(_below_softplus(1.0)) if settings.top_k is None else None

    @property
    def scale(self) -> Tensor:
        """w_s, between 0 and 1."""
        return self.raw_scale.sigmoid()

    @property
    def centre(self) -> Tensor:
        """w_b, below 0."""
        return -softplus(self.raw_centre) - LEAST

    @property
    def steepness(self) -> Tensor:
        """w_a, above 0."""
        return softplus(self.raw_steepness) + LEAST

    def look(self, logits_AV: Tensor) -> Seen:
        """Return what is kept of the logits of some masks."""
        mask = torch.tensor([self.mask_id], device=logits_AV.device)
        logits_AV = logits_AV.float().index_fill(1, mask, -torch.inf)
        if self.raw_temperature is None:
            probs_AV = logits_AV.softmax(-1)
            best = logits_AV.topk(min(self.settings.top_k or 1, logits_AV.shape[1] - 1), dim=-1)
            ids_AK, shares_AK = best.indices, best.values.softmax(-1)
        else:
            probs_AV = shares_AK = (logits_AV / (softplus(self.raw_temperature) + LEAST)).softmax(-1)
            ids_AK = torch.arange(logits_AV.shape[1], device=logits_AV.device).expand_as(logits_AV)
        return Seen(torch.special.entr(probs_AV).sum(-1), ids_AK, shares_AK)

    def gate(self, entropy_A: Tensor) -> Tensor:
        """Return lam (A,), the more the less the entropy is."""
        return self.scale * torch.sigmoid(self.steepness * (-entropy_A - self.centre))

    def words(self, seen: Seen, backbone: Backbone) -> Tensor:
        """Return the mixture of tokens (A, D) that would be fed alone."""
        if self.raw_temperature is None:
            return backbone.embed_mix(seen.ids_AK, seen.shares_AK)
        table_VD = backbone.embed(torch.arange(seen.shares_AK.shape[1], device=seen.shares_AK.device))
        return seen.shares_AK.to(table_VD.dtype) @ table_VD

    def mixed(self, masks_AD: Tensor, lam_A: Tensor, words_AD: Tensor) -> Tensor:
        """Return what masks are read as (A, D): their own embedding where lam is 0."""
        return mixed(self.settings.mix, masks_AD, lam_A, words_AD)

    def soften(
        self,
        backbone: Backbone,
        embeds_BLD: Tensor,
        masks: tuple[Tensor, Tensor],
        predict: Callable[[Tensor], Tensor],
        chunk: AtOnce = None,
    ) -> Tensor:
        """Make the passes that nothing is learned from, and return the embeddings of the next, its masks softened.

        Args:
            backbone: what embeds, and shows states.
            embeds_BLD: what would be read, masks hard.
            masks: the rows and columns (A,) of the masks.
            predict: makes a pass over embeddings (B, L, D), and returns the states (A, D) that predict the masks.
            chunk: how many rows of logits may exist together.
        """
        if not len(masks[0]):
            return embeds_BLD
        soft_BLD = embeds_BLD
        for n_left in reversed(range(self.settings.unroll)):
            with torch.no_grad():
                states_AD = predict(soft_BLD)
            with torch.set_grad_enabled(torch.is_grad_enabled() and n_left == 0):
                soft_BLD = self._fed(backbone, embeds_BLD, masks, states_AD, chunk)
        return soft_BLD

    def _fed(
        self,
        backbone: Backbone,
        embeds_BLD: Tensor,
        masks: tuple[Tensor, Tensor],
        states_AD: Tensor,
        chunk: AtOnce,
    ) -> Tensor:
        """Return embeddings whose masks are fed what states show."""
        size = chunk if isinstance(chunk, int) and self.raw_temperature is None else len(states_AD)
        parts = []
        for part_AD in states_AD.split(size):
            with torch.no_grad():
                logits_AV = backbone.head(part_AD)
            parts.append(self.look(logits_AV))
        seen = Seen(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
        mixed_AD = self.mixed(embeds_BLD[masks], self.gate(seen.entropy_A), self.words(seen, backbone))
        return embeds_BLD.index_put(masks, mixed_AD)


def soft_mask(settings: SoftSettings, mask_id: int, device: torch.device) -> SoftMask | None:
    """Return the gate of soft masks; None: masks are hard."""
    return SoftMask(settings, mask_id).to(device) if settings.is_on else None


def mixed(mix: Mix, masks_AD: Tensor, lam_A: Tensor, words_AD: Tensor) -> Tensor:
    """Return mixtures (A, D) of the embeddings of masks and of words, of which lam is that of the words."""
    dtype, lam_A1 = masks_AD.dtype, lam_A[:, None].to(torch.promote_types(masks_AD.dtype, torch.float32))
    own, fed = masks_AD.to(lam_A1.dtype), words_AD.to(lam_A1.dtype)
    line = (1 - lam_A1) * own + lam_A1 * fed
    if mix == "lerp":
        return line.to(dtype)
    length = own.norm(dim=-1, keepdim=True)
    level = line * (length / line.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    if mix == "lerp_norm":
        return level.to(dtype)
    fed = fed * (length / fed.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    cosine = (own * fed).sum(-1, keepdim=True) / length.square().clamp(min=1e-12)
    is_arc = cosine.abs() < 1 - 1e-6
    angle = torch.where(is_arc, cosine, 0.0).acos()
    shares = [(share * angle).sin() / angle.sin() for share in (1 - lam_A1, lam_A1)]
    arc = shares[0] * own + shares[1] * fed
    return torch.where(is_arc, arc, level).to(dtype)


def _below_softplus(value: float) -> Tensor:
    """Return what softplus, and `LEAST` more, makes ``value`` of."""
    return torch.tensor(value - LEAST, dtype=torch.float64).expm1().log().float()

"""f of the denoising methods: one pass that sees whole rows, each a question and the canvas of its answer.

Rows share a pass whatever their progress: the network is told no time. Nothing is cached, as every token sees every
other. The head is applied only where a prediction is asked for.

Shapes: `R` rows, `P` columns of questions, `G` tokens of a canvas, `A` places that are asked for, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cost import CostMeter
from innerloop.passes.context import Context


@dataclass
class Prompts:
    """The questions of some rows, padded before.

    Attributes:
        ids_RP: their tokens.
        mask_RP: 1 where they are real; None: all are.
    """

    ids_RP: Tensor
    mask_RP: Tensor | None


def predict(
    backbone: Backbone,
    prompts: Prompts,
    tokens_RG: Tensor,
    asked: tuple[Tensor, Tensor],
    shift: bool = False,
    guidance: tuple[float, int] = (0.0, 0),
    meter: CostMeter | None = None,
    slots_R: Tensor | None = None,
    embeds_RGD: Tensor | None = None,
) -> Tensor:
    """Return the logits (A, V) of some places of canvases, in one pass; (2A, V) with guidance, for `lean`.

    Args:
        backbone: what reads.
        prompts: the questions.
        tokens_RG: the canvases, masks among them.
        asked: the rows (A,) and the places (A,) that are asked for.
        shift: the position before a place predicts it.
        guidance: w, and the mask: above 0 the pass has rows whose questions are masks, too; their logits come last.
        meter: where the pass is counted.
        slots_R: the meter's rows.
        embeds_RGD: what canvases are read as; None: the embeddings of their tokens.
    """
    weight, mask_id = guidance
    ids_RP, mask_RP, (rows_A, places_A) = prompts.ids_RP, prompts.mask_RP, asked
    n_rows = len(ids_RP)
    if weight > 0:
        ids_RP = torch.cat([ids_RP, torch.full_like(ids_RP, mask_id)])
        mask_RP = None if mask_RP is None else mask_RP.repeat(2, 1)
        tokens_RG, slots_R = tokens_RG.repeat(2, 1), None if slots_R is None else slots_R.repeat(2)
        rows_A, places_A = torch.cat([rows_A, rows_A + n_rows]), places_A.repeat(2)
        embeds_RGD = None if embeds_RGD is None else embeds_RGD.repeat(2, 1, 1)
    states_RLD = read_whole(backbone, Prompts(ids_RP, mask_RP), tokens_RG, meter, slots_R, embeds_RGD)
    columns_A = ids_RP.shape[1] + places_A - int(shift)
    return backbone.head(states_RLD[rows_A, columns_A]).float()


def read_whole(
    backbone: Backbone,
    prompts: Prompts,
    tokens_RG: Tensor,
    meter: CostMeter | None = None,
    slots_R: Tensor | None = None,
    embeds_RGD: Tensor | None = None,
) -> Tensor:
    """Return the states of questions and canvases after the final norm (R, P + G, D), in one pass."""
    ids_RL = torch.cat([prompts.ids_RP, tokens_RG], dim=1)
    mask_RL = None if prompts.mask_RP is None else torch.cat([prompts.mask_RP, torch.ones_like(tokens_RG)], dim=1)
    context = Context(backbone, len(ids_RL), meter)
    context.rows = slots_R
    embeds_RLD = backbone.embed(ids_RL)
    if embeds_RGD is not None:
        embeds_RLD = torch.cat([embeds_RLD[:, : prompts.ids_RP.shape[1]], embeds_RGD], dim=1)
    return context.read(embeds_RLD, mask_RL, sees="all", keeps=False)


def lean(logits: Tensor, weight: float) -> Tensor:
    """Return what guidance makes of logits: u + (1 + w) (l - u), u the second half of them."""
    if weight == 0:
        return logits
    own_AV, other_AV = logits.chunk(2)
    return other_AV + (1 + weight) * (own_AV - other_AV)

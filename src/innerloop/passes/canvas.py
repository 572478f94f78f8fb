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
) -> Tensor:
    """Return the logits (A, V) of some places of canvases, in one pass.

    Args:
        backbone: what reads.
        prompts: the questions.
        tokens_RG: the canvases, masks among them.
        asked: the rows (A,) and the places (A,) that are asked for.
        shift: the position before a place predicts it.
        guidance: w, and the mask: logits are u + (1 + w) (l - u), u those of rows whose questions are masks; these are
            rows of the same pass.
        meter: where the pass is counted.
        slots_R: the meter's rows.
    """
    weight, mask_id = guidance
    ids_RP, mask_RP, (rows_A, places_A) = prompts.ids_RP, prompts.mask_RP, asked
    n_rows, n_asked = len(ids_RP), len(rows_A)
    if weight > 0:
        ids_RP = torch.cat([ids_RP, torch.full_like(ids_RP, mask_id)])
        mask_RP = None if mask_RP is None else mask_RP.repeat(2, 1)
        tokens_RG, slots_R = tokens_RG.repeat(2, 1), None if slots_R is None else slots_R.repeat(2)
        rows_A, places_A = torch.cat([rows_A, rows_A + n_rows]), places_A.repeat(2)
    ids_RL = torch.cat([ids_RP, tokens_RG], dim=1)
    mask_RL = None if mask_RP is None else torch.cat([mask_RP, torch.ones_like(tokens_RG)], dim=1)
    context = Context(backbone, len(ids_RL), meter)
    context.rows = slots_R
    states_RLD = context.read(backbone.embed(ids_RL), mask_RL, sees="all")
    columns_A = ids_RP.shape[1] + places_A - int(shift)
    logits_AV = backbone.head(states_RLD[rows_A, columns_A]).float()
    if weight > 0:
        own, other = logits_AV[:n_asked], logits_AV[n_asked:]
        logits_AV = other + (1 + weight) * (own - other)
    return logits_AV

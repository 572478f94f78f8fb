"""The pass that reads rows with hidden tokens while training: what is seen ahead may be drawn, and masks may be soft.

A decoder learns to look ahead little by little (DiffuLLaMA): a position sees what comes before it, and each later one
with a chance that rises to 1. One draw is of all rows.

Shapes: `B` rows, `L` positions, `U` hidden tokens, `D` width.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from innerloop.decoder.token_losses import AtOnce
from innerloop.passes.context import Context
from innerloop.passes.region import Masked
from innerloop.passes.soft_masks import SoftMask
from innerloop.text.batch import Batch


def noised(
    soft: SoftMask | None,
    context: Context,
    read: Masked,
    batch: Batch,
    first_column: int,
    chunk: AtOnce,
    options: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Return what whole rows are read as (B, L, D), and with which options of `Context.read`.

    Args:
        soft: what softens masks, in passes of its own.
        context: what was read before: nothing. It is left as it was.
        read: what would be read, masks hard, and its mask.
        batch: the rows.
        first_column: their column that is read first.
        chunk: how many rows of logits may exist together.
        options: of `Context.read`, to which what is seen ahead is added.
    """
    (embeds_BLD, mask_BL), n_columns = read, batch.ids_BS.shape[1]
    if batch.ahead is not None:
        n, device = embeds_BLD.shape[1], embeds_BLD.device
        is_own_LL, seen_LL = (x.to(device) for x in (torch.eye(n).bool(), looks_ahead(n, *batch.ahead)))
        real_BL = embeds_BLD.new_ones(embeds_BLD.shape[:2]) if mask_BL is None else mask_BL
        seen_BQP = (seen_LL & real_BL.bool()[:, None, :]) | is_own_LL  # padding, too, must see something
        options = {**options, "seen_BQP": seen_BQP}
    if soft is not None and batch.soft_at_U is not None:
        rows_U, predict_at_U = batch.predict_at_U // n_columns, batch.predict_at_U % n_columns - first_column
        masks = rows_U, batch.soft_at_U % n_columns - first_column

        def predict(embeds_BLD: Tensor) -> Tensor:
            return context.fork().read(embeds_BLD, mask_BL, **{**options, "all_states": False})[rows_U, predict_at_U]

        embeds_BLD = soft.soften(context.backbone, embeds_BLD, masks, predict, chunk)
    return embeds_BLD, options


def looks_ahead(n: int, share: float, seed: str) -> Tensor:
    """Return which positions each of ``n`` sees (L, L): those before it and itself, later ones with a chance."""
    drawn = torch.Generator().manual_seed(random.Random(f"ahead/{seed}").getrandbits(63))
    return (torch.rand(n, n, generator=drawn) < share) | torch.ones(n, n, dtype=torch.bool).tril()

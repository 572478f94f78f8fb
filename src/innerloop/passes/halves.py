"""The two passes over rows that are denoised block by block: as they were written, then noised on top of that.

Gradients flow through the first, whose keys the second sees. One pass over both halves gives the same, with a mask of
twice as many rows and columns (block_diffusion.md, section 2). Where masks are soft, the second is made again, on top
of the first as it was.

Shapes: `B` rows, `S` columns, `U` hidden tokens, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.decoder.token_losses import AtOnce, LogitsFn
from innerloop.passes.context import Context
from innerloop.passes.region import Masked, join
from innerloop.passes.soft_masks import SoftMask
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch


def read_halves(thought: Thought, batch: Batch, soft: SoftMask | None = None, chunk: AtOnce = None) -> LogitsFn:
    """Return what shows the logits (U, V) of the hidden tokens of a batch of which nothing has been read.

    Shifted predictions come from the column before: if that is of an earlier block, from its state as it was written.

    Args:
        thought: of the batch.
        batch: the rows.
        soft: what softens masks, in passes of its own.
        chunk: how many rows of logits may exist together.
    """
    halves, clean, backbone = batch.halves, thought.context.fork(), thought.context.backbone
    assert halves is not None
    suffix, mask = batch.columns(2)
    n, first, n_columns = halves.n_clean, halves.first_noised, batch.ids_BS.shape[1]
    rows_U, at_U = batch.predict_at_U // n_columns, batch.predict_at_U % n_columns

    def fed(ids_BS: Tensor, columns: slice) -> Masked:
        embeds, mask_BS = join([*thought.pending, (backbone.embed(ids_BS[:, suffix]), mask)])
        return embeds[:, columns], None if mask_BS is None else mask_BS[:, columns]

    def read(context: Context, read: Masked, columns: slice, is_noised: int) -> Tensor:
        return context.read(*read, sees="blocks", halves_BL=2 * halves.blocks_BS[:, columns] + is_noised)

    clean_BND = read(clean, fed(halves.clean_BS, slice(n)), slice(n), 0) if n > 0 else None
    clean.next_position_B = batch.mask_BS[:, :first].sum(1)
    noised = slice(first, None)

    def predict(context: Context, embeds_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        noised_BLD = read(context, (embeds_BLD, mask_BL), noised, 1)
        states_UD = noised_BLD[rows_U, (at_U - first).clamp(min=0)]
        if clean_BND is None or not halves.shift:
            return states_UD
        is_before_U = halves.blocks_BS[rows_U, at_U] < halves.blocks_BS[rows_U, at_U + 1]
        return torch.where(is_before_U[:, None], clean_BND[rows_U, at_U.clamp(max=n - 1)], states_UD)

    embeds_BLD, mask_BL = fed(batch.ids_BS, noised)
    if soft is not None and batch.soft_at_U is not None:
        masks = rows_U, batch.soft_at_U % n_columns - first
        embeds_BLD = soft.soften(
            backbone, embeds_BLD, masks, lambda embeds_BLD: predict(clean.fork(), embeds_BLD, mask_BL), chunk
        )
    thought.after = clean
    return backbone.head_inputs(predict(clean, embeds_BLD, mask_BL))

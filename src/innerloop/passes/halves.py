"""The two passes over rows that are denoised block by block: as they were written, then noised on top of that.

Gradients flow through the first, whose keys the second sees. One pass over both halves gives the same, with a mask of
twice as many rows and columns (block_diffusion.md, section 2).

Shapes: `B` rows, `S` columns, `U` hidden tokens, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.decoder.token_losses import LogitsFn
from innerloop.passes.region import join
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch


def read_halves(thought: Thought, batch: Batch) -> LogitsFn:
    """Return what shows the logits (U, V) of the hidden tokens of a batch of which nothing has been read.

    Shifted predictions come from the column before: if that is of an earlier block, from its state as it was written.
    """
    halves, context = batch.halves, thought.context.fork()
    assert halves is not None
    suffix, mask = batch.columns(2)
    n, first, backbone = halves.n_clean, halves.first_noised, context.backbone

    def read(ids_BS: Tensor, columns: slice, is_noised: int) -> Tensor:
        embeds, mask_BS = join([*thought.pending, (backbone.embed(ids_BS[:, suffix]), mask)])
        real = None if mask_BS is None else mask_BS[:, columns]
        numbers_BL = 2 * halves.blocks_BS[:, columns] + is_noised
        return context.read(embeds[:, columns], real, sees="blocks", halves_BL=numbers_BL)

    clean_BND = read(halves.clean_BS, slice(n), 0) if n > 0 else None
    context.next_position_B = batch.mask_BS[:, :first].sum(1)
    noised_BLD = read(batch.ids_BS, slice(first, None), 1)
    rows_U, at_U = batch.predict_at_U // batch.ids_BS.shape[1], batch.predict_at_U % batch.ids_BS.shape[1]
    states_UD = noised_BLD[rows_U, (at_U - first).clamp(min=0)]
    if clean_BND is not None and halves.shift:
        is_before_U = halves.blocks_BS[rows_U, at_U] < halves.blocks_BS[rows_U, at_U + 1]
        states_UD = torch.where(is_before_U[:, None], clean_BND[rows_U, at_U.clamp(max=n - 1)], states_UD)
    thought.after = context
    return backbone.head_inputs(states_UD)

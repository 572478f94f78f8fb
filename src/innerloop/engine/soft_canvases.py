"""Soft masks while answering: each canvas keeps what its masks are read as in the next pass (soft_masked.md, 6).

The first pass over a canvas, or over a block that no pass has seen before, has hard masks. What was just committed is
read as it is, whatever was predicted for it; as are tokens.

Shapes: `R` rows, `L` columns that are read of each, `A` places, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from innerloop.decoder.backbone import Backbone
from innerloop.methods.denoise.canvas import Canvas, Ints
from innerloop.passes.soft_masks import SoftMask


class SoftCanvases:
    """What the masks of canvases are fed."""

    def __init__(self, soft: SoftMask, backbone: Backbone):
        self.soft, self.backbone = soft, backbone

    def watched(self, canvas: Canvas) -> Ints:
        """Return the places (A,) that are read out: those asked for, and those whose predictions may be fed back.

        These are masks that the pass sees, and tokens that may be masked again.
        """
        is_watched = canvas.tokens_G[: canvas.n_read] == canvas.mask_id
        is_watched[canvas.asked()] = True
        if self.soft.settings.remasked == "raw" and not canvas.keeps:
            is_watched[canvas.start : canvas.end] = True
        return np.flatnonzero(is_watched)

    def embeds(self, canvases: Sequence[Canvas], ids_RL: Tensor) -> Tensor:
        """Return what is read of the canvas of each row (R, L, D)."""
        embeds_RLD = self.backbone.embed(ids_RL)
        for i, canvas in enumerate(canvases):
            if canvas.fed is None:
                continue
            places, lam_A, words_AD = canvas.fed
            columns = canvas.columns(places)
            if (columns < ids_RL.shape[1]).all():  # the one column of a block may be read by no one, and is not here
                columns_A = torch.from_numpy(columns).to(ids_RL.device, non_blocking=True)
                embeds_RLD[i, columns_A] = self.soft.mixed(embeds_RLD[i, columns_A], lam_A, words_AD)
        return embeds_RLD

    def keep(
        self,
        canvases: Sequence[Canvas],
        before: Sequence[Ints],
        watched: Sequence[Ints],
        logits_AV: Tensor,
    ) -> None:
        """Keep what the masks of canvases are fed next.

        Args:
            canvases: what they are after the pass.
            before: their tokens in it.
            watched: the places that it was asked for.
            logits_AV: what it predicts for these, canvas by canvas.
        """
        device, seen = logits_AV.device, self.soft.look(logits_AV)
        lam_A, words_AD = self.soft.gate(seen.entropy_A), self.soft.words(seen, self.backbone)
        first = 0
        for canvas, tokens_G, places in zip(canvases, before, watched):
            is_mask = canvas.tokens_G[places] == canvas.mask_id
            own = torch.from_numpy(first + np.flatnonzero(is_mask)).to(device)
            at, lam, words = places[is_mask], lam_A[own], words_AD[own]
            again = np.flatnonzero((canvas.tokens_G == canvas.mask_id) & (tokens_G != canvas.mask_id))
            if self.soft.settings.remasked == "carry" and len(again):
                carried = self.backbone.embed(torch.from_numpy(tokens_G[again]).to(device))
                at = np.concatenate([at, again])
                lam, words = torch.cat([lam, self.soft.gate(lam.new_zeros(len(again)))]), torch.cat([words, carried])
            canvas.fed, first = (at, lam, words), first + len(places)

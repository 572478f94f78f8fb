"""Rows that are fed latents beside or instead of the tokens that they write, until the answer's mark is written.

Shapes: `R` rows, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from innerloop.engine.decoding import DecodeBatch
from innerloop.engine.drawing import without
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import Request
from innerloop.loop.stabilize import at_least_fp32
from innerloop.model.model import LatentCore
from innerloop.passes.context import Context
from innerloop.text.examples import ANSWER_PREFIX

MARK = ANSWER_PREFIX.strip()
NEVER = -1


class HybridDecodeBatch(DecodeBatch):
    """Writes, and feeds what the distribution of each token is mixed to while its row thinks.

    A row thinks until its text has the answer's mark; the token that completes it is fed as it is.

    Args:
        model: what writes.
        context: what has been read.
        requests: the rows.
        options: the temperature of latents is that of the draws, and what was fed is kept if it is to be replayable.
    """

    per_row = (*DecodeBatch.per_row, "thinks_R", "calm_R", "forced_R")

    def __init__(self, model: LatentCore, context: Context, requests: Sequence[Request], options: EngineOptions):
        super().__init__(model, context, requests)
        assert model.hybrid is not None
        self.feed, self.options = model.hybrid, options
        self.temperature = options.temperature or self.feed.hybrid.temperature
        self.suppressed = model.suppressed_ids()
        self.mark_ids = torch.tensor(model.encoder.answer_prefix_ids(), device=model.device)
        self.enders = {i for token, i in model.tokenizer.get_vocab().items() if MARK[-1] in token or token == "<0x23>"}
        self.thinks_R = torch.ones_like(self.chosen_R, dtype=torch.bool)
        self.calm_R = torch.zeros_like(self.chosen_R)  # tokens of low entropy, one after the other
        self.forced_R = torch.full_like(self.chosen_R, NEVER)  # how much of the mark had to be written

    @property
    def drawn_from(self) -> Tensor:
        """The logits (R, V) of the distribution that tokens are drawn from, the temperature in them."""
        return at_least_fp32(without(self.allowed(), self.suppressed)) / self.temperature

    def forced(self, ids_R: Tensor) -> Tensor | None:
        """Return which rows have thought enough, and must write the next token of the answer's mark."""
        hybrid = self.feed.hybrid
        if hybrid.stop_after == 0:
            return None
        entropy_R = torch.special.entr(self.drawn_from.softmax(-1)).sum(-1)
        self.calm_R = torch.where(self.thinks_R & (entropy_R < hybrid.stop_entropy), self.calm_R + 1, 0)
        begins_R = (self.calm_R >= hybrid.stop_after) & (self.forced_R == NEVER)
        at_R = torch.where(begins_R, 0, self.forced_R)
        goes_on_R = (at_R >= 0) & (at_R < len(self.mark_ids))
        self.forced_id = self.mark_ids[at_R.clamp(0, len(self.mark_ids) - 1)]  # type: ignore[assignment]
        self.forced_R = torch.where(goes_on_R, at_R + 1, at_R)
        return goes_on_R

    def write(self) -> None:
        """Read what the tokens that were chosen are mixed to, so that the next can be."""
        latents_RD, ids = self._latents(), self.chosen_R.tolist()
        for r, (request, i) in enumerate(zip(self.requests, ids)):
            request.said.append(i)
            if i in self.enders and MARK in self.model.tokenizer.decode(request.said, skip_special_tokens=True):
                self.thinks_R[r] = False
        thinks = self.thinks_R.tolist()
        if self.options.replayable:
            for request, latent_D, is_fed in zip(self.requests, latents_RD, thinks):
                request.fed += [latent_D] * is_fed
        if self.context.meter is not None:  # a latent is the product with one matrix more, as large as the head
            self.context.meter.count_logits(self.context.rows, (self.ends_R > 0) & self.thinks_R)
        embeds = self.backbone.embed(self.chosen_R[:, None])
        fed = self.feed(embeds, latents_RD[:, None], self.thinks_R[:, None])
        self.logits_RV = self.show(self.context.read(fed, counted_B=self.ends_R > 0))

    def _latents(self) -> Tensor:
        """Return the latent of each row (R, D)."""
        hybrid, drawn = self.feed.hybrid, None
        if hybrid.noise > 0:
            k = hybrid.top_k or self.logits_RV.shape[1]
            numbers = torch.from_numpy(np.stack([self._noise_of(request).random(k) for request in self.requests]))
            drawn = numbers.float().clamp(1e-7, 1 - 1e-7).to(self.logits_RV.device)
        return self.feed.latents(self.backbone, self.drawn_from, self.chosen_R, drawn)

    def _noise_of(self, request: Request) -> np.random.Generator:
        """Return what draws the noise of a row, which depends on the seed, its question and its sample alone."""
        if request.noise is None:
            request.noise = np.random.default_rng([request.options.seed, *request.draw, 1])
        return request.noise

"""Beam search: of the texts that may be written for a question, the likeliest few are followed side by side.

    model.generate(questions, beams=4)

At each step every text is continued by every token; of the 2 k likeliest continuations those that end, among the first
k, are set aside, and the k likeliest of the others go on. A text's score is its log-likelihood divided by the number of
its tokens, the end of sequence among them; where no more may be written, texts count as they are. The search ends when
no text that goes on can reach the best score any more, as a log-likelihood never rises. These are the rules of
transformers' ``generate(num_beams=k, early_stopping="never")``.

The question is read and thought about once. All its texts write on one row of the meter, so its cost is that of all;
its thought tokens are those of the text that was chosen.

Shapes: `G` questions, `K` texts of each, `R` = G K rows, `C` = 2 K continuations, `L` tokens, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from innerloop.engine.batching import check_every
from innerloop.engine.decoding import DecodeBatch
from innerloop.engine.drawing import without
from innerloop.engine.engine import Engine
from innerloop.engine.generation import finish
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import NOTHING, Request
from innerloop.errors import refuse
from innerloop.model.model import LatentCore
from innerloop.text.row import Row


class BeamEngine(Engine):
    """Answers questions, some at a time, by the best of ``options.beams`` texts."""

    @classmethod
    def per_request(cls, model: LatentCore) -> frozenset[str]:
        """Return the options in which the requests of one engine may differ."""
        return frozenset({"max_new_tokens"})

    def __init__(self, model: LatentCore, options: EngineOptions):
        super().__init__(model, options)
        waits = self.prefill.block is not None or (model.depth is not None and model.depth.waits)
        refuse((waits, f"in '{model.method.name}' rows wait for others while they write: take one beam"))
        self.batch_size = max(1, self.batch_size // options.beams)  # questions; rows are as many as without

    def most_positions(self, row: Row, budget: int) -> int:
        """Return how many positions all texts of a row may come to occupy."""
        return super().most_positions(row, budget) * self.options.beams

    @torch.no_grad()
    def _advance(self) -> None:
        """Answer some questions."""
        self.thinking = done = self._next(max(1, self.batch_size - self.elsewhere[0] // self.options.beams))
        if not done:
            return
        batch = self.prefill(done)
        assert isinstance(batch, DecodeBatch)
        self._search(done, batch)
        found = finish(self.model, done, self.prefill.slots.meter)
        for generation in found:
            generation.depths = ()  # its texts have read tokens of their own
        self.thinking = []
        self._answer(done, found)

    def _search(self, live: list[Request], batch: DecodeBatch) -> None:
        """Write the texts of questions, and give each request its best one."""
        device, eos, ticks = self.model.device, self.model.encoder.eos_id, []
        texts, mark = Texts([request.budget for request in live], self.options.beams, device), time.perf_counter()
        while True:
            assert batch.context.meter is not None
            batch.context.meter.count_logits(batch.context.rows, batch.ends_R > 0)
            rows_R = texts.grow(without(batch.allowed(), self.suppressed), batch.ends_R, eos)
            batch.take_rows(rows_R)
            batch.chosen_R = texts.ids_GKL[..., -1].flatten()
            ends_R = batch.ends_R - (batch.chosen_R == eos).long()
            batch.ends_R = ends_R * ~texts.is_done_G.repeat_interleave(texts.width)  # what is done is billed no more
            now = time.perf_counter()
            ticks.append((now - mark) / len(live))
            mark = now
            if texts.n % check_every(device) == 0 or texts.n >= min(request.budget for request in live):
                is_done = texts.is_done_G.tolist()
                for g, request in enumerate(live):
                    if is_done[g]:
                        _settle(request, texts.best_GL[g].tolist(), float(texts.best_G[g]), ticks, eos)
                left = [g for g, done in enumerate(is_done) if not done]
                if not left:
                    return
                if len(left) < len(live):
                    live = [live[g] for g in left]
                    batch.take_rows(texts.keep(torch.tensor(left, device=device)))
                    batch.context = batch.context.trim()
            batch.write()


class Texts:
    """The texts of some questions, and the best that has ended of each.

    Args:
        budgets: how many tokens may be written for each question.
        n_beams: how many texts of each go on.
        device: where they are.

    Attributes:
        n: the tokens of each text.
        ids_GKL: the texts that go on, and ``sums_GK``, their log-likelihoods.
        best_GL: the best text that has ended, NOTHING behind its end, and ``best_G``, its score.
        is_done_G: whether none that goes on can be better.
    """

    def __init__(self, budgets: Sequence[int], n_beams: int, device: torch.device):
        self.n, self.n_beams, n_questions = 0, n_beams, len(budgets)
        self.budget_G1 = torch.tensor(budgets, device=device)[:, None]
        self.ids_GKL = torch.zeros(n_questions, 1, 0, dtype=torch.long, device=device)  # at first they are all the same
        self.sums_GK = torch.zeros(n_questions, 1, device=device)
        self.best_G, self.best_GL = torch.full_like(self.sums_GK[:, 0], -torch.inf), self.ids_GKL[:, 0]
        self.is_done_G = torch.zeros_like(self.best_G, dtype=torch.bool)

    @property
    def width(self) -> int:
        """How many texts of each question go on."""
        return self.sums_GK.shape[1]

    def grow(self, logits_RV: Tensor, ends_R: Tensor, eos: int) -> Tensor:
        """Continue all texts by a token; return which row (R,) each of those that go on has continued.

        ``ends_R`` are the ends of sequence that each text has still to write.
        """
        n_questions, width = self.sums_GK.shape
        log_probs_RV = logits_RV.float().log_softmax(-1)
        sums_GX = (self.sums_GK.view(-1, 1) + log_probs_RV).view(n_questions, -1)
        sums_GC, found_GC = sums_GX.topk(min(2 * self.n_beams, sums_GX.shape[1]))
        parent_GC, token_GC = found_GC // logits_RV.shape[1], found_GC % logits_RV.shape[1]
        ids_GCL = torch.cat([self.ids_GKL.take_along_dim(parent_GC[..., None], 1), token_GC[..., None]], dim=2)
        row_GC = parent_GC + width * torch.arange(n_questions, device=parent_GC.device)[:, None]
        self.n += 1
        is_last_G1 = self.n >= self.budget_G1
        is_over_GC = (ends_R[row_GC] - (token_GC == eos).long() <= 0) | is_last_G1

        scores_GC = (sums_GC / self.n).masked_fill(~is_over_GC, -torch.inf)
        score_G, at_G = scores_GC[:, : self.n_beams].max(1)
        is_best_G = (score_G > self.best_G) & ~self.is_done_G
        over_GL = ids_GCL.take_along_dim(at_G[:, None, None], 1)[:, 0]
        self.best_GL = torch.where(is_best_G[:, None], over_GL, pad(self.best_GL, (0, 1), value=NOTHING))
        self.best_G = torch.where(is_best_G, score_G, self.best_G)

        n_kept = min(self.n_beams, sums_GC.shape[1])
        self.sums_GK, kept_GK = sums_GC.masked_fill(is_over_GC, -torch.inf).topk(n_kept)
        self.ids_GKL = ids_GCL.take_along_dim(kept_GK[..., None], 1)
        best_possible_G = self.sums_GK[:, 0] / self.budget_G1[:, 0]
        self.is_done_G = self.is_done_G | is_last_G1[:, 0] | (best_possible_G <= self.best_G)
        return row_GC.take_along_dim(kept_GK, 1).flatten()

    def keep(self, index_G: Tensor) -> Tensor:
        """Go on with some questions; return which rows (R,) are theirs."""
        rows_GK = index_G[:, None] * self.width + torch.arange(self.width, device=index_G.device)
        for name in ("budget_G1", "ids_GKL", "sums_GK", "best_G", "best_GL", "is_done_G"):
            setattr(self, name, getattr(self, name)[index_G])
        return rows_GK.flatten()


def _settle(request: Request, ids: Sequence[int], score: float, ticks: Sequence[float], eos: int) -> None:
    """Give a request its text, and the time of all that was written for it."""
    request.written = [token for token in ids if token != NOTHING]
    n = len(request.written)
    request.n_ends, request.log_likelihood = request.written.count(eos), score * n
    request.ticks = [*ticks[: n - 1], sum(ticks[n - 1 :])]

"""Canvases whose filling is learned: the pass that predicts also shows what a scorer goes by.

What is drawn for a canvas depends on its seed and its pass alone, as everywhere. Where it is replayable, each `Commit`
has its log-probability, made by the functions that `innerloop.engine.canvas_policies` replays it with.

Shapes: `R` canvases, `G` tokens of each, `A` places that are asked for, `K` places chosen, `V` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.decoder.cost import CostMeter
from innerloop.engine.cached import CachedEngine, has_cache
from innerloop.engine.canvases import CanvasEngine, flat, likeliest, propose
from innerloop.engine.decoding import without
from innerloop.engine.requests import Request
from innerloop.methods.denoise.canvas import Canvas, Ints
from innerloop.methods.denoise.choices import coins_log_prob, ranking_log_prob
from innerloop.methods.denoise.commits import Commit, ints
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.unmasking_policy import UnmaskingPolicy
from innerloop.model.model import LatentCore
from innerloop.passes.canvas import Prompts, read_whole


@dataclass
class Stage:
    """Canvases before a pass.

    Attributes:
        prompts: their questions.
        tokens_RG: what they hold.
        asked_RG: the masks that may be filled.
        at: their rows and their places (A,), row by row.
        block_RG: the places of the active block.
        time_R: the share of the passes made (ranking), or left (commits).
    """

    prompts: Prompts
    tokens_RG: Tensor
    asked_RG: Tensor
    at: tuple[Tensor, Tensor]
    block_RG: Tensor
    time_R: Tensor


@dataclass
class Seen:
    """What a scorer goes by in a pass.

    Attributes:
        stage: the canvases before it.
        states_RGD: the states at the places that predict.
        logits_AV: of the masks that may be filled.
        drawn_R3G: three draws for each place.
    """

    stage: Stage
    states_RGD: Tensor
    logits_AV: Tensor
    drawn_R3G: Tensor


def predicted(
    model: LatentCore, stage: Stage, never: Tensor, meter: CostMeter | None = None, slots_R: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the states at the places that predict (R, G, D), and the logits of masks that may be filled (A, V)."""
    method = model.method
    assert isinstance(method, DenoisingMethod)
    states_RLD = read_whole(model.backbone, stage.prompts, stage.tokens_RG, meter, slots_R)
    first, n = stage.prompts.ids_RP.shape[1] - int(method.shift), stage.tokens_RG.shape[1]
    states_RGD = states_RLD[:, first : first + n]
    return states_RGD, without(model.backbone.head(states_RGD[stage.at]).float(), never)


def ranked(model: LatentCore, stage: Stage, states_RGD: Tensor, logits_AV: Tensor, mask_id: int) -> Tensor:
    """Return by what masks are ranked (R, G)."""
    assert model.scorer is not None
    likeliest_RG = states_RGD.new_zeros(stage.asked_RG.shape, dtype=torch.float32)
    likeliest_RG = likeliest_RG.index_put(stage.at, logits_AV.log_softmax(-1).amax(-1))
    return model.scorer(states_RGD, stage.tokens_RG == mask_id, stage.block_RG, stage.time_R, likeliest_RG)


def ranking_likelihood(
    score_RG: Tensor, logits_AV: Tensor, stage: Stage, order_RK: Tensor, tokens_RK: Tensor, is_chosen_RK: Tensor
) -> Tensor:
    """Return the log-probability of each pass's choice (R,): of the places in their order, and of the tokens there.

    Where all masks of a block must be filled, their order is no choice.
    """
    order_R = ranking_log_prob(score_RG, stage.asked_RG, order_RK, is_chosen_RK)
    is_forced_R = is_chosen_RK.sum(1) == stage.asked_RG.sum(1)
    index_RG = stage.asked_RG.flatten().cumsum(0).view(stage.asked_RG.shape) - 1
    chosen_UV = logits_AV[index_RG.gather(1, order_RK)[is_chosen_RK]].log_softmax(-1)
    likely_U = chosen_UV.gather(1, tokens_RK[is_chosen_RK][:, None])[:, 0]
    tokens_R = torch.zeros_like(order_RK, dtype=likely_U.dtype).masked_scatter(is_chosen_RK, likely_U).sum(1)
    return torch.where(is_forced_R, 0.0, order_R) + tokens_R


def coins_likelihood(logit_RG: Tensor, asked_RG: Tensor, is_drawn_RG: Tensor, fallback: str) -> Tensor:
    """Return the log-probability of which masks were drawn in each pass (R,); 0 where none was, if that is none."""
    found_R = coins_log_prob(logit_RG, asked_RG, is_drawn_RG)
    return found_R if fallback == "zeros" else torch.where(is_drawn_RG.any(1), found_R, 0.0)


class LearnedEngine(CanvasEngine, ABC):
    """Fills canvases as a scorer says."""

    def _fill_in(self, requests: Sequence[Request], canvases: Sequence[Canvas]) -> None:
        """Make one pass, and let the scorer choose what each canvas keeps of it."""
        slots, asked = self.prefill.slots, [canvas.asked() for canvas in canvases]
        before = [canvas.tokens_G.copy() for canvas in canvases]
        stage = self._stage(requests, canvases, asked)
        slots.meter.count_logits(slots.of(requests), self._sent(np.array([len(own) for own in asked])))
        states_RGD, logits_AV = predicted(self.model, stage, self.never, slots.meter, slots.of(requests))
        drawn_R3G = self._sent(np.stack([canvas.drawn() for canvas in canvases]))
        found = self._choose(canvases, asked, Seen(stage, states_RGD, logits_AV, drawn_R3G))
        for canvas, commit in zip(canvases, found):
            canvas.take(np.array(commit.places, dtype=np.int64), np.array(commit.tokens, dtype=np.int64))
            if self.options.replayable:
                canvas.commits.append(commit)
        if self.options.trace:
            self._record(requests, canvases, asked, before, logits_AV)

    def _stage(self, requests: Sequence[Request], canvases: Sequence[Canvas], asked: Sequence[Ints]) -> Stage:
        """Return canvases as tensors."""
        asked_RG = torch.zeros(len(canvases), self.method.gen_length, dtype=torch.bool)
        rows, places = flat(asked)
        asked_RG[rows, places] = True
        tokens = np.stack([canvas.tokens_G for canvas in canvases])
        block_RG = blocks_of([(canvas.start, canvas.end) for canvas in canvases], self.method.gen_length)
        time_R = times_of(self.method, [canvas.n_passes for canvas in canvases])
        asked_RG, block_RG, time_R = (part.to(self.model.device) for part in (asked_RG, block_RG, time_R))
        at = self._sent(rows), self._sent(places)
        return Stage(self._prompts(requests), self._sent(tokens), asked_RG, at, block_RG, time_R)

    @abstractmethod
    def _choose(self, canvases: Sequence[Canvas], asked: Sequence[Ints], seen: Seen) -> list[Commit]:
        """Return what each canvas keeps."""


class RankingEngine(LearnedEngine):
    """DCoLT: as many masks as are due, in the order of their scores; above temperature 0 places and tokens are drawn.

    Places drawn one after the other by softmax of their scores are the largest of scores with Gumbel's noise, in order.
    """

    def _choose(self, canvases: Sequence[Canvas], asked: Sequence[Ints], seen: Seen) -> list[Commit]:
        stage, logits_AV = seen.stage, seen.logits_AV
        score_RG = ranked(self.model, stage, seen.states_RGD, logits_AV, self.mask_id)
        temperature, by_place = self.options.temperature, seen.drawn_R3G.transpose(1, 2)[stage.at]
        tokens_A, _ = propose(logits_AV, self.method.sampler, temperature, by_place[:, 0])
        keys_A = score_RG[stage.at].double()
        if temperature > 0:
            keys_A = keys_A - (-by_place[:, 1].clamp(min=1e-300).log()).log()
        found = _apart(torch.stack([tokens_A.double(), keys_A]), asked)
        chosen = []
        for canvas, own, (tokens, keys) in zip(canvases, asked, found):
            order = np.argsort(-keys, kind="stable")[: canvas.n_due]
            chosen.append((own[order], tokens[order].astype(np.int64)))
        likely = [0.0] * len(chosen)
        if self.options.replayable:
            kept = padded(chosen, self.model.device)
            likely = ranking_likelihood(score_RG, logits_AV / temperature, stage, *kept).tolist()
        return [
            Commit(ints(own), ints(places), ints(tokens), bounds=(canvas.start, canvas.end), log_prob=log_prob)
            for canvas, own, (places, tokens), log_prob in zip(canvases, asked, chosen, likely)
        ]


class CoinsEngine(LearnedEngine):
    """Learned unmasking: each mask by a coin, at least the one with the largest chance; the likeliest tokens."""

    def _choose(self, canvases: Sequence[Canvas], asked: Sequence[Ints], seen: Seen) -> list[Commit]:
        stage, logits_AV, drawn_R3G = seen.stage, seen.logits_AV, seen.drawn_R3G
        method, scorer, is_mask_RG = self.method, self.model.scorer, stage.tokens_RG == self.mask_id
        assert isinstance(method, UnmaskingPolicy) and scorer is not None
        likely_A = logits_AV.softmax(-1).amax(-1)
        sure_RG = torch.zeros(is_mask_RG.shape, device=likely_A.device).index_put(stage.at, likely_A)
        logit_RG = scorer(sure_RG, is_mask_RG, stage.time_R) / method.tau
        beta = 1.0 if self.options.replayable else method.beta
        drawn_RG = (drawn_R3G[:, 1] < (beta * logit_RG.sigmoid()).clamp(max=1.0)) & stage.asked_RG
        tokens_A = likeliest(logits_AV, drawn_R3G[:, 0][stage.at] if method.sampler.ties == "random" else None)
        parts = drawn_RG[stage.at], tokens_A, likely_A, logit_RG[stage.at]  # all chances may be 0, but not their logits
        found = _apart(torch.stack([part.double() for part in parts]), asked)
        likely = [0.0] * len(canvases)
        if self.options.replayable:
            likely = coins_likelihood(logit_RG, stage.asked_RG, drawn_RG, method.fallback).tolist()
        commits = []
        for canvas, own, (is_drawn, tokens, sure, logits), log_prob in zip(canvases, asked, found, likely):
            chosen = np.flatnonzero(is_drawn) if is_drawn.any() else np.array([logits.argmax()])
            bounds, told = (canvas.start, canvas.end), tuple(sure.tolist())
            places, filled = ints(own[chosen]), ints(tokens[chosen])
            commits.append(Commit(ints(own), places, filled, (), bounds, log_prob, told, not is_drawn.any()))
        return commits


def _apart(found_NA: Tensor, asked: Sequence[Ints]) -> list[NDArray[np.float64]]:
    """Return what was found for the places that each canvas asked for; the device is waited for here."""
    return np.split(found_NA.cpu().numpy(), np.cumsum([len(own) for own in asked])[:-1], axis=1)


def canvas_engine(method: DenoisingMethod) -> type[CanvasEngine]:
    """Return what fills the canvases of a method."""
    if method.sampler.commit == "learned":
        return CoinsEngine if isinstance(method, UnmaskingPolicy) else RankingEngine
    return CachedEngine if has_cache(method) else CanvasEngine


def times_of(method: DenoisingMethod, n_passes: Sequence[int]) -> Tensor:
    """Return the times (R,) that scorers are told: the share of passes made, or left where any number may come."""
    n = method.gen_length if method.sampler.steps is None else method.sampler.steps
    made_R = torch.tensor(n_passes, dtype=torch.float32) / n
    return 1 - made_R if isinstance(method, UnmaskingPolicy) else made_R


def blocks_of(bounds: Sequence[tuple[int, int]], gen_length: int) -> Tensor:
    """Return which places are within bounds (R, G)."""
    bounds_R2, at_G = torch.tensor(bounds), torch.arange(gen_length)
    return (at_G >= bounds_R2[:, :1]) & (at_G < bounds_R2[:, 1:])


def padded(
    chosen: Sequence[tuple[Sequence[int] | Ints, Sequence[int] | Ints]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return places and tokens that were chosen, in order (R, K) each, and which of them are real."""
    width = max(len(places) for places, _ in chosen)
    found = torch.zeros(2, len(chosen), width, dtype=torch.long)
    is_chosen_RK = torch.zeros(len(chosen), width, dtype=torch.bool)
    for r, pair in enumerate(chosen):
        n = len(pair[0])
        for i in range(2):
            found[i, r, :n] = torch.as_tensor(np.asarray(pair[i], dtype=np.int64))
        is_chosen_RK[r, :n] = True
    return found[0].to(device), found[1].to(device), is_chosen_RK.to(device)

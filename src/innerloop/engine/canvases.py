"""Denoising in the engine: canvases are rows of one batch, join and leave between passes, and share each pass.

Each canvas is at its own step. A pass reads all of them whole and predicts the places that each asks for; what a canvas
keeps of that it decides by itself (`Canvas.commit`). A canvas whose text can change no more leaves, and a question that
waits takes its place.

Shapes: `R` canvases, `G` tokens of each, `A` places that are asked for, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.engine.drawing import choose, without
from innerloop.engine.engine import Engine
from innerloop.engine.events import Event
from innerloop.engine.generation import finish
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import Request
from innerloop.engine.soft_canvases import SoftCanvases
from innerloop.errors import InputError, refuse
from innerloop.loop.trace import HIDDEN, Frame
from innerloop.methods.denoise.canvas import ALIKE, Canvas, Ints
from innerloop.methods.denoise.commits import commit_between
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.settings import SamplerSettings
from innerloop.model.model import LatentCore
from innerloop.passes.canvas import Prompts, lean, predict
from innerloop.text.row import Row

C = TypeVar("C", bound=Canvas)


class CanvasEngine(Engine):
    """Fills canvases, one for each sample of a question."""

    @classmethod
    def per_request(cls, model: LatentCore) -> frozenset[str]:
        """Return the options in which the requests of one engine may differ."""
        return frozenset({"max_new_tokens", "seed", "samples"})

    def __init__(self, model: LatentCore, options: EngineOptions):
        method = model.method if options.loops is None else model.method.with_loops(options.loops)
        assert isinstance(method, DenoisingMethod)
        refuse(
            (options.beams > 1, f"'{method.name}' fills canvases and follows no beams: take samples, or one beam"),
            (
                options.starts > 1,
                f"'{method.name}' has no latents that could begin elsewhere: take samples, or one start",
            ),
            (
                options.likelihoods,
                f"what '{method.name}' fills in has no likelihood that is known exactly: leave likelihoods out",
            ),
        )
        self.method, self.live = method, list[tuple[Request, Canvas]]()
        self.mask_id = method.mask_id(model.encoder)
        self.soft = None if model.soft is None else SoftCanvases(model.soft, model.backbone)
        super().__init__(model, options)
        ends = torch.tensor([model.encoder.eos_id], device=model.device)
        self.never = torch.cat([self.suppressed, ends]) if method.sampler.eos == "never" else self.suppressed

    def _reset(self) -> None:
        super()._reset()
        self.live = []

    @property
    def is_at_work(self) -> bool:
        """Whether any canvas is not full."""
        return bool(self.waiting or self.live or self.events)

    def _budget(self, row: Row, options: EngineOptions) -> int:
        """Return how many tokens of a row's canvas are told; what is longer is cut."""
        room, n = self.model.backbone.context_length, len(row) + self.method.gen_length
        if room is not None and n > room:
            raise InputError(
                f"a question takes {len(row)} positions and its canvas {self.method.gen_length}, but the model reads "
                f"at most {room}: shorten the question"
            )
        return min(options.max_new_tokens, self.method.gen_length)

    def most_positions(self, row: Row, budget: int) -> int:
        """Return how many positions a row occupies."""
        return (len(row) + self.method.gen_length) * (2 if self.method.sampler.guidance > 0 else 1)

    def _read(self) -> list[Request]:
        return [request for request, _ in self.live]

    def _drop(self) -> None:
        super()._drop()
        self.live = []

    @torch.no_grad()
    def _advance(self) -> None:
        """Let canvases in if there is room, then make one pass over all of them."""
        self.mark = time.perf_counter()
        free = self.batch_size - self.elsewhere[0] - len(self.live)
        joining = self._next(free) if free > 0 else []
        if joining:
            self.prefill.slots.take(joining)
            self.live += [(request, self._canvas(request)) for request in joining]
        requests, canvases = [request for request, _ in self.live], [canvas for _, canvas in self.live]
        if not requests:
            return
        self._fill_in(requests, canvases)
        self._tell_canvases(requests, canvases)
        share = (time.perf_counter() - self.mark) / len(requests)
        done = [i for i, canvas in enumerate(canvases) if canvas.is_done]
        for request in requests:
            request.waited += share
        for i in done:
            _settle(requests[i], canvases[i].written(), self.model.encoder.eos_id)
        if done:
            found = finish(self.model, [requests[i] for i in done], self.prefill.slots.meter)
            for i, generation in zip(done, found):
                generation.cost.loops, generation.commits = canvases[i].n_passes, canvases[i].commits
            self._stay([i for i, canvas in enumerate(canvases) if not canvas.is_done])
            self._answer([requests[i] for i in done], found)

    def _tell_canvases(self, requests: Sequence[Request], canvases: Sequence[Canvas]) -> None:
        """Tell what canvases are after a pass."""
        for request, canvas in zip(requests, canvases) if self.tells_all else ():
            shown = tuple(np.where(canvas.tokens_G == self.mask_id, HIDDEN, canvas.tokens_G).tolist())
            self.events.append(Event(request.id, request.draw[1], canvas=shown, n_final=canvas.n_final))

    @property
    def n_writing(self) -> int:
        """How many canvases are filled."""
        return len(self.live)

    def _leave(self, gone: Sequence[Request]) -> None:
        self._stay([i for i, (request, _) in enumerate(self.live) if request not in gone])

    def _stay(self, kept: Sequence[int]) -> None:
        """Let all canvases go but some."""
        self.live = [self.live[i] for i in kept]

    def _canvas(self, request: Request) -> Canvas:
        seed = [request.options.seed, *request.draw]
        eos_id = self.model.encoder.eos_id
        return self._begun(Canvas(self.method.sampler, self.method.gen_length, self.mask_id, eos_id, seed))

    def _begun(self, canvas: C) -> C:
        """Return a canvas as it begins: as masks, or random tokens."""
        if self.method.noise.filler == "random":
            canvas.fill(len(self.model.tokenizer))
        return canvas

    def _fill_in(self, requests: Sequence[Request], canvases: Sequence[Canvas]) -> None:
        """Make one pass, and let each canvas keep of it what it will; the device is waited for once."""
        sampler, soft, slots = self.method.sampler, self.soft, self.prefill.slots
        asked, before = [canvas.asked() for canvas in canvases], [canvas.tokens_G.copy() for canvas in canvases]
        read = asked if soft is None else [soft.watched(canvas) for canvas in canvases]
        rows, places = flat(asked)
        drawn = np.stack([canvas.drawn() for canvas in canvases])
        numbers_A = self._sent(drawn[rows, 0, places])
        slots.meter.count_logits(slots.of(requests), self._sent(np.array([len(one) for one in read])))
        logits_AV = self._predict(requests, canvases, read)
        own_AV, logits_AV = logits_AV[: sum(map(len, read))], lean(logits_AV, sampler.guidance)
        if soft is not None:
            logits_AV = logits_AV[self._sent(_within(asked, read))]
        logits_AV = without(logits_AV, self.never)
        tokens_A, scores_A = propose(logits_AV, sampler, self.options.temperature, numbers_A)
        found_2A = torch.stack([tokens_A.double(), scores_A.double()]).cpu().numpy()
        parts = np.split(found_2A, np.cumsum([len(own) for own in asked])[:-1], axis=1)
        for canvas, own, was_G, part_2A in zip(canvases, asked, before, parts):
            bounds = canvas.start, canvas.end
            canvas.commit(part_2A[0].astype(np.int64), part_2A[1])
            if self.options.replayable:
                order = own[np.argsort(-part_2A[1], kind="stable")]
                canvas.commits.append(commit_between(was_G, canvas.tokens_G, own, order, self.mask_id, bounds))
        if soft is not None:
            soft.keep(canvases, before, read, own_AV)
        if self.options.trace:
            self._record(requests, canvases, asked, before, logits_AV)

    def _record(
        self,
        requests: Sequence[Request],
        canvases: Sequence[Canvas],
        asked: Sequence[Ints],
        before: Sequence[Ints],
        logits_AV: Tensor,
    ) -> None:
        """Add a pass to the trace of each canvas."""
        parts = logits_AV.split([len(own) for own in asked])
        for request, canvas, places, was, own_AV in zip(requests, canvases, asked, before, parts):
            request.record = request.record or (self.model.new_trace(), 0)
            was, now = (np.where(tokens == self.mask_id, HIDDEN, tokens).tolist() for tokens in (was, canvas.tokens_G))
            trace = request.record[0]
            trace.frames.append(Frame(places.tolist(), trace.read(own_AV[None]), was, now))

    def _predict(self, requests: Sequence[Request], canvases: Sequence[Canvas], asked: Sequence[Ints]) -> Tensor:
        """Return the logits (A, V) of places, canvas by canvas, in one pass; (2A, V) with guidance, for `lean`."""
        model, slots = self.model, self.prefill.slots
        rows, places = map(self._sent, flat(asked))
        tokens_RG = self._sent(np.stack([canvas.read_G for canvas in canvases]))
        embeds_RGD = None if self.soft is None else self.soft.embeds(canvases, tokens_RG)
        guidance = (self.method.sampler.guidance, self.mask_id)
        return predict(
            model.backbone, self._prompts(requests), tokens_RG, (rows, places), self.method.shift, guidance,
            slots.meter, slots.of(requests), embeds_RGD,
        )  # fmt: skip

    def _sent(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device, non_blocking=True)

    def _prompts(self, requests: Sequence[Request]) -> Prompts:
        """Return the questions of requests, padded before."""
        ids = [request.row.ids() for request in requests]
        width, pad, device = max(map(len, ids)), self.model.encoder.pad_id, self.model.device
        mask = [[0] * (width - len(one)) + [1] * len(one) for one in ids]
        padded = torch.tensor([[pad] * (width - len(one)) + one for one in ids], device=device)
        is_padded = any(len(one) < width for one in ids)
        return Prompts(padded, torch.tensor(mask, device=device) if is_padded else None)


def flat(places: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return the rows (A,) and the places (A,) of the places of several canvases."""
    return np.repeat(np.arange(len(places)), [len(own) for own in places]), np.concatenate(places)


def _within(asked: Sequence[Ints], read: Sequence[Ints]) -> Ints:
    """Return where the places that are asked for are among those that are read, which are more."""
    first = np.cumsum([0, *map(len, read)])
    return np.concatenate([start + np.searchsorted(own, a) for start, own, a in zip(first, read, asked)])


def propose(logits_AV: Tensor, sampler: SamplerSettings, temperature: float, drawn_A: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is predicted for each place (A,), and the score by which it is ranked (A,).

    Args:
        logits_AV: of tokens that may be written.
        sampler: how canvases are filled.
        temperature: 0 takes the likeliest token, above it one is drawn.
        drawn_A: the numbers in [0, 1) that draw tokens, at temperature 0 among those that are equally likely.
    """
    plain_AV = logits_AV
    if temperature > 0 and sampler.is_tempered:
        logits_AV, temperature = logits_AV / temperature, 1.0
    if sampler.top_p < 1:
        logits_AV = nucleus(logits_AV, sampler.top_p, temperature or 1.0)
    if temperature > 0:
        tokens_A = choose(logits_AV, logits_AV.new_zeros(0, dtype=torch.long), temperature, drawn_A)
    else:
        tokens_A = likeliest(logits_AV, drawn_A if sampler.ties == "random" else None)
    return tokens_A, scores_of(sampler.commit, logits_AV if sampler.is_tempered else plain_AV, tokens_A)


def nucleus(logits_AV: Tensor, top_p: float, temperature: float) -> Tensor:
    """Return logits without the tokens beyond a share of the probability; the one that crosses it stays."""
    shares_AV, order_AV = (logits_AV.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    is_beyond_AV = shares_AV.cumsum(-1) - shares_AV >= top_p
    return logits_AV.masked_fill(torch.empty_like(is_beyond_AV).scatter(1, order_AV, is_beyond_AV), -torch.inf)


def likeliest(logits_AV: Tensor, drawn_A: Tensor | None) -> Tensor:
    """Return the likeliest token of each place: of several the lowest, or the one that a number in [0, 1) points at."""
    is_best_AV = logits_AV >= logits_AV.max(-1, keepdim=True).values - 10.0**-ALIKE
    if drawn_A is None:
        return is_best_AV.long().argmax(-1)
    n_A = is_best_AV.sum(-1)
    which_A = (drawn_A * n_A).long().clamp(max=n_A - 1)
    return (is_best_AV.cumsum(-1) == which_A[:, None] + 1).long().argmax(-1)


def scores_of(commit: str, logits_AV: Tensor, tokens_A: Tensor) -> Tensor:
    """Return by what each predicted token is ranked (A,): its probability, its lead, or minus the entropy."""
    log_probs_AV = logits_AV.double().log_softmax(-1)
    if commit == "entropy":
        return -torch.special.entr(log_probs_AV.exp()).sum(-1)
    if commit == "margin":
        best_A2 = log_probs_AV.topk(2).values.exp()
        return best_A2[:, 0] - best_A2[:, 1]
    return log_probs_AV.gather(1, tokens_A[:, None])[:, 0].exp()


def _settle(request: Request, ids: Sequence[int], eos: int) -> None:
    """Give a request its text, and the time of all its passes, evenly over the tokens."""
    ids, seconds = ids[: request.budget], request.waited
    request.waited, n = 0.0, max(len(ids), 1)
    request.take(ids, [seconds / n] * len(ids), eos, 1)

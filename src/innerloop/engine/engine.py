"""The engine: requests come in, think together, write together, and leave as soon as they are answered.

    waiting   requests, those of like length together
    thought   some of them: prefill, then the inner loop; rows that halt leave it between two iterations
    writing   one batch, a token at each step; rows that have ended leave it, rows that have thought join it

Requests think when there is room in the batch that writes; what does not fit yet is kept ready. So both phases run on
full batches, whatever lengths answers have. Duplicates think together, unless they are more than a batch holds.
Where memory runs out, rows go back to those that wait and fewer run together from then on; see `Engine._give_way`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor, nn

from innerloop.decoder.memory import is_out_of_memory
from innerloop.decoder.packed import PackedWeights, release
from innerloop.engine.decoding import DecodeBatch
from innerloop.engine.generation import Generation, failed, finish
from innerloop.engine.options import EngineOptions
from innerloop.engine.prefill import Prefill
from innerloop.engine.requests import Request, check_starts, lay_out
from innerloop.errors import InputError, refuse
from innerloop.model.answer_decoder import Classifier
from innerloop.model.model import LatentCore
from innerloop.text.row import Row

CHECK_EVERY: int | None = None
"""Tokens between two looks at which rows have ended; a look waits for the device. None: 1 on a CPU, 8 elsewhere."""

Answered = list[tuple[int, Generation]]


@dataclass
class Unseen:
    """What has been chosen since the host looked last: tokens, log-probabilities where asked for, seconds of each."""

    tokens: list[Tensor] = field(default_factory=list)
    likely: list[Tensor] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)


class Engine:
    """Answers questions with continuous batching: `admit` takes one in, each `step` writes a token of those that write.

    for index, generation in Engine(model).run(questions): ...     # as they are answered
    """

    def __init__(self, model: LatentCore, options: EngineOptions | None = None):
        options = options or EngineOptions()
        by_class = isinstance(model.decoder, Classifier)
        several = options.samples > 1 or options.beams > 1
        searches = model.hybrid is not None and options.beams > 1
        refuse((searches, f"'{model.method.name}' is fed more than a text, so beams cannot be compared: take one beam"))
        refuse((several and by_class, "this model answers by a class, and writes no text: take one sample, one beam"))
        model.method.stage_or_last(options.stage)
        self.model, self.options, self.batch_size = model, options, options.batch_size
        self.suppressed = model.suppressed_ids()
        self.n_loops_of: Mapping[tuple[int, int], int] | None = None  # of samples, where they differ
        self.is_busy = False
        self._reset()

    def _reset(self) -> None:
        """Forget all requests."""
        self.waiting: list[Request] = []  # a heap
        self.prompts: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # number those that wait
        self.prefill = Prefill(self.model, self.options, 2 * self.batch_size)
        self.thinking: list[Request] = []
        self.ready: DecodeBatch | None = None  # has thought, and written nothing yet
        self.joining: list[Request] = []  # rows on their way to those that write
        self.decode_batch: DecodeBatch | None = None
        self.most: int | None = None  # rows that may be in the engine together, once memory has run out
        self.unseen = Unseen()
        self.spent, self.mark = 0.0, 0.0
        self.answered: Answered = []  # and not told yet

    @property
    def is_at_work(self) -> bool:
        """Whether anything waits, or is being answered."""
        return bool(self.waiting) or self.ready is not None or self.decode_batch is not None

    def run(
        self, questions: Sequence[str], steps: Sequence[Sequence[str]] | None = None, strict: bool = True
    ) -> Iterator[tuple[int, Generation]]:
        """Yield each answer's index (question * answers of each + answer) and generation as soon as it is there.

        Between two of them the model is in the mode that it was in, and others may use it.
        """
        for found in self.groups(questions, steps, strict):
            yield from found

    def groups(
        self,
        questions: Sequence[str],
        steps: Sequence[Sequence[str]] | None = None,
        strict: bool = True,
        begun: Sequence[Sequence[str]] | None = None,
        places: Sequence[int] | None = None,
    ) -> Iterator[Answered]:
        """Yield what `run` yields, those together that were answered at once."""
        for name, of_each in (("steps", steps), ("begun", begun), ("places", places)):
            if of_each is not None and len(of_each) != len(questions):
                raise InputError(f"{name}: of {len(of_each)} questions, but {len(questions)} are asked")
        if self.is_busy:
            raise InputError("this engine is still answering other questions; close that run first, or make another")
        self.is_busy, parts = True, list(self.model.modules())
        try:
            self._reset()
            refused: Answered = []
            for i, question in enumerate(questions):
                try:
                    known = () if steps is None else steps[i]
                    place = i if places is None else places[i]
                    self.admit(i, question, known, None if begun is None else begun[i], place)
                except Exception as error:  # a tokenizer names no errors of its own
                    if strict:
                        raise
                    n = self.options.n_answers
                    refused += [(i * n + s, failed(self.model, " ".join(str(error).split()))) for s in range(n)]
            yield refused
            packed = PackedWeights(parts if self.waiting and self.model.backbone.compiled is None else [])
            while self.is_at_work:
                with evaluating(parts), packed.used():
                    found = self.step(strict)
                yield found
        finally:  # whatever ended the run, the next one begins afresh
            if self.model.training:  # weights are about to change
                release(parts)
            self._reset()
            self.is_busy = False

    def admit(
        self,
        index: int,
        question: str,
        steps: Sequence[str] = (),
        begun: Sequence[str] | None = None,
        place: int | None = None,
    ) -> None:
        """Take in a question, whose samples wait from now on; ``steps`` are the gold ones, where known.

        An answer goes on from what it has ``begun`` with. Draws depend on its ``place``, by default its index.

        Raises:
            InputError: it cannot be answered. A tokenizer may raise errors of its own.
        """
        options = self.options
        shown = steps if options.trace else None
        row, blocks = lay_out(self.model, question, options.stage, options.loops, shown, begun)
        budget = self._budget(row)
        most, limit = self.most_positions(row, budget), options.max_positions
        if limit is not None and most > limit:
            raise InputError(
                f"the question '{question[:40]}...' may come to take {most} positions, which is more than the "
                f"{limit} of max_positions; raise it, lower max_new_tokens or shorten the question"
            )
        n = options.n_answers
        if options.starts > 1:
            check_starts(self.model, row, self.prefill.block)
        for s in range(n):
            apart = (index, s) if options.starts > 1 and s > 0 else ()  # begins at a state of its own
            own = row if self.n_loops_of is None else replace(row, n_loops=self.n_loops_of[index, s])
            prompt = self.prompts.setdefault((tuple(row.ids()), (*apart, own.n_loops)), len(self.prompts))
            draw = (index if place is None else place, s)
            heappush(self.waiting, Request(index * n + s, own, budget, blocks, draw, prompt))

    def _budget(self, row: Row) -> int:
        """Return how many tokens may be written for a row."""
        room, most = self.model.backbone.context_length, self.options.max_new_tokens
        return most if room is None else min(most, room - len(row))

    def most_positions(self, row: Row, budget: int) -> int:
        """Return how many positions a row may come to occupy."""
        n, room, block = len(row) + budget, self.model.backbone.context_length, self.prefill.block
        if block is not None:  # the latents that it may open while it writes
            n += min(block.most - bool(row.region), budget) * block.n_read
        return n if room is None else min(n, room)

    def step(self, strict: bool = True) -> Answered:
        """Let requests in if there is room, and write one token; return the answers that this has completed.

        As many rows run as memory takes. One that does not fit by itself raises, or without ``strict`` has failed.
        """
        while True:
            try:
                self._advance()
                break
            except Exception as error:
                n_rows = len(self._in_flight())
                if not is_out_of_memory(error) or n_rows == 0 or (n_rows == 1 and strict):
                    raise
                reason = " ".join(str(error).split())[:200]
            self._give_way(reason)  # out here, where nothing holds on to what the failed pass has made
        found, self.answered = self.answered, []
        return found

    # Memory

    def _read(self) -> list[Request]:
        """Return the rows that write, or are ready to."""
        return [request for batch in (self.ready, self.decode_batch) if batch is not None for request in batch.requests]

    def _in_flight(self) -> list[Request]:
        """Return the rows that think, have thought or write."""
        return [*self.thinking, *self.joining, *self._read()]

    def _give_way(self, reason: str) -> None:
        """After memory has run out, let half as many rows run together; a row that was alone has failed, for a reason.

        Rows that were being read wait again, and others write on; where memory ran out in writing, all begin anew.
        Costs are those of the attempt that succeeds.
        """
        requests = self._in_flight()
        if len(requests) > 1:
            self.most = len(requests) // 2
        fell = self.thinking or requests
        if not self.thinking:
            self._drop()
        self.thinking, self.joining = [], []
        self.prefill.slots.release(fell)
        if len(requests) == 1:
            index, n = requests[0].index, len(requests[0].row)
            told = f"the question takes {n} positions and does not fit into memory by itself ({reason}); shorten it"
            self.answered.append((index, failed(self.model, told)))
        else:
            self.waiting += [request.anew(self._budget(request.row)) for request in fell]
            heapify(self.waiting)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _drop(self) -> None:
        """Let go of all that has been read."""
        self.ready = self.decode_batch = None
        self.unseen = Unseen()

    # Steps

    @torch.no_grad()
    def _advance(self) -> None:
        """Let rows in if there is room, then write one token."""
        self.mark = time.perf_counter()
        if not self.unseen.tokens:
            self._fill()
        batch, unseen = self.decode_batch, self.unseen
        if batch is None:
            return
        batch.choose(self.suppressed, self.options.temperature, self.options.likely_at)
        unseen.tokens.append(batch.chosen_R)
        if batch.likely_R is not None:
            unseen.likely.append(batch.likely_R)
        now = time.perf_counter()
        unseen.ticks.append(self.spent + now - self.mark)
        self.spent, self.mark = 0.0, now
        n = len(unseen.tokens)
        if n >= check_every(self.model.device) or n >= min(
            request.budget - len(request.written) for request in batch.requests
        ):
            self._look(batch)
        if batch.requests:
            batch.write()
        else:
            self.decode_batch = None
        self.spent = time.perf_counter() - self.mark

    def _fill(self) -> None:
        """Let rows that have thought join those that write, if there is room."""
        while self.waiting or self.ready is not None:
            batch, ready = self.decode_batch, self.ready
            free = self.batch_size - (0 if batch is None else len(batch.requests))
            if batch is not None and (free < max(1, self.batch_size // 8) or self.options.trace or not batch.joins):
                break
            if ready is None:
                if not self._think():
                    break
                continue
            if batch is not None and not ready.joins:
                break
            n, self.ready, part = min(free, len(ready.requests)), None, ready
            self.joining = ready.requests
            if n < len(ready.requests):
                part, self.ready = ready.split(n), ready
                self.joining = part.requests
            if batch is None:
                self.decode_batch = part
            else:
                batch.join(part)
            self.joining = []

    def _think(self) -> bool:
        """Let some of those that wait think; False where there is no room for any."""
        requests = self._next()
        if requests:
            self.spent += time.perf_counter() - self.mark
            self.thinking = requests
            found = self.prefill(requests)
            if isinstance(found, DecodeBatch):
                self.ready = found
            else:
                self._answer(requests, found)
            self.thinking = []
            self.mark = time.perf_counter()
        return bool(requests)

    def _next(self, most: int | None = None) -> list[Request]:
        """Take from those that wait as many as there is room for, and no more than ``most`` (None: a batch)."""
        busy, limit = self._read(), self.options.max_positions
        taken = sum(self.most_positions(request.row, request.budget) for request in busy)
        requests: list[Request] = []
        most = self.batch_size if most is None else most
        most = most if self.most is None else min(most, self.most - len(busy))
        while self.waiting and len(requests) < most:
            longest = self.waiting[0]  # rows are padded to the longest, which is the last
            n = self.most_positions(longest.row, longest.budget) * (len(requests) + 1)
            if limit is not None and n > limit - taken:
                break
            requests.append(heappop(self.waiting))
        if self.waiting and requests and self.waiting[0].prompt == requests[-1].prompt != requests[0].prompt:
            while requests[-1].prompt == self.waiting[0].prompt:  # duplicates come together, and are read once
                heappush(self.waiting, requests.pop())
        return requests

    def _look(self, batch: DecodeBatch) -> None:
        """Move chosen tokens to the host; rows that have ended leave."""
        unseen, self.unseen = self.unseen, Unseen()
        tokens = torch.stack(unseen.tokens, dim=1).tolist()
        ticks = [seconds / len(batch.requests) for seconds in unseen.ticks]
        likely = torch.stack(unseen.likely, dim=1).tolist() if unseen.likely else [None] * len(tokens)
        eos, n_ends = self.model.encoder.eos_id, self.model.method.n_ends
        for request, ids, log_probs in zip(batch.requests, tokens, likely):
            request.take(ids, ticks, eos, n_ends, log_probs)
        done = [request for request in batch.requests if request.is_done(n_ends)]
        if not done:
            return
        found = finish(self.model, done, self.prefill.slots.meter)
        if len(done) < len(batch.requests):
            batch.keep_rows([i for i, request in enumerate(batch.requests) if not request.is_done(n_ends)])
        else:
            batch.requests = []
        self._answer(done, found)

    def _answer(self, requests: Sequence[Request], found: Sequence[Generation]) -> None:
        """Let requests go with what was written for them."""
        self.prefill.slots.release(requests)
        self.answered += [(request.index, generation) for request, generation in zip(requests, found)]


def check_every(device: torch.device) -> int:
    """Return how many tokens there are between two looks."""
    return CHECK_EVERY or (1 if device.type == "cpu" else 8)


@contextmanager
def evaluating(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules in evaluation mode in the block; each goes back to the mode it was in."""
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

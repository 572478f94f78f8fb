"""The engine: requests come in, think together, write together, and leave as soon as they are answered.

    waiting   requests, those of like length together
    thought   some of them: prefill, then the inner loop; rows that halt leave it between two iterations
    writing   one batch, a token at each step; rows that have ended leave it, rows that have thought join it

Requests think when there is room in the batch that writes; what does not fit yet is kept ready. So both phases run on
full batches, whatever lengths answers have. Duplicates think together, unless they are more than a batch holds.
Where memory runs out, rows go back to those that wait and fewer run together from then on; see `Engine._give_way`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from innerloop.decoder.memory import is_out_of_memory
from innerloop.engine.decoding import DecodeBatch
from innerloop.engine.events import Event
from innerloop.engine.generation import Generation, failed, finish
from innerloop.engine.options import EngineOptions
from innerloop.engine.prefill import Prefill
from innerloop.engine.requests import Alternatives, Request
from innerloop.engine.waiting import Waiting
from innerloop.loop.trace import Iteration, Trace
from innerloop.model.model import LatentCore
from innerloop.text.row import Row

CHECK_EVERY: int | None = None
"""Tokens between two looks at which rows have ended; a look waits for the device. None: 1 on a CPU, 8 elsewhere."""


@dataclass
class Unseen:
    """What has been chosen since the host looked last: tokens, seconds of each, and what else is asked for of them."""

    tokens: list[Tensor] = field(default_factory=list)
    likely: list[Tensor] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)


class Batching:
    """The requests of an engine, from when they wait until what has happened to them is told.

    Attributes:
        elsewhere: rows of others that write on the same model, and positions that these may come to occupy; they count
            as its own.
        tells_all: whether events tell what happens to answers before they are there.
        on_loop: called in the middle of a step with what an iteration of a traced thought shows.
    """

    elsewhere = (0, 0)
    tells_all = False
    on_loop: Callable[[Event], None] | None = None

    def __init__(self, model: LatentCore, options: EngineOptions):
        self.model, self.options, self.batch_size = model, options, options.batch_size
        self.suppressed = model.suppressed_ids()
        self._reset()

    def _reset(self) -> None:
        """Forget all requests."""
        self.waiting, self.ids = Waiting(self.batch_size), itertools.count()
        self.prefill = Prefill(self.model, self.options, 2 * self.batch_size, self._tell_loop)
        self.thinking: list[Request] = []
        self.ready: DecodeBatch | None = None  # has thought, and written nothing yet
        self.joining: list[Request] = []  # rows on their way to those that write
        self.decode_batch: DecodeBatch | None = None
        self.most: int | None = None  # rows that may be in the engine together, once memory has run out
        self.unseen = Unseen()
        self.spent, self.mark = 0.0, 0.0
        self.events: list[Event] = []  # not told yet

    @property
    def is_at_work(self) -> bool:
        """Whether anything waits, is being answered, or has not been told."""
        return bool(self.waiting or self.events) or self.ready is not None or self.decode_batch is not None

    def _leave(self, gone: Sequence[Request]) -> None:
        """Let some of the rows that write, or are ready to, leave."""
        for name in ("ready", "decode_batch"):
            batch = getattr(self, name)
            if batch is None or not any(request in gone for request in batch.requests):
                continue
            kept = [i for i, request in enumerate(batch.requests) if request not in gone]
            if kept:
                batch.keep_rows(kept)
            setattr(self, name, batch if kept else None)

    def _budget(self, row: Row, options: EngineOptions) -> int:
        """Return how many tokens may be written for a row."""
        room, most = self.model.backbone.context_length, options.max_new_tokens
        return most if room is None else min(most, room - len(row))

    def most_positions(self, row: Row, budget: int) -> int:
        """Return how many positions a row may come to occupy."""
        n, room, block = len(row) + budget, self.model.backbone.context_length, self.prefill.block
        if block is not None:  # the latents that it may open while it writes
            n += min(block.most - bool(row.region), budget) * block.n_read
        return n if room is None else min(n, room)

    def _step(self, strict: bool) -> None:
        """Do what `step` does."""
        while True:
            try:
                self._advance()
                break
            except Exception as error:
                n_rows = len(self.in_flight())
                if not is_out_of_memory(error) or n_rows == 0 or (n_rows == 1 and strict):
                    raise
                reason = " ".join(str(error).split())[:200]
            self._give_way(reason)  # out here, where nothing holds on to what the failed pass has made

    @property
    def n_writing(self) -> int:
        """How many rows write."""
        return 0 if self.decode_batch is None else len(self.decode_batch.requests)

    @property
    def n_positions(self) -> int:
        """How many positions those that have been read may come to occupy."""
        return sum(self.most_positions(request.row, request.budget) for request in self._read())

    # Memory

    def _read(self) -> list[Request]:
        """Return the rows that write, or are ready to."""
        return [request for batch in (self.ready, self.decode_batch) if batch is not None for request in batch.requests]

    def in_flight(self) -> list[Request]:
        """Return the rows that think, have thought or write."""
        return [*self.thinking, *self.joining, *self._read()]

    def _give_way(self, reason: str) -> None:
        """After memory has run out, let half as many rows run together; a row that was alone has failed, for a reason.

        Rows that were being read wait again, and others write on; where memory ran out in writing, all begin anew.
        Costs are those of the attempt that succeeds.
        """
        requests = self.in_flight()
        if len(requests) > 1:
            self.most = len(requests) // 2
        fell = self.thinking or requests
        if not self.thinking:
            self._drop()
        self.thinking, self.joining = [], []
        self.prefill.slots.release(fell)
        if len(requests) == 1:
            one, n = requests[0], len(requests[0].row)
            told = f"the question takes {n} positions and does not fit into memory by itself ({reason}); shorten it"
            self.events.append(Event(one.id, one.draw[1], generation=failed(self.model, told)))
        else:
            self.waiting.again(request.anew(self._budget(request.row, request.options)) for request in fell)
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
        batch.choose(self.suppressed)
        unseen.tokens.append(batch.chosen_R)
        if batch.likely_R is not None:
            unseen.likely.append(batch.likely_R)
        if batch.others_2RK is not None:
            unseen.others.append(batch.others_2RK)
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
            free = self.batch_size - self.elsewhere[0] - (0 if batch is None else len(batch.requests))
            if free <= 0 and self.elsewhere[0] > 0:
                break
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
                self._tell_thoughts(requests)
            else:
                self._answer(requests, found)
            self.thinking = []
            self.mark = time.perf_counter()
        return bool(requests)

    def _next(self, most: int | None = None) -> list[Request]:
        """Take from those that wait as many as there is room for, and no more than ``most`` (None: a batch)."""
        (n_rows, n_positions), limit = self.elsewhere, self.options.max_positions
        most = self.batch_size - n_rows if most is None else most
        most = most if self.most is None else min(most, self.most - len(self._read()))
        room = None if limit is None else limit - n_positions - self.n_positions
        return self.waiting.take(most, room, self.most_positions)

    def _tell_thoughts(self, requests: Sequence[Request]) -> None:
        """Tell what latents show, before anything is written."""
        for request in requests if self.tells_all else ():
            if request.record is not None:
                record, row = request.record
                self.events.append(Event(request.id, request.draw[1], thought=record.row(row)))

    def _tell_loop(self, requests: Sequence[Request], entry: Iteration) -> None:
        """Tell what latents show after an iteration, while they are thought about."""
        if self.on_loop is not None:
            for row in entry.rows:
                one = requests[row]
                self.on_loop(Event(one.id, one.draw[1], loop=Trace(iterations=[entry.of(row)])))

    def _look(self, batch: DecodeBatch) -> None:
        """Move chosen tokens to the host; rows that have ended leave."""
        unseen, self.unseen = self.unseen, Unseen()
        tokens = torch.stack(unseen.tokens, dim=1).tolist()
        ticks = [seconds / len(batch.requests) for seconds in unseen.ticks]
        likely = torch.stack(unseen.likely, dim=1).tolist() if unseen.likely else [None] * len(tokens)
        others = _alternatives(unseen.others, len(tokens))
        eos, n_ends = self.model.encoder.eos_id, self.model.method.n_ends
        for request, ids, log_probs, own in zip(batch.requests, tokens, likely, others):
            asks = request.options.likely_at is not None
            request.take(ids, ticks, eos, n_ends, log_probs if asks else None, own if asks else ())
            self._tell_tokens(request)
        done = [request for request in batch.requests if request.is_done(n_ends)]
        if not done:
            return
        found = finish(self.model, done, self.prefill.slots.meter)
        if len(done) < len(batch.requests):
            batch.keep_rows([i for i, request in enumerate(batch.requests) if not request.is_done(n_ends)])
        else:
            batch.requests = []
        self._answer(done, found)

    def _tell_tokens(self, request: Request) -> None:
        """Tell the tokens of a request that have not been told."""
        if self.tells_all and (ids := tuple(request.written[request.n_told :])):
            more = tuple(request.log_probs[request.n_told :]), tuple(request.alternatives[request.n_told :])
            request.n_told += len(ids)
            self.events.append(Event(request.id, request.draw[1], ids, *more))

    def _answer(self, requests: Sequence[Request], found: Sequence[Generation]) -> None:
        """Let requests go with what was written for them."""
        self.prefill.slots.release(requests)
        for request, generation in zip(requests, found):
            self.events.append(Event(request.id, request.draw[1], generation=generation))


def _alternatives(others: Sequence[Tensor], n_rows: int) -> list[list[Alternatives]]:
    """Return the likeliest tokens in place of each that was chosen, row by row; ``others`` are (2, R, K) each."""
    if not others:
        return [[] for _ in range(n_rows)]
    found = [torch.stack(own).tolist() for own in zip(*[list(one.unbind(1)) for one in others])]
    return [[tuple(zip(map(int, ids), likely)) for ids, likely in row] for row in found]


def check_every(device: torch.device) -> int:
    """Return how many tokens there are between two looks."""
    return CHECK_EVERY or (1 if device.type == "cpu" else 8)

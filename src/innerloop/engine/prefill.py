"""Prefill and thought: some requests are read and thought about together, up to the logits of their first tokens.

Requests with the same prompt are duplicates: questions that are asked more than once, and those of which several
answers are drawn. One of them is read for all. What all begin with is read once (`innerloop.engine.shared_prefix`).

Shapes: `R` rows that write, `S` columns of what they have been given to write on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from innerloop.decoder.cost import Meter
from innerloop.engine.decoding import ApartWriter, BlockWriter, PatientWriter, Writer
from innerloop.engine.generation import Generation, gold_of, read_last, traced
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import Seat
from innerloop.engine.shared_prefix import begin, n_shared
from innerloop.loop.trace import Trace
from innerloop.model.answer_decoder import AnswerDecoder, Classifier
from innerloop.model.model import LatentCore
from innerloop.passes.region import join
from innerloop.passes.thought import Thought
from innerloop.text.encoder import ANSWER_PREFIX


class Slots:
    """The rows of a meter: a request has one from when it is read until it is answered."""

    def __init__(self, n: int, device: torch.device):
        self.meter, self.free = Meter(n, device), list(range(n))[::-1]

    def take(self, seats: Sequence[Seat]) -> None:
        """Give requests slots, in which nothing has been counted and whose time is theirs now."""
        for seat in seats:
            seat.slot = self.free.pop()
        taken = [seat.slot for seat in seats]
        self.meter.reset(self.of(seats), taken)
        self.meter.sharing = taken

    def release(self, seats: Sequence[Seat]) -> None:
        """Take slots back."""
        self.free += [seat.slot for seat in seats]

    def of(self, seats: Sequence[Seat]) -> Tensor:
        """Return the slots of requests."""
        return torch.tensor([seat.slot for seat in seats], device=self.meter.passes.device)


class Prefill:
    """Reads requests and thinks about them.

    Args:
        model: what reads.
        options: how questions are answered.
        n_slots: how many requests may be read and not answered at a time.
    """

    def __init__(self, model: LatentCore, options: EngineOptions, n_slots: int):
        self.model, self.options = model, options
        self.block = model.block(options.loops)
        self.slots = Slots(n_slots, model.device)

    def __call__(self, seats: list[Seat]) -> Writer | list[Generation]:
        """Return those who write, with the logits of their first tokens; or their answers, where these are classes."""
        model, is_traced = self.model, self.options.trace
        first: dict[int, int] = {}
        same = [i if is_traced else first.setdefault(seat.prompt, len(first)) for i, seat in enumerate(seats)]
        read = [seats[same.index(i)] for i in range(len(set(same)))]
        self._bill(seats)
        record = self._trace(seats) if is_traced else None
        self.slots.take(seats)
        rows = [seat.row for seat in read]
        n = 0 if is_traced else n_shared(model, rows)
        batch, context = begin(model, rows, n, self.slots.meter, self.slots.of(read))

        # What is pending is read with the first answer token.
        columns, mask = batch.columns(2)
        suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)] if columns.start < columns.stop else []
        thought = model.think(batch, record, context)
        if thought.loop is not None:
            for seat, i in zip(seats, same):
                seat.n_loops = seat.billed * thought.loop.n_loops[i]
        if isinstance(model.decoder, Classifier):
            return self._classify(seats, same, thought)
        writer = self._writer(read, thought, batch.ids_BS[:, columns])
        with self.slots.meter.phase("answer" if thought.context.length > n else "prefill"):
            writer.start(join([*thought.pending, *suffix]))
        if record is not None and writer.first_states is not None:
            read_last(model, record, batch, thought, writer.first_states)
        if len(read) < len(seats):
            self._copy_depths(seats, [read[i] for i in same])
            writer.keep_rows(same)
            writer.seats, writer.context.rows = list(seats), self.slots.of(seats)
        writer.context = writer.context.trim()
        writer.uniforms = self._uniforms(seats) if self.options.temperature > 0 else None
        return writer

    def _bill(self, seats: Sequence[Seat]) -> None:
        """Bill what the samples of a question share to the first of them here; in a trace each is read by itself."""
        firsts = {seat.draw[0]: seat for seat in reversed(seats)}
        for seat in seats:
            seat.billed = self.options.trace or seat is firsts[seat.draw[0]]

    def _trace(self, seats: list[Seat]) -> Trace:
        """Begin a trace, with a meter of its own: both speak of rows by their place among the requests."""
        self.slots, record = Slots(len(seats), self.model.device), self.model.new_trace()
        if any(seat.blocks for seat in seats):
            record.gold = gold_of([seat.blocks for seat in seats], [seat.row for seat in seats], self.model.device)
        for i, seat in enumerate(seats):
            seat.record = record, i
        return record

    def _writer(self, seats: Sequence[Seat], thought: Thought, ids_RS: Tensor) -> Writer:
        model, context = self.model, thought.context
        if isinstance(model.decoder, AnswerDecoder):
            return ApartWriter(model, context, seats, model.memory(thought), ids_RS)
        if self.block is not None:
            return BlockWriter(model, context, seats, self.block)
        return (PatientWriter if model.depth is not None and model.depth.waits else Writer)(model, context, seats)

    def _copy_depths(self, seats: Sequence[Seat], read: Sequence[Seat]) -> None:
        """Let requests know how deeply their question was read, by whichever row it was read for."""
        depths = self.slots.meter.token_depths()
        for seat, other in zip(seats, read):
            depths[seat.slot] = list(depths[other.slot])

    def _uniforms(self, seats: Sequence[Seat]) -> Tensor:
        """Return the numbers that draw each row's tokens (R, budget)."""
        n = max(seat.budget for seat in seats)
        drawn = np.stack([np.random.default_rng([self.options.seed, *seat.draw]).random(n) for seat in seats])
        return torch.from_numpy(drawn).to(self.model.device)

    def _classify(self, seats: list[Seat], same: list[int], thought: Thought) -> list[Generation]:
        """Answer by the class of the largest logit."""
        model, meter = self.model, self.slots.meter
        assert isinstance(model.decoder, Classifier)
        with meter.phase("answer"):
            best = model.decoder(thought).argmax(-1).tolist()
        found = []
        for seat, i, cost in zip(seats, same, meter.costs(model.backbone, [seat.slot for seat in seats])):
            answer = model.decoder.classes[best[i]]
            cost.thought_tokens, cost.loops = model.n_thought_positions(seat.row), seat.n_loops
            found.append(traced(model, seat, Generation(ANSWER_PREFIX + answer, answer, cost)))
        return found

"""The engine: questions come in, think in waves, write together, and leave as soon as they are answered.

    waiting   questions, those of like length together
    thought   a wave of them: prefill, then the inner loop; rows that halt leave it between two iterations
    writing   one batch, a token at each step; rows that have ended leave it, rows that have thought join it

A wave thinks when there is room in the batch that writes; what does not fit yet is kept ready. So both phases run on
full batches, whatever lengths answers have. Questions that are asked more than once, and those of which several answers
are drawn, are read and thought about once: they are of one wave, unless they are more than it holds. What all questions
of a wave begin with is read once (`innerloop.engine.shared_prefix`).
Where memory runs out, rows go back to those that wait and fewer run together from then on; see `Engine._give_way`.

    gens = generate(model, ["3 ; + 4 ; * 2"], max_new_tokens=8)
    gens[0].text, gens[0].answer, gens[0].cost
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from innerloop.decoder.cost import Meter
from innerloop.decoder.memory import is_out_of_memory
from innerloop.decoder.packed import PackedWeights
from innerloop.engine.decoding import ApartWriter, BlockWriter, PatientWriter, Writer
from innerloop.engine.generation import Generation, Seat, failed, finish, gold_of, lay_out, read_last, traced
from innerloop.engine.shared_prefix import begin, n_shared
from innerloop.errors import InputError
from innerloop.loop.trace import Trace
from innerloop.model.answer_decoder import AnswerDecoder, Classifier
from innerloop.passes.context import Context
from innerloop.passes.thought import Thought, join, think
from innerloop.text.encoder import ANSWER_PREFIX
from innerloop.text.row import Row

if TYPE_CHECKING:
    from innerloop.model.model import LatentCore

CHECK_EVERY: int | None = None
"""Tokens between two looks at which rows have ended; a look waits for the device. None: 1 on a CPU, 8 elsewhere."""


def generate(
    model: LatentCore,
    questions: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    trace: bool = False,
    stage: int | None = None,
    loops: int | None = None,
    progress: Callable[[int], None] | None = None,
    steps: Sequence[Sequence[str]] | None = None,
    max_positions: int | None = None,
    strict: bool = True,
    samples: int = 1,
    beams: int = 1,
    likelihoods: bool = False,
) -> list[Generation]:
    """Answer questions, in the order given; the samples of each come after each other.

    Args:
        model: the model; it is put into evaluation mode for the time being.
        questions: the questions.
        max_new_tokens: the most tokens to write per question.
        batch_size: how many rows write, or think, together.
        temperature: 0 writes the likeliest token, above it tokens are drawn.
        seed: of the draws; what is drawn depends on it, the question's index and the sample's number alone.
        trace: record what the loop did, with read-outs.
        stage: the curriculum's stage whose layout is used; None: the last.
        loops: another number of loops than the model was trained with.
        progress: called with the number of questions answered since the last call.
        steps: the gold steps of each question, where known: a trace then has the ranks of their tokens.
        max_positions: the most positions that rows in the engine may come to occupy together; None: no limit but
            ``batch_size``. A question that may come to take more by itself cannot be answered.
        strict: refuse them all if one cannot be answered (it is too long, empty, no text, or does not fit into memory
            or ``max_positions`` by itself); otherwise that one alone fails, with its reason in ``error``.
        samples: how many answers are drawn for each question. The first are those that fewer samples would give; what
            they share is charged to one of them.
        beams: how many texts a search for the likeliest one follows (`innerloop.engine.beams`); 1 searches for nothing.
        likelihoods: also tell the log-likelihood of what is written.
    """
    settings = (model, max_new_tokens, batch_size, temperature, seed, trace, stage, loops, max_positions)
    if beams == 1:
        engine = Engine(*settings, samples, likelihoods)
    else:
        from innerloop.engine.beams import BeamEngine

        engine = BeamEngine(*settings, samples, beams=beams)
    results: list[Generation | None] = [None] * (samples * len(questions))
    for found in engine.groups(questions, steps, strict):
        for index, generation in found:
            results[index] = generation
        if progress is not None and found:
            progress(len(found))
    return [generation for generation in results if generation is not None]


class Engine:
    """Answers questions with continuous batching; see `generate` for the arguments.

    for index, generation in Engine(model).run(questions): ...     # as they are answered
    """

    def __init__(
        self,
        model: LatentCore,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        trace: bool = False,
        stage: int | None = None,
        loops: int | None = None,
        max_positions: int | None = None,
        samples: int = 1,
        likelihoods: bool = False,
    ):
        if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
            raise InputError("generation needs temperature >= 0, max_new_tokens >= 1 and batch_size >= 1")
        if temperature > 0 and seed < 0:
            raise InputError(f"seed is {seed}, but draws need a seed of 0 or more")
        if max_positions is not None and max_positions < 1:
            raise InputError("max_positions must be at least 1, or left out")
        if samples < 1 or (samples > 1 and temperature == 0):
            raise InputError(f"{samples} samples: give at least 1, and a temperature above 0 for several to differ")
        if samples > 1 and isinstance(model.decoder, Classifier):
            raise InputError("this model answers by a class, and draws nothing: take one sample")
        self.samples, self.likelihoods = samples, likelihoods
        self.model, self.max_new_tokens, self.batch_size = model, max_new_tokens, batch_size
        self.temperature, self.seed, self.traces = temperature, seed, trace
        self.stage, self.loops, self.max_positions = stage, loops, max_positions
        self.block, self.suppressed = model.block(loops), model.suppressed_ids()
        self.waiting: deque[Seat] = deque()
        self.ready: Writer | None = None  # has thought, and written nothing yet
        self.writer: Writer | None = None
        self.most: int | None = None  # rows that may be in the engine together, once memory has run out
        self.meter = Meter(0, model.device)
        self.free: list[int] = []  # rows of the meter that nobody uses
        self.pending: list[Tensor] = []  # tokens chosen since the last look
        self.likely: list[Tensor] = []  # their log-probabilities, where asked for
        self.ticks: list[float] = []  # and the seconds of each step
        self.spent, self.mark = 0.0, 0.0
        self.thinking: list[Seat] = []  # the wave that is being read
        self.joining: list[Seat] = []  # rows on their way to those that write
        self.answered: list[tuple[int, Generation]] = []  # and not told yet
        self.is_busy = False

    def run(
        self, questions: Sequence[str], steps: Sequence[Sequence[str]] | None = None, strict: bool = True
    ) -> Iterator[tuple[int, Generation]]:
        """Yield each answer's index (question * samples + sample) and generation as soon as it is there.

        Between two of them the model is in the mode that it was in, and others may use it.
        """
        for found in self.groups(questions, steps, strict):
            yield from found

    def groups(
        self, questions: Sequence[str], steps: Sequence[Sequence[str]] | None = None, strict: bool = True
    ) -> Iterator[list[tuple[int, Generation]]]:
        """Yield what `run` yields, those together that were answered at once."""
        if steps is not None and len(steps) != len(questions):
            raise InputError(f"steps are of {len(steps)} questions, but {len(questions)} are asked")
        if self.is_busy:
            raise InputError("this engine is still answering other questions; close that run first, or make another")
        self.is_busy, parts = True, list(self.model.modules())
        try:
            yield self._seat(questions, steps, strict)
            packed = PackedWeights(parts if self.waiting and self.model.backbone.compiled is None else [])
            while self.waiting or self.ready is not None or self.writer is not None:
                with _evaluating(parts), packed.used():
                    self._advance_in_memory(strict)
                yield self._answered()
        finally:  # whatever ended the run, the next one begins afresh
            self.waiting.clear()
            self.ready = self.writer = self.most = None
            self.thinking, self.joining, self.answered = [], [], []
            self.pending, self.likely, self.ticks, self.spent, self.is_busy = [], [], [], 0.0, False

    # Questions

    def _seat(
        self, questions: Sequence[str], steps: Sequence[Sequence[str]] | None, strict: bool
    ) -> list[tuple[int, Generation]]:
        """Lay questions out and let them wait, the shortest first; return those that cannot be answered."""
        seats, refused = [], []
        twins: dict[tuple[int, ...], int] = {}
        for index, question in enumerate(questions):
            told = (() if steps is None else steps[index]) if self.traces else None
            try:
                row, blocks = lay_out(self.model, question, self.stage, self.loops, told)
                budget = self._budget(row)
                self._check_room(question, self._most(row, budget))
            except Exception as error:  # a tokenizer names no errors of its own
                if strict:
                    raise
                reason = " ".join(str(error).split())
                refused += [(index * self.samples + s, failed(self.model, reason)) for s in range(self.samples)]
                continue
            twin = twins.setdefault(tuple(row.ids()), len(twins))
            for s in range(self.samples):
                seats.append(Seat(index * self.samples + s, row, budget, blocks=blocks, draw=(index, s), twin=twin))
        self.waiting.extend(sorted(seats, key=lambda seat: seat.order))
        n_places = min(2 * self.batch_size, len(seats))
        self.meter, self.free = Meter(n_places, self.model.device), list(range(n_places))
        return refused

    def _budget(self, row: Row) -> int:
        """Return how many tokens may be written for a row."""
        room = self.model.backbone.context_length
        return self.max_new_tokens if room is None else min(self.max_new_tokens, room - len(row))

    def _most(self, row: Row, budget: int) -> int:
        """Return how many positions a row may come to occupy."""
        n, room = len(row) + budget, self.model.backbone.context_length
        if self.block is not None:  # the latents that it may open while it writes
            n += min(self.block.most - bool(row.region), budget) * self.block.n_read
        return n if room is None else min(n, room)

    def _check_room(self, question: str, most: int) -> None:
        if self.max_positions is not None and most > self.max_positions:
            raise InputError(
                f"the question '{question[:40]}...' may come to take {most} positions, which is more than the "
                f"{self.max_positions} of max_positions; raise it, lower max_new_tokens or shorten the question"
            )

    def _wave(self) -> list[Seat]:
        """Take from those that wait as many as there is room for, one at least."""
        busy = [seat for writer in (self.writer, self.ready) if writer is not None for seat in writer.seats]
        taken = sum(self._most(seat.row, seat.budget) for seat in busy)
        room = None if self.max_positions is None else self.max_positions - taken
        wave: list[Seat] = []
        most = self.batch_size if self.most is None else min(self.batch_size, self.most - len(busy))
        while self.waiting and len(wave) < most:
            longest = self.waiting[0]  # rows are padded to the longest, which is the last
            if room is not None and self._most(longest.row, longest.budget) * (len(wave) + 1) > room:
                break
            wave.append(self.waiting.popleft())
        if self.waiting and wave and self.waiting[0].twin == wave[-1].twin != wave[0].twin:
            while wave[-1].twin == self.waiting[0].twin:  # they come together, and are read once
                self.waiting.appendleft(wave.pop())
        return wave

    # Steps

    def _answered(self) -> list[tuple[int, Generation]]:
        """Return what has been answered since it was last asked."""
        found, self.answered = self.answered, []
        return found

    def _advance_in_memory(self, strict: bool) -> None:
        """Advance, with as few rows as memory takes."""
        while True:
            try:
                return self._advance()
            except Exception as error:
                n_rows = len(self._in_flight())
                if not is_out_of_memory(error) or n_rows == 0 or (n_rows == 1 and strict):
                    raise
                reason = " ".join(str(error).split())[:200]
            self._give_way(reason)  # out here, where nothing holds on to what the failed pass has made

    def _in_flight(self) -> list[Seat]:
        """Return the rows that think, have thought or write."""
        writing = [seat for writer in (self.ready, self.writer) if writer is not None for seat in writer.seats]
        return [*self.thinking, *self.joining, *writing]

    def _give_way(self, reason: str) -> None:
        """After memory has run out, let half as many rows run together; a row that was alone has failed, for a reason.

        A wave that was being read waits again, and others write on; where memory ran out in writing, all begin anew.
        Costs are those of the attempt that succeeds.
        """
        seats = self._in_flight()
        if len(seats) > 1:
            self.most = len(seats) // 2
        fell = self.thinking or seats
        if not self.thinking:
            self.ready = self.writer = None
            self.pending, self.likely, self.ticks = [], [], []
        self.thinking, self.joining = [], []
        self._release(fell)
        if len(seats) == 1:
            index, n = seats[0].index, len(seats[0].row)
            told = f"the question takes {n} positions and does not fit into memory by itself ({reason}); shorten it"
            self.answered.append((index, failed(self.model, told)))
        else:
            fresh = [seat.anew(self._budget(seat.row)) for seat in fell]
            self.waiting = deque(sorted([*fresh, *self.waiting], key=lambda seat: seat.order))
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _advance(self) -> None:
        """Let rows in if there is room, then write one token."""
        self.mark = time.perf_counter()
        if not self.pending:
            self._admit()
        writer = self.writer
        if writer is None:
            return
        writer.choose(self.suppressed, self.temperature, self.likelihoods)
        self.pending.append(writer.chosen_R)
        if writer.likely_R is not None:
            self.likely.append(writer.likely_R)
        now = time.perf_counter()
        self.ticks.append(self.spent + now - self.mark)
        self.spent, self.mark = 0.0, now
        n = len(self.pending)
        if n >= check_every(self.model.device) or n >= min(seat.budget - len(seat.written) for seat in writer.seats):
            self._collect(writer)
        if writer.seats:
            writer.write()
        else:
            self.writer = None
        self.spent = time.perf_counter() - self.mark

    def _admit(self) -> None:
        """Let rows that have thought join those that write, if there is room."""
        while self.waiting or self.ready is not None:
            n_writing = 0 if self.writer is None else len(self.writer.seats)
            free = self.batch_size - n_writing
            if self.writer is not None and (
                free < max(1, self.batch_size // 8) or self.traces or not self.writer.joins
            ):
                break
            if self.ready is None:
                wave = self._wave()
                if not wave:
                    break
                self.spent += time.perf_counter() - self.mark
                self.thinking = wave
                self.ready = self._think(wave)
                self.thinking = []
                self.mark = time.perf_counter()
                continue
            if self.writer is not None and not self.ready.joins:
                break
            n, ready = min(free, len(self.ready.seats)), self.ready
            self.joining, self.ready = ready.seats, None
            part = ready
            if n < len(ready.seats):
                part, self.ready = ready.split(n), ready
                self.joining = part.seats
            if self.writer is None:
                self.writer = part
            else:
                self.writer.join(part)
            self.joining = []

    def _think(self, wave: list[Seat]) -> Writer | None:
        """Prefill and thought of a wave, and the logits of its first tokens; None where its answers are classes."""
        model = self.model
        first: dict[int, int] = {}  # rows that are asked the same are read once
        same = [i if self.traces else first.setdefault(seat.twin, len(first)) for i, seat in enumerate(wave)]
        seats = [wave[same.index(i)] for i in range(len(set(same)))]
        firsts = {seat.draw[0]: seat for seat in reversed(wave)}  # of each question
        for seat in wave:
            seat.charged = self.traces or seat is firsts[seat.draw[0]]
        record = self._seat_traced(wave) if self.traces else None
        if record is None:
            for seat in wave:
                seat.place = self.free.pop()
            self.meter.reset(self._places(wave), [seat.place for seat in wave])
        self.meter.sharing = [seat.place for seat in wave]
        rows = [seat.row for seat in seats]
        n = 0 if record is not None else n_shared(model, rows)
        batch, context = begin(model, rows, n, self.meter, None if record is not None else self._places(seats))
        if context.depth is not None:
            context.depth.trace = record

        # What is pending is read with the first answer token.
        columns, mask = batch.columns(2)
        suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)] if columns.start < columns.stop else []
        thought = think(model.method, model.loop, batch, context, record, model.read_out, stem=model.spell.stem())
        if thought.loop is not None:
            for seat, i in zip(wave, same):
                seat.n_loops = seat.charged * thought.loop.n_loops[i]
        if isinstance(model.decoder, Classifier):
            self._classify(wave, same, thought)
            return None
        writer = self._writer(thought.context, seats, thought, batch.ids_BS[:, columns])
        with self.meter.phase("answer" if thought.context.length > n else "prefill"):
            writer.start(join([*thought.pending, *suffix]))
        if record is not None and writer.first_states is not None:
            read_last(model, record, batch, thought, writer.first_states)
        if len(seats) < len(wave):
            self._share_depths(wave, [seats[i] for i in same])
            writer.keep_rows(same)
            writer.seats, writer.context.rows = list(wave), self._places(wave)
        writer.context = writer.context.trim()
        writer.uniforms = self._uniforms(wave) if self.temperature > 0 else None
        return writer

    def _writer(self, context: Context, seats: Sequence[Seat], thought: Thought, ids_RS: Tensor) -> Writer:
        model = self.model
        if isinstance(model.decoder, AnswerDecoder):
            return ApartWriter(model, context, seats, None, model.memory(thought), ids_RS)
        if self.block is not None:
            return BlockWriter(model, context, seats, None, self.block)
        kind = PatientWriter if model.depth is not None and model.depth.waits else Writer
        return kind(model, context, seats)

    def _share_depths(self, wave: Sequence[Seat], read: Sequence[Seat]) -> None:
        """Let rows know how deeply their question was read, by whichever row it was read for."""
        depths = self.meter.token_depths()
        for seat, other in zip(wave, read):
            depths[seat.place] = list(depths[other.place])

    def _uniforms(self, seats: Sequence[Seat]) -> Tensor:
        """Return the numbers that draw each row's tokens (R, budget)."""
        n = max(seat.budget for seat in seats)
        drawn = np.stack([np.random.default_rng([self.seed, *seat.draw]).random(n) for seat in seats])
        return torch.from_numpy(drawn).to(self.model.device)

    def _places(self, seats: Sequence[Seat]) -> Tensor:
        return torch.tensor([seat.place for seat in seats], device=self.model.device)

    def _seat_traced(self, wave: list[Seat]) -> Trace:
        """Begin the trace of a wave, which has a meter of its own: both speak of rows by their place in the wave."""
        self.meter, record = Meter(len(wave), self.model.device), self.model.new_trace()
        if any(seat.blocks for seat in wave):
            record.gold = gold_of([seat.blocks for seat in wave], [seat.row for seat in wave], self.model.device)
        for i, seat in enumerate(wave):
            seat.place, seat.record = i, (record, i)
        return record

    def _collect(self, writer: Writer) -> None:
        """Move chosen tokens to the host; rows that have ended leave."""
        tokens = torch.stack(self.pending, dim=1).tolist()
        ticks = [seconds / len(writer.seats) for seconds in self.ticks]
        likely = torch.stack(self.likely, dim=1).tolist() if self.likely else [None] * len(tokens)
        self.pending, self.likely, self.ticks = [], [], []
        eos, n_ends = self.model.spell.eos_id, self.model.method.n_ends
        for seat, ids, log_probs in zip(writer.seats, tokens, likely):
            seat.take(ids, ticks, eos, n_ends, log_probs)
        done = [seat for seat in writer.seats if seat.is_done(n_ends)]
        if not done:
            return
        found = finish(self.model, done, self.meter)
        if len(done) < len(writer.seats):
            writer.keep_rows([i for i, seat in enumerate(writer.seats) if not seat.is_done(n_ends)])
        else:
            writer.seats = []
        self._release(done)
        self.answered += [(seat.index, generation) for seat, generation in zip(done, found)]

    def _release(self, seats: Sequence[Seat]) -> None:
        if not self.traces:
            self.free += [seat.place for seat in seats]

    def _classify(self, wave: list[Seat], same: list[int], thought: Thought) -> None:
        """Answer by the class of the largest logit."""
        model = self.model
        assert isinstance(model.decoder, Classifier)
        with self.meter.phase("answer"):
            best = model.decoder(thought).argmax(-1).tolist()
        found = []
        for seat, i, cost in zip(wave, same, self.meter.costs(model.backbone, [seat.place for seat in wave])):
            answer = model.decoder.classes[best[i]]
            cost.thought_tokens, cost.loops = model.n_thought_positions(seat.row), seat.n_loops
            found.append((seat.index, traced(model, seat, Generation(ANSWER_PREFIX + answer, answer, cost))))
        self._release(wave)
        self.answered += found


def check_every(device: torch.device) -> int:
    """Return how many tokens there are between two looks."""
    return CHECK_EVERY or (1 if device.type == "cpu" else 8)


@contextmanager
def _evaluating(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules in evaluation mode in the block; each goes back to the mode it was in."""
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

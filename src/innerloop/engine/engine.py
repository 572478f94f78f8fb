"""The engine: questions are taken in one by one, or many at once, and answered as they come and go.

    engine = Engine(model)
    engine.submit("3 ; + 4 ; * 2")
    while engine.is_at_work:
        for event in engine.step():
            event.id, event.generation

How they share the model is told in `innerloop.engine.batching`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace

from innerloop.engine.at_work import AtWork
from innerloop.engine.batching import Batching
from innerloop.engine.events import Event
from innerloop.engine.generation import Generation, failed, finish
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import check_starts, lay_out
from innerloop.errors import InputError, refuse
from innerloop.model.answer_decoder import Classifier
from innerloop.model.model import LatentCore
from innerloop.model.stopping import ruled_by

Answered = list[tuple[int, Generation]]


class Engine(Batching):
    """Answers questions with continuous batching: `submit` takes one in, each `step` writes a token.

    for index, generation in Engine(model).run(questions): ...     # as they are answered

    Attributes:
        n_loops_of: the iterations of each (question, sample), where they differ.
    """

    n_loops_of: Mapping[tuple[int, int], int] | None = None

    @classmethod
    def per_request(cls, model: LatentCore) -> frozenset[str]:
        """Return the options in which the requests of one engine may differ."""
        own = frozenset({"max_new_tokens", "seed", "samples"})
        drawn = frozenset({"temperature", "likelihoods", "alternatives", "replayable"})
        return own if model.hybrid is not None else own | drawn

    def __init__(self, model: LatentCore, options: EngineOptions | None = None):
        options = options or EngineOptions()
        model.method.stage_or_last(options.stage)
        super().__init__(model, options)
        self.check(options)
        if options.stop is not None:
            with ruled_by(model, **options.stop):  # refused here, not in the first step
                pass
        self.is_busy = False
        self.at_work: AtWork | None = None

    # Many questions at once

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
        if self.is_busy or self.is_at_work:
            raise InputError("this engine is still answering other questions; close that run first, or make another")
        self.is_busy, n = True, self.options.n_answers
        try:
            self._reset()
            for i, question in enumerate(questions):
                try:
                    known, start = (() if steps is None else steps[i]), None if begun is None else begun[i]
                    self.submit(question, None, known, start, id=i, place=i if places is None else places[i])
                except Exception as error:  # a tokenizer names no errors of its own
                    if strict:
                        raise
                    one = failed(self.model, " ".join(str(error).split()))
                    self.events += [Event(i, s, generation=one) for s in range(n)]
            refused, self.events = self.events, []
            yield _answered(refused, n)
            while self.is_at_work:
                yield _answered(self.step(strict), n)
        finally:  # whatever ended the run, the next one begins afresh
            self.close()
            self.is_busy = False

    # One by one

    def submit(
        self,
        question: str,
        options: EngineOptions | None = None,
        steps: Sequence[str] = (),
        begun: Sequence[str] | None = None,
        id: int | None = None,
        place: int = 0,
    ) -> int:
        """Take in a question, whose samples wait from now on; return the id by which events and `cancel` know it.

        Args:
            question: what is asked.
            options: how it is answered; they may differ from the engine's in what `per_request` names. None: as those.
            steps: the gold steps, where known.
            begun: what the answer has begun with and goes on from; see `generate`.
            id: the id, one that no other request has; None: a new one.
            place: what its draws depend on besides the seed: its place among the questions that are asked together.

        Raises:
            InputError: it cannot be answered. A tokenizer may raise errors of its own.
        """
        options = options or self.options
        self.check(options)
        shown = steps if options.trace else None
        row, blocks = lay_out(self.model, question, options.stage, options.loops, shown, begun)
        budget = self._budget(row, options)
        most, limit = self.most_positions(row, budget), self.options.max_positions
        if limit is not None and most > limit:
            raise InputError(
                f"the question '{question[:40]}...' may come to take {most} positions, which is more than the "
                f"{limit} of max_positions; raise it, lower max_new_tokens or shorten the question"
            )
        if options.starts > 1:
            check_starts(self.model, row, self.prefill.block)
        id = next(self.ids) if id is None else id
        rows = [row] * options.n_answers
        if self.n_loops_of is not None:
            rows = [replace(row, n_loops=self.n_loops_of[id, s]) for s in range(options.n_answers)]
        self.waiting.add(id, rows, budget, options, blocks, place)
        return id

    def check(self, options: EngineOptions) -> None:
        """Refuse options that this model, or this engine, cannot answer by."""
        several, by_class = max(options.samples, options.beams) > 1, isinstance(self.model.decoder, Classifier)
        searches = self.model.hybrid is not None and options.beams > 1
        own = {field.name for field in fields(options)} - self.per_request(self.model) - {"batch_size", "max_positions"}
        other = sorted(name for name in own if getattr(options, name) != getattr(self.options, name))
        name = self.model.method.name
        refuse(
            (searches, f"'{name}' is fed more than a text, so beams cannot be compared: take one beam"),
            (several and by_class, "this model answers by a class, and writes no text: take one sample, one beam"),
            (bool(other), f"all requests of this engine have the same {', '.join(other)}"),
        )

    def step(self, strict: bool = False) -> list[Event]:
        """Let requests in if there is room, and write one token; return what has happened.

        As many rows run as memory takes. One that does not fit by itself has failed, or with ``strict`` raises.
        """
        if self.at_work is None:
            self.at_work = AtWork(self.model, self.options.stop)
        with self.at_work.step():
            self._step(strict)
        events, self.events = self.events, []
        if not self.is_at_work:
            self._rest()
        return events

    def cancel(self, id: int) -> list[Generation]:
        """Let a question go, with all of its samples; return what was written for those that were being answered."""
        if self.unseen.tokens and self.decode_batch is not None:
            self._look(self.decode_batch)
            self.decode_batch = self.decode_batch if self.decode_batch.requests else None
        self.waiting.remove(id)
        gone = [request for request in self._read() if request.id == id]
        found = finish(self.model, gone, self.prefill.slots.meter) if gone else []
        found += [event.generation for event in self.events if event.id == id and event.generation is not None]
        self.events = [event for event in self.events if event.id != id]
        self._leave(gone)
        self.prefill.slots.release(gone)
        return found

    def close(self) -> None:
        """Let all questions go."""
        self._reset()
        self._rest()

    def _rest(self) -> None:
        """Leave the model as it was."""
        if self.at_work is not None:
            self.at_work.end()
            self.at_work = None


def _answered(events: Sequence[Event], n: int) -> Answered:
    """Return the answers among events by their index, where each question has ``n``."""
    return [(one.id * n + one.sample, one.generation) for one in events if one.generation is not None]

"""One request from its questions to what is sent: all at once, or event by event."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from innerloop.decoder.cost import Cost
from innerloop.engine.events import Event
from innerloop.serve import protocol
from innerloop.serve.answers import Answers, errors_of
from innerloop.serve.guard import error_of
from innerloop.serve.metrics import Metrics
from innerloop.serve.text import Writing
from innerloop.serve.worker import Asked, Worker


class Failed(Exception):
    """The engine could not answer, for no fault of the request."""


class Exchange:
    """A request while it is answered.

    Args:
        worker: answers.
        metrics: count.
        name: the model's.
        asked: the request.
        most: how many tokens an answer may have.
    """

    def __init__(self, worker: Worker, metrics: Metrics, name: str, asked: protocol.Asked, most: int):
        self.worker, self.metrics, self.asked, self.start = worker, metrics, asked, time.perf_counter()
        self.options, self.questions = asked.options(most), asked.questions
        is_chat, tokenizer = isinstance(asked, protocol.ChatAsked), worker.model.tokenizer
        self.answers = Answers(name, tokenizer, is_chat, asked.n_alternatives, self.options["seed"])
        n, eos_id = self.options.get("samples", 1), worker.model.encoder.eos_id
        self.writings = [Writing(tokenizer, eos_id, asked.stops) for _ in range(n * len(self.questions))]
        self.handed: list[Asked] = []
        self.costs: list[Cost] = []
        self.has_begun = False

    async def begin(self) -> None:
        """Hand the questions over; all of them, or none.

        Raises:
            Full: as many wait as may.
            InputError: one cannot be answered.
        """
        is_paced = bool(self.asked.stream or self.asked.stops)  # a stop text is looked for in what is told
        try:
            for question in self.questions:
                self.handed.append(await self.worker.ask(question, self.options, is_paced))
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Let go of what has not been answered."""
        for one in self.handed:
            if one.n_left > 0:
                self.worker.cancel(one)

    @property
    def n_read(self) -> int:
        """The tokens of all questions."""
        return sum(one.n_read for one in self.handed)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield what happens, each with the place of its answer; ends once nothing more is to be told.

        Raises:
            Failed: an answer cannot be given.
        """
        n = self.options.get("samples", 1)
        for q, one in enumerate(self.handed):
            own = self.writings[q * n : (q + 1) * n]
            async for event in one:
                if not self.has_begun:
                    self.metrics.first.observe(time.perf_counter() - self.start)
                    self.has_begun = True
                if event.generation is not None:
                    if reason := errors_of([event.generation]):
                        raise Failed(reason)
                    self.costs.append(event.generation.cost)
                yield q * n + event.sample, event
                if all(writing.is_over for writing in own) and one.n_left > 0:  # a stop text has come
                    self.costs += [found.cost for found in await self.worker.cancel(one)]
                    break
        self.metrics.count(self.costs)
        self.metrics.whole.observe(time.perf_counter() - self.start)

    async def whole(self) -> dict[str, Any]:
        """Return all answers at once."""
        try:
            async for place, event in self.events():
                self.writings[place].take(event)
        finally:
            self.leave()
        return self.answers.whole(self.writings, self.n_read, self.costs)

    async def stream(self) -> AsyncIterator[str]:
        """Yield server-sent events."""
        try:
            if self.answers.is_chat:
                for place in range(len(self.writings)):
                    yield _sent(self.answers.first(place))
            async for place, event in self.events():
                for chunk in self._chunks(place, event):
                    yield _sent(chunk)
            if self.asked.tells_usage:
                yield _sent(self.answers.usage(self.n_read, self.costs))
        except Failed as error:
            yield _sent(error_of(str(error), 503))
        finally:
            if any(one.n_left > 0 for one in self.handed):
                self.metrics.gone.inc()
            self.leave()
        yield "data: [DONE]\n\n"

    def _chunks(self, place: int, event: Event) -> list[dict[str, Any]]:
        """Return what is sent of an event."""
        writing, found = self.writings[place], []
        if writing.is_over:
            return []
        if event.loop is not None:
            return [self.answers.loop(place, event.loop)]
        if event.thought is not None and event.thought.iterations:
            found.append(self.answers.thought(place, event.thought))
        if event.canvas is not None and self.asked.trace:
            found.append(self.answers.canvas(place, event))
        before = len(writing.ids)
        text = writing.take(event)
        new = slice(before, None) if event.generation is None else slice(len(writing.log_probs), None)
        if text or writing.is_over or len(writing.ids) > before:
            ours: dict[str, Any] = {"innerloop": self.answers.about(writing)} if writing.is_over else {}
            found.append(self.answers.chunk(place, writing, text, new, **ours))
        return found


def _sent(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

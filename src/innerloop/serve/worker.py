"""The thread that answers: an `IncrementalEngine`, which takes questions from an event loop and gives it events.

worker = Worker(model, most_waiting=256)
worker.start()
asked = await worker.ask("3 ; + 4", {"max_new_tokens": 8})
async for event in asked: ...
worker.cancel(asked)                                        # who asked is gone
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from innerloop.engine.events import Event
from innerloop.engine.generation import Generation
from innerloop.engine.incremental import IncrementalEngine
from innerloop.model.model import LatentCore

PACE = 0.1
"""Seconds between two tellings of one answer's tokens, after its first: each costs a turn of the event loop."""


class Full(Exception):
    """As many questions wait as may."""


class Asked:
    """A question that has been handed over.

    Attributes:
        id: its id.
        n_answers: how many answers it gets, of which ``n_left`` are not there yet.
        n_read: the tokens of the question.
        is_paced: whether its tokens are told as they are written, at a pace; otherwise with the answer alone.
    """

    def __init__(self, n_answers: int, is_paced: bool = True):
        self.id, self.n_answers, self.n_left, self.n_read = -1, n_answers, n_answers, 0
        self.is_paced = is_paced
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.held: dict[int, list[Event]] = {}  # tokens of each answer that have not been told
        self.due: dict[int, float] = {}  # when the next are

    def told(self, event: Event, now: float) -> list[Event]:
        """Return what is to be told at a time at which something has happened: tokens are held back for a while."""
        others = event.loop, event.thought, event.canvas, event.generation
        s, is_tokens = event.sample, all(other is None for other in others)
        if is_tokens:
            self.held.setdefault(s, []).append(event)
        if event.generation is None and (not self.is_paced or (is_tokens and now < self.due.get(s, now))):
            return []
        self.due[s] = now + PACE
        found = [joined(held)] if (held := self.held.pop(s, [])) else []
        return found if is_tokens else [*found, event]

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield its events up to the last answer."""
        n_seen = 0
        while n_seen < self.n_answers:
            event = await self.events.get()
            n_seen += event.generation is not None
            yield event


def joined(events: Sequence[Event]) -> Event:
    """Return several tellings of tokens as one."""
    ids = tuple(i for event in events for i in event.ids)
    likely = tuple(p for event in events for p in event.log_probs)
    others = tuple(more for event in events for more in event.alternatives)
    return replace(events[0], ids=ids, log_probs=likely, alternatives=others)


class Worker(threading.Thread):
    """Answers until it is told to end.

    Args:
        model: what answers.
        most_waiting: answers that may wait to be begun; None: no bound.
        options: of the engine.
    """

    def __init__(self, model: LatentCore, most_waiting: int | None = None, **options: Any):
        super().__init__(daemon=True, name="engine")
        self.model, self.engine = model, IncrementalEngine(model, **options)
        self.engine.on_loop = lambda event: self._tell([event])
        self.most_open = None if most_waiting is None else most_waiting + self.engine.options.batch_size
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.open: dict[int, tuple[Asked, asyncio.AbstractEventLoop]] = {}
        self.n_open = 0  # answers that were asked for and are not there, as the event loop counts them
        self.ends = False

    # Called in the event loop

    async def ask(self, question: str, options: dict[str, Any], is_paced: bool = True) -> Asked:
        """Hand over a question; see `Asked` for ``is_paced``.

        Raises:
            Full: as many wait as may.
            InputError: it cannot be answered.
        """
        n, loop = options.get("samples", 1), asyncio.get_running_loop()
        if self.most_open is not None and self.n_open + n > self.most_open:
            raise Full
        asked, taken = Asked(n, is_paced), loop.create_future()
        self.n_open += n

        def submit() -> None:
            try:
                asked.id = self.engine.submit(question, **options)
                asked.n_read = len(self.model.encoder.question(question).ids)
                self.open[asked.id] = asked, loop
                told: Exception | None = None
            except Exception as error:
                told = error
            loop.call_soon_threadsafe(settle, told)

        def settle(error: Exception | None) -> None:
            if taken.done():  # who asked is gone
                if error is None:
                    self.cancel(asked)
                else:
                    self.n_open -= n
            elif error is None:
                taken.set_result(None)
            else:
                taken.set_exception(error)

        self.calls.put(submit)
        try:
            await taken
        except Exception:
            self.n_open -= n
            raise
        return asked

    def cancel(self, asked: Asked) -> asyncio.Future[list[Generation]]:
        """Let a question go; the result is what was written for it."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Generation]] = loop.create_future()
        self.n_open -= asked.n_left
        asked.n_left = 0

        def cancel() -> None:
            self.open.pop(asked.id, None)
            written = self.engine.cancel(asked.id)
            loop.call_soon_threadsafe(lambda: None if found.done() else found.set_result(written))

        self.calls.put(cancel)
        return found

    def end(self) -> None:
        """Let the thread end; what is being answered is lost."""
        self.calls.put(None)

    # The thread

    def run(self) -> None:
        """Answer."""
        while not self.ends:
            self._call()
            if self.engine.is_at_work:
                self._tell(self.engine.step())
        self.engine.close()

    def _call(self) -> None:
        """Do what has been asked for; wait for something where there is nothing else to do."""
        while not self.ends and (not self.engine.is_at_work or not self.calls.empty()):
            call = self.calls.get()
            if call is None:
                self.ends = True
            else:
                call()

    def _tell(self, events: list[Event]) -> None:
        """Hand events over."""
        told: dict[asyncio.AbstractEventLoop, list[tuple[Asked, Event]]] = {}
        now = time.monotonic()
        for event in events:
            if event.id in self.open:
                asked, loop = self.open[event.id]
                if found := asked.told(event, now):
                    told.setdefault(loop, []).extend((asked, one) for one in found)
        for id in {event.id for event in events if event.generation is not None}:
            if id not in self.engine.owners:
                self.open.pop(id, None)
        for loop, pairs in told.items():
            loop.call_soon_threadsafe(self._hand_over, pairs)

    def _hand_over(self, pairs: list[tuple[Asked, Event]]) -> None:
        for asked, event in pairs:
            if asked.n_left > 0:
                if event.generation is not None:
                    self.n_open, asked.n_left = self.n_open - 1, asked.n_left - 1
                asked.events.put_nowait(event)

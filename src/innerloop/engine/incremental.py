"""Requests one by one, each answered in its own way: what a server runs.

    engine = IncrementalEngine(model, batch_size=32)
    id = engine.submit("3 ; + 4 ; * 2", temperature=0.7, seed=1, loops=4)
    while engine.is_at_work:
        for event in engine.step():
            event.id, event.ids, event.generation

An answer is that of ``generate([question], ...)`` with the same options, whatever company it has. Requests that think
alike - by the same stop rule, with a trace or without - share an `Engine`; those of all engines together are never more
than a batch, and whichever has waited longest is let in first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Unpack

from innerloop.checks.arguments import checked
from innerloop.engine.beams import BeamEngine
from innerloop.engine.engine import Engine
from innerloop.engine.events import Event
from innerloop.engine.generation import Generation, failed
from innerloop.engine.learned_canvases import canvas_engine
from innerloop.engine.options import Answering, EngineOptions
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.model.model import LatentCore


def engine_class(model: LatentCore, options: EngineOptions) -> type[Engine]:
    """Return what answers as a method does: token by token, by the best of several texts, or by canvases."""
    if isinstance(model.method, DenoisingMethod):
        return canvas_engine(model.method)
    return Engine if options.beams == 1 else BeamEngine


class IncrementalEngine:
    """Answers requests that come one by one.

    Args:
        model: what answers.
        options: the options of requests that do not say otherwise; see `EngineOptions`.

    Attributes:
        on_loop: called in the middle of a step, with an event for each iteration of a thought of which a trace is asked
            for: the read-out after it, before the next has run. None: they come together, as `Event.thought`.
    """

    on_loop: Callable[[Event], None] | None = None

    @checked
    def __init__(self, model: LatentCore, **options: Unpack[Answering]):
        self.model, self.options = model, EngineOptions(**options)
        self.engines: dict[str, Engine] = {}
        self.owners: dict[int, tuple[str, int]] = {}  # and answers that have not been told
        self.ids = itertools.count()

    @property
    def is_at_work(self) -> bool:
        """Whether any request waits or is being answered."""
        return bool(self.engines)

    @property
    def n_waiting(self) -> int:
        """How many answers wait to be begun."""
        return sum(len(engine.waiting) for engine in self.engines.values())

    @property
    def n_running(self) -> int:
        """How many answers are being written."""
        return sum(len(engine.in_flight()) for engine in self.engines.values())

    @checked
    def submit(
        self,
        question: str,
        *,
        steps: Sequence[str] = (),
        begun: Sequence[str] | None = None,
        **options: Unpack[Answering],
    ) -> int:
        """Take in a question; return the id by which events and `cancel` know it.

        Args:
            question: what is asked.
            steps: the gold steps, where known: a trace then has the ranks of their tokens.
            begun: what the answer has begun with and goes on from; see `innerloop.engine.generate.generate`.
            options: what differs from the engine's own, but ``batch_size`` and ``max_positions``, which are of all.

        Raises:
            InputError: it cannot be answered. A tokenizer may raise errors of its own.
        """
        own = replace(self.options, **options)
        own = replace(own, batch_size=self.options.batch_size, max_positions=self.options.max_positions)
        kind, id = engine_class(self.model, own), next(self.ids)
        key = _key(own, kind.per_request(self.model))
        engine = self.engines[key] if key in self.engines else kind(self.model, own)
        engine.tells_all, engine.on_loop = True, self.on_loop
        engine.submit(question, own, steps, begun, id)
        self.engines[key], self.owners[id] = engine, (key, own.n_answers)
        return id

    def step(self) -> list[Event]:
        """Let requests in if there is room, and write one token; return what has happened.

        Where a pass fails, those whom it was for have failed.
        """
        events: list[Event] = []
        for key in sorted(self.engines, key=lambda key: min((one.id for one in self.engines[key].waiting), default=0)):
            engine = self.engines[key]
            others = [one for one in self.engines.values() if one is not engine]
            engine.elsewhere = sum(one.n_writing for one in others), sum(one.n_positions for one in others)
            events += self._step(engine)
            if not engine.is_at_work:
                del self.engines[key]
        for event in events:
            if event.generation is not None:
                key, n = self.owners.pop(event.id)
                if n > 1:
                    self.owners[event.id] = key, n - 1
        return events

    def _step(self, engine: Engine) -> list[Event]:
        """Let one of the engines make a step."""
        try:
            return engine.step()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            left = {(one.id, one.draw[1]) for one in (*engine.waiting, *engine.in_flight())}
            told = [event for event in engine.events if event.generation is not None]
            engine.close()
            return [*told, *(Event(id, s, generation=failed(self.model, reason)) for id, s in sorted(left))]

    def cancel(self, id: int) -> list[Generation]:
        """Let a question go; return what was written for its answers that were not complete."""
        key, _ = self.owners.pop(id, ("", 0))
        if (engine := self.engines.get(key)) is None:
            return []
        found = engine.cancel(id)
        if not engine.is_at_work:
            engine.close()
            del self.engines[key]
        return found

    def close(self) -> None:
        """Let all questions go."""
        for engine in self.engines.values():
            engine.close()
        self.engines, self.owners = {}, {}


def _key(options: EngineOptions, free: frozenset[str]) -> str:
    """Return what requests that may share an engine have in common: all options but those that are free."""
    own = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in free}
    return json.dumps(own, sort_keys=True, default=str)

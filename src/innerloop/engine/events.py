"""What a step of an engine has done: `Event`."""

from __future__ import annotations

from dataclasses import dataclass

from innerloop.engine.generation import Generation
from innerloop.engine.requests import Alternatives
from innerloop.loop.trace import Trace


@dataclass(frozen=True)
class Event:
    """Something that happened to an answer.

    Attributes:
        id: the question's, as `submit` returned it.
        sample: which of its answers.
        ids: tokens that were written since its last event, and ``log_probs`` and ``alternatives`` of each, where asked
            for.
        loop: what its latents show after one iteration, while others follow; see `IncrementalEngine`.
        thought: what its latents show, once they are there and before anything is written, where a trace is asked for.
        canvas: all tokens of its canvas after a pass, `HIDDEN` where masks are.
        n_final: how many tokens at the beginning of the canvas can change no more.
        generation: the answer, where it is there; one with an ``error`` where it cannot be given. The last event.
    """

    id: int
    sample: int = 0
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    alternatives: tuple[Alternatives, ...] = ()
    loop: Trace | None = None
    thought: Trace | None = None
    canvas: tuple[int, ...] | None = None
    n_final: int = 0
    generation: Generation | None = None

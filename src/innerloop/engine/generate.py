"""Questions in, generations out, in the order of the questions.

gens = generate(model, ["3 ; + 4 ; * 2"], max_new_tokens=8)
gens[0].text, gens[0].answer, gens[0].cost
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Unpack

from innerloop.checks.arguments import checked
from innerloop.checks.values import ONE_BY_ONE
from innerloop.engine.generation import Generation
from innerloop.engine.incremental import engine_class
from innerloop.engine.options import Answering, EngineOptions
from innerloop.model.model import LatentCore


@checked
def generate(
    model: LatentCore,
    questions: Annotated[Sequence[str], ONE_BY_ONE],
    *,
    steps: Sequence[Sequence[str]] | None = None,
    begun: Sequence[Sequence[str]] | None = None,
    places: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    strict: bool = True,
    **options: Unpack[Answering],
) -> list[Generation]:
    """Answer questions, in the order given; the answers of each come after each other.

    Args:
        model: the model; it is put into evaluation mode for the time being.
        questions: the questions.
        steps: the gold steps of each question, where known: a trace then has the ranks of their tokens.
        begun: what each answer has begun with and goes on from: steps as if it had written them, and the mark ``###``
            last where the answer is to come at once. It is not told again in what is written.
        places: the place of each question among all, where these are a part of them, as draws depend on it.
        progress: called with the number of questions answered since the last call.
        strict: refuse them all if one cannot be answered (it is too long, empty, no text, or does not fit into memory
            or ``max_positions`` by itself); otherwise that one alone fails, with its reason in ``error``.
        options: the fields of `EngineOptions`.
    """
    chosen = EngineOptions(**options)
    engine = engine_class(model, chosen)(model, chosen)
    results: list[Generation | None] = [None] * (chosen.n_answers * len(questions))
    for found in engine.groups(questions, steps, strict, begun, places):
        for index, generation in found:
            results[index] = generation
        if progress is not None and found:
            progress(len(found))
    return [generation for generation in results if generation is not None]

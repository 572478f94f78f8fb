"""Fixtures of the methods' tests."""

from collections.abc import Callable, Sequence

import pytest

from innerloop import LatentModel, engine
from innerloop.engine import Generation
from tests.methods.tools import QUESTIONS


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Generation]]:
    """Return a function that lets a model answer questions with at most ``n`` tokens, whose ids are in ``ids``."""
    finish = engine._finish

    def finish_with_ids(model, rows, written, *rest):
        generations = finish(model, rows, written, *rest)
        for generation, ids in zip(generations, written):
            generation.ids = ids
        return generations

    def answer(model: LatentModel, questions: Sequence[str] = QUESTIONS, n: int = 14, **options) -> list[Generation]:
        return model.generate(questions, max_new_tokens=n, **options)

    monkeypatch.setattr(engine, "_finish", finish_with_ids)
    return answer

"""Fixtures of the methods' tests."""

from collections.abc import Callable, Sequence

import pytest

from innerloop import LatentModel
from innerloop.engine.generation import Generation
from tests.methods.tools import QUESTIONS


@pytest.fixture
def answers() -> Callable[..., list[Generation]]:
    """Return a function that lets a model answer questions with at most ``n`` tokens."""

    def answer(model: LatentModel, questions: Sequence[str] = QUESTIONS, n: int = 14, **options) -> list[Generation]:
        return model.generate(questions, max_new_tokens=n, **options)

    return answer

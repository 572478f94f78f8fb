"""What takes long says what it is doing to whoever listens: the command line does, Python code hears nothing.

with phase(f"reading {path}"):
    ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Listener = Callable[[str], AbstractContextManager[object]]

_listeners: list[Listener] = []


@contextmanager
def phase(words: str) -> Iterator[None]:
    """Tell listeners what a block does for as long as it runs; also a decorator."""
    with ExitStack() as stack:
        for listener in tuple(_listeners):
            stack.enter_context(listener(words))
        yield


def says(words: Callable[..., str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of a function which is a phase, whose words are made of its arguments."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with phase(words(*args, **kwargs)):
                return function(*args, **kwargs)

        return call

    return decorated


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Let a listener hear of the phases of a block.

    Args:
        listener: is handed the words of a phase, and returns a context that lasts as long as the phase.
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)

"""The one exception for what a user can mend: the command line prints it as one sentence, without a traceback."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""


class UnreadWarning(UserWarning):
    """Something that lies where a model is loaded from is not read, or not as it was saved; the message names it."""


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: object, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    close = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def refuse(*problems: tuple[bool, str]) -> None:
    """Raise the message of the first problem that is there."""
    for is_there, message in problems:
        if is_there:
            raise InputError(message)

"""The one exception for what a user can mend: the command line prints it as one sentence, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def check_choices(settings: Any) -> None:
    """Refuse a dataclass with a field that is none of its Literal type's choices."""
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name, None)
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = [str(choice) for choice in get_args(hint)]
            near = nearest(str(value), choices)
            raise InputError(f"{name} is '{value}'{near}; choose one of {', '.join(choices)}")


def refuse(*problems: tuple[bool, str]) -> None:
    """Raise the message of the first problem that is there."""
    for is_there, message in problems:
        if is_there:
            raise InputError(message)

"""The one exception for what a user can mend: the command line prints it as one sentence, without a traceback."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
LISTS = {int: "whole numbers, as [1, 2]", float: "numbers, as [0.1, 0.2]"}


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""


class UnreadWarning(UserWarning):
    """Something that lies where a model is loaded from is not read, or not as it was saved; the message names it."""


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def check_choices(settings: Any) -> None:
    """Refuse a dataclass with a field that is none of its Literal type's choices."""
    for name, known in _choices(settings.__class__).items():
        value = getattr(settings, name, None)
        if value not in known:
            choices = [str(choice) for choice in known]
            near = nearest(str(value), choices)
            raise InputError(f"{name} is '{value}'{near}; choose one of {', '.join(choices)}")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """Return the choices of each field of a dataclass that has a Literal type."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}


def refuse(*problems: tuple[bool, str]) -> None:
    """Raise the message of the first problem that is there."""
    for is_there, message in problems:
        if is_there:
            raise InputError(message)


def misfit(error: Exception, types: Mapping[str, Any], prefix: str) -> str:
    """Say what a parser found wrong with the value of one of its keys; in its own words where it is something else.

    Args:
        error: the parser's.
        types: the type of each key.
        prefix: what a user writes before the key.
    """
    told = " ".join(str(error).split())
    key = re.match(r'Parser key "(?:\w+\.)?(\w+)":', told)
    value = re.search(r".*(?:Got|Given) value: (.*)$", told)
    if key is None or value is None or key[1] not in types:
        return told
    kind = types[key[1]]
    choices = [str(choice) for part in _parts(kind) for choice in get_args(part) if get_origin(part) is Literal]
    return f"{prefix}{key[1]} is {value[1]}, but must be {told_type(kind)}{nearest(value[1], choices)}"


def takes_none(kind: Any) -> bool:
    """Tell whether a type has None among its values."""
    return kind in (Any, NoneType) or NoneType in get_args(kind)


def _parts(kind: Any) -> list[Any]:
    """Return the types of which a value may have any."""
    return (
        [part for part in get_args(kind) if part is not NoneType] if get_origin(kind) in (Union, UnionType) else [kind]
    )


def told_type(kind: Any) -> str:
    """Say in words what a type takes."""
    told = []
    for part in _parts(kind):
        origin, inner = get_origin(part) or part, get_args(part)
        if origin is Literal:
            told.append(f"one of {', '.join(map(str, inner))}")
        elif is_dataclass(origin) or (isinstance(origin, type) and issubclass(origin, Mapping)):
            told.append("fields, as {name: value}")
        elif isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
            item = inner[0] if inner else str
            words = ", ".join(map(str, get_args(item))) if get_origin(item) is Literal else "texts, as [one, two]"
            told.append(f"a list of {LISTS.get(item, words)}")
        else:
            told.append(KINDS.get(origin, getattr(origin, "__name__", str(origin))))
    return " or ".join(told)

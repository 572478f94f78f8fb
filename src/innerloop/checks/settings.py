"""Dataclasses of settings whose fields are checked where they are made, in Python as in recipes.

@dataclass(frozen=True)
class Sizes(Checked):
width: Count = 64

Sizes(width=0)          # InputError: width is 0, but must be a whole number, at least 1
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Self, get_args, get_origin, get_type_hints

from innerloop.checks.values import Bounds, fitted
from innerloop.errors import InputError, nearest


class Checked:
    """A dataclass that refuses unknown names and wrong values; what makes no sense together it refuses itself."""

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Refuse names that are no fields, with the nearest that is one."""
        if is_dataclass(cls):
            own = [field.name for field in fields(cls) if field.init]
            for group in fields(cls):
                for name in named if is_dataclass(group.default) else ():
                    if name not in own and name in {field.name for field in fields(group.default)}:
                        raise InputError(f"{cls.__name__} has '{name}' in a group: {group.name}={{'{name}': ...}}")
            check_names(cls.__name__, named, own)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)


def check_names(title: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is not among those that are known."""
    known = list(known)
    for name in given:
        if name not in known:
            there = f"; it has {', '.join(known)}" if known else "; it has no fields"
            raise InputError(f"{title} has no '{name}'{nearest(str(name), known) or there}")


def check_fields(settings: Any) -> None:
    """Refuse a dataclass with a value that its field cannot hold; lists become tuples where fields say so."""
    if not is_dataclass(settings):
        return
    for name, kind in kinds_of(settings.__class__).items():
        value = getattr(settings, name)
        found = fitted(name, value, kind)
        if found is not value:
            object.__setattr__(settings, name, found)


@cache
def kinds_of(cls: type) -> dict[str, Any]:
    """Return the kind of each field of a dataclass: its type, with the bounds that it or a base class gave it."""
    kinds = get_type_hints(cls, include_extras=True)
    for base in reversed(cls.__mro__):
        for name, kind in get_type_hints(base, include_extras=True).items() if base is not object else ():
            if name in kinds and has_bounds(kind) and not has_bounds(kinds[name]):
                kinds[name] = kind
    return {field.name: kinds[field.name] for field in fields(cls)}


def has_bounds(kind: Any) -> bool:
    """Tell whether a kind, or a part of it, has bounds."""
    if get_origin(kind) is Annotated and any(isinstance(one, Bounds) for one in get_args(kind)):
        return True
    return any(has_bounds(part) for part in get_args(kind))

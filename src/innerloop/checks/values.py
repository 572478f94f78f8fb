"""Kinds of values, types with bounds, and whether a value is of a kind.

    Share = Annotated[float, Bounds(0, 1)]          fitted("rate", "1e-3", Share, is_text=True)     # 0.001

Numbers are finite wherever a kind does not say otherwise. A recipe and the command line write numbers as text, such as
1e-3, which Python does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from enum import Enum
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from innerloop.errors import InputError, nearest

T = TypeVar("T")
LARGE = 1000  # bounds from here on keep nonsense away, and are named only where they are passed
MOST = 10**9
MOST_SHOWN = 60  # characters of a wrong value
CHECKED = "innerloop.checks.settings"
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
LISTS = {int: ("whole numbers", "[1, 2]"), float: ("numbers", "[0.1, 0.2]"), str: ("texts", "[one, two]")}


@dataclass(frozen=True)
class Bounds:
    """Where a number lies, or how many items a list has; used as ``Annotated[int, Bounds(1)]``.

    Args:
        least: the least value.
        most: the largest value.
        above: least itself is too small.
        below: most itself is too large.
        also: one more value that has a meaning of its own.
        infinite: the number may be infinite.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    also: float | None = None
    infinite: bool = False

    def hold(self, value: Any) -> bool:
        """Whether a value is within."""
        if not isinstance(value, int | float):
            return self.least <= len(value) <= self.most if hasattr(value, "__len__") else True
        is_low = value < self.least or (self.above and value == self.least)
        is_high = value > self.most or (self.below and value == self.most)
        return value == self.also or not (is_low or is_high)

    def told(self, value: Any) -> str:
        """Say the bounds in words, as they matter to a value that is not within."""
        names_most = self.most < LARGE or (isinstance(value, int | float) and value > self.most)
        also = "" if self.also is None else f", or {self.also:g}"
        low = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        high = f"below {self.most:.15g}" if self.below else f"at most {self.most:.15g}"
        if self.least == -math.inf or (names_most and self.most >= LARGE):
            return f", {high}{also}" if names_most else also
        if not names_most:
            return f", {low}{also}"
        if self.above != self.below:
            return f", {low} and {high}{also}"
        return f" between {self.least:g} and {self.most:g}{', but neither' if self.above else ''}{also}"


Count = Annotated[int, Bounds(1, MOST)]
"""How many of something that must be there."""
Natural = Annotated[int, Bounds(0, MOST)]
"""How many, none included."""
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
"""Of draws; numpy takes no larger one."""
Loops = Annotated[int, Bounds(0, 10_000)]
"""Iterations: each is a pass of the model, and may have weights of its own."""
SomeLoops = Annotated[int, Bounds(1, 10_000)]
"""Iterations, one or more."""
Places = Annotated[int, Bounds(1, 100_000)]
"""Positions in a sequence, such as latents; no model reads more."""
SomePlaces = Annotated[int, Bounds(0, 100_000)]
"""Positions in a sequence, or none."""
Width = Annotated[int, Bounds(0, 1_000_000)]
"""Of a layer; 0 stands for a default."""
Weight = Annotated[float, Bounds(0)]
"""Of a term of the loss; 0 leaves it out."""
Positive = Annotated[float, Bounds(0, above=True)]
"""A number above 0."""
Share = Annotated[float, Bounds(0, 1)]
"""A share or probability."""
SomeShare = Annotated[float, Bounds(0, 1, above=True)]
"""A share of something, and not nothing."""
Chance = Annotated[float, Bounds(0, 1, above=True, below=True)]
"""A probability that is neither 0 nor 1."""
Layers = Annotated[int, Bounds(0, 10_000)]
"""A number of layers, or none."""
Dropout = Annotated[float, Bounds(0, 1, below=True)]
"""A probability below 1."""


Some = Annotated[Sequence[T], Bounds(1)]
"""A list with an item or more."""
ONE_BY_ONE = object()
"""Marks a list whose items are looked at later, each by itself."""


def fitted(name: str, value: Any, kind: Any, is_text: bool = False) -> Any:
    """Return a value as its kind holds it: whole numbers as floats where those are meant, lists as tuples.

    Args:
        name: what the value is called where it was given, such as ``method.n_slots``.
        value: the value.
        kind: a type, possibly with bounds.
        is_text: numbers may be written as text.

    Raises:
        InputError: it is not of this kind; the message says what is.
    """
    try:
        return _fitted(value, kind, is_text)
    except _Misfit:
        choices = [str(choice) for part in parts_of(kind) for choice in _choices(part)]
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise InputError(f"{name} is {shown(value, is_text)}, but must be {told(kind, value)}{near}") from None


def shown(value: Any, is_text: bool = False) -> str:
    """Return a wrong value as it is told, in one short line; in quotes where text might be taken for a number."""
    is_word = isinstance(value, str) and value.strip() and (is_text or not value.strip().replace(".", "").isdigit())
    text = value if is_word else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def takes_none(kind: Any) -> bool:
    """Tell whether a kind has None among its values."""
    return kind in (Any, NoneType) or NoneType in get_args(kind)


def parts_of(kind: Any) -> list[Any]:
    """Return the kinds of which a value may have any, without None."""
    if get_origin(kind) in (Union, UnionType):
        return [part for part in get_args(kind) if part is not NoneType]
    return [kind]


def told(kind: Any, value: Any = None) -> str:
    """Say in words what a kind takes, as it matters to a wrong value."""
    return " or ".join(_told(part, value) for part in parts_of(kind))


def _told(kind: Any, value: Any) -> str:
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _told(inner, value) + "".join(bounds.told(value) for bounds in more if isinstance(bounds, Bounds))
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if choices := _choices(kind):
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    if origin is float and isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if origin in WORDS:
        return WORDS[origin]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "fields, as {name: value}"
    if _is_list(origin):
        return _told_list(inner[0] if inner else str)
    if origin is Callable or getattr(origin, "__name__", "") == "Callable":
        return "a function"
    if hasattr(origin, "__dataclass_fields__"):
        return (
            "fields, as {name: value}"
            if isinstance(value, str | int | float | list) or value is None
            else (f"of type {origin.__name__}")
        )
    return f"of type {getattr(origin, '__name__', origin)}"


def _told_list(kind: Any) -> str:
    """Say in words what a list holds."""
    kind, *more = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if kind in LISTS:
        noun, example = LISTS[kind]
        each = "".join(f", each {bounds.told(None).lstrip(', ')}" for bounds in more if isinstance(bounds, Bounds))
        return f"a list of {noun}{each}, as {example}"
    return f"a list of {', '.join(map(str, _choices(kind))) or getattr(kind, '__name__', str(kind))}"


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the values of a kind that lists them."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(one.value for one in kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def _is_list(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, str | Mapping)


class _Misfit(Exception):
    """A value is not of a kind."""


def _fitted(value: Any, kind: Any, is_text: bool) -> Any:
    origin = get_origin(kind) or kind
    if origin is Annotated:
        inner, *more = get_args(kind)
        bounds = [one for one in more if isinstance(one, Bounds)]
        inner = get_origin(inner) if ONE_BY_ONE in more else inner
        value = _fitted(value, inner, is_text) if not _is_infinite(value, bounds) else float(value)
        return value if all(one.hold(value) for one in bounds) else _refuse()
    if origin in (Union, UnionType):
        return _of_any(value, get_args(kind), is_text)
    if choices := _choices(kind):
        return _chosen(value, kind, choices, is_text)
    if origin in PLAIN:
        return PLAIN[origin](value, is_text)
    if origin is Any or not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return value  # Any, or nothing that a value could be checked against
    if _is_list(origin) and origin.__module__ in ("builtins", "collections.abc"):
        return _items(value, origin, get_args(kind), is_text)
    if hasattr(origin, "__dataclass_fields__"):
        return value if _kin(type(value), origin) else _refuse()
    return value if isinstance(value, origin) else _refuse()


def _kin(cls: type, other: type) -> bool:
    """Tell whether two classes have a base in common, as the groups of settings of two methods have."""
    return any(base in cls.__mro__ and base.__module__ not in ("builtins", "abc", CHECKED) for base in other.__mro__)


def _refuse() -> NoReturn:
    raise _Misfit


def _is_infinite(value: Any, bounds: Sequence[Bounds]) -> bool:
    """Whether a value is an infinite number and may be."""
    return isinstance(value, float) and math.isinf(value) and any(one.infinite for one in bounds)


def _of_any(value: Any, kinds: Sequence[Any], is_text: bool) -> Any:
    """Return a value as the first of several kinds that holds it."""
    if NoneType in kinds and (value is None or (is_text and value == "null")):
        return None
    for kind in kinds:
        try:
            return _fitted(value, kind, is_text)
        except _Misfit:
            continue
    _refuse()


def _chosen(value: Any, kind: Any, choices: Sequence[Any], is_text: bool) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return value
        if is_text and isinstance(value, str) and value == str(choice):
            return choice
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    _refuse()


def _truth(value: Any, is_text: bool) -> bool:
    if is_text and isinstance(value, str) and value.lower() in TRUTHS:
        return TRUTHS[value.lower()]
    return value if isinstance(value, bool) else _refuse()


def _whole(value: Any, is_text: bool) -> int:
    if is_text and isinstance(value, str | float) and not isinstance(value, bool):
        number = _number(value, is_text)
        if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d{1,18}\s*", value):
            return int(value)
        return int(number) if number == int(number) else _refuse()
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else _refuse()


def _number(value: Any, is_text: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, str) if is_text else Real):
        _refuse()
    try:
        number = float(value)
    except (ValueError, OverflowError):
        _refuse()
    return number if math.isfinite(number) else _refuse()


def _text(value: Any, is_text: bool) -> str:
    return value if isinstance(value, str) else _refuse()


def _items(value: Any, origin: type, inner: Sequence[Any], is_text: bool) -> Any:
    """Return a list with each item as its kind holds it; what is no tuple stays as it is, only checked."""
    has_order = isinstance(value, Sized) and isinstance(value, Iterable) and not isinstance(value, Set | Mapping)
    if not has_order or isinstance(value, str | bytes):
        _refuse()
    if issubclass(origin, tuple) and inner and Ellipsis not in inner:
        if len(value) != len(inner):
            _refuse()
        return tuple(_fitted(item, kind, is_text) for item, kind in zip(value, inner))
    items = [_fitted(item, inner[0], is_text) for item in value] if inner else list(value)
    if origin is tuple:
        return tuple(items)
    return items if is_text else value


PLAIN: dict[Any, Callable[[Any, bool], Any]] = {bool: _truth, int: _whole, float: _number, str: _text}

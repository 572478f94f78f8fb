"""Grids: which values a field takes, and the variants of a recipe that this makes.

method.max_loops=1,2,4               every value, in every combination with those of other fields
train.learning_rate=1e-4..1e-2:log   a range that a search draws from; without :log evenly, whole numbers if both are
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from innerloop.errors import InputError


@dataclass(frozen=True)
class Choices:
    """A field and the values it takes, in order."""

    field: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A field and the range that a search draws from."""

    field: str
    low: float
    high: float
    log: bool = False
    is_whole: bool = False


Axis = Choices | Range


def parse_axis(text: str) -> Axis:
    """Read one ``FIELD=VALUES`` of the command line."""
    field, is_given, values = text.partition("=")
    if not is_given or not field.strip() or not values.strip():
        raise InputError(f"cannot read --grid {text}: write --grid FIELD=VALUE,VALUE,.. or --grid FIELD=LOW..HIGH")
    return axis_of(field.strip().removeprefix("--"), values.strip())


def axis_of(field: str, written: Any) -> Axis:
    """Return the axis that is written for a field: a list, or text as on the command line."""
    if isinstance(written, str) and ".." in written:
        return _range(field, written)
    if isinstance(written, str):
        try:
            values = yaml.safe_load(f"[{written}]")
        except yaml.YAMLError:
            raise InputError(f"cannot read the values of {field}: '{written}' is no list such as 1,2,4") from None
    else:
        values = written if isinstance(written, list) else [written]
    values = [number(value) for value in values]
    shown = [value_name(value) for value in values]
    if twice := [name for name, n in Counter(shown).items() if n > 1]:
        raise InputError(f"the values of {field} name {twice[0]} twice")
    if not values:
        raise InputError(f"{field} has no values: write {field}=VALUE,VALUE,..")
    return Choices(field, tuple(values))


def _range(field: str, written: str) -> Range:
    body, _, kind = written.partition(":")
    low, _, high = body.partition("..")
    ends = [number(yaml.safe_load(end.strip() or "null")) for end in (low, high)]
    if kind not in ("", "log") or not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends):
        raise InputError(f"cannot read the range {field}={written}: write LOW..HIGH or LOW..HIGH:log")
    if not ends[0] < ends[1] or (kind == "log" and ends[0] <= 0):
        raise InputError(f"the range {field}={written} needs LOW < HIGH" + (", both above 0" if kind == "log" else ""))
    return Range(field, ends[0], ends[1], kind == "log", all(type(end) is int for end in ends))


def number(value: Any) -> Any:
    """Read ``1e-3``, which YAML takes for text, as the number it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def value_name(value: Any) -> str:
    """Return a value as it is shown: short, and never read for another one."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def grid_variants(axes: Sequence[Choices]) -> dict[str, dict[str, Any]]:
    """Return the variants of a grid: by name, the value of each field."""
    if twice := [field for field, n in Counter(axis.field for axis in axes).items() if n > 1]:
        raise InputError(f"the grid names {twice[0]} twice: list all its values once")
    points = [
        dict(zip((axis.field for axis in axes), values)) for values in itertools.product(*(a.values for a in axes))
    ]
    return {variant_name(point, [axis.field for axis in axes]): point for point in points}


def variant_name(point: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Return the name of a point, also that of its folder, such as ``max_loops=4, learning_rate=0.001``."""
    short = short_names(fields)
    return ", ".join(f"{short[field]}={value_name(value)}" for field, value in point.items()).replace("/", "_")


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Return the last part of each field's name, or all of it where the last parts agree."""
    last = {field: field.rpartition(".")[2] for field in fields}
    n = Counter(last.values())
    return {field: name if n[name] == 1 else field for field, name in last.items()}

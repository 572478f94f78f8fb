"""Axes: the values or the range of a field that a grid or a search goes over, as Optuna's distributions.

method.max_loops=1,2,4               every value, in every combination with those of other fields
train.learning_rate=1e-4..1e-2:log   a range that a search draws from; without :log evenly, whole numbers if both are
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from innerloop.config.reading import read_yaml
from innerloop.disk.names import folder_name
from innerloop.errors import InputError, check_installed

if TYPE_CHECKING:  # an extra, and slow to import
    from optuna.distributions import BaseDistribution

DIGITS = 4  # of a number drawn from a range, so that it can be read and typed again
Axes = Mapping[str, "BaseDistribution"]
Settings = dict[str, Any]
"""The value of each field of one trial."""


def parse_axes(listed: Sequence[str]) -> dict[str, BaseDistribution]:
    """Read each ``FIELD=VALUES`` of the command line."""
    axes: dict[str, BaseDistribution] = {}
    for text in listed:
        field, is_given, values = (part.strip() for part in text.partition("="))
        field = field.removeprefix("--")
        if not is_given or not field or not values:
            raise InputError(f"cannot read --grid {text}: write --grid FIELD=VALUE,VALUE,.. or --grid FIELD=LOW..HIGH")
        if field in axes:
            raise InputError(f"--grid names {field} twice: list all its values once")
        axes[field] = axis_of(field, values)
    return axes


def axes_of(written: Any) -> dict[str, BaseDistribution]:
    """Return the axes that a suite lists under ``grid``."""
    if not isinstance(written, dict) or not written:
        raise InputError("grid lists the values of fields, for example grid: {method.max_loops: [1, 2, 4]}")
    return {str(field): axis_of(str(field), values) for field, values in written.items()}


def axis_of(field: str, written: Any) -> BaseDistribution:
    """Return the axis that is written for a field: a list, or text as on the command line."""
    if field in ("out", "train.seed"):
        raise InputError(f"the grid cannot go over {field}" + ("; list seeds" if field != "out" else ""))
    if isinstance(written, str) and ".." in written:
        return _range(field, written)
    if isinstance(written, str):
        try:
            values = read_yaml(f"[{written}]", field)
        except InputError:
            raise InputError(f"cannot read the values of {field}: '{written}' is no list such as 1,2,4") from None
    else:
        values = written if isinstance(written, list) else [written]
    values = [_number(value) for value in values]
    if twice := [name for name, n in Counter(map(value_name, values)).items() if n > 1]:
        raise InputError(f"the values of {field} name {twice[0]} twice")
    if not values:
        raise InputError(f"{field} has no values: write {field}=VALUE,VALUE,..")
    return optuna().distributions.CategoricalDistribution(list(map(json.dumps, values)))  # lists are values, too


def _range(field: str, written: str) -> BaseDistribution:
    body, _, kind = written.partition(":")
    low, high = (_number(read_yaml(end.strip() or "null", field)) for end in body.split("..", 1))
    if kind not in ("", "log") or not all(isinstance(end, (int, float)) and math.isfinite(end) for end in (low, high)):
        raise InputError(f"cannot read the range {field}={written}: write LOW..HIGH or LOW..HIGH:log")
    if not low < high or (kind == "log" and low <= 0):
        raise InputError(f"the range {field}={written} needs LOW < HIGH" + (", both above 0" if kind == "log" else ""))
    made, is_whole = optuna().distributions, type(low) is int and type(high) is int
    return (made.IntDistribution if is_whole else made.FloatDistribution)(low, high, log=kind == "log")


def optuna() -> Any:
    """Return Optuna, quiet."""
    check_installed("grids and searches need Optuna", "sweep", "optuna")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def values_of(axis: BaseDistribution) -> list[Any] | None:
    """Return the values of an axis in order, None of a range."""
    choices = getattr(axis, "choices", None)
    return None if choices is None else list(map(json.loads, choices))


def first_trial(axes: Axes) -> Settings:
    """Return the first value of each field, or the low end of its range."""
    return {field: (values_of(axis) or [getattr(axis, "low", None)])[0] for field, axis in axes.items()}


def written(axis: BaseDistribution) -> Any:
    """Return an axis as a suite would list it."""
    if (values := values_of(axis)) is not None:
        return values
    return f"{axis.low:g}..{axis.high:g}" + (":log" if axis.log else "")  # type: ignore[attr-defined]


def settings_of(axes: Axes, drawn: Mapping[str, Any]) -> Settings:
    """Return what Optuna has drawn as the values of fields; of a range, numbers of few digits."""
    settings: Settings = {}
    for field, axis in axes.items():
        value = drawn[field]
        if values_of(axis) is not None:
            settings[field] = json.loads(value)
        elif isinstance(value, int):
            settings[field] = value
        else:
            settings[field] = min(max(float(f"{value:.{DIGITS}g}"), axis.low), axis.high)  # type: ignore[attr-defined]
    return settings


def _number(value: Any) -> Any:
    """Read ``1e-3``, which YAML takes for text, as the number it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def value_name(value: Any) -> str:
    """Return a value as it is shown: short, and never read for another one."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def variant_name(settings: Settings) -> str:
    """Return the name of a trial, such as ``max_loops=4, learning_rate=0.001``."""
    return ", ".join(_parts(settings))


def trial_folder(settings: Settings) -> str:
    """Return the name of a trial's folder, such as ``max_loops=4_learning_rate=0.001``: one word to a shell."""
    return folder_name("_".join(map(folder_name, _parts(settings))))


def _parts(settings: Settings) -> list[str]:
    short = short_names(list(settings))
    return [f"{short[field]}={value_name(value)}" for field, value in settings.items()]


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Return the last part of each field's name, or all of it where the last parts agree."""
    last = {field: field.rpartition(".")[2] for field in fields}
    n = Counter(last.values())
    return {field: name if n[name] == 1 else field for field, name in last.items()}

"""Wrong values of a kind, as the command line writes them and as Python has them."""

import math
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from innerloop.checks.values import Bounds, parts_of

NUMBERS = [math.nan, math.inf, -math.inf, True, "x", "", [1], {"a": 1}, b"1", object()]


def outside(bounds: Bounds) -> list[float]:
    """Return numbers just outside bounds."""
    low = [bounds.least - (0 if bounds.above else 1)] if math.isfinite(bounds.least) else []
    high = [bounds.most + (0 if bounds.below else 1)] if math.isfinite(bounds.most) else []
    return [value for value in low + high if value != bounds.also]


def wrong_values(kind: Any) -> list[Any]:
    """Return values that are not of a kind; none where every value is."""
    parts = parts_of(kind)
    if len(parts) > 1 or get_origin(kind) is Union:
        return [{"a": 1}, object()] if len(parts) > 1 else wrong_values(parts[0])
    (kind,), more = parts, []
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
    bounds = [one for one in more if isinstance(one, Bounds)]
    if kind in (int, float):
        beyond = [kind(value) for one in bounds for value in outside(one)]
        infinite = any(one.infinite for one in bounds)
        return beyond + [1.5] * (kind is int) + [v for v in NUMBERS if not (infinite and v in (math.inf, -math.inf))]
    if kind is bool:
        return ["maybe", 3, None, [True]]
    if kind is str:
        return [5, ["x"], {"a": 1}, 1.5, True]
    if get_origin(kind) is Literal:
        return ["no such", 17.5, [1]]
    if get_origin(kind) in (tuple, list):
        return [3, "x", {"a": 1}, [object()]]
    return []


def written(value: Any) -> str | None:
    """Return a value as the command line writes it; None for one that it cannot write."""
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    if isinstance(value, bytes) or type(value) is object or (isinstance(value, list) and type(value[0]) is object):
        return None
    return {True: "true", False: "false", None: "null"}.get(value) if value is None or value is True else str(value)

"""Lines of files, and dataclasses as JSON.

`to_json` writes a value with all that it holds, `from_json` reads it back by its types.

    from_json(Verdict, json.loads(json.dumps(to_json(verdict)))) == verdict

JSON has no number that is not finite: it becomes null, and where a float is expected null is read as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not blank; only a newline ends one, whatever else a text may hold."""
    return [line for line in Path(path).read_bytes().decode("utf-8").split("\n") if line.strip()]


def to_json(value: Any) -> Any:
    """Return a value as JSON has it: dataclasses and mappings as objects, tuples as lists."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def from_json(cls: type[T], data: Any) -> T:
    """Return the value of a type that JSON holds; names that a dataclass does not have are passed over.

    Raises:
        TypeError: a dataclass misses a field that has no default, or its data is no object.
    """
    return _read(cls, data)  # type: ignore[no-any-return]


def _read(kind: Any, data: Any) -> Any:
    if is_dataclass(kind):
        if not isinstance(data, Mapping):
            raise TypeError(f"a {kind.__name__} is an object in JSON, not {data!r}")  # type: ignore[union-attr]
        types = _types(kind)  # type: ignore[arg-type]
        return kind(**{name: _read(types[name], data[name]) for name in types if name in data})  # type: ignore[operator]
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _read(next((one for one in inner if _holds(one, data)), Any), data)
    if isinstance(data, Mapping) and inner and issubclass(origin, Mapping):
        return {_key(inner[0], key): _read(inner[1], one) for key, one in data.items()}
    if isinstance(data, list) and inner:
        kinds = inner if origin is tuple and inner[-1] is not ... else (inner[0],) * len(data)
        found = [_read(one, value) for one, value in zip(kinds, data, strict=True)]
        return found if origin is list else tuple(found)
    if kind is float and data is None:
        return math.nan
    return Path(data) if kind is Path else data


@cache
def _types(cls: Any) -> dict[str, Any]:
    """Return the types of the fields that a dataclass is made from."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _key(kind: Any, key: str) -> Any:
    return kind(key) if kind in (int, float, Path) else key


def _holds(kind: Any, data: Any) -> bool:
    """Whether a member of a union is what JSON holds."""
    origin = get_origin(kind) or kind
    if origin is Literal:
        return data in get_args(kind)
    if is_dataclass(kind) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return isinstance(data, Mapping)
    if kind is Path or kind is str:
        return isinstance(data, str)
    if kind is float:
        return isinstance(data, int | float) and not isinstance(data, bool)
    if kind in (int, bool, NoneType):
        return type(data) is kind
    return isinstance(data, list)

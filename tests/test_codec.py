"""JSON of dataclasses: what is written is read back the same, nested as deep as it may be."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from innerloop.text.codec import from_json, to_json


@dataclass(frozen=True)
class Inner:
    name: str
    pair: tuple[int, float] = (0, 0.0)


@dataclass(frozen=True)
class Outer:
    one: Inner
    many: tuple[Inner, ...] = ()
    listed: list[Inner] = field(default_factory=list)
    by_number: dict[int, Inner | None] = field(default_factory=dict)
    which: int | Literal["all"] = "all"
    loss: float = 0.0
    maybe: float | None = None
    shares: Sequence[float | None] | None = None
    folder: Path = Path("here")
    free: Mapping[str, Any] = field(default_factory=dict)
    either: Inner | tuple[int, ...] | str = ""


FULL = Outer(
    Inner("a", (1, 0.1 + 0.2)),
    many=(Inner("b"), Inner("c")),
    listed=[Inner("d")],
    by_number={3: Inner("e"), 4: None},
    which=2,
    loss=-1e-300,
    maybe=2.0,
    shares=(0.5, None),
    folder=Path("there/it is"),
    free={"x": [1, {"y": True}]},
    either=(1, 2),
)


@pytest.mark.parametrize(
    "value", [FULL, Outer(Inner("a")), Outer(Inner("a"), either=Inner("b")), Inner("ü\n")], ids=str
)
def test_what_is_written_is_read_back(value):
    again = from_json(type(value), json.loads(json.dumps(to_json(value), allow_nan=False)))
    assert again == value and type(again) is type(value)


def test_what_is_written_is_plain():
    assert to_json(Inner("a", (1, 2.5))) == {"name": "a", "pair": [1, 2.5]}
    assert to_json({1: (FULL.one, None), "x": Path("a/b")}) == {"1": [to_json(FULL.one), None], "x": "a/b"}


def test_a_number_that_is_not_finite_is_null_and_read_as_nan():
    written = to_json([Inner("a", (1, math.inf)), {"x": math.nan}])
    assert written == [{"name": "a", "pair": [1, None]}, {"x": None}]
    assert math.isnan(from_json(Inner, written[0]).pair[1])


def test_containers_are_read_by_their_type_and_derived_values_are_passed_over():
    assert from_json(list[Inner], [{"name": "a", "length": 1}]) == [Inner("a")]
    assert from_json(dict[str, tuple[int, ...]], {"a": [1, 2]}) == {"a": (1, 2)}


@pytest.mark.parametrize("data", [{"pair": [1, 2]}, [1], "a", None])
def test_what_is_no_such_object_is_refused(data):
    with pytest.raises(TypeError):
        from_json(Inner, data)

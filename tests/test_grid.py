"""Axes: how values are written, what combinations they make, and how mistakes are answered."""

import pytest

from innerloop.errors import InputError
from innerloop.experiments.grid import axis_of, parse_axes, short_names, values_of, variant_name, written
from innerloop.experiments.search import combinations


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("method.max_loops=1,2,4", [1, 2, 4]),
        ("--train.learning_rate=1e-3, 3e-4", [0.001, 0.0003]),
        ("method.rescale=none,rms", ["none", "rms"]),
        ("backbone.freeze=true,false", [True, False]),
        ("a=[1, 2], null", [[1, 2], None]),
    ],
)
def test_values_are_read_as_they_are_meant(text: str, values: list):
    ((field, axis),) = parse_axes([text]).items()
    assert text.startswith(("--" if "--" in text else "") + field) and values_of(axis) == written(axis) == values
    assert values_of(axis_of("a", [1, "1e-2"])) == [1, 0.01]


@pytest.mark.parametrize("text", ["0.0001..0.01:log", "1..8", "0.1..0.9"])
def test_ranges_are_read_as_they_are_meant(text: str):
    axis = axis_of("a", text)
    assert values_of(axis) is None and written(axis) == text and isinstance(axis.low, int) == (text == "1..8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method.max_loops", "write --grid FIELD=VALUE"),
        ("=1,2", "write --grid FIELD=VALUE"),
        ("a=1,1", "name 1 twice"),
        ("a=1e-3,0.001", "name 0.001 twice"),
        ("a=[1,2", "is no list such as 1,2,4"),
        ("a=2..1", "needs LOW < HIGH"),
        ("a=0..1:log", "both above 0"),
        ("a=1..2:lin", "write LOW..HIGH or LOW..HIGH:log"),
        ("a=x..2", "write LOW..HIGH"),
    ],
)
def test_mistakes_are_named(text: str, words: str):
    with pytest.raises(InputError) as error:
        parse_axes([text])
    assert words in str(error.value)


def test_a_grid_is_every_combination_in_order():
    found = combinations(parse_axes(["method.max_loops=2,1", "train.learning_rate=1e-3,3e-4"]))
    assert [variant_name(trial) for trial in found] == [
        "max_loops=2, learning_rate=0.001",
        "max_loops=2, learning_rate=0.0003",
        "max_loops=1, learning_rate=0.001",
        "max_loops=1, learning_rate=0.0003",
    ]
    assert found[0] == {"method.max_loops": 2, "train.learning_rate": 1e-3}


def test_names_are_short_where_they_can_be():
    assert short_names(["method.alpha", "train.alpha", "method.x"]) == {
        "method.alpha": "method.alpha",
        "train.alpha": "train.alpha",
        "method.x": "x",
    }
    assert variant_name({"backbone.model": "a/b"}) == "model=a/b"  # the folder has another name

"""Grids: how values are written, what variants they make, and how mistakes are answered."""

import pytest

from innerloop.errors import InputError
from innerloop.experiments.grid import Choices, Range, axis_of, grid_variants, parse_axis, short_names, variant_name


def test_values_are_read_as_they_are_meant():
    assert parse_axis("method.max_loops=1,2,4") == Choices("method.max_loops", (1, 2, 4))
    assert parse_axis("--train.learning_rate=1e-3, 3e-4") == Choices("train.learning_rate", (0.001, 0.0003))
    assert parse_axis("method.rescale=none,rms") == Choices("method.rescale", ("none", "rms"))
    assert parse_axis("backbone.freeze=true,false").values == (True, False)
    assert axis_of("a", [1, "1e-2"]) == Choices("a", (1, 0.01)) and axis_of("a", "1,2").values == (1, 2)


def test_ranges_are_read_as_they_are_meant():
    assert parse_axis("train.learning_rate=1e-4..1e-2:log") == Range("train.learning_rate", 1e-4, 1e-2, True, False)
    assert parse_axis("method.n_slots=1..8") == Range("method.n_slots", 1, 8, False, True)
    assert parse_axis("method.alpha=0.1..0.9") == Range("method.alpha", 0.1, 0.9)


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
        parse_axis(text)
    assert words in str(error.value)


def test_a_grid_is_every_combination_in_order():
    variants = grid_variants([Choices("method.max_loops", (1, 2)), Choices("train.learning_rate", (1e-3, 3e-4))])
    assert list(variants) == [
        "max_loops=1, learning_rate=0.001",
        "max_loops=1, learning_rate=0.0003",
        "max_loops=2, learning_rate=0.001",
        "max_loops=2, learning_rate=0.0003",
    ]
    assert variants["max_loops=2, learning_rate=0.001"] == {"method.max_loops": 2, "train.learning_rate": 1e-3}
    with pytest.raises(InputError, match="names a twice"):
        grid_variants([Choices("a", (1,)), Choices("a", (2,))])


def test_names_are_short_where_they_can_be_and_never_folders_of_folders():
    assert short_names(["method.alpha", "train.alpha", "method.x"]) == {
        "method.alpha": "method.alpha",
        "train.alpha": "train.alpha",
        "method.x": "x",
    }
    assert variant_name({"backbone.model": "a/b"}, ["backbone.model"]) == "model=a_b"

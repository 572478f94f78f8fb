"""YAML as recipes are written in: what is ambiguous, endless or no plain value is refused, by where it stands."""

import pytest

from innerloop.config.reading import read_yaml
from innerloop.errors import InputError
from innerloop.train.recipe import parse_overrides, read_recipe

LISTS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("{a: 2024-01-01}", {"a": "2024-01-01"}),  # a date is text, so a field that holds a number names it
        ("{a: 2024-13-45}", {"a": "2024-13-45"}),
        ("{a: [1, 2.5, true, null, x]}", {"a": [1, 2.5, True, None, "x"]}),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_plain_values_are_read(text, value):
    assert read_yaml(text, "r.yaml") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml names 'a' twice, again in line 3: keep one of them"),
        ("train: {seed: 1, seed: 2}", "names 'seed' twice"),
        (LISTS, "stands for more than 100000 values"),
        (MERGES, "stands for more than 100000 values"),
        ("a: &a [*a]", "has an alias .* within what it stands for"),
        ("[" * 2000, "too deep to read"),
        ("a: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("a: [1", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "another document in line 2"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!bool maybe", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_what_no_recipe_holds_is_refused_by_where_it_stands(text, message):
    with pytest.raises(InputError, match=message):
        read_yaml(text, "r.yaml")


def test_recipes_and_overrides_are_read_so(tmp_path):
    (tmp_path / "r.yaml").write_text("out: a\nout: b\n")
    with pytest.raises(InputError, match="names 'out' twice"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(InputError, match="--method names 'n' twice"):
        parse_overrides(["--method", "{n: 1, n: 2}"])
    (tmp_path / "latin.yaml").write_bytes(b"out: \xff")
    with pytest.raises(InputError, match=r"latin\.yaml cannot be read"):
        read_recipe(tmp_path / "latin.yaml")

"""Typing of YAML: dataclasses with groups are built from plain values, and mistakes are answered by name."""

from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, Literal

import pytest
import yaml

from innerloop.config.typed import field_names, field_parser, field_types, filled, groups, merged, named, typed
from innerloop.errors import InputError
from innerloop.methods import METHODS, Slr


@dataclass(frozen=True)
class Inject:
    """How the loop is told where it is.

    Args:
        kind: what is added.
        table: a file with rows to add.
    """

    kind: Literal["none", "lookup"] = "none"
    table: str | None = None


@dataclass(frozen=True)
class Loop:
    """How states are carried over.

    Args:
        residual: what is added to a state.
        alpha: its share, between 0 and 1.
    """

    residual: Literal["none", "sum", "A"] = "none"
    alpha: float = 0.5
    layers: tuple[int, ...] = ()
    inject: Inject = Inject()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"loop.alpha is {self.alpha}, but must be between 0 and 1")


@dataclass(frozen=True)
class Aux:
    weight: float = 1.0
    source: str = "gold"


@dataclass(frozen=True)
class Stage:
    first_stage: int = 0
    stage_length: int | None = None
    with_markers: bool = False


@dataclass(frozen=True)
class Summed(Stage):
    """A method.

    Args:
        n_blocks: blocks of latents, 100 % of them.
    """

    name: ClassVar[str] = "summed"
    presets: ClassVar[dict[str, "Summed"]] = {}

    n_blocks: int = 6
    teacher: str | None = None
    loop: Loop = Loop(residual="sum", inject=Inject(kind="lookup"))
    aux: Aux | None = None
    kd: Aux | None = field(default_factory=lambda: Aux(2.0))


Summed.presets["small"] = Summed(n_blocks=1, loop=Loop(residual="A", alpha=0.25), aux=Aux(3.0))


@dataclass(frozen=True)
class Needy:
    loop: Loop
    n: int


def build(**settings: object) -> Summed:
    return typed(Summed, settings, "method")


def of(section: object) -> Summed:
    return named(section, "method", {"summed": Summed}.__getitem__)


def test_a_group_changes_the_fields_that_are_written_of_the_methods_own_default():
    assert build() == Summed()
    assert build(n_blocks=2, loop={"alpha": 0.1}) == Summed(n_blocks=2, loop=Loop("sum", 0.1, (), Inject("lookup")))
    assert build(loop={"inject": {"table": "x"}}).loop == Loop("sum", inject=Inject("lookup", "x"))
    assert build(loop={}).loop == Summed().loop
    assert build(loop={"layers": [1, 2]}).loop.layers == (1, 2)
    assert build(loop={"alpha": "1e-1"}).loop.alpha == 0.1  # as YAML reads 1e-1


def test_a_group_that_may_be_none_is_made_by_fields_and_removed_by_null():
    assert build(aux={"weight": 2}).aux == Aux(2.0)
    assert build(aux={}).aux == Aux() and build(aux=None).aux is None
    assert build(kd={"source": "own"}).kd == Aux(2.0, "own") and build(kd=None).kd is None


def test_fields_of_groups_override_those_of_a_preset():
    small = Summed.presets["small"]
    assert of({"name": "summed", "preset": "small"}) == small
    changed = of({"name": "summed", "preset": "small", "loop": {"layers": [3]}, "aux": {"source": "own"}, "kd": None})
    assert changed == replace(small, loop=Loop("A", 0.25, (3,)), aux=Aux(3.0, "own"), kd=None)
    assert of({"name": "summed", "preset": "small", "aux": None}) == replace(small, aux=None)
    assert of("summed") == Summed()


def test_what_is_written_of_a_dataclass_reads_back_as_itself():
    for method in (Summed(), Summed.presets["small"], build(aux={}, kd=None, loop={"layers": [1]})):
        again = yaml.safe_load(yaml.safe_dump(asdict(method)))
        assert typed(Summed, again, "method") == method


def test_a_default_of_a_more_special_class_stays_of_that_class():
    @dataclass(frozen=True)
    class Doubled(Loop):
        factor: int = 2

    @dataclass(frozen=True)
    class Special:
        loop: Loop = Doubled("A")

    assert typed(Special, {"loop": {"factor": 3}}, "method").loop == Doubled("A", factor=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_block": 1}, "method.n_block: 'summed' has no field 'n_block' (did you mean 'n_blocks'?)"),
        (
            {"loop": {"residul": 1}},
            "method.loop.residul: 'method.loop' has no field 'residul' (did you mean 'residual'",
        ),
        ({"loop": {"inject": {"knd": "x"}}}, "method.loop.inject.knd: 'method.loop.inject' has no field 'knd'"),
        ({"residual": "A"}, "method.residual: 'summed' has no field 'residual' (did you mean 'loop.residual'?)"),
        ({"aux.weight": 1}, "method.aux.weight: 'summed' has no field 'aux.weight'; write aux: {weight: ...}"),
        ({"aux_weight": 1}, "method.aux_weight: 'summed' has no field 'aux_weight' (did you mean 'aux.weight'?)"),
        ({"n_blocks": "four"}, "method.n_blocks is four, but must be a whole number"),
        ({"n_blocks": None}, "method.n_blocks is empty, but must be a whole number"),
        ({"first_stage": 2.5}, "method.first_stage is 2.5, but must be a whole number"),
        ({"with_markers": 3}, "method.with_markers is 3, but must be true or false"),
        ({"stage_length": "x"}, "method.stage_length is x, but must be a whole number"),
        ({"loop": {"alpha": "much"}}, "method.loop.alpha is much, but must be a number"),
        (
            {"loop": {"residual": "som"}},
            "method.loop.residual is som, but must be one of none, sum, A (did you mean 's",
        ),
        ({"loop": {"layers": ["x"]}}, "method.loop.layers is ['x'], but must be a list of whole numbers, as [1, 2]"),
        ({"loop": {"inject": {"kind": 3}}}, "method.loop.inject.kind is 3, but must be one of none, lookup"),
        ({"loop": {"alpha": None}}, "method.loop.alpha is empty, but must be a number"),
        ({"loop": None}, "method.loop is empty, but must be fields, as {name: value}"),
        ({"loop": "sum"}, "the method.loop section must list fields, not 'sum'"),
        ({"aux": 1}, "the method.aux section must list fields, not 1"),
        ({"aux": {"weight": "x"}}, "method.aux.weight is x, but must be a number"),
        ({"loop": {"alpha": 2}}, "loop.alpha is 2.0, but must be between 0 and 1"),
        ({"name.x": 2}, "method.name.x: 'summed' has no field 'name.x'"),
    ],
)
def test_mistakes_are_named_with_their_path(settings: dict, message: str):
    with pytest.raises(InputError) as caught:
        build(**settings)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS.keys())
def test_every_field_of_every_method_refuses_what_it_cannot_hold(cls: type):
    for name, kind in field_types(cls).items():
        with pytest.raises(InputError, match=rf"^(the )?method\.{name}\b"):
            typed(cls, {name: [[]] if kind in (str, str | None) else "no such"}, "method")


def test_fields_without_a_default_must_be_given():
    with pytest.raises(InputError, match=r"^method needs loop, n$"):
        typed(Needy, {}, "method")
    assert typed(Needy, {"loop": {"residual": "A"}, "n": 3}, "method") == Needy(Loop("A"), 3)


def test_fields_are_merged_inside_groups():
    before = {"name": "summed", "loop": {"residual": "sum", "inject": {"kind": "none"}}, "aux": {"weight": 1}}
    changes = {"loop": {"inject": {"table": "x"}}, "aux": None, "n_blocks": 3}
    loop = {"residual": "sum", "inject": {"kind": "none", "table": "x"}}
    assert merged(before, changes) == {"name": "summed", "loop": loop, "aux": None, "n_blocks": 3}
    assert merged({"aux": None}, {"aux": {"weight": 2}}) == {"aux": {"weight": 2}}
    assert before["loop"] == {"residual": "sum", "inject": {"kind": "none"}}  # and stays as it was


def test_a_mark_is_filled_in_every_text():
    marked = Summed(teacher="{out}/a", loop=Loop(inject=Inject(table="{out}/{out}")), aux=Aux(source="b"))
    meant = Summed(teacher="runs/a", loop=Loop(inject=Inject(table="runs/runs")), aux=Aux(source="b"))
    assert filled(marked, "{out}", "runs") == meant
    assert filled(meant, "{out}", "x") == meant


def test_own_fields_come_first_and_groups_are_known():
    own, inherited = ["n_blocks", "teacher", "loop", "aux", "kd"], ["first_stage", "stage_length", "with_markers"]
    assert list(field_types(Summed)) == own + inherited
    assert groups(Summed) == {"loop": Loop, "aux": Aux, "kd": Aux} and groups(Loop) == {"inject": Inject}
    assert {"n_blocks", "loop", "loop.residual", "loop.inject.kind", "aux.weight"} <= set(field_names(Summed))


def test_help_tells_the_fields_but_for_groups():
    told = " ".join(field_parser(Summed, "method.").format_help().split())
    assert "--method.n_blocks" in told and "blocks of latents, 100 % of them" in told and "default: 6" in told
    assert "--method.first_stage" in told and "loop" not in told
    assert "what is added to a state" in field_parser(Loop, "method.loop.").format_help()


@pytest.mark.parametrize("value", ["A", None, 3])
def test_what_is_no_group_is_refused_in_python_too(value):
    with pytest.raises(InputError, match="loop is a group of settings, such as StabilisedLoop"):
        Slr(loop=value)

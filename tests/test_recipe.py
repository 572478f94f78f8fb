"""Recipes: every file in recipes/ loads, overrides reach their field, and mistakes are answered in one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from innerloop.errors import InputError
from innerloop.methods import METHODS, Coconut, Slr
from innerloop.tasks import Chain
from innerloop.train.algorithms import arguments_of
from innerloop.train.recipe import BackboneChoice, load_recipe, parse_recipe
from innerloop.train.training_arguments import training_arguments
from tests.fields import change
from tests.test_typed import Aux, Inject, Loop, Summed

RECIPES = sorted(p for p in (Path(__file__).parents[1] / "recipes").rglob("*.yaml") if "suites" not in p.parts)
RAW = {
    "task": {"name": "chain", "n_ops": 3},
    "backbone": {"scratch": {"type": "llama", "hidden_size": 32}},
    "method": {"name": "slr", "n_slots": 4},
    "train": {"max_steps": 5},
    "out": "runs/x",
}
STAGED = {
    **{name: RAW[name] for name in ("task", "backbone", "out")},
    "train": {"learning_rate": 1e-3},
    "stages": [
        {"method": {"name": "cot"}, "train": {"max_steps": 2}},
        {"method": {"name": "coconut", "curriculum": {"max_stage": 2}}},
    ],
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_loads_with_training_arguments_that_exist(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    for stage in recipe.stages or (recipe,):
        assert arguments_of(tmp_path, stage.train).learning_rate > 0
    assert recipe.out.startswith("runs/")


def write(tmp_path: Path, raw: dict) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def with_method(**fields) -> dict:
    return {**RAW, "method": {"name": "slr", **fields}}


def test_a_recipe_becomes_the_dataclasses_of_the_python_interface_and_reads_back_as_itself(tmp_path: Path):
    recipe = parse_recipe(RAW)
    assert (recipe.task, recipe.method, recipe.train) == (Chain(n_ops=3), Slr(n_slots=4), {"max_steps": 5})
    for raw in (RAW, STAGED):
        recipe = parse_recipe(raw)
        recipe.save(tmp_path / "config.yaml")
        again = load_recipe(tmp_path / "config.yaml")
        assert again.as_dict() == recipe.as_dict()
        assert [s.method for s in again.stages] == [s.method for s in recipe.stages]


def test_overrides_reach_their_field(tmp_path: Path):
    overrides = ["--method.n_slots", "8", "--train.learning_rate=1e-2", "--out", "runs/y", "--task.n_ops", "4"]
    recipe = load_recipe(write(tmp_path, RAW), overrides)
    assert (recipe.method.n_slots, recipe.out, recipe.task.n_ops) == (8, "runs/y", 4)
    assert training_arguments(tmp_path, recipe.train).learning_rate == 0.01
    assert load_recipe(write(tmp_path, RAW), ["--method", "coconut"]).method == Coconut()
    deep = load_recipe(write(tmp_path, RAW), ["--backbone.scratch.hidden_size", "64"])
    assert deep.backbone.scratch == {"type": "llama", "hidden_size": 64}


def test_overrides_of_a_staged_recipe_reach_the_last_method_and_every_training(tmp_path: Path):
    path = write(tmp_path, STAGED)
    recipe = load_recipe(path, ["--method.curriculum.max_stage", "1", "--train.max_steps", "7"])
    assert recipe.method == Coconut(curriculum={"max_stage": 1})
    assert [stage.train["max_steps"] for stage in recipe.stages] == [7, 7]
    recipe = load_recipe(path, ["--stages.1.train.max_steps", "9", "--stages.1.method.with_markers", "true"])
    assert recipe.stages[0].train == {"learning_rate": 1e-3, "max_steps": 9}
    assert recipe.stages[0].method.with_markers


def test_overrides_reach_the_stages_that_go_on_from_the_recipes_own_method(tmp_path: Path):
    hard = [{"method": {"iterate": "oracle"}}, {"method": {"trains": "decider", "tau": 0.5}}]
    own = {"name": "tah", "oracle": {"reference": "runs/a"}}
    path = write(tmp_path, {**RAW, "method": own, "stages": [{"method": "cot"}, *hard]})
    first, *hard = load_recipe(path, ["--method.oracle.reference", "runs/b", "--method.tau", "0.25"]).stages
    assert first.method.name == "cot"
    assert [(stage.method.oracle.reference, stage.method.tau) for stage in hard] == [("runs/b", 0.25)] * 2
    assert [stage.method.trains for stage in hard] == ["model", "decider"]


def test_stages_override_what_the_recipe_says_and_share_the_rest():
    recipe = parse_recipe({**STAGED, "method": {"name": "coconut", "latents_per_step": 1}})
    assert recipe.stages[1].method == Coconut(latents_per_step=1, curriculum={"max_stage": 2})
    assert recipe.stages[0].train == {"learning_rate": 1e-3, "max_steps": 2}
    assert recipe.method == recipe.stages[1].method


def test_groups_of_a_method_reach_from_the_recipe_over_stages_to_the_command_line(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(METHODS, "summed", Summed)
    own = {"name": "summed", "loop": {"alpha": 0.25}, "teacher": "{out}/a", "aux": {"source": "{out}/b"}}
    table = {"loop": {"inject": {"table": "t"}}, "aux": None}
    stages = [{"method": {"loop": {"residual": "A"}}}, {"method": table}]
    path = write(tmp_path, {**RAW, "method": own, "stages": stages})
    first, second = load_recipe(path).stages
    assert first.method == Summed(
        teacher="{out}/a", loop=Loop("A", 0.25, (), Inject("lookup")), aux=Aux(source="{out}/b")
    )
    assert second.method == Summed(teacher="{out}/a", loop=Loop("sum", 0.25, (), Inject("lookup", "t")))
    assert first.with_paths().method == replace(first.method, teacher="runs/x/a", aux=Aux(source="runs/x/b"))
    changes = ["--method.loop.residual=none", "--method.aux.weight", "2", "--stages.1.method.loop.inject.kind=none"]
    recipe = load_recipe(path, changes)
    aux = Aux(2.0, "{out}/b")  # a field of the group that the last stage had removed brings it back
    assert [(stage.method.loop, stage.method.aux) for stage in recipe.stages] == [
        (Loop("A", 0.25, (), Inject("none")), aux),
        (Loop("none", 0.25, (), Inject("lookup", "t")), aux),
    ]
    recipe.save(tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == recipe
    with pytest.raises(InputError, match=r"^method.loop.residul: .* .did you mean 'residual'"):
        load_recipe(path, ["--method.loop.residul", "A"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "slrr"}}, "there is no method 'slrr' .did you mean 'slr'"),
        ({"method": {"name": "slr", "n_slotz": 4}}, "method.n_slotz: 'slr' has no field 'n_slotz' .did you mean 'n_sl"),
        (
            {"method": {"name": "slr", "n_slots": "four"}},
            "^method.n_slots is four, .* a whole number, at least 1$",
        ),
        ({"backbone": {"scratch": 3}}, "^backbone.scratch is 3, but must be fields, as {name: value}$"),
        (
            {"method": {"name": "slr", "loop": {"alpha": 2}}},
            "^method.loop.alpha is 2, .* between 0 and 1",
        ),
        ({"method": {"n_slots": 4}}, "the method section needs a name"),
        ({"method": None}, "the method section needs a name"),
        ({"task": {"name": "chain", "preset": "hard"}}, r"task.preset: 'chain' has no preset 'hard'; it has none"),
        ({"task": "chian"}, "no task 'chian' .did you mean 'chain'"),
        (with_method(decoder={"kind": "linear"}), "list the answers there are"),
        ({"backbone": {}}, "backbone: give either 'scratch"),
        ({"backbone": {"model": "x", "scratch": {}}}, "backbone: give either"),
        ({"backbone": {"model": "x", "dtype": "int8"}}, "backbone.dtype is int8, but must be one of float32, bfloat16"),
        ({"train": [1]}, "the train section must list"),
        ({"trian": {}}, "a recipe has no section 'trian' .did you mean 'train'"),
        ({"stages": [{"out": "x"}]}, "a stage overrides task, backbone, method or train, not 'out'"),
    ],
)
def test_mistakes_are_named(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        parse_recipe({**RAW, **change})


@pytest.mark.parametrize("change", [["--backbone", "runs/cot"], ["--backbone.model", "runs/cot"]])
def test_a_model_takes_the_place_of_one_from_scratch(change: list[str], tmp_path: Path):
    lora = {"r": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RAW | {"backbone": {"scratch": {}, "lora": lora}}))
    assert load_recipe(tmp_path / "recipe.yaml", change).backbone == BackboneChoice(model="runs/cot", lora=lora)
    assert parse_recipe(RAW | {"backbone": "runs/cot"}).backbone == BackboneChoice(model="runs/cot")
    stages = [{"method": "cot"}, {"method": "cot", "backbone": "runs/cot"}]
    assert parse_recipe(RAW | {"stages": stages}).stages[1].backbone == BackboneChoice(model="runs/cot")


@pytest.mark.parametrize("preset", Slr.presets)
def test_a_preset_is_its_dataclass_and_fields_beside_it_override_it(preset: str):
    assert parse_recipe(with_method(preset=preset)).method == Slr.presets[preset]
    changed = parse_recipe(with_method(preset=preset, max_loops=6, loop={"alpha": 0.5})).method
    assert changed == change(Slr.presets[preset], max_loops=6, loop={"alpha": 0.5})


def test_the_presets_are_those_of_the_card():
    bare = {"residual": "none", "rescale": "none", "time": "none"}
    loop = {"time": "lookup", "lora": "per_iter", "lora_rank": 8, "residual": "A", "alpha": 0.7}
    fed = {"loop_scope": "append", "max_loops": 6, "h0": "forward", "answer_from": "kv_last"}
    assert Slr.presets == {
        "default": Slr(n_slots=8, max_loops=4, loop=loop),
        "readme": Slr(loop_scope="all", loop={**bare, "residual": "sum"}),
        "pause": Slr(max_loops=0, loop=bare),
        "coconut": Slr(**fed, loop=bare),
        "codi": Slr(**fed, loop={**bare, "rescale": "project"}),
        "lotus": Slr(n_slots=150, max_loops=6, loop={**bare, "residual": "sum"}),
        "spiral": Slr(n_slots=5, max_loops=5, loop={**bare, "rescale": "adapter"}),
    }


def test_a_preset_may_be_chosen_for_all_stages_on_the_command_line_or_by_a_stage(tmp_path: Path):
    path = write(tmp_path, with_method(preset="lotus", n_slots=4))
    recipe = load_recipe(path, ["--method.preset", "spiral", "--method.loop.alpha", "0.5"])
    assert recipe.method == change(Slr.presets["spiral"], n_slots=4, loop={"alpha": 0.5})
    stages = [{"method": {"max_loops": 2}}, {"method": {"name": "slr", "preset": "readme"}}]
    first, second = parse_recipe({**with_method(preset="lotus", n_slots=4), "stages": stages}).stages
    assert first.method == replace(Slr.presets["lotus"], n_slots=4, max_loops=2)
    assert second.method == replace(Slr.presets["readme"], n_slots=4)
    recipe = parse_recipe(with_method(preset="readme", max_loops=6))
    recipe.save(tmp_path / "config.yaml")
    assert "preset" not in (tmp_path / "config.yaml").read_text()  # it is written out
    assert load_recipe(tmp_path / "config.yaml").method == recipe.method == replace(Slr.presets["readme"], max_loops=6)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"preset": "readmee"},
            "method.preset: 'slr' has no preset 'readmee' .did you mean 'readme'.*; it has default, r",
        ),
        ({"preset": "zzz"}, "'slr' has no preset 'zzz'; it has default"),
        ({"preset": ["readme"]}, "has no preset"),
        ({"preset": None}, "'slr' has no preset 'None'"),
        ({"name": "coconut", "preset": "readme"}, "'coconut' has no preset 'readme'; it has none"),
        ({"preset": "readme", "n_slotz": 4}, "'slr' has no field 'n_slotz' .did you mean 'n_slots'"),
        ({"preset": "coconut", "max_loops": 0}, "max_loops to at least 1"),
    ],
)
def test_a_preset_that_cannot_be_is_named(method: dict, message: str):
    with pytest.raises(InputError, match=message) as caught:
        parse_recipe({**RAW, "method": {"name": "slr", **method}})
    assert "\n" not in str(caught.value)


def test_a_recipe_lists_the_classes_of_a_classifier(tmp_path: Path):
    recipe = parse_recipe(with_method(decoder={"kind": "linear", "classes": ["True", "False"]}))
    assert recipe.method == Slr(decoder={"kind": "linear", "classes": ("True", "False")})
    recipe.save(tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml").method == recipe.method


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["n_slots", "4"], "overrides are written --section.field value"),
        (["--method.n_slots"], "--method.n_slots has no value"),
        (["--metod.n_slots", "4"], "a recipe has no 'metod' .did you mean 'method'"),
        (["--max_steps", "4"], "a recipe has no 'max_steps' .did you mean '--train.max_steps'"),
        (["--n_slot=4"], "did you mean '--method.n_slots'"),
        (["--loop.residul", "A"], "did you mean '--method.loop.residul'"),
        (["--residual", "A"], "did you mean '--method.loop.residual'"),
        (["--lora.r", "4"], "did you mean '--backbone.lora.r'"),
        (["--ouut", "x"], "did you mean 'out'"),
        (["--zzzz", "x"], "a recipe has no 'zzzz'$"),
        (["--stages.3.method.x", "4"], "N from 1 to 0"),
        (["--task.name.x", "4"], "'name' is not a section"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, RAW), overrides)


def test_files_that_hold_no_recipe_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"there is no recipe .*recipe.yml .did you mean '.*recipe.yaml'"):
        load_recipe(write(tmp_path, RAW).with_suffix(".yml"))
    for text, words in (("a: [", "is not valid YAML"), ("- a", "holds no recipe")):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(InputError, match=f"broken.yaml {words}"):
            load_recipe(tmp_path / "broken.yaml")
    for missing in ("task", "backbone", "method", "out"):
        with pytest.raises(InputError, match=f"the recipe has no '{missing}' section"):
            parse_recipe({name: value for name, value in RAW.items() if name != missing})

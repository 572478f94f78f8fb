"""Recipes of published sizes have the authors' values, or say beside theirs what the authors' is (docs/papers.md)."""

import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from innerloop.methods import METHODS
from innerloop.train.algorithms import arguments_of
from innerloop.train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
SIZES = ("gpt2", "llama-3.2-1b", "llama-3.2-3b")
RECIPES = [f"{size}/{path.stem}" for size in SIZES for path in sorted((ROOT / "recipes" / size).glob("*.yaml"))]
PAGE = (ROOT / "docs/papers.md").read_text()
NOT_KNOWN = object()

# The authors' values (their code's where it differs from the paper), by place in the recipe; "2." is of stage 2 alone.
# `batch` are the examples of an optimizer step.
LORA = {"backbone.lora.r": 128, "backbone.lora.lora_alpha": 32, "backbone.lora.lora_dropout": 0.1}
INSTRUCT = "meta-llama/Llama-3.2-1B-Instruct"
CONSTANT = {"train.lr_scheduler_type": "constant", "train.weight_decay": 0.01, "train.seed": 0, "train.batch": 128}
BEST = {"train.eval_strategy": "epoch", "train.eval_limit": 500}
PLAIN = {"1.method.name": "cot", "1.method.with_markers": False}
COCONUT = {
    **CONSTANT,
    **BEST,
    **PLAIN,
    "backbone.model": "openai-community/gpt2",
    "backbone.dtype": "float32",
    "train.learning_rate": 1e-4,
    "train.max_grad_norm": 0,
    "train.loss_norm": "micro",
    "1.train.num_train_epochs": 25,
    "2.train.num_train_epochs": 22,
    "2.method.latents_per_step": 2,
    "2.method.curriculum.length": 3,
    "2.method.curriculum.first_stage": 1,
    "2.method.curriculum.reset_optimizer": "epoch",
}
LOTUS = {
    **CONSTANT,
    **BEST,
    **PLAIN,
    "train.max_grad_norm": 1.0,
    "2.train.num_train_epochs": 30,
    "2.method.n_blocks": 6,
    "2.method.step_weight": 0.05,
    "2.method.supervision": "post",
    "2.method.overflow": "spill",
    "2.method.readout_offset": -1,
    "2.method.curriculum.length": 1,
    "2.method.curriculum.first_stage": 0,
}
COSINE = {"train.lr_scheduler_type": "cosine", "train.warmup_steps": 0.03}
CODI = {
    **LORA,
    **COSINE,
    "backbone.dtype": "bfloat16",
    "method.n_latents_total": 6,
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 2.0,
    "train.batch": 128,
    "train.loss_norm": "micro",
    "train.eval_strategy": "no",
    "train.seed": 11,
}
CODI_1B = {
    **CODI,
    "backbone.model": INSTRUCT,
    "method.hid.weight": 20.0,
    "train.learning_rate": 8e-4,
    "train.num_train_epochs": 10,
    "train.max_length": 200,
}
AUTHORS: dict[str, dict[str, Any]] = {
    "gpt2/coconut": {**COCONUT, "2.method.curriculum.max_stage": 3},
    "gpt2/simcot": {
        **COCONUT,
        "2.method.curriculum.max_stage": 5,
        "3.method.curriculum.max_stage": 5,
        "3.method.curriculum.first_stage": 6,
        "3.method.curriculum.reset_optimizer": "epoch",
        "3.method.latents_per_step": 2,
        "3.method.aux.weight": 1.0,
        "3.method.aux.position": 1,
        "3.method.aux.norm": "per_row",
        "3.method.surplus": "answer",
        "3.train.num_train_epochs": 15,
    },
    "gpt2/codi": {
        **CODI,
        "backbone.model": "openai-community/gpt2",
        "method.hid.weight": 1.0,
        "train.learning_rate": 3e-3,
        "train.num_train_epochs": 40,
        "train.batch_size": 64,
    },
    "gpt2/icot": {
        **BEST,
        "backbone.model": "mistralai/Mistral-7B-v0.1",
        "backbone.dtype": "bfloat16",
        "method.removed_per_epoch": 8,
        "method.max_removed": 39,
        "method.smoothing": 4.0,
        "method.reset_optimizer": "stage",
        "train.learning_rate": 1e-5,
        "train.lr_scheduler_type": "constant",
        "train.weight_decay": 0.01,
        "train.max_grad_norm": 1.0,
        "train.batch": 32,
        "train.batch_size": 16,
        "train.num_train_epochs": 80,
        "train.max_length": 150,
        "train.seed": 1234,
    },
    "gpt2/lotus": {
        **LOTUS,
        "backbone.model": "openai-community/gpt2",
        "backbone.dtype": "float32",
        "train.learning_rate": 1e-4,
        "1.train.num_train_epochs": 100,
        "2.method.latents_per_block": 13,
    },
    "llama-3.2-1b/codi": {**CODI_1B, "train.batch_size": 32},
    "llama-3.2-1b/simcot_codi": {
        **CODI_1B,
        "train.batch_size": 64,
        "method.aux.weight": 1.0,
        "method.aux.norm": "token_mean",
        "method.surplus": "ignore",
    },
    "llama-3.2-1b/lotus": {
        **LOTUS,
        "backbone.model": INSTRUCT,
        "backbone.dtype": "bfloat16",
        "train.learning_rate": 1e-4,
        "1.train.num_train_epochs": 100,
        "2.method.latents_per_block": 25,
    },
    "llama-3.2-1b/pccot": {
        **LORA,
        **COSINE,
        "backbone.model": INSTRUCT,
        "backbone.dtype": "bfloat16",
        "method.n_slots": 24,
        "method.max_loops": 3,
        "method.hid.weight": 1.0,
        "train.learning_rate": NOT_KNOWN,
        "train.num_train_epochs": NOT_KNOWN,
        "train.weight_decay": 0.01,
        "train.max_grad_norm": 1.0,
        "train.batch": 128,
        "train.batch_size": 128,
        "train.seed": 42,
        "train.max_length": None,
        "train.eval_strategy": "steps",
        "train.eval_steps": 200,
        "train.eval_limit": 500,
    },
    "llama-3.2-1b/spiralthinker": {
        "backbone.model": "meta-llama/Llama-3.2-1B",
        "2.method.latents_per_block": 5,
        "2.method.max_loops": 5,
        **dict.fromkeys((*LORA, "backbone.dtype", "2.method.pattern", "2.method.hid.weight"), NOT_KNOWN),
        **dict.fromkeys((f"train.{name}" for name in ("learning_rate", "num_train_epochs", "batch_size")), NOT_KNOWN),
        **dict.fromkeys(
            (
                f"train.{name}"
                for name in ("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed")
            ),
            NOT_KNOWN,
        ),
    },
    "llama-3.2-3b/lotus": {
        **LOTUS,
        "backbone.model": "meta-llama/Llama-3.2-3B-Instruct",
        "backbone.dtype": "bfloat16",
        "train.learning_rate": 5e-5,
        "1.train.num_train_epochs": 10,
        "2.method.latents_per_block": 25,
    },
}


def found(recipe: Recipe, place: str, tmp_path: Path) -> set[Any]:
    """Return the values that a recipe has at a place, of all its stages or of one."""
    number, _, rest = place.partition(".")
    stages = recipe.stages or (recipe,)
    section, *names = (rest if number.isdigit() else place).split(".")
    values = set()
    for stage in (stages[int(number) - 1],) if number.isdigit() else stages:
        if section == "train":
            args = arguments_of(tmp_path, stage.train)
            batch = args.batch_size * args.gradient_accumulation_steps
            value = batch if names == ["batch"] else getattr(args, names[0])
        else:
            get = lambda at, name: at[name] if isinstance(at, dict) else getattr(at, name)  # noqa: E731
            value = reduce(get, names, getattr(stage, section))
        values.add(getattr(value, "value", value))
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_a_value_that_differs_from_the_authors_says_beside_it_what_theirs_is(name: str, tmp_path: Path):
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe, theirs = load_recipe(path), AUTHORS[name]
    differing = {place for place, value in theirs.items() if found(recipe, place, tmp_path) != {value}}
    beside = re.findall(r"^ *(?:- )?(\w+): .*# theirs: (.+)$", path.read_text(), re.MULTILINE)
    assert sorted(field for field, _ in beside) == sorted(place.rpartition(".")[2] for place in differing)
    for place in differing:
        (told,) = [told for field, told in beside if field == place.rpartition(".")[2]]
        said = told.partition(";")[0].partition(",")[0].partition(" over")[0]
        if theirs[place] is NOT_KNOWN:
            assert said == "not known"
        else:
            assert said == theirs[place] if isinstance(theirs[place], str) else float(said) == theirs[place]


def test_every_recipe_of_a_published_size_is_compared():
    assert sorted(AUTHORS) == sorted(RECIPES)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_data_sets_of_the_hub_name_a_configuration_not_a_split(path: Path):
    """NAME:CONFIG:SPLIT; what a split is called there is found out."""
    sources = re.findall(r'(?:train|valid|test): "?([\w-]+/[\w-]+:[\w:-]+)"?', path.read_text())
    assert [source for source in sources if re.search(r"^[^:]+:(train|valid|validation|test)$", source)] == []
    if "num_train_epochs" in path.read_text() and "eval_strategy: " in path.read_text():
        assert "valid: " in path.read_text()  # there is something to choose the best checkpoint by


# The page


def rows() -> list[list[str]]:
    """Return the cells of the page's table."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| paper")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_every_paper_and_every_recipe_of_a_published_size_has_one_row():
    papers = {number for method in METHODS.values() for number in re.findall(r"\d{4}\.\d{5}", method.paper)}
    assert papers <= set(re.findall(r"\d{4}\.\d{5}", PAGE))
    recipes = [recipe for _, _, cell, *_ in rows() for recipe in re.findall(r"recipes/([\w./-]+)\.yaml", cell)]
    assert len(recipes) == len(set(recipes)) and set(RECIPES) <= set(recipes)


def test_what_is_ours_was_measured_and_committed_or_was_not_run():
    for *_, published, ours in rows():
        assert re.search(r"\d|no number", published)
        linked = re.findall(r"\]\((\S+?)\)", ours)
        assert ours.startswith("not run") or linked
        assert all((ROOT / "docs" / target.partition("#")[0]).exists() for target in linked)
        assert not re.search(r"\d+(\.\d+)? %", re.sub(r"\[[^]]*\]\([^)]*\)", "", ours)) or linked

"""A method or task of one's own: one file anywhere, a recipe that names it, and nothing in the package is touched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from innerloop import InputError, LatentModel
from innerloop.cli.main import main
from innerloop.methods import method_named
from innerloop.tasks import task_named
from innerloop.train.recipe import load_recipe

METHOD = '''
from dataclasses import dataclass
import innerloop as il

@dataclass(frozen=True)
class Gate(il.LoopSettings):
    residual: str = "B"
    time: str = "lookup"

@dataclass(frozen=True)
class Breath(il.LatentMethod):
    """Breaths between question and answer: latents refined a number of times.

    Args:
        n_breaths: how many latents.
        max_loops: how often they are refined.
    """
    name, paper, summary = "breath", "none", "latents that breathe"
    n_breaths: int = 2
    max_loops: int = 2
    loop: Gate = Gate()

    def n_latents(self, stage: int) -> int:
        return self.n_breaths

    def n_loops(self, stage: int) -> int:
        return self.max_loops
'''
TASK = '''
from dataclasses import dataclass
import innerloop as il

@dataclass(frozen=True)
class Twice(il.Task):
    """Says a word twice.

    Args:
        n: examples of each split.
    """
    name, summary = "twice", "a word, twice"
    n: int = 8

    def examples(self, split: str, limit: int | None = None):
        word = {"train": "a", "valid": "b", "test": "c"}[split]
        found = [il.Example(f"{word} {i}", (), f"{word} {i}", f"twice-{split}-{i}") for i in range(self.n)]
        return found[:limit]
'''
RECIPE = """
task: {name: chain, n_ops: 2, modulus: 5, n_train: 16, n_valid: 4, n_test: 4}
backbone: {scratch: {type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}
method: {name: my_breath.Breath, n_breaths: 3, loop: {alpha: 0.5}}
train: {max_steps: 2, batch_size: 8, learning_rate: 1.0e-3, seed: 0}
out: OUT
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_breath.py").write_text(METHOD.replace('"B"\n', '"B"\n    alpha: float = 0.7\n'))
    (tmp_path / "breath.yaml").write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_breath", raising=False)
    return tmp_path / "breath.yaml"


def test_it_is_trained_by_a_recipe_loaded_again_and_answers(recipe, capsys):
    assert main(["train", str(recipe)]) == 0
    model = LatentModel.from_pretrained(recipe.parent / "run")
    assert model.method == load_recipe(recipe).method and model.method.n_breaths == 3
    assert (model.method.loop.residual, model.method.loop.alpha, model.loop.time is None) == ("B", 0.5, False)
    answer = model.generate(["3 ; + 1"], max_new_tokens=4)[0]
    assert (answer.cost.loops, answer.cost.thought_tokens) == (2, 3 + len(answer.ids))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_breath.Breaht", "method 'my_breath.Breaht': my_breath has no 'Breaht'"),
        ("my_breath.Gate", "method 'my_breath.Gate' is no class derived from innerloop.Method"),
        ("nowhere.Breath", "cannot import nowhere"),
        ("breath", "there is no method 'breath'"),
    ],
)
def test_what_is_no_method_is_refused_in_one_sentence(recipe, name, message):
    with pytest.raises(InputError, match=message):
        method_named(name)


@pytest.mark.slow
def test_a_task_of_ones_own_is_found_again_in_another_process(recipe: Path, monkeypatch, capsys):
    (recipe.parent / "my_task.py").write_text(TASK)
    task, run = recipe.read_text().splitlines()[1], recipe.parent / "run"
    recipe.write_text(recipe.read_text().replace(task, "task: {name: my_task.Twice, n: 6}"))
    assert main(["train", str(recipe)]) == 0
    assert "name: my_task.Twice" in (run / "config.yaml").read_text()
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(recipe.parent), *sys.path])}
    command = [sys.executable, "-m", "innerloop", "eval", str(run)]
    found = subprocess.run(command, capture_output=True, text=True, env=place)
    assert found.returncode == 0, found.stderr
    assert json.loads((run / "result.json").read_text())["task"] == {"name": "twice", "version": 1, "n": 6}

    (recipe.parent / "my_task.py").rename(run / "my_task.py")  # a run's folder holds no code
    monkeypatch.delitem(sys.modules, "my_task")
    assert main(["eval", str(run), "--out", str(recipe.parent / "other")]) != 0
    assert "task 'my_task.Twice': cannot import my_task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_breath.Breath", "task 'my_breath.Breath' is no class derived from innerloop.Task"),
        ("nowhere.Twice", "cannot import nowhere"),
        ("twice", "no task 'twice'"),
    ],
)
def test_what_is_no_task_is_refused_in_one_sentence(recipe, name, message):
    with pytest.raises(InputError, match=message):
        task_named(name)

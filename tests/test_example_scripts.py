"""The examples run as they are, with fewer steps; what they print is what they promise to show."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from innerloop import LatentModel
from innerloop.cli.main import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TINY = ("--task.n_train", "32", "--task.n_valid", "2", "--train.max_steps", "2", "--train.batch_size", "4")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, with the examples to be imported as they are beside a script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("train_slr", "own_method"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def run(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_model_is_trained_compared_and_looked_into(capsys):
    run("train_slr.py", "--steps", "2", "--n-test", "4")
    table = capsys.readouterr().out
    assert re.findall(r"^(cot|slr) +[\d.]+% +[\d.]+% to [\d.]+% +[\d.]+$", table, re.MULTILINE) == ["cot", "slr"]
    assert LatentModel.from_pretrained("runs/examples/slr").method.n_slots == 3
    run("look_inside.py", "--n", "4")
    out = capsys.readouterr().out
    assert len(re.findall(r"^  after loop \d the latents show", out, re.MULTILINE)) == 3
    assert re.search(r"^  hidden +[\d.]+%$", out, re.MULTILINE)


def test_a_method_of_ones_own_is_trained_by_its_script_and_by_a_recipe_and_loaded_again(capsys):
    run("own_method.py", "--steps", "2")
    assert "told what to hold" in capsys.readouterr().out.splitlines()[-1]
    recipe, method = str(ROOT / "recipes/chain/slr.yaml"), "{name: own_method.Scratchpad, n_cells: 3}"
    assert main(["train", recipe, "--method", method, "--out", "runs/own", *TINY]) == 0
    assert LatentModel.from_pretrained("runs/own").method.n_cells == 3


def test_the_method_of_ones_own_takes_twenty_lines():
    text = (EXAMPLES / "own_method.py").read_text()
    body = text[text.index("@dataclass") : text.index("TASK =")].split('"""')
    assert len([line for line in (body[0] + body[2]).splitlines() if line.strip()]) <= 20


def test_the_notebook_runs_from_top_to_bottom(capsys):
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    quick, n_changed = re.subn(r"STEPS = \d+", "STEPS = 2", "\n".join(code))
    exec(compile(re.sub(r"n_test=\d+", "n_test=4", quick), "first_steps.ipynb", "exec"), {})
    out = capsys.readouterr().out
    assert (n_changed, len(re.findall(r"^loop \d: moved", out, re.MULTILINE))) == (1, 3)


def test_the_notebook_shows_what_it_printed():
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    printed = ["".join(line for out in cell["outputs"] for line in out["text"]) for cell in cells if "outputs" in cell]
    assert len("".join(printed).splitlines()) > 15
    assert not any(cell.get("execution_count") is None and cell["outputs"] for cell in cells if "outputs" in cell)

"""What the pages show is run: README's Python as printed, its recipe, and the files it names."""

import re
from pathlib import Path

import pytest
import yaml

from innerloop.methods import Slr
from innerloop.train.recipe import parse_recipe
from tests.models import tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_of_the_readme_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    method = Slr(n_slots=5, max_loops=5, slots_per_step=1, step_weight=1.0)  # what the demo leaves there, untrained
    tiny_model(method).save_pretrained(tmp_path / "runs/demo/slr")
    monkeypatch.chdir(tmp_path)
    code, *_ = blocks("python")
    assert len(code.strip().splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert len(re.findall(r"^loop \d: change", out, re.MULTILINE)) == 5


def test_the_recipe_of_the_readme_loads():
    (text,) = blocks("yaml")
    assert parse_recipe(yaml.safe_load(text)).method.name == "coconut"


def test_every_file_and_module_that_the_pages_name_exists():
    pages = [README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "docs/architecture.md").read_text()]
    names = {name for page in pages for name in re.findall(r"`([\w./]+?(?:\.py|\.md|\.yaml|/))`", page)}
    missing = [
        name
        for name in names
        if "NAME" not in name and not (ROOT / name).exists() and not (ROOT / "src/innerloop" / name).exists()
    ]
    assert not missing

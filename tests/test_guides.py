"""The guides: their Python runs as printed, recipes load, files and commands exist, and the site shows them all."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import innerloop
from innerloop.cli.main import VERBS
from innerloop.tasks import task_named
from innerloop.train.recipe import parse_recipe
from innerloop.train.training_arguments import LatentTrainingArguments

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
BESIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
PAGES = [*BESIDE, ROOT / "examples/README.md", *DOCS]
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("getting_started", "your_own_data", "several_gpus", "logging")]
NAMED = [name for page in DOCS for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_of_the_guides_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    (examples,) = blocks(ROOT / "docs/your_own_data.md", "json")
    Path("train.jsonl").write_text(examples)
    for page in GUIDES:
        for code in blocks(page, "python"):
            exec(compile(code, page.name, "exec"), {"__name__": page.stem})
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ of 100", out[0])
    assert out[1] == "Ann has 3 apples and buys 4. How many has she? True"
    assert json.loads(Path("own.jsonl").read_text())["steps"] == ["3 * 4 = 12", "2 + 12 = 14"]
    assert re.match(r"\[\(10, [\d.]+\), \(20, ", out[-1])


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_recipes_of_the_guides_load(page: Path):
    for raw in map(yaml.safe_load, blocks(page, "yaml")):
        if "task" in raw:
            assert parse_recipe(raw).out.startswith("runs/")
        assert set(raw.get("train", {})) <= set(LatentTrainingArguments.__dataclass_fields__)


@pytest.mark.parametrize(
    ("task", "gold", "written"),
    [
        ("plain", "Paris", " Paris "),
        ("gsm8k", "1200", "1,200"),
        ("gsm8k", "1200", "$1200"),
        ("gsm8k", "1200", "1200.0"),
        ("strategyqa", "yes", "Yes"),
        ("prontoqa", "true", "True"),
    ],
)
def test_an_answer_is_right_as_the_guide_says(tmp_path: Path, task: str, gold: str, written: str):
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": "?", "steps": [], "answer": gold}))
    chosen = task_named(task)(test=str(tmp_path / "own.jsonl"))
    (example,) = chosen.examples("test")
    assert chosen.is_correct(chosen.extract(f"a step\n### {written}"), example.answer)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_and_types_is_there(page: Path):
    text = page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert [target for target in links if not (page.parent / target).exists()] == []
    commands = re.findall(
        r"^ +(?:torchrun .*-m |accelerate launch .*-m )?innerloop (\w+)(?: (\w+))?", text, re.MULTILINE
    )
    assert [(first, second) for first, second in commands if not {first, f"{first} {second}"} & set(VERBS)] == []


def test_every_page_is_in_the_navigation_of_the_site():
    def leaves(value) -> list[str]:
        return [value] if isinstance(value, str) else [leaf for part in value for leaf in leaves_of(part)]

    def leaves_of(entry: dict) -> list[str]:
        return [leaf for value in entry.values() for leaf in leaves(value)]

    shown = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    made = [f"examples/{path.stem}.md" for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")]
    assert sorted(shown) == sorted([*(page.relative_to(ROOT).as_posix() for page in PAGES), *made])


def test_every_public_name_is_in_the_reference():
    assert {f"innerloop.{name}" for name in innerloop.__all__} - set(NAMED) == set()


@pytest.mark.parametrize("name", NAMED)
def test_what_the_reference_shows_exists_and_has_a_docstring(name: str):
    module, _, last = name.rpartition(".")
    assert getattr(import_module(module), last).__doc__


def test_every_folder_of_recipes_is_explained():
    folders = {f"{path.name}/" for path in (ROOT / "recipes").iterdir() if path.is_dir()}
    assert folders - set(re.findall(r"`([\w.-]+/)`", (ROOT / "recipes/README.md").read_text())) == set()

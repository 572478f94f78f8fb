"""What the pages show is run: README's Python as printed, its recipe, and the files it names."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from innerloop import LatentModel
from innerloop.cli.main import main
from innerloop.methods import METHODS, Slr
from innerloop.train.recipe import parse_recipe
from tests.hub import standing_in
from tests.models import tiny_model

TINY = {"type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
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
    text = blocks("yaml")[-1]
    assert parse_recipe(yaml.safe_load(text)).method.name == "coconut"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in huggingface_hub itself
def test_own_data_are_trained_on_and_the_run_is_shared_as_printed(tmp_path: Path, monkeypatch, capsys):
    own, _, sharing = README[README.index("## Use your own data") : README.index("## Use it")].partition("## Share it")
    monkeypatch.chdir(tmp_path)
    (table, recipe), (code,) = (
        re.findall(r"```(?:csv|yaml)\n(.*?)```", own, re.DOTALL),
        re.findall(r"```python\n(.*?)```", sharing, re.DOTALL),
    )
    Path("mine.csv").write_text(table)
    Path("mine.yaml").write_text(recipe)
    commands = [
        shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (innerloop .*)", own + sharing, re.M)
    ]
    commands[0] += ["--backbone", yaml.safe_dump({"scratch": TINY}), "--train.max_steps", "2"]
    with standing_in(tmp_path, monkeypatch) as hub:
        assert [main(command) for command in commands] == [0] * len(commands)
        assert [command[0] for command in commands] == ["train", "ask", "doctor", "push"]
        capsys.readouterr()
        exec(compile(code, "README.md", "exec"), {})
        model = LatentModel.from_pretrained("me/mine")
    answer = model.generate(["Ann has 3 apples and buys 4. How many has she?"], max_new_tokens=16)[0]
    assert capsys.readouterr().out.strip() == answer.text.strip()
    assert "README.md" in hub.repos["me/mine"]


def test_every_file_and_module_that_the_pages_name_exists():
    pages = [README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "docs/architecture.md").read_text()]
    names = {name for page in pages for name in re.findall(r"`([\w./]+?(?:\.py|\.md|\.yaml|/))`", page)}
    missing = [
        name
        for name in names
        if "NAME" not in name and not (ROOT / name).exists() and not (ROOT / "src/innerloop" / name).exists()
    ]
    assert not missing


def test_the_table_of_methods_has_them_all():
    table = README.split("## The methods")[1].split("##")[0]
    assert [name for name in METHODS if f"`{name}`" not in table] == []

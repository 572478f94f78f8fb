"""Names that become folders: what cannot be one is refused, and nothing that is printed is markup."""

import re
from io import StringIO
from pathlib import Path

import pytest
import yaml

from innerloop.disk.names import check_folder, check_name, folder_name
from innerloop.errors import InputError
from innerloop.experiments.grid import trial_folder
from innerloop.experiments.suite import load_suite, parse_suite
from innerloop.experiments.summary import terminal_table
from innerloop.model import run_folder
from innerloop.terminal.plain import plain_console
from innerloop.terminal.progress import bar
from innerloop.text.examples import read_examples, write_examples
from innerloop.train.recipe import read_recipe
from tests.test_cli import innerloop, refused, written
from tests.test_suite import RAW

SRC = Path(__file__).parents[1] / "src/innerloop"
NO_NAMES = ["../../escaped", "./a", "a/b", "/a", "a\\b", "", ".", "..", "a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 300]
NO_NAMES += ["\u00e9" * 150, 7, None, True]


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_a_variant_whose_name_is_no_folder_is_refused(name):
    with pytest.raises(InputError, match="variant"):
        parse_suite({**RAW, "out": "out", "variants": {"a": {}, name: {}}})


@pytest.mark.parametrize("name", ["slr", "cot, vote of 4", "[x]", "C#", "caf\u00e9", "..a", "x" * 230])
def test_every_other_name_is_taken_as_it_is(name: str):
    assert check_name(name, "variant") == name


@pytest.mark.parametrize(
    "path", ["runs/a\0b", "runs/" + "x" * 300, "x/" * 2000, "a\nb", "a\ud800/b"], ids=lambda p: p[:9]
)
@pytest.mark.parametrize(
    "use",
    [
        lambda path: check_folder(path, "out"),
        lambda path: parse_suite({**RAW, "out": path}),
        read_recipe,
        read_examples,
        lambda path: write_examples([], path),
        run_folder.resolve,
    ],
    ids=["folder", "suite", "recipe", "data", "written", "model"],
)
def test_a_path_that_no_file_system_has_is_refused_in_one_sentence(use, path: str):
    with pytest.raises(InputError, match=r"cannot be printed|a shorter one") as error:
        use(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 250


@pytest.mark.parametrize("name", NO_NAMES[:-3])
def test_what_is_called_so_gets_a_folder_of_its_own(name: str):
    made = folder_name(name)
    assert re.fullmatch(r"[\w.=+-]{9,230}", made, re.ASCII)
    assert made != folder_name(name + "'")


@pytest.mark.parametrize(
    "settings, folder",
    [
        ({"method.max_loops": 4, "train.learning_rate": 1e-3}, r"max_loops=4_learning_rate=0\.001"),
        ({"train.bf16": True, "method.x": -1}, "bf16=True_x=-1"),
        ({"backbone.model": "a/b"}, r"model=a_b-\w{8}"),
        ({"backbone.model": "a_b"}, "model=a_b"),
        ({"stop.layers": [1, 2]}, r"layers=_1_2_-\w{8}"),
        ({"backbone.model": "../.."}, r"model=\.\._\.\.-\w{8}"),
    ],
    ids=str,
)
def test_folders_of_trials_are_one_word_to_a_shell(settings: dict, folder: str):
    assert re.fullmatch(folder, trial_folder(settings))


def test_trials_of_a_grid_are_in_such_folders(tmp_path: Path):
    grid = {"method.max_loops": [1, 2], "train.learning_rate": [1e-3]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**RAW, "variants": None, "grid": grid, "out": "runs"}))
    jobs = load_suite(tmp_path / "suite.yaml").jobs
    assert jobs["max_loops=2, learning_rate=0.001", 1].out == "runs/max_loops=2_learning_rate=0.001/1"


def test_what_is_printed_is_never_markup():
    console, hostile = plain_console(), "runs/[/x] :warning: [red]a[/red] \\[b]"
    console.file, console.width = (out := StringIO()), 100
    console.print(hostile)
    console.print(terminal_table([hostile, "n"], [[hostile, "1"]], hostile))
    with bar(console) as progress:
        progress.add_task(hostile, total=1, note=hostile)
    assert " ".join(out.getvalue().split()).count(hostile) >= 5


def test_no_verb_prints_to_another_console():
    makers = [path.name for path in SRC.rglob("*.py") if re.search(r"\bConsole\(|rich\.markup", path.read_text())]
    assert makers == ["plain.py"]


def test_a_run_whose_name_looks_like_markup_is_trained_and_evaluated(tmp_path: Path, capsys):
    run = tmp_path / "[" / "x]"
    recipe = written(tmp_path, out=str(run), stages=None, method={"name": "no_cot"})
    assert innerloop(capsys, "train", recipe)[0] == 0
    code, out, err = innerloop(capsys, "eval", run, "--limit", 2)
    assert code == 0 and str(run / "result.json") in out, err


def test_a_recipe_does_not_train_into_a_name_that_cannot_be_printed(tmp_path: Path, capsys):
    refused(capsys, "cannot be printed", "train", written(tmp_path, out=str(tmp_path / "a\0b")))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]

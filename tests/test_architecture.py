"""The house is as docs/architecture.md and the lint contracts say: floors, walks, and nothing too long to read."""

import ast
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from innerloop.cli.main import VERBS
from innerloop.methods import METHODS

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src/innerloop"
FILES = sorted(SRC.rglob("*.py"))
TEXT = (ROOT / "docs/architecture.md").read_text()
WALKS = re.findall(r"(?:\d\. |, or |`; )`([\w/]+\.py): ([\w.]+)`", TEXT[TEXT.index("## Two walks") :])


def test_the_rooms_of_the_document_are_the_floors_that_lint_holds_in_the_same_order():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    upwards = [re.findall(r"\w+", floor) for floor in reversed(floors)]
    table = TEXT[TEXT.index("| room |") : TEXT.index("## Two walks")]
    rows = [
        re.findall(r"`(\w+)(?:/|\.py)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")
    ]
    told = [name for row in rows for name in row]
    assert sorted(told) == sorted(name for floor in upwards for name in floor if not name.startswith("__"))
    places = {name: i for i, floor in enumerate(upwards) for name in floor}
    assert [places[name] for name in told] == sorted(places[name] for name in told)


@pytest.mark.parametrize("file, name", WALKS, ids=lambda value: value)
def test_what_the_walks_name_is_there(file, name):
    found = set()
    for node in ast.walk(ast.parse((SRC / file).read_text())):
        if isinstance(node, ast.ClassDef):
            found |= {
                node.name,
                *(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)),
            }
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    assert name in found


def test_there_are_walks():
    assert len(WALKS) >= 20


def test_commands_that_are_printed_can_be_pasted():
    """A folder with a space is quoted: commands are joined by shlex, not written out around a value."""
    spelled = re.compile(rf"""innerloop ({"|".join(name.split()[0] for name in VERBS)}) [^"'`]*\{{""")
    lines = [(path.name, line) for path in FILES for line in path.read_text().splitlines()]
    assert [(name, line) for name, line in lines if spelled.search(line)] == []


def test_nothing_lies_in_the_hall():
    names = {path.name for path in SRC.iterdir() if path.is_file()}
    assert names == {"__init__.py", "__main__.py", "errors.py", "py.typed"}


BY_HAND = re.compile(
    r"shutil|os\.(open|replace|rename|remove)\((?!os\.devnull)|\.(unlink|rename|touch|write_bytes|st_mtime)\b|(?<!aside)\.open\(\"[wa]"
    r"|(?<!aside / run_folder\.SETTINGS\))(?<!folder / SETTINGS\))(?<!aside / \"adapter_config\.json\"\))\.write_text\("
)


def test_files_are_written_and_removed_in_one_room():
    by_hand = [
        f"{path.relative_to(SRC)}: {line.strip()}"
        for path in FILES
        if path.parent.name != "disk"
        for line in path.read_text().splitlines()
        if BY_HAND.search(line)
    ]
    assert by_hand == []


def test_files_and_functions_can_be_read_whole():
    long_files = [str(path) for path in FILES if len(path.read_text().splitlines()) > 400]
    assert long_files == []
    functions = [
        (str(path.relative_to(SRC)), node.name, node.end_lineno - node.lineno + 1)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert [found for found in functions if found[2] > 70] == []
    heart = {("loop/loop.py", "forward"), ("passes/thought.py", "think")}
    assert all(n < 60 for file, name, n in functions if (file, name) in heart)
    for file, name in heart:
        nodes = [node for node in ast.walk(ast.parse((SRC / file).read_text())) if isinstance(node, ast.FunctionDef)]
        for node in (node for node in nodes if node.name == name):
            assert sum(isinstance(part, ast.If | ast.For | ast.While) for part in ast.walk(node)) <= 8


def test_methods_have_few_options_between_them():
    def leaves(settings) -> int:
        values = [getattr(settings, field.name) for field in dataclasses.fields(settings)]
        return sum(leaves(value) if dataclasses.is_dataclass(value) else 1 for value in values)

    n_options = sum(leaves(method()) for method in METHODS.values())
    assert (
        n_options <= 586
    )  # 166 of them: denoising, most in groups that five methods share; 13: hybrid, 3: Ouro and Huginn

"""What needs no model imports neither torch nor transformers: they take seconds, and half a gigabyte."""

import json
import subprocess
import sys

import pytest

import innerloop as il
from innerloop.cli.main import VERBS

NO_RUN = "runs/no_such_run"
COMMANDS = [  # each with the code that it ends with
    (["--help"], 0),
    (["--version"], 0),
    (["methods"], 0),
    (["data", "list"], 0),
    *(([*verb.split(), "--help"], 0) for verb in VERBS),
    (["data", "make", "chain", "--help"], 0),
    (["methds"], 2),
    (["eval", "run", "--limt", "8"], 2),
    (["train", "no_such_recipe.yaml"], 2),
    (["data", "make", "chian"], 2),
    (["data", "show", "no_such_file.jsonl"], 2),
    (["ask", ".", "?", "--method", "slrr"], 2),
    *(([verb, NO_RUN], 2) for verb in ("eval", "lens", "calibrate", "bench")),
    (["ask", NO_RUN, "?"], 2),
    (["compare", NO_RUN, NO_RUN], 2),
]
SCRIPT = """
import contextlib, io, json, sys
import innerloop as il
from innerloop.cli.main import main

def heavy():
    return sorted({"torch", "transformers", "peft", "datasets", "scipy", "numpy"} & set(sys.modules))

dir(il), il.Slr(), il.Mor(), il.Chain()
found = [["import", 0, heavy()]]
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(command)
        except SystemExit as end:
            code = end.code
    found.append([command, code, heavy()])
print(json.dumps(found))
"""


def test_commands_that_need_no_model_import_neither_torch_nor_transformers():
    commands = json.dumps([command for command, _ in COMMANDS])
    asked = subprocess.run([sys.executable, "-c", SCRIPT, commands], capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == [["import", 0, []], *([command, code, []] for command, code in COMMANDS)]


def test_all_names_of_the_package_are_found_the_slow_ones_too():
    names: dict[str, object] = {}
    exec("from innerloop import *", names)
    assert {name for name in il.__all__ if getattr(il, name) is names[name]} == set(il.__all__) <= set(dir(il))
    assert {name: getattr(il, name).__name__ for name in il._SLOW} == {name: name for name in il._SLOW}


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'innerloop' has no attribute 'Slrr'"):
        il.Slrr  # noqa: B018

"""The verbs on released weights: asked as they are, converted into a folder of ours, and asked again."""

import json

import pytest

from innerloop import LatentModel
from innerloop.cli.main import main
from tests.formats import authors
from tests.formats.released import RELEASED

EACH = pytest.mark.parametrize("name", RELEASED)
QUESTION = "How many?"
pytestmark = pytest.mark.usefixtures("short_canvases")


@EACH
def test_ask_opens_it_and_says_what_it_is(name, tmp_path, capsys):
    RELEASED[name](tmp_path / name)
    assert main(["ask", str(tmp_path / name), QUESTION, "--max-new-tokens", "2"]) == 0
    assert f"{tmp_path / name} is " in capsys.readouterr().err


@EACH
@pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
def test_what_is_converted_answers_as_before(name, tmp_path):
    RELEASED[name](tmp_path / name)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "ours")]) == 0
    models = [LatentModel.from_pretrained(tmp_path / one, device="cpu") for one in (name, "ours")]
    assert models[0].method == models[1].method
    assert len({tuple(model.generate([QUESTION], max_new_tokens=8)[0].ids) for model in models}) == 1


def test_what_is_no_released_format_is_refused(tmp_path, capsys):
    authors.write_json(tmp_path / "other", "config.json", model_type="llama")
    assert main(["convert", str(tmp_path / "other"), str(tmp_path / "ours")]) == 2
    assert "has none of the formats that can be converted" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path, capsys):
    authors.llada(tmp_path / "llada")
    assert main(["convert", str(tmp_path / "llada"), str(tmp_path)]) == 2
    assert "is not empty: give another OUT" in capsys.readouterr().err


@EACH
@pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
def test_a_released_model_is_measured_and_looked_into(name, tmp_path, capsys):
    RELEASED[name](tmp_path / name)
    rows = [{"id": str(i), "question": text, "answer": "7", "steps": []} for i, text in enumerate(("How many?", "?"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["--task", "gsm8k", "--data", str(tmp_path / "rows.jsonl"), "--split", "test", "--max-new-tokens", "4"]
    assert main(["eval", str(tmp_path / name), *asked, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/result.json").read_text())["n"] == 2
    assert main(["lens", str(tmp_path / name), *asked, "--out", str(tmp_path / "lens.html")]) == 0

"""`innerloop eval` with controls, stability and probes: the files, the screen, and what is refused."""

import json
from pathlib import Path

import pytest

from innerloop.cli.main import main
from innerloop.methods import Cot, Method, Pause, Slr
from tests.models import moved, saved, tiny_model

TASK = "{name: chain, n_ops: 3, n_train: 40, n_valid: 12, n_test: 12}"
SMALL = Slr(n_slots=2, max_loops=2)


def evaluated(method: Method, folder: Path, *options: str) -> int:
    """Evaluate a tiny model as a user would; return the exit code."""
    run = saved(moved(tiny_model(method, num_hidden_layers=1)), folder / "run")
    return main(["eval", str(run), "--task", TASK, "--max_new_tokens", "3", "--out", str(folder / "out"), *options])


def test_everything_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = ["--controls", "true", "--stability", "true", "--probes", "true"]
    assert evaluated(SMALL, tmp_path, *flags) == 0
    files = {name: json.loads((tmp_path / "out" / name).read_text()) for name in ("controls.json", "stability.json")}
    found, shaky = files["controls.json"], files["stability.json"]
    edits = ["shuffled", "zeroed", "mean", "noise", "frozen", "hidden", "question_hidden"]
    assert [entry["control"] for entry in found["controls"]] == edits
    for report in (found, shaky):
        assert (report["method"], report["task"], report["split"], report["n"]) == ("slr", "chain", "test", 12)
    assert found["verdict"]["kind"] == "undecided" and [point["loops"] for point in found["loops"]] == [0, 1, 2, 3, 4]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["controls"] == found and result["n"] == 12
    assert [entry["loop"] for entry in shaky["loops"]] == [1, 2] and shaky["sentences"]
    probed = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert (probed["n_train"], probed["n_test"]) == (40, 12)
    assert {probe["step"] for probe in probed["probes"]} == {1, 2, 3, "answer"} and len(probed["best"]) == 4
    assert probed["swap"][0]["latents"] == "all"
    screen = capsys.readouterr().out
    for words in ("are the latents used?", "accuracy against loops", "stability", "linear probes", "swapped"):
        assert words in screen


def test_no_number_of_the_stability_table_is_cut_at_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert evaluated(SMALL, tmp_path, "--stability", "true") == 0
    screen = capsys.readouterr().out
    table = screen[screen.index("stability:") :]
    assert max(map(len, table.splitlines()[:10])) <= 80 and "…" not in table
    for entry in json.loads((tmp_path / "out" / "stability.json").read_text())["loops"]:
        for spread in filter(None, (value for value in entry.values() if isinstance(value, dict))):
            assert f"{spread['median']:.3g}" in table
            assert f"({spread['low']:.2g} to {spread['high']:.2g})" in table


def test_a_method_without_latents_is_told_so_and_still_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert evaluated(Cot(), tmp_path, "--controls", "true") == 0
    assert json.loads((tmp_path / "out" / "controls.json").read_text())["verdict"]["kind"] == "none"
    assert "'cot' has no latents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SMALL, ("--controls", "true", "--loops", "3"), "leave --loops out"),
        (Pause(), ("--stability", "true"), "no loop over latents"),
        (Cot(), ("--probes", "true"), "no latents to probe"),
        (SMALL, ("--probes", "--limit", "5"), "10 to be tested on, but there are 40 and 5"),
        (SMALL, ("--controls", "--limit", "1"), "give at least two different ones"),
    ],
    ids=["loops", "stability", "probes", "few", "one"],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_answered(
    method: Method, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert evaluated(method, tmp_path, *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--controls", "controls exchange latents between questions: give at least two different ones that can be"),
        ("--probes", "10 to be tested on, but there are 40 and 2 that can be answered"),
    ],
)
def test_what_is_too_long_is_not_counted(flag: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    questions = ["1 ; + 1", "1 ; + 1", *[" ; + ".join(["1"] * 400 + [str(i)]) for i in range(1, 5)]]
    rows = [{"id": str(i), "question": q, "steps": ["1"], "answer": "2"} for i, q in enumerate(questions)]
    train = [{"id": str(i), "question": f"{i % 9} ; + 1", "steps": ["1"], "answer": "2"} for i in range(40)]
    for name, told in (("test", rows), ("train", train)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    task = f"{{name: plain, train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl}}"
    assert evaluated(SMALL, tmp_path, flag, "true", "--task", task) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "result.json").exists()


def test_plain_evaluation_writes_answers_and_their_parts_alone(tmp_path: Path):
    assert evaluated(SMALL, tmp_path) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["parts.json", "predictions.jsonl", "result.json"]

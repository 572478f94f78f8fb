"""What was measured is kept part by part: what was interrupted goes on where it was, and nothing stale is taken."""

import json
import math
import queue
from dataclasses import replace
from pathlib import Path

import pytest

from innerloop.calibrate.threshold_search import ThresholdSearch
from innerloop.cli.main import main
from innerloop.experiments import jobs, testing
from innerloop.experiments.suite import parse_suite
from innerloop.measure import result_cache, subject
from innerloop.measure.result_cache import PARTS, ResultCache
from innerloop.methods import Looped, Slr
from tests.models import moved, saved, tiny_model
from tests.test_suite import RAW

TASK = "{name: chain, n_ops: 2, n_train: 30, n_valid: 12, n_test: 12}"
ALL = ("--controls", "true", "--stability", "true", "--probes", "true")
REPORTS = ("controls.json", "stability.json", "probes.json", "predictions.jsonl")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return saved(moved(tiny_model(Slr(n_slots=2, max_loops=1), num_hidden_layers=1)), tmp_path / "run")


def evaluated(run: Path, out: Path, *options: str) -> int:
    """Evaluate a run as a user would; return the exit code."""
    return main(["eval", str(run), "--task", TASK, "--max_new_tokens", "3", "--out", str(out), *options])


def counted(monkeypatch: pytest.MonkeyPatch, stops_at: int | None = None) -> list[str]:
    """Count the evaluations with edits; Ctrl-C is pressed during one of them."""
    calls, real = [], subject.evaluate

    def spy(*arguments, **options):
        calls.append("evaluate")
        if len(calls) == stops_at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(subject, "evaluate", spy)
    return calls


def without_seconds(path: Path) -> object:
    """Return what a file holds but for times."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    return path.read_text() if found is None else [row | {"cost": row["cost"] | {"seconds": 0}} for row in found]


def test_what_was_interrupted_goes_on_and_gives_what_an_uninterrupted_one_does(run: Path, tmp_path: Path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, stops_at=6)
        assert evaluated(run, tmp_path / "twice", *ALL) == 130
    shown = " ".join(capsys.readouterr().out.split())
    assert "7 parts are kept in" in shown and "the same command goes on" in shown
    assert not (tmp_path / "twice" / "controls.json").exists() and (tmp_path / "twice" / "result.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch, stops_at=7)
        assert evaluated(run, tmp_path / "twice", *ALL) == 130  # among the swaps
        assert (tmp_path / "twice" / "stability.json").exists() and len(calls) == 7
    shown = " ".join(capsys.readouterr().out.split())
    assert "measured before: accuracy, latents, shuffled, zeroed, mean, noise, frozen (--fresh true starts" in shown
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        assert evaluated(run, tmp_path / "twice", *ALL) == 0
        rest = len(calls)
        assert evaluated(run, tmp_path / "once", *ALL) == 0
    assert len(calls) - rest == 13 == 5 + 6 + rest  # of 10 controls and 3 swaps
    for name in REPORTS:
        assert without_seconds(tmp_path / "twice" / name) == without_seconds(tmp_path / "once" / name)


def test_nothing_is_measured_twice_and_fresh_starts_over(run: Path, tmp_path: Path, monkeypatch, capsys):
    flags = ("--controls", "true")
    calls = counted(monkeypatch)
    assert evaluated(run, tmp_path / "out", *flags) == 0
    first, n = (tmp_path / "out" / "controls.json").read_bytes(), len(calls)
    assert evaluated(run, tmp_path / "out", *flags, "--limit", "11") == 0 and len(calls) == 2 * n
    capsys.readouterr()
    assert evaluated(run, tmp_path / "out", *flags) == 0 and len(calls) == 2 * n  # both are kept
    assert "measured before: accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "controls.json").read_bytes() == first
    assert evaluated(run, tmp_path / "out", *flags, "--fresh", "true") == 0 and len(calls) == 3 * n
    assert "measured before" not in capsys.readouterr().out


def test_what_is_stale_is_not_taken(run: Path, tmp_path: Path, monkeypatch, capsys):
    path, out = tmp_path / "out" / PARTS, tmp_path / "out"

    def takes(*options: str) -> bool:
        assert evaluated(run, out, *options) == 0
        return "measured before" in capsys.readouterr().out

    assert not takes() and not takes("--batch_size", "5") and len(json.loads(path.read_text())) == 2
    model = moved(tiny_model(Slr(n_slots=2, max_loops=1), num_hidden_layers=1))
    model.backbone.lm.get_input_embeddings().weight.data[5, 5] += 1.0
    saved(model, run)
    assert not takes() and len(json.loads(path.read_text())) == 1  # parts of other weights are gone
    monkeypatch.setattr(result_cache, "versions", lambda: {"innerloop": "0"})
    assert not takes() and takes()
    path.write_text('[{"made_of"')
    assert not takes()


def test_a_part_is_the_same_whether_measured_or_read(tmp_path: Path):
    made = {"a": (1, 2.5), "b": math.inf, "c": 0.1 + 0.2}
    told: list[str] = []
    first = ResultCache(tmp_path / "p.json", {"of": (1, 2)})
    first.begins = told.append
    again = ResultCache(tmp_path / "p.json", {"of": [1, 2]})
    assert first("x", lambda: made) == {"a": [1, 2.5], "b": math.inf, "c": 0.1 + 0.2} and "x" not in again
    again = ResultCache(tmp_path / "p.json", {"of": [1, 2]})
    assert again("x", lambda: 1 / 0) == first("x", lambda: 1 / 0) and told == ["x"]
    other = ResultCache(tmp_path / "p.json", {"of": [1, 3]})
    assert other.missing(["x", "y"]) == ["x", "y"] == ["x", *again.missing(["y"])]
    assert ResultCache()("x", lambda: 1) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "3", "[3]", '[{"made_of": 3, "parts": {}}]', '[{"made_of": {}, "parts": 3}]', '[{"parts": {}}]']
)
def test_a_file_that_cannot_be_read_has_no_parts(tmp_path: Path, text: str):
    (tmp_path / "p.json").write_text(text)
    broken = ResultCache(tmp_path / "p.json", {"of": 1})
    assert not broken.known and broken("x", lambda: 1) == 1
    assert "x" in ResultCache(tmp_path / "p.json", {"of": 1})


def test_the_test_of_a_job_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch):
    raw = {name: value for name, value in RAW.items() if name != "warm_up"} | {"out": str(tmp_path), "seeds": [0]}
    exam = {"loops": [1, 3], "limit": 5, "controls": True, "also": {"longer": {"n_ops": 3, "min_ops": 3}}}
    suite = parse_suite({**raw, "variants": {"plain": {"train": {"max_steps": 1}}}, "test": exam})
    (key, recipe), messages = next(iter(suite.jobs.items())), queue.Queue()
    counted(monkeypatch, stops_at=3)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(key, recipe, suite.test, messages)
    kept = json.loads((Path(recipe.out) / testing.TEST_CACHE).read_text())[0]["parts"]
    monkeypatch.setattr(testing, "evaluate", lambda *_, **__: pytest.fail("answered again"))
    jobs.run_job(key, recipe, suite.test, messages)
    result = jobs.known_result(suite, key)
    assert result is not None and list(result["loops"]) == ["1", "3"] and set(result["also"]["longer"]) == {
        "trained", "1", "3",
    }  # fmt: skip
    assert {"accuracy", "latents", "shuffled", "zeroed"} < set(kept) and "mean" not in kept
    assert (key, 1, "test: mean") in list(messages.queue)
    assert not (Path(recipe.out) / testing.TEST_CACHE).exists() and (Path(recipe.out) / "controls.json").exists()


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        pytest.param(Slr(n_slots=2, max_loops=3), "classifier", id="rows"),
        pytest.param(Looped(max_loops=2), "gap", id="tokens", marks=pytest.mark.slow),
    ],
)
def test_calibrating_goes_on_where_it_was_interrupted(method, rule, tmp_path: Path, monkeypatch, capsys):
    model, real, asked = moved(tiny_model(method, num_hidden_layers=1)), ThresholdSearch.answer, []
    once, twice, stops_at = saved(model, tmp_path / "once"), saved(model, tmp_path / "twice"), [3]

    def spy(search, examples):
        asked.append(len(examples))
        if len(asked) in stops_at:
            raise KeyboardInterrupt
        return real(replace(search, settings=replace(search.settings, max_new_tokens=2)), examples)

    monkeypatch.setattr(ThresholdSearch, "answer", spy)

    def calibrated(run: Path, *options: object) -> tuple[int, int, str]:
        """Calibrate as a user would; return the exit code, how often questions were answered, and what was shown."""
        before = len(asked)
        words = ["calibrate", run, "--task", TASK, "--rule", rule, "--check", 4, *options]
        code = main([str(word) for word in words])
        return code, len(asked) - before, " ".join(capsys.readouterr().out.split())

    code, n_before, shown = calibrated(twice)
    assert (code, n_before) == (130, 3) and "2 parts are kept in" in shown and "the same command goes on" in shown
    code, n_after, shown = calibrated(twice)
    assert code == 0 and "measured before: 2 sets of answers (--fresh true starts over)" in shown
    code, n, shown = calibrated(once)
    assert code == 0 and n == 2 + n_after and "measured before" not in shown
    first, second = (json.loads((run / "calibration.json").read_text()) for run in (once, twice))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert calibrated(once)[:2] == (0, 0) and calibrated(once, "--fresh", "true")[:2] == (0, n)
    assert calibrated(once, "--agreement", 0.5)[1] <= 2  # a way to stop that was not tried, for both sets of questions
    stops_at.append(len(asked) + 2)
    assert calibrated(once, "--out", tmp_path / "out")[:2] == (130, 2)
    assert calibrated(once, "--out", tmp_path / "out")[:2] == (0, n - 1)
    saved(moved(model, 1), once)
    code, n_anew, shown = calibrated(once)
    assert code == 0 and n_anew > 3 and "measured before" not in shown  # of other weights nothing is taken

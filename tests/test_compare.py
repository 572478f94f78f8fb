"""Comparing: the same data for all, results that fit are taken and others made, and nothing of a run is overwritten."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from innerloop.bench import latency
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.experiments import compare, jobs
from innerloop.experiments.compare import (
    check_runs,
    compare_runs,
    compare_suite,
    eval_set,
    run_names,
)
from innerloop.experiments.suite import load_suite
from innerloop.experiments.summary import MethodResult, summary_table
from innerloop.experiments.verdicts import diverged_sentences, seeds_sentence, verdicts
from innerloop.methods import Cot, NoCot, Pause
from innerloop.tasks import Chain, Plain
from innerloop.train.recipe import parse_recipe
from tests.models import tiny_model, trained_on
from tests.test_cli import innerloop, refused
from tests.test_suite import RAW, here, in_this_process, written

TASK = Chain(n_ops=2, n_train=8, n_valid=8, n_test=12)
QUIET = Console(quiet=True)


def make_run(folder: Path, method, task: Chain = TASK) -> str:
    """Save an untrained model as a run."""
    tiny_model(method).save_pretrained(folder / "checkpoint")
    recipe = {"task": {"name": "chain", **asdict(task)}, "backbone": {"model": "x"}, "method": method.name}
    parse_recipe({**recipe, "out": str(folder)}).save(folder / "config.yaml")
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [make_run(tmp_path / "a", Cot()), make_run(tmp_path / "b", Pause(n_pauses=2))]


def compared(runs: list[str], out: Path, n_timed: int = 0, **asked) -> list[MethodResult]:
    """Compare runs as the command does, without its output."""
    folders = [Path(run) for run in runs]
    check_runs(folders, out)
    return compare_runs(runs, out, QUIET, eval_set(folders, **asked), n_timed)


def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that every evaluation is written to."""
    seen: list[str] = []
    before = compare.evaluate

    def spy(model, *arguments, **options):
        seen.append(model.method.name)
        return before(model, *arguments, **options)

    monkeypatch.setattr(compare, "evaluate", spy)
    return seen


def test_what_is_missing_is_evaluated_once_and_reported_the_same_twice(
    runs: list[str], tmp_path: Path, monkeypatch, capsys
):
    seen, out = evaluated(monkeypatch), tmp_path / "out"
    rows = compared(runs, out, 4, limit=5)
    assert seen == ["cot", "pause"] and [s.name for s in rows] == ["cot", "pause"]
    assert all(s.results[0]["n"] == 5 and len(s.turns) == 5 and s.memory > 0 for s in rows)
    assert not (tmp_path / "a" / "result.json").exists()
    assert compared(runs, out, 4, limit=5) == rows
    arguments = ["compare", *runs, "--out", out, "--limit", 5, "--timed", 4, "--baseline", "pause"]
    code, printed, _ = innerloop(capsys, *arguments)
    assert code == 0 and "report.html" in printed and "cot and pause" in printed
    page = (out / "report.html").read_bytes()
    assert innerloop(capsys, *arguments)[0] == 0 and (out / "report.html").read_bytes() == page
    assert [p["variant"] for p in json.loads((out / "results.json").read_text())["points"]] == ["cot", "pause"]
    assert summary_table(rows).row_count == 2 and seen == ["cot", "pause"]


def test_a_runs_own_result_is_taken_if_it_covers_the_test_and_is_of_the_run_as_it_is(
    runs: list[str], tmp_path: Path, monkeypatch, capsys
):
    for run in runs:
        assert innerloop(capsys, "eval", run)[0] == 0
    before, seen = (tmp_path / "a" / "result.json").read_bytes(), evaluated(monkeypatch)
    whole, _ = compared(runs, tmp_path / "whole")
    assert not seen and whole.answers == [tmp_path / "a"]
    part, _ = compared(runs, tmp_path / "part", limit=7)
    assert seen == ["cot", "pause"] and part.results[0]["n"] == 7 and part.answers == [tmp_path / "part" / "cot"]
    assert (tmp_path / "a" / "result.json").read_bytes() == before
    compared(runs, tmp_path / "valid", split="valid")
    assert seen == ["cot", "pause"] * 2
    innerloop(capsys, "eval", runs[0], "--max_new_tokens", 3)
    compared(runs, tmp_path / "one")
    assert seen[4:] == ["cot"]
    trained_on(tmp_path / "b")
    compared(runs, tmp_path / "two")
    assert seen[5:] == ["cot", "pause"]


def test_runs_that_cannot_be_compared_are_named_and_those_of_one_method_by_their_paths(runs: list[str], tmp_path: Path):
    other = make_run(tmp_path / "c", Cot(), Chain(n_ops=3, n_train=8, n_valid=8, n_test=12))
    for arguments, out, words in (
        ([runs[0], other], "out", "other test examples: say which to answer with --task"),
        ([runs[0], runs[0]], "out", "is named twice"),
        ([runs[0], str(tmp_path / "nothing")], "out", "nothing"),
        (runs, "a", "would be overwritten"),
    ):
        with pytest.raises(InputError, match=words):
            compared(arguments, tmp_path / out)
    rows = compared([runs[0], other], tmp_path / "out", task=TASK, limit=2)
    assert [s.name for s in rows] == ["a", "c"]
    folders = [tmp_path / "one" / "0", tmp_path / "two" / "0", Path(runs[1])]
    for folder in folders[:2]:
        make_run(folder, Cot())
    assert run_names(folders) == ["one/0", "two/0", "pause"]


def test_times_are_kept_as_long_as_the_runs_are_the_same(runs: list[str], tmp_path: Path, monkeypatch):
    chosen = {"a": Path(runs[0]), "b": Path(runs[1])}
    questions = [example.question for example in TASK.examples("test", 3)]
    first = latency.time_runs(chosen, TASK, questions, tmp_path)
    assert first["n"] == 3 and set(first["runs"]) == {"a", "b"} and min(first["runs"]["a"]["seconds"]) > 0
    assert latency.time_runs(chosen, TASK, questions, tmp_path) == json.loads((tmp_path / "times.json").read_text())
    monkeypatch.setattr(latency, "take_turns", lambda jobs, *rest: 1 / 0)
    assert latency.time_runs(chosen, TASK, questions, tmp_path)["runs"] == first["runs"]
    for others in (questions[:2], [*questions[:2], "1 ; + 1"]):
        with pytest.raises(ZeroDivisionError):
            latency.time_runs(chosen, TASK, others, tmp_path)


def test_what_one_run_cannot_answer_is_told_costs_nothing_and_is_timed_of_none(tmp_path: Path, capsys):
    """The long questions leave room for an answer of one run, but not of the one that pauses."""
    short, long = "1 ; + 1", "1 ; + 1 ; + 1 ; + 1"
    data = tmp_path / "data.jsonl"
    rows = [{"id": str(i), "question": q, "steps": [], "answer": "2"} for i, q in enumerate((short, long, long))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = [tmp_path / "a", tmp_path / "b"]
    for run, method in zip(chosen, (NoCot(), Pause(n_pauses=8))):
        tiny_model(method, max_position_embeddings=20).save_pretrained(run / "checkpoint")
    task = f"{{name: plain, test: {data}}}"
    code, printed, _ = innerloop(capsys, "compare", *chosen, "--task", task, "--out", tmp_path / "out")
    told, page = "Could not be answered, and count as wrong: pause 2 of 3.", (tmp_path / "out/report.html").read_text()
    assert code == 0 and told in " ".join(printed.split()) and told in page
    result = json.loads((tmp_path / "out" / "pause" / "result.json").read_text())
    (alone,) = LatentModel.from_pretrained(chosen[1]).generate([short], max_new_tokens=20)
    assert result["failed"] == 2 and result["cost"]["passes"] == alone.cost.passes
    assert json.loads((tmp_path / "out" / "times.json").read_text())["n"] == 1
    (tmp_path / "out" / "times.json").unlink()
    named = {"a": chosen[0], "b": chosen[1]}
    assert latency.time_runs(named, TASK, [long, long], tmp_path / "out") == {"n": 0, "runs": {}}
    runs = [str(folder) for folder in chosen]
    rows = compared(runs, tmp_path / "out", task=Plain(test=str(data)))
    assert compare.timed(rows, TASK, [long], tmp_path / "out") == rows


def test_verdicts_are_of_the_same_rows_or_over_seeds(tmp_path: Path):
    def row(name: str, rights: list[list[bool]]) -> MethodResult:
        places, results = [], []
        for seed, right in enumerate(rights):
            place = tmp_path / name / str(seed)
            place.mkdir(parents=True)
            rows = [json.dumps({"id": f"e{i}", "correct": correct}) for i, correct in enumerate(right)]
            (place / "predictions.jsonl").write_text("\n".join(rows))
            places.append(place)
            results.append({"seed": seed, "n": len(right), "accuracy": sum(right) / len(right)})
        return MethodResult(name, results, places, places)

    good, bad = [True] * 40, [False] * 30 + [True] * 10
    ours, theirs = row("ours", [good]), row("theirs", [bad])
    (sentence,) = verdicts([theirs, ours], "theirs")
    assert sentence.startswith("ours is 75.0 points above theirs, 95 % interval") and "p < 0.001" in sentence
    many, few = row("many", [good, good, bad]), row("few", [bad, bad, bad])
    (sentence,) = verdicts([many, few], "few")
    assert sentence == seeds_sentence("many", "few", [0.75, 0.75, 0.0])
    assert verdicts([many], "gone") == ["gone has no result, so nothing is set against it."]
    assert verdicts([], "gone") == []


def test_a_sentence_over_seeds_by_hand():
    found = seeds_sentence("a", "b", [0.1, 0.2, 0.3])  # 20 points, 4.302653 * 10 / sqrt(3) = 24.8 wide
    assert found == "a and b cannot be told apart: +20.0 points, 95 % interval -4.8 to 44.8 (3 seeds)"
    found = seeds_sentence("a", "b", [-0.1, -0.1], 0.05)  # 1.96 * 5 / sqrt(2) = 6.9 wide
    assert found == "a is 10.0 points below b, 95 % interval 3.1 to 16.9 (2 seeds)"
    assert "cannot be told apart: -2.5 points" in seeds_sentence("a", "b", [-0.025, -0.025], 0.025)
    assert seeds_sentence("a", "b", [0.0, 0.0]) == "a and b are equally accurate in each of 2 seeds"


def test_mistakes_are_answered_before_anything_is_evaluated(runs: list[str], tmp_path: Path, capsys):
    for arguments, words in (
        ([runs[0]], "compare takes a suite, or two runs or more"),
        ([*runs, "--train.max_steps", "3"], "runs take no --train.max_steps"),
        ([*runs, "--timed", "-1"], "--timed is -1"),
        ([*runs, "--baseline", "coot", "--out", str(tmp_path / "o"), "--limit", 1], "--baseline coot: no such row"),
        (["recipes/suites/chain_methods.yaml", "--limit", "3"], "are of runs"),
    ):
        refused(capsys, words, "compare", *arguments)
    assert not (tmp_path / "o").exists()


def test_the_report_of_a_suite_lists_what_failed_and_shows_the_rest(tmp_path: Path, monkeypatch, capsys):
    raw = {**RAW, "variants": {"plain": {}, "too long": {"train": {"max_length": 1}}}, "test": {"controls": True}}
    path = written(tmp_path, raw)
    in_this_process(load_suite(path, seeds=[0]), skip=["too long"])
    monkeypatch.setattr(jobs, "local_workers", lambda n: here())
    monkeypatch.setattr(jobs, "_run_pool", lambda suite, missing, *rest: {key: "it broke" for key in missing})
    with pytest.raises(InputError, match=r"^1 of 2 jobs failed: it broke$"):
        compare_suite(str(path), None, None, [0], 1, None, [], QUIET, n_timed=2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "too long seed 0: it broke" in page and "plain" in page and "Do the latents carry the answer?" in page


def test_a_suite_all_of_whose_jobs_fail_says_why_once(tmp_path: Path, monkeypatch, capsys):
    path = written(tmp_path, {**RAW, "variants": {"a": {}, "b": {"method": "pause"}}})
    why = {"a": "it [broke]", "b": "no room"}
    monkeypatch.setattr(jobs, "local_workers", lambda n: here())
    monkeypatch.setattr(jobs, "_run_pool", lambda suite, missing, *rest: {key: why[key[0]] for key in missing})
    code, out, err = innerloop(capsys, "compare", path, "--seeds", 0, 1)
    assert code == 2 and err == ("innerloop: all of 4 jobs failed: it [broke] (and for another reason, listed above)\n")
    assert out.count("it [broke]") == out.count("no room") == out.count("b seed 1") == 1
    assert "a seed 0; a seed 1: it [broke]" in (tmp_path / "out" / "report.html").read_text()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["points"]
    assert [p["error"] for p in found] == ["it [broke]", "no room", "it [broke]", "no room"]


def test_a_task_that_cannot_be_made_is_refused_before_anything_is_trained(tmp_path: Path, capsys):
    bad = {"task": {"n_train": 9_999}}
    path = written(tmp_path, {**RAW, "variants": {"small": {}, "much": bad, "more": bad}})
    code, _, err = innerloop(capsys, "compare", path)
    assert code == 2 and "nothing was trained: chain: there are only 490 different train questions, not 9999" in err
    assert err.count("chain:") == 1 and err.endswith("or lower n_train (much, more)\n")
    assert not (tmp_path / "out").exists()


def test_runs_that_diverged_are_counted_by_variant():
    results = [{"variant": "calm", "seed": i, "diverged": 0.1} for i in range(3)]
    results += [{"variant": "wild", "seed": i, "diverged": i / 2} for i in range(3)]
    results += [{"variant": "lost", "seed": 0, "error": "DivergedError: the loss is nan"}]
    assert diverged_sentences(results) == [
        "wild: 2 of 3 runs diverged (95 % interval 9 to 99 %)",
        "lost: 1 of 1 runs diverged (95 % interval 2 to 100 %)",
    ]

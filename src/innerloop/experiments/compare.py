"""Comparing runs: the same test data for all, what is missing is evaluated, and each is set against a baseline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from innerloop.bench.latency import time_runs
from innerloop.config.typed import named
from innerloop.disk.files import write_text
from innerloop.disk.names import check_folder, folder_name
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.test_time import TestTimeCompute
from innerloop.errors import InputError, nearest
from innerloop.experiments.committed import committed, committed_sentence, with_records
from innerloop.experiments.jobs import On, check_tasks, run_suite
from innerloop.experiments.ray import evaluate_on_ray
from innerloop.experiments.report import write_report
from innerloop.experiments.suite import Suite, load_suite, suite_report
from innerloop.experiments.summary import (
    PREDICTIONS,
    RESULT,
    MethodResult,
    by_variant,
    failure_lines,
    failure_sentence,
    failures,
    read_json,
    read_questions,
    summary_table,
    write_answers,
)
from innerloop.experiments.verdicts import diverged_sentences, verdicts
from innerloop.lens.page import check_viz
from innerloop.measure.accuracy import Prediction, evaluate, result_of
from innerloop.methods import method_named
from innerloop.model import run_folder
from innerloop.tasks import Task
from innerloop.terminal.progress import bar
from innerloop.text.examples import Example
from innerloop.train.recipe import CONFIG, load_recipe, read_recipe

REPORT = "report.html"
Answer = Callable[..., list[Prediction]]
"""Answers what is asked of a run, given its name, the model, an `EvalSet`, and what is told the progress."""


@dataclass(frozen=True)
class EvalSet:
    """What all runs answer."""

    task: Task
    split: str
    examples: Sequence[Example]


def evaluate_here(run: str, model: LatentModel, asked: EvalSet, progress: Callable[[int], None]) -> list[Prediction]:
    """Answer what is asked in this process."""
    return evaluate(model, asked.task, asked.examples, progress=progress)


def evaluate_on_cluster(
    run: str, model: LatentModel, asked: EvalSet, progress: Callable[[int], None]
) -> list[Prediction]:
    """Answer what is asked in parts on the Ray cluster that is there."""
    return evaluate_on_ray((run, None, "auto"), asked.task, asked.examples, {}, progress)


def compare_runs(
    runs: Sequence[str],
    out: Path,
    console: Console,
    asked: EvalSet | None = None,
    n_timed: int = 64,
    answer: Answer = evaluate_here,
) -> list[MethodResult]:
    """Return how runs compare on the same test data. Results that cover it are taken as they are, others are made.

    Args:
        runs: folders of runs.
        out: where results go that are made here; a run's own are never touched.
        console: where progress is shown.
        asked: what is answered; None: all test examples of what the runs were trained on, which must then be the same.
        n_timed: examples that all answer in turns for times and memory; 0: times are those of each evaluation.
        answer: answers what is asked of a run: here, or on a cluster.
    """
    folders = [Path(run) for run in runs]
    asked = asked or eval_set(folders)
    names = run_names(folders)
    check_folder(out, "--out").mkdir(parents=True, exist_ok=True)
    places = [out / folder_name(name) for name in names]
    known = [
        next((found for found in (folder, place) if covers(found, folder, asked)), None)
        for folder, place in zip(folders, places)
    ]
    with bar(console) as progress:
        for name, folder, place, found in zip(names, folders, places, known):
            if found is None:
                row = progress.add_task(f"eval {name}", total=len(asked.examples), note="")
                _evaluate(folder, place, asked, partial(answer, progress=partial(progress.advance, row)))
    rows = [
        MethodResult(name, [read_json(place / RESULT)], [folder], [place])
        for name, folder, place in zip(names, folders, (found or place for found, place in zip(known, places)))
    ]
    questions = [example.question for example in asked.examples[:n_timed]]
    return timed(rows, asked.task, questions, out) if questions else rows


def check_runs(folders: Sequence[Path], out: Path) -> None:
    """Refuse folders that are no runs, are named twice, or would be overwritten."""
    for folder in folders:
        if not run_folder.is_run(folder):
            raise InputError(f"{folder} is no run: compare takes folders that `innerloop train` wrote, or one suite")
        if out.resolve() == folder.resolve():
            raise InputError(f"{out} is one of the runs, whose own results would be overwritten: choose another --out")
    if twice := [str(folder) for folder, n in Counter(folder.resolve() for folder in folders).items() if n > 1]:
        raise InputError(f"{twice[0]} is named twice")


def _evaluate(run: Path, place: Path, asked: EvalSet, answer: Callable[..., list[Prediction]]) -> None:
    """Answer what is asked and write result.json and predictions.jsonl to a place."""
    model = LatentModel.from_pretrained(run)
    predictions = answer(str(run), model, asked)
    result = result_of(model, asked.task, asked.split, predictions, run_folder.recorded(run, "seed"), str(run))
    write_answers(place, result, predictions)


def eval_set(
    folders: Sequence[Path], task: Task | None = None, split: str = "test", limit: int | None = None
) -> EvalSet:
    """Return what all runs answer; tasks that differ must at least ask the same."""
    tasks = [task] if task is not None else [_task(folder) for folder in folders]
    asked = [chosen.examples(split, limit) for chosen in tasks]
    for folder, examples in zip(folders[1:], asked[1:]):
        if _key(examples) != _key(asked[0]):
            raise InputError(
                f"{folders[0]} and {folder} were trained on tasks with other {split} examples: say which to answer "
                "with --task '{name: ..., field: value}'"
            )
    return EvalSet(tasks[0], split, asked[0])


def _task(folder: Path) -> Task:
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} has no {CONFIG}, so say what to answer: --task NAME")
    return load_recipe(folder / CONFIG).task


def _key(examples: Sequence[Example]) -> list[tuple[str, str, str]]:
    return [(example.id, example.question, example.answer) for example in examples]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its method where that tells them apart, otherwise the end of its path."""
    methods = [str((run_folder.recorded(folder, "method") or {}).get("name")) for folder in folders]
    tails = [folder.resolve().parts[::-1] for folder in folders]
    names = []
    for i, (method, tail) in enumerate(zip(methods, tails)):
        if methods.count(method) == 1:
            names.append(method)
            continue
        others = [t for j, t in enumerate(tails) if j != i]
        depth = next(d for d in range(1, len(tail) + 1) if all(other[:d] != tail[:d] for other in others))
        names.append("/".join(reversed(tail[:depth])))
    return names


def covers(place: Path, run: Path, asked: EvalSet) -> bool:
    """Tell whether a folder holds the answers of a run, as it is now, to exactly what is asked."""
    if not (place / RESULT).exists() or not (place / PREDICTIONS).exists():
        return False
    result = read_json(place / RESULT)
    task = result.get("task", {})
    found = (task.get("name"), task.get("version"), result.get("split"), "asked" in result or "error" in result)
    is_same_model = result.get("saved") == run_folder.identity(run)
    if found != (asked.task.name, asked.task.version, asked.split, False) or not is_same_model:
        return False
    now, then = (named(m, "method", method_named) for m in (run_folder.recorded(run, "method"), result["method"]))
    # Unless it reasons in another way since, such as by another stop rule.
    return bool(now == then) and read_questions(place) == _key(asked.examples)


def suite_rows(suite: Suite, results: Sequence[Mapping[str, Any]]) -> list[MethodResult]:
    """Return how the variants of a suite compare, those that have a result for any seed."""
    rows = []
    for row in by_variant(results):
        folders = [Path(suite.jobs[row.name, result["seed"]].out) for result in row.results]
        rows.append(replace(row, folders=folders, answers=folders))
    return rows


def chosen_baseline(names: Sequence[str], baseline: str | None) -> str:
    """Return the name of the row that the others are set against: the first, or the one asked for."""
    if baseline is None:
        return names[0]
    if baseline not in names:
        raise InputError(
            f"--baseline {baseline}: no such row{nearest(baseline, names)}; choose one of {', '.join(names)}"
        )
    return baseline


def compare_folders(
    runs: Sequence[str],
    out: Path,
    baseline: str | None,
    console: Console,
    task: Task | None = None,
    split: str = "test",
    limit: int | None = None,
    n_timed: int = 64,
    answer: Answer = evaluate_here,
) -> None:
    """Compare runs, print the table and write OUT/report.html and OUT/results.json."""
    check_viz()
    folders = [Path(run) for run in runs]
    check_runs(folders, out)
    chosen, asked = chosen_baseline(run_names(folders), baseline), eval_set(folders, task, split, limit)
    rows = compare_runs(runs, out, console, asked, n_timed, answer)
    report = {"baseline": chosen, "points": [{"variant": row.name, **row.results[0]} for row in rows]}
    write_text(out / "results.json", json.dumps(report, indent=1) + "\n")
    sentences = verdicts(rows, chosen)
    write_report(out / REPORT, f"Comparison of {len(rows)} runs", rows, sentences)
    _show(rows, {}, sentences, out, console)


def compare_suite(
    path: str,
    out: str | None,
    baseline: str | None,
    seeds: Sequence[int] | None,
    workers: int,
    results: str | None,
    overrides: Sequence[str],
    console: Console,
    n_timed: int = 64,
    on: On | None = None,
) -> None:
    """Run what is missing of a suite, print the table and write OUT/report.html and OUT/results.json.

    Without ``out``, results that come with the suite count as run (`innerloop.experiments.committed`).

    Raises:
        InputError: before anything is trained, where it can be told that jobs would fail; otherwise after all else
            was written.
    """
    check_viz()
    suite = load_suite(path, out, seeds, overrides)
    chosen = chosen_baseline(suite.variants, baseline)
    raw, folder = read_recipe(path, overrides), Path(suite.out)
    known = committed(suite, raw) if out is None else {}
    check_tasks(suite, known)
    found = run_suite(suite, workers, console, on, known)
    report = json.dumps(suite_report(raw, with_records(suite, found)), indent=1) + "\n"
    for file in [folder / "results.json", *([Path(results)] if results else [])]:
        write_text(file, report)
    failed, rows = failures(found), suite_rows(suite, found)
    if rows and n_timed and not known:
        task = next(iter(suite.jobs.values())).task
        examples = task.examples(suite.test.split, min(n_timed, suite.test.limit or n_timed))
        runs = {row.name: Path(suite.run_of(row.name, row.results[0]["seed"])) for row in rows}
        tried = {row.name: suite.test_of(row.name).attempts for row in rows}
        rows = timed(rows, task, [example.question for example in examples], folder, runs, tried)
    sentences = [*verdicts(rows, chosen), *diverged_sentences(found)]
    sentences += [committed_sentence(suite, raw["results"], known)] if known else []
    shown = {name: value for name, value in raw.items() if name != "out"}
    write_report(folder / REPORT, f"Suite {Path(path).stem}", rows, sentences, failed, shown)
    _show(rows, failed, sentences, folder, console)
    if failed:
        raise InputError(failure_sentence(failed, len(found)))


def _show(
    rows: Sequence[MethodResult],
    failed: Mapping[str, Sequence[str]],
    sentences: Sequence[str],
    folder: Path,
    console: Console,
) -> None:
    if rows:
        console.print(summary_table(rows))
    for line in [*failure_lines(failed), *sentences]:
        console.print(line, soft_wrap=True)
    console.print(f"the report is in {folder / REPORT}, every job in {folder / 'results.json'}", soft_wrap=True)


def timed(
    rows: Sequence[MethodResult],
    task: Task,
    questions: Sequence[str],
    folder: Path,
    runs: Mapping[str, Path] | None = None,
    attempts: Mapping[str, TestTimeCompute] | None = None,
) -> list[MethodResult]:
    """Return rows with the times and the memory of the run of their first seed, measured in turns.

    Where no question can be answered by all, they are returned as they are.
    ``runs`` are by name the folders of these runs, where they are not the rows' own; ``attempts`` say how they answer.
    """
    runs = {row.name: row.folders[0] for row in rows} if runs is None else runs
    if not (measured := time_runs(runs, task, questions, folder, attempts)["runs"]):
        return list(rows)
    return [
        replace(row, turns=tuple(measured[row.name]["seconds"]), memory=measured[row.name]["memory"]) for row in rows
    ]

"""Comparing runs: the same test data for all, what is missing is evaluated, and each is set against a baseline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from innerloop.bench.latency import time_runs
from innerloop.config.typed import named
from innerloop.decoder.cost import Cost
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.test_time import Attempts
from innerloop.errors import InputError, nearest
from innerloop.experiments.jobs import check_tasks, run_suite
from innerloop.experiments.report import write_report
from innerloop.experiments.suite import Suite, load_suite, suite_report
from innerloop.experiments.summary import Standing, failure_sentence, failure_table, failures, read_json, standing_table
from innerloop.measure.accuracy import Prediction, evaluate, result_of, scores_of
from innerloop.measure.stability import diverged_rate
from innerloop.measure.statistics import difference_noise, over_seeds, verdict_of_files
from innerloop.methods import Method, method_named
from innerloop.model import checkpoint
from innerloop.tasks import Task
from innerloop.text.examples import Example
from innerloop.train.callbacks import bar
from innerloop.train.recipe import load_recipe, read_recipe
from innerloop.train.run import CONFIG

OF_THE_WHOLE = ("loops", "change", "also", "accuracy_by_match", "controls", "stability", "probes", "failed")
"""What result.json says of all answers, and not of the first of them."""
RESULT, PREDICTIONS, REPORT = "result.json", "predictions.jsonl", "report.html"


@dataclass(frozen=True)
class Asked:
    """What all runs answer."""

    task: Task
    split: str
    limit: int | None
    examples: Sequence[Example]


def compare_runs(
    runs: Sequence[str],
    out: Path,
    console: Console,
    task: Task | None = None,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 64,
    n_timed: int = 64,
    baseline: str | None = None,
) -> list[Standing]:
    """Return how runs stand on the same test data. Results that cover it are taken as they are, others are made.

    Args:
        runs: folders of runs.
        out: where results go that are made here; a run's own are never touched.
        console: where progress is shown.
        task: what is answered; None: what the runs were trained on, which must then be the same.
        split: which examples.
        limit: how many; None: all.
        batch_size: rows per batch.
        n_timed: examples that all answer in turns for times and memory; 0: times are those of each evaluation.
        baseline: a row that must be among them.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not checkpoint.is_run(folder):
            raise InputError(f"{folder} is no run: compare takes folders that `innerloop train` wrote, or one suite")
        if out.resolve() == folder.resolve():
            raise InputError(f"{out} is one of the runs, whose own results would be overwritten: choose another --out")
    if twice := [str(folder) for folder, n in Counter(folder.resolve() for folder in folders).items() if n > 1]:
        raise InputError(f"{twice[0]} is named twice")
    test = _test(folders, task, split, limit)
    names = run_names(folders)
    chosen_baseline(names, baseline)
    out.mkdir(parents=True, exist_ok=True)
    places = [out / name.replace("/", "_") for name in names]
    known = [
        next((p for p in (folder, place) if covers(p, folder, test)), None) for folder, place in zip(folders, places)
    ]
    with bar(console) as progress:
        bars = {
            name: progress.add_task(f"eval {name}", total=len(test.examples), note="")
            for name, found in zip(names, known)
            if found is None
        }
        for i, (name, folder, place) in enumerate(zip(names, folders, places)):
            if known[i] is not None:
                continue
            predictions = _shortened(folder, test)
            if predictions is not None:
                result = shortened_result(read_json(folder / RESULT), predictions)
                progress.update(bars[name], completed=len(predictions))
            else:
                model = LatentModel.from_pretrained(folder)
                predictions = evaluate(
                    model,
                    test.task,
                    test.examples,
                    batch_size=batch_size,
                    progress=lambda n, name=name: progress.advance(bars[name], n),  # type: ignore[misc]
                )
                seed = checkpoint.recorded(folder, "seed")
                result = result_of(model, test.task, split, predictions, seed, str(folder))
            place.mkdir(exist_ok=True)
            write_answers(place, result, predictions)
            known[i] = place
    standings = [
        Standing(name, [read_json(place / RESULT)], [folder], [place])
        for name, folder, place in zip(names, folders, known)
        if place is not None
    ]
    questions = [example.question for example in test.examples[:n_timed]]
    return timed(standings, test.task, questions, out) if questions else standings


def _test(folders: Sequence[Path], task: Task | None, split: str, limit: int | None) -> Asked:
    """Return what all runs answer; tasks that differ must at least ask the same."""
    tasks = [task] if task is not None else [_task(folder) for folder in folders]
    asked = [chosen.examples(split, limit) for chosen in tasks]
    for folder, examples in zip(folders[1:], asked[1:]):
        if _key(examples) != _key(asked[0]):
            raise InputError(
                f"{folders[0]} and {folder} were trained on tasks with other {split} examples: say which to answer "
                "with --task '{name: ..., field: value}'"
            )
    return Asked(tasks[0], split, limit, asked[0])


def _task(folder: Path) -> Task:
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} has no {CONFIG}, so say what to answer: --task NAME")
    return load_recipe(folder / CONFIG).task


def _key(examples: Sequence[Example]) -> list[tuple[str, str, str]]:
    return [(example.id, example.question, example.answer) for example in examples]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: its method where that tells them apart, otherwise the end of its path."""
    methods = [str((checkpoint.recorded(folder, "method") or {}).get("name")) for folder in folders]
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


def covers(place: Path, run: Path, test: Asked) -> bool:
    """Tell whether a folder holds the answers of a run to exactly the test, made since it was trained."""
    predictions = _answers(place, run, test)
    return predictions is not None and len(predictions) == len(test.examples)


def _shortened(run: Path, test: Asked) -> list[Prediction] | None:
    """Return the answers to the test where a run has answered more than it asks for, and something of it."""
    predictions = (_answers(run, run, test) or [])[: len(test.examples)]
    return predictions if any(p.error is None for p in predictions) else None


def _answers(place: Path, run: Path, test: Asked) -> list[Prediction] | None:
    """Return the answers that a folder holds, if the first of them are to the test and they are the run's as it is."""
    if not (place / RESULT).exists() or not (place / PREDICTIONS).exists():
        return None
    weights = Path(checkpoint.resolve(run)) / "innerloop.json"
    if (place / RESULT).stat().st_mtime < weights.stat().st_mtime:
        return None  # trained on since
    result = read_json(place / RESULT)
    task = {"name": test.task.name, "version": test.task.version}
    same_task = all(result.get("task", {}).get(name) == value for name, value in task.items())
    if not same_task or result.get("split") != test.split or "asked" in result or "error" in result:
        return None
    if _method(result["method"]) != _method(checkpoint.recorded(run, "method")):
        return None  # it reasons in another way since, such as by another stop rule
    predictions = read_answers(place)
    wanted = _key(test.examples)
    return predictions if [(p.id, p.question, p.gold) for p in predictions[: len(wanted)]] == wanted else None


def _method(written: Any) -> Method:
    return named(written, "method", method_named)  # type: ignore[no-any-return]


def read_answers(folder: Path) -> list[Prediction]:
    """Read predictions.jsonl."""
    path = folder / PREDICTIONS
    predictions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            raw = json.loads(line)
            predictions.append(Prediction(**{**raw, "cost": Cost(**raw["cost"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}, line {number}, is no prediction ({error}); remove the file") from None
    return predictions


def write_answers(folder: Path, result: Mapping[str, Any], predictions: Sequence[Prediction]) -> None:
    """Write result.json and predictions.jsonl."""
    lines = (json.dumps(asdict(p), ensure_ascii=False) for p in predictions)
    checkpoint.write_text(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
    checkpoint.write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")


def shortened_result(result: Mapping[str, Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return the result of the first of a run's answers: shares and costs anew, what else was recorded as it was."""
    return {k: v for k, v in result.items() if k not in OF_THE_WHOLE} | scores_of(predictions)


def suite_standings(suite: Suite, results: Sequence[Mapping[str, Any]]) -> list[Standing]:
    """Return how the variants of a suite stand, those that have a result for any seed."""
    standings = []
    for variant in suite.variants:
        found = [r for r in results if r["variant"] == variant and "error" not in r]
        folders = [Path(suite.points[variant, r["seed"]].out) for r in found]
        if found:
            standings.append(Standing(variant, [dict(r) for r in found], folders, folders))
    return standings


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
) -> None:
    """Compare runs, print the table and write OUT/report.html and OUT/results.json."""
    standings = compare_runs(runs, out, console, task, split, limit, n_timed=n_timed, baseline=baseline)
    chosen = chosen_baseline([s.name for s in standings], baseline)
    report = {"baseline": chosen, "points": [{"variant": s.name, **s.results[0]} for s in standings]}
    checkpoint.write_text(out / "results.json", json.dumps(report, indent=1) + "\n")
    _show(standings, chosen, out, f"Comparison of {len(standings)} runs", console)


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
) -> None:
    """Run what is missing of a suite, print the table and write OUT/report.html and OUT/results.json.

    Raises:
        InputError: before anything is trained, where it can be told that points would fail; otherwise after all else
            was written.
    """
    suite = load_suite(path, out, seeds, overrides)
    chosen = chosen_baseline(suite.variants, baseline)
    check_tasks(suite)
    points = run_suite(suite, workers, console)
    raw = read_recipe(path, overrides)
    report = json.dumps(suite_report(raw, points), indent=1) + "\n"
    folder = Path(suite.out)
    for file in [folder / "results.json", *([Path(results)] if results else [])]:
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(file, report)
    failed = failures(points)
    shown = {name: value for name, value in raw.items() if name != "out"}
    standings = suite_standings(suite, points)
    if standings and n_timed:
        task, exam = next(iter(suite.points.values())).task, suite.exam
        questions = [example.question for example in task.examples(exam.split, min(n_timed, exam.limit or n_timed))]
        runs = {s.name: Path(suite.run_of(s.name, s.results[0]["seed"])) for s in standings}
        tried = {s.name: suite.exam_of(s.name).attempts for s in standings}
        standings = timed(standings, task, questions, folder, runs, tried)
    _show(standings, chosen, folder, f"Suite {Path(path).stem}", console, failed, shown, diverged_sentences(points))
    if failed:
        raise InputError(failure_sentence(failed, len(points)))


def _show(
    standings: Sequence[Standing],
    baseline: str,
    folder: Path,
    title: str,
    console: Console,
    failed: Mapping[str, Sequence[str]] | None = None,
    suite: Mapping[str, Any] | None = None,
    more: Sequence[str] = (),
) -> None:
    sentences = [*verdicts(standings, baseline), *more]
    write_report(folder / REPORT, title, standings, sentences, failed, suite)
    if standings:
        console.print(standing_table(standings))
    if failed:
        console.print(failure_table(failed))
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)
    console.print(f"the report is in {folder / REPORT}, every point in {folder / 'results.json'}", soft_wrap=True)


def diverged_sentences(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each variant of which a run has diverged, in training or in its loop, how many of its runs have."""
    sentences = []
    for variant in dict.fromkeys(point["variant"] for point in points):
        rate = diverged_rate([point for point in points if point["variant"] == variant])
        if rate["diverged"]:
            low, high = (100 * end for end in rate["ci95"])
            runs = f"{rate['diverged']} of {rate['n']} runs"
            sentences.append(f"{variant}: {runs} diverged (95 % interval {low:.0f} to {high:.0f} %)")
    return sentences


def timed(
    standings: Sequence[Standing],
    task: Task,
    questions: Sequence[str],
    folder: Path,
    runs: Mapping[str, Path] | None = None,
    attempts: Mapping[str, Attempts] | None = None,
) -> list[Standing]:
    """Return rows with the times and the memory of the run of their first seed, measured in turns.

    Where no question can be answered by all, they are returned as they are.
    ``runs`` are by name the folders of these runs, where they are not the rows' own; ``attempts`` say how they answer.
    """
    runs = {s.name: s.folders[0] for s in standings} if runs is None else runs
    if not (measured := time_runs(runs, task, questions, folder, attempts)["runs"]):
        return list(standings)
    return [replace(s, turns=tuple(measured[s.name]["seconds"]), memory=measured[s.name]["memory"]) for s in standings]


def verdicts(standings: Sequence[Standing], baseline: str) -> list[str]:
    """Say of each row whether it is better than the baseline, and how sure that is.

    With one seed the same rows are compared (McNemar's test, a paired bootstrap): that is about these two runs. With
    several the differences of the seeds are, by their interval over seeds: that is about the methods.
    """
    base = next((s for s in standings if s.name == baseline), None)
    if base is None:
        return [f"{baseline} has no result, so nothing is set against it."] if standings else []
    sentences = []
    for standing in standings:
        if standing is base:
            continue
        seeds = [r.get("seed") for r in base.results]
        pairs = [
            (place, base.answers[seeds.index(r.get("seed"))])
            for r, place in zip(standing.results, standing.answers)
            if r.get("seed") in seeds
        ]
        if len(standing.results) == len(base.results) == 1:
            pairs = [(standing.answers[0], base.answers[0])]
        found = [
            verdict_of_files(ours / PREDICTIONS, theirs / PREDICTIONS, (standing.name, base.name))
            for ours, theirs in pairs
        ]
        if len(found) > 1:
            sentences.append(
                seeds_sentence(standing.name, base.name, [v.difference for v in found], difference_noise(found))
            )
        else:
            sentences += [v.sentence for v in found]
    return sentences


def seeds_sentence(name: str, other: str, differences: Sequence[float], noise: float = 0.0) -> str:
    """Say how two rows compare over seeds, by the interval (`over_seeds`) of the differences of their accuracies."""
    mean, half = over_seeds(differences, noise)
    low, high = max(mean - half, -1.0), min(mean + half, 1.0)
    if not any(differences):
        return f"{name} and {other} are equally accurate in each of {len(differences)} seeds"
    tail = f"({len(differences)} seeds)"
    if low <= 0 <= high:
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        return f"{name} and {other} cannot be told apart: {100 * mean:+.1f} points, {interval} {tail}"
    side, ends = ("above", (low, high)) if mean > 0 else ("below", (-high, -low))
    interval = f"95 % interval {100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
    return f"{name} is {100 * abs(mean):.1f} points {side} {other}, {interval} {tail}"

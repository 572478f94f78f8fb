"""Verbs that set runs beside each other: compare, sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import join
from typing import Annotated, Literal

from innerloop.checks.values import Bounds, Count, Natural, Seed
from innerloop.cli.arguments import TaskArguments, console
from innerloop.errors import InputError
from innerloop.model import run_folder

Workers = Annotated[int, Bounds(1, 1024)]


def compare(
    subjects: list[str],
    out: str | None = None,
    baseline: str | None = None,
    seeds: list[Seed] | None = None,
    workers: Workers = 2,
    results: str | None = None,
    task: str | None = None,
    split: str | None = None,
    limit: Count | None = None,
    timed: Natural = 64,
    on: Literal["local", "ray"] = "local",
    overrides: Sequence[str] = (),
) -> None:
    """Compare a suite's variants, or runs: train and evaluate what is missing, print the table, write report.html.

    Args:
        subjects: a YAML file with variants or a grid, or the folders of two runs or more.
        out: the folder of the suite's runs, by default its own; of runs, where the report and what is evaluated go, by
            default runs/compare.
        baseline: the row that the others are set against; by default the first.
        seeds: of a suite, other seeds than its own.
        workers: of a suite, jobs trained at a time, each on one thread.
        results: of a suite, also write the jobs to this file; by default OUT/results.json alone.
        task: of runs, what to answer: a task's name, or {name: ..., field: value}; by default what they learned.
        split: of runs, train, valid or test; by default test. A suite says so itself, under test.
        limit: of runs, answer only the first examples.
        timed: examples that all answer in turns, for times and memory; 0: times are those of each evaluation.
        on: train, or answer in parts, on this machine, or on the Ray cluster that is there.
        overrides: of a suite, fields that all variants share, written --section.field value.
    """
    from innerloop.experiments.suite import is_suite

    place = None
    if on == "ray":
        from innerloop.experiments.ray import check_ray, ray_workers

        check_ray()
        place = ray_workers
    if len(subjects) == 1 and is_suite(subjects[0]):
        if (task, split, limit) != (None, None, None):
            raise InputError("--task, --split and --limit are of runs: a suite says under 'test' what is answered")
        from innerloop.experiments.compare import compare_suite

        compare_suite(subjects[0], out, baseline, seeds, workers, results, overrides, console, timed, place)
        return
    if overrides:
        raise InputError(f"runs take no {overrides[0]}: they are compared as they are")
    if any(is_suite(subject) for subject in subjects):
        raise InputError(f"compare takes one suite, or runs alone, not {' '.join(subjects)}")
    if Path(subjects[0]).suffix in (".yaml", ".yml"):
        single = join(["innerloop", "train", subjects[0]])
        raise InputError(f"{subjects[0]} has no variants to compare; train a single recipe: {single}")
    if len(subjects) < 2:
        raise InputError("compare takes a suite, or two runs or more")
    for run in subjects:
        run_folder.resolve(run)
    from innerloop.experiments.compare import compare_folders, evaluate_here, evaluate_on_cluster

    chosen = None if task is None else TaskArguments(task).task_of(subjects[0], split or "test")
    answer = evaluate_on_cluster if on == "ray" else evaluate_here
    folder = Path(out or "runs/compare")
    compare_folders(subjects, folder, baseline, console, chosen, split or "test", limit, timed, answer)


def sweep(
    recipe: str,
    grid: list[str] = [],  # noqa: B006  (jsonargparse shows it)
    search: Literal["none", "optuna"] = "none",
    trials: Count = 20,
    seeds: list[Seed] | None = None,
    out: str | None = None,
    workers: Workers = 2,
    on: Literal["local", "ray"] = "local",
    split: str | None = None,
    limit: Count | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train a recipe over a grid of values, or over trials that a search draws; writes sweep.html and results.json.

    Args:
        recipe: a YAML recipe, or a suite that has a grid.
        grid: FIELD=VALUE,VALUE,.. or, for a search, FIELD=LOW..HIGH or FIELD=LOW..HIGH:log; one --grid for each field.
        search: none trains every combination of values; optuna draws trials, told by the accuracy of those before.
        trials: how many a search draws.
        seeds: seeds of every trial; by default the recipe's.
        out: the folder of the runs; by default the recipe's with -sweep behind it. What is there is not run again.
        workers: jobs trained at a time, each on one thread; on Ray, trials that a search draws at a time.
        on: this machine, or the Ray cluster that is there.
        split: the examples that trials are chosen by; by default valid.
        limit: how many of them.
        overrides: other fields of the recipe, written --section.field value.
    """
    from innerloop.experiments.ray import check_ray, ray_workers
    from innerloop.experiments.summary import failure_lines, failure_sentence, failures
    from innerloop.experiments.sweep import best_line, read_sweep, run_sweep, sweep_table, write_sweep
    from innerloop.lens.page import check_viz

    check_viz()
    if on == "ray":
        check_ray()
    raw, axes = read_sweep(recipe, grid, {"out": out, "seeds": seeds, "split": split, "limit": limit}, overrides)
    place = ray_workers if on == "ray" else None
    swept = run_sweep(raw, axes, None if search == "none" else trials, workers, console, place)
    folder = Path(raw["out"])
    write_sweep(swept, f"Sweep of {Path(recipe).stem}", folder)
    failed = failures(swept.results)
    if swept.best is not None:
        console.print(sweep_table(swept))
        console.print(best_line(swept), soft_wrap=True)
    for line in failure_lines(failed):
        console.print(line, soft_wrap=True)
    console.print(f"the picture is in {folder / 'sweep.html'}, every job in {folder / 'results.json'}", soft_wrap=True)
    if failed:
        raise InputError(failure_sentence(failed, len(swept.results)))

"""Sweeps: a recipe over a grid of values, or over trials that a search draws, each with all seeds, in one picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import join
from typing import Any

from rich.console import Console
from rich.table import Table

from innerloop.disk.files import write_text
from innerloop.errors import InputError
from innerloop.experiments.charts import Cell, bars, heat_map, scatter
from innerloop.experiments.compare import suite_rows
from innerloop.experiments.grid import (
    Axes,
    Settings,
    axes_of,
    first_trial,
    parse_axes,
    short_names,
    value_name,
    values_of,
    variant_name,
    written,
)
from innerloop.experiments.jobs import check_tasks, run_suite
from innerloop.experiments.report import Section, details, document, picture, summary, table
from innerloop.experiments.search import combinations, search
from innerloop.experiments.suite import parse_suite, suite_report
from innerloop.experiments.summary import MethodResult, failure_lines, failures, terminal_table
from innerloop.experiments.workers import Workers
from innerloop.train.recipe import read_recipe

N_NAMED = 8  # trials of a picture that are named


@dataclass(frozen=True)
class Sweep:
    """What was swept.

    Attributes:
        raw: the suite as it would be written.
        axes: the fields.
        settings: the value of each field by trial, in order.
        results: the result, or error, of every job.
        rows: the trials that have results.
    """

    raw: Mapping[str, Any]
    axes: Axes
    settings: Mapping[str, Settings]
    results: Sequence[Mapping[str, Any]]
    rows: Sequence[MethodResult]

    @property
    def best(self) -> MethodResult | None:
        """The trial of the highest mean accuracy, the first of equals."""
        return max(self.rows, key=lambda row: row.mark.share, default=None)


def read_sweep(
    path: str | Path, grid: Sequence[str] = (), given: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], Axes]:
    """Return a recipe, or a suite with a grid, as the suite of a sweep, and its axes; ``grid`` overrides those.

    Trials are chosen by their accuracy on validation examples, unless the file says otherwise or ``given`` does, where
    ``out``, ``seeds``, ``split`` and ``limit`` that are not None stand in place of the file's.
    """
    raw = read_recipe(path, overrides)
    if "variants" in raw:
        raise InputError(f"{path} lists variants: run it with {join(['innerloop', 'compare', str(path)])}")
    listed = raw.pop("grid", None)
    axes = {**(axes_of(listed) if listed else {}), **parse_axes(grid)}
    if not axes:
        raise InputError("a sweep needs values: --grid FIELD=VALUE,VALUE,..")
    chosen = {name: value for name, value in (given or {}).items() if value is not None}
    raw["test"] = {"split": "valid", **(raw.get("test") or {})}
    raw["test"] |= {name: chosen.pop(name) for name in ("split", "limit") if name in chosen}
    raw.setdefault("seeds", [(raw.get("train") or {}).get("seed", 0)])
    out = raw.get("out") if listed else f"{raw.get('out')}-sweep"
    return {**raw, "grid": {field: written(axis) for field, axis in axes.items()}, "out": out, **chosen}, axes


def run_sweep(
    raw: Mapping[str, Any],
    axes: Axes,
    n_trials: int | None,
    workers: int,
    console: Console,
    on: Callable[[], AbstractContextManager[Workers]] | None = None,
) -> Sweep:
    """Train and test what is missing of ``n_trials`` that a search draws, or of every combination of values."""
    if n_trials is None:
        check_tasks(parse_suite(raw, combinations(axes)))
    elif n_trials < 1:
        raise InputError(f"--trials is {n_trials}, but must be at least 1")
    else:  # a field that does not exist is found before anything is drawn
        parse_suite(raw, [first_trial(axes)])
    found: list[Sweep] = []

    def scores_of(trials: Sequence[Settings]) -> list[float | None]:
        suite = parse_suite(raw, trials)
        results = run_suite(suite, workers, console, on)
        rows = {row.name: row for row in suite_rows(suite, results)}
        settings = {variant_name(trial): trial for trial in trials}
        found[:] = [Sweep(raw, axes, settings, results, list(rows.values()))]
        whole = {name for name, row in rows.items() if len(row.results) == len(raw["seeds"])}
        return [rows[name].mark.share if name in whole else None for name in settings]

    search(axes, n_trials, workers, Path(raw["out"]), scores_of)
    return found[0]


def write_sweep(sweep: Sweep, title: str, folder: Path) -> None:
    """Write results.json and sweep.html."""
    report = suite_report(sweep.raw, sweep.results)
    for job in report["points"]:
        job["settings"] = dict(sweep.settings[job["variant"]])
    write_text(folder / "results.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "sweep.html", sweep_page(sweep, title))


def sweep_page(sweep: Sweep, title: str) -> str:
    """Return the page of a sweep: pictures, the best trial, the table, what was swept."""
    is_grid = all(values_of(axis) is not None for axis in sweep.axes.values())
    sections = [*summary(sweep.rows), {"failed": failure_lines(failures(sweep.results))}]
    if sweep.best is not None:
        sections += [{"note": best_line(sweep)}]
    sections += [{"heading": "Accuracy"}, *(_maps(sweep) if is_grid else _draws(sweep))]
    if sweep.rows:
        note = "The trials in order; intervals as in the pictures."
        sections += [{"heading": "Trials"}, table(*columns(sweep), note)]
    return document(title, [*sections, {"heading": "Configuration"}, details("what was swept", dict(sweep.raw))])


def best_line(sweep: Sweep) -> str:
    """Say which trial was best, and what that is worth."""
    best = sweep.best
    assert best is not None
    split = (sweep.raw.get("test") or {}).get("split", "test")
    return (
        f"Best of {len(sweep.rows)} on {split}: {best.name}, {best.mark.share:.1%} ({best.interval}). "
        "The best of many looks better than it is: test it on examples that did not choose it."
    )


def _maps(sweep: Sweep) -> list[Section]:
    """Draw a grid: a heat map over the first two fields, one for each combination of the others."""
    names = [[value_name(value) for value in values_of(axis) or ()] for axis in sweep.axes.values()]
    titles, found = list(short_names(list(sweep.axes)).values()), {row.name: row for row in sweep.rows}
    cells = {tuple(map(value_name, trial.values())): found.get(name) for name, trial in sweep.settings.items()}
    if len(names) == 1:  # a map of one row
        names, titles, cells = [[""], *names], ["", *titles], {("", *key): row for key, row in cells.items()}
    kind = "that over seeds" if any(len(row.results) > 1 for row in sweep.rows) else "Wilson's over examples"
    note = f"Accuracy in percent, and its 95 % interval ({kind}); the best trial is framed."
    sections: list[Section] = []
    for others in itertools.product(*names[2:]):
        if others:
            sections.append({"heading3": ", ".join(f"{title} {value}" for title, value in zip(titles[2:], others))})
        shown = [[_cell(cells.get((row, column, *others)), sweep.best) for column in names[1]] for row in names[0]]
        sections.append(picture(heat_map(names[0], names[1], shown, titles[0], titles[1]), note))
    if titles[0] == "" and sweep.rows:
        sections.append(picture(bars([row.mark for row in sweep.rows]), "The same as bars."))
    return sections


def _cell(row: MethodResult | None, best: MethodResult | None) -> Cell:
    if row is None:
        return Cell(None, "failed")
    return Cell(row.mark.share, f"{100 * row.mark.low:.0f} to {100 * row.mark.high:.0f}", row is best)


def _draws(sweep: Sweep) -> list[Section]:
    """Draw a search: accuracy against each field that is a number."""
    pictures = []
    for field, axis in sweep.axes.items():
        values = {name: trial[field] for name, trial in sweep.settings.items()}
        if not sweep.rows or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values.values()):
            continue
        is_named = {row.name for row in (sweep.rows if len(sweep.rows) <= N_NAMED else [sweep.best]) if row is not None}
        marks = [replace(row.at(values[row.name]), name=row.name if row.name in is_named else "") for row in sweep.rows]
        drawn = scatter(marks, field, log=getattr(axis, "log", False), best_is_low=False)
        pictures.append(picture(drawn, f"Accuracy by {field}, with its interval."))
    return [{"pair": pictures}] if pictures else []


def columns(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Return the table of a sweep: its head, and the cells of each row."""
    several = any(len(row.results) > 1 for row in sweep.rows)
    head = [*short_names(list(sweep.axes)).values(), "accuracy", "95 % interval"]
    head += [*(["by seed"] if several else []), "passes", "ms"]
    cells = []
    for row in sweep.rows:
        shown = [*map(value_name, sweep.settings[row.name].values()), f"{row.mark.share:.1%}", row.interval]
        shown += [" ".join(f"{100 * a:.0f}" for a in row.accuracies)] if several else []
        cells.append([*shown, f"{row.cost('passes'):.1f}", f"{1000 * row.seconds:.2f}"])
    return head, cells


def sweep_table(sweep: Sweep) -> Table:
    """Return the table of a sweep for a terminal."""
    return terminal_table(*columns(sweep))

"""Sweeps: a recipe over a grid of values, or over points that a search draws; each point a run, all in one picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from innerloop.errors import InputError
from innerloop.experiments.compare import suite_standings
from innerloop.experiments.grid import (
    Axis,
    Choices,
    Range,
    axis_of,
    number,
    parse_axis,
    short_names,
    value_name,
    variant_name,
)
from innerloop.experiments.html import document, escape, figure, settings, table
from innerloop.experiments.jobs import check_tasks, run_suite
from innerloop.experiments.report import failed_part, summary
from innerloop.experiments.search import search
from innerloop.experiments.suite import Suite, parse_suite, suite_report
from innerloop.experiments.summary import Standing, failures
from innerloop.experiments.svg import Cell, Mark, bars, heat_map, scatter
from innerloop.experiments.workers import Workers
from innerloop.model.checkpoint import write_text
from innerloop.train.recipe import read_recipe

N_NAMED = 8  # points of a picture that are named


@dataclass(frozen=True)
class Sweep:
    """What was swept.

    Attributes:
        raw: the suite as it would be written.
        axes: the fields.
        settings: the value of each field by variant, in order.
        results: the result, or error, of every point.
        standings: the variants that have results.
    """

    raw: Mapping[str, Any]
    axes: Sequence[Axis]
    settings: Mapping[str, Mapping[str, Any]]
    results: Sequence[Mapping[str, Any]]
    standings: Sequence[Standing]

    @property
    def best(self) -> Standing | None:
        """The variant of the highest mean accuracy, the first of equals."""
        return max(self.standings, key=lambda s: s.mark.share, default=None)


def read_sweep(
    path: str | Path,
    grid: Sequence[str] = (),
    out: str | None = None,
    seeds: Sequence[int] | None = None,
    split: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Axis]]:
    """Return a recipe, or a suite with a grid, as the suite of a sweep without its grid, and the axes.

    Points are chosen by their accuracy on validation examples, unless the file or ``split`` says otherwise.
    """
    raw = read_recipe(path, overrides)
    if "variants" in raw:
        raise InputError(f"{path} lists variants: run it with innerloop compare {path}")
    written = raw.pop("grid", None) or {}
    if not isinstance(written, dict):
        raise InputError("grid lists the values of fields, for example grid: {method.max_loops: [1, 2, 4]}")
    axes = {field: axis_of(field, values) for field, values in written.items()}
    given = [parse_axis(text) for text in grid]
    if twice := [a.field for i, a in enumerate(given) if a.field in [b.field for b in given[:i]]]:
        raise InputError(f"--grid names {twice[0]} twice: list all its values once")
    axes |= {axis.field: axis for axis in given}
    if not axes:
        raise InputError("a sweep needs values: --grid FIELD=VALUE,VALUE,..")
    raw["out"] = out or (raw.get("out") if written else f"{raw.get('out')}-sweep")
    raw["seeds"] = list(seeds) if seeds is not None else raw.get("seeds", [(raw.get("train") or {}).get("seed", 0)])
    exam = {"split": "valid", **(raw.get("test") or {})}
    exam |= {name: value for name, value in (("split", split), ("limit", limit)) if value is not None}
    return {**raw, "test": exam}, list(axes.values())


def run_grid(
    raw: Mapping[str, Any],
    axes: Sequence[Axis],
    workers: int,
    console: Console,
    on: Callable[[], AbstractContextManager[Workers]] | None = None,
) -> Sweep:
    """Train and test every combination of values that is missing."""
    if drawn := [axis.field for axis in axes if isinstance(axis, Range)]:
        raise InputError(f"{drawn[0]} has a range, which only a search draws from: list values, or add --search optuna")
    listed = {**raw, "grid": {a.field: list(a.values) for a in axes if isinstance(a, Choices)}}
    suite = parse_suite(listed)
    check_tasks(suite)
    results = run_suite(suite, workers, console, on)
    return Sweep(listed, axes, suite.settings, results, suite_standings(suite, results))


def run_search(
    raw: Mapping[str, Any],
    axes: Sequence[Axis],
    n_trials: int,
    workers: int,
    console: Console,
    on: Callable[[], AbstractContextManager[Workers]] | None = None,
) -> Sweep:
    """Train and test the points that a search draws, until there are ``n_trials``."""
    last: dict[str, Any] = {}

    def scores_of(trials: Sequence[Mapping[str, Any]]) -> list[float | None]:
        suite = suite_of(raw, trials)
        results = run_suite(suite, workers, console, on)
        standings = suite_standings(suite, results)
        last.update(suite=suite, results=results, standings=standings)
        by_name = {s.name: s for s in standings}
        n_seeds = len(raw["seeds"])
        found = [by_name.get(name) for name in suite.settings]
        return [s.mark.share if s is not None and len(s.results) == n_seeds else None for s in found]

    middle = {axis.field: axis.values[0] if isinstance(axis, Choices) else axis.low for axis in axes}
    suite_of(raw, [middle])  # a field that does not exist is found before anything is drawn
    search(axes, n_trials, workers, Path(raw["out"]), scores_of)
    return Sweep(raw, axes, last["suite"].settings, last["results"], last["standings"])


def suite_of(raw: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Suite:
    """Return the suite of points that were drawn."""
    return parse_suite(raw, {variant_name(trial, list(trial)): trial for trial in trials})


def write_sweep(sweep: Sweep, title: str, folder: Path) -> None:
    """Write results.json and sweep.html."""
    report = suite_report(sweep.raw, sweep.results)
    for point in report["points"]:
        point["settings"] = dict(sweep.settings[point["variant"]])
    folder.mkdir(parents=True, exist_ok=True)  # points that fail at once leave none
    write_text(folder / "results.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "sweep.html", sweep_page(sweep, title))


def sweep_page(sweep: Sweep, title: str) -> str:
    """Return the page of a sweep: pictures, the best point, the table, what was swept."""
    parts = [summary(sweep.standings) if sweep.standings else "", failed_part(failures(sweep.results))]
    if sweep.best is not None:
        parts.append(f"<p>{escape(best_line(sweep))}</p>")
    parts.append("<h2>Accuracy</h2>")
    parts += _maps(sweep) if all(isinstance(a, Choices) for a in sweep.axes) else _draws(sweep)
    if sweep.standings:
        parts += ["<h2>Points</h2>", table(*columns(sweep), "The points in order; intervals as in the pictures.")]
    parts += ["<h2>Configuration</h2>", settings("what was swept", dict(sweep.raw))]
    return document(title, parts)


def best_line(sweep: Sweep) -> str:
    """Say which point was best, and what that is worth."""
    best = sweep.best
    assert best is not None
    split = (sweep.raw.get("test") or {}).get("split", "test")
    n = len(sweep.standings)
    return (
        f"Best of {n} on {split}: {best.name}, {best.mark.share:.1%}"
        + (f" ({best.interval})" if best.interval != "-" else "")
        + ". The best of many looks better than it is: test it on examples that did not choose it."
    )


def _interval_note(standing: Standing) -> str:
    """Return the interval of a cell in a few letters."""
    low, high = 100 * standing.mark.low, 100 * standing.mark.high
    return f"{low:.0f} to {high:.0f}"


def _maps(sweep: Sweep) -> list[str]:
    """Draw a grid: a heat map over the first two fields, one for each combination of the others."""
    axes = [axis for axis in sweep.axes if isinstance(axis, Choices)]
    short = short_names([axis.field for axis in axes])
    found = {tuple(map(value_name, sweep.settings[s.name].values())): s for s in sweep.standings}
    kind = "that over seeds" if any(len(s.results) > 1 for s in sweep.standings) else "Wilson's over examples"
    note = f"Accuracy in percent, and its 95 % interval ({kind}); the best point is framed."
    rows, columns_axis, rest = (axes[0], axes[1], axes[2:]) if len(axes) > 1 else (None, axes[0], [])
    parts = []
    for others in itertools.product(*(axis.values for axis in rest)):
        cells = []
        for row in rows.values if rows is not None else ("",):
            keys = [(*((row,) if rows is not None else ()), column, *others) for column in columns_axis.values]
            cells.append([_cell(found.get(tuple(map(value_name, key))), sweep.best) for key in keys])
        where = ", ".join(f"{short[axis.field]} {value_name(value)}" for axis, value in zip(rest, others))
        parts.append(f"<h3>{escape(where)}</h3>" if where else "")
        drawn = heat_map(
            [value_name(v) for v in rows.values] if rows is not None else [""],
            [value_name(v) for v in columns_axis.values],
            cells,
            short[rows.field] if rows is not None else "",
            short[columns_axis.field],
        )
        parts.append(figure(drawn, note))
    if rows is None and sweep.standings:
        marks = [Mark(s.name, s.mark.share, s.mark.low, s.mark.high) for s in sweep.standings]
        parts.append(figure(bars(marks), "The same as bars."))
    return parts


def _cell(standing: Standing | None, best: Standing | None) -> Cell:
    if standing is None:
        return Cell(None, "failed")
    return Cell(standing.mark.share, _interval_note(standing), standing is best)


def _draws(sweep: Sweep) -> list[str]:
    """Draw a search: accuracy against each field that is a number."""
    parts = []
    for axis in sweep.axes:
        values = {s.name: number(sweep.settings[s.name][axis.field]) for s in sweep.standings}
        if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values.values()):
            continue
        shown = sweep.standings if len(sweep.standings) <= N_NAMED else [sweep.best]
        names = {s.name for s in shown if s is not None}
        marks = [
            Mark(s.name if s.name in names else "", s.mark.share, s.mark.low, s.mark.high, float(values[s.name]))
            for s in sweep.standings
        ]
        drawn = scatter(marks, axis.field, log=isinstance(axis, Range) and axis.log, best_is_low=False)
        parts.append(figure(drawn, f"Accuracy by {axis.field}, with its interval."))
    return [f"<div class=pair>{''.join(parts)}</div>"]


def columns(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Return the table of a sweep: its head, and the cells of each row."""
    several = any(len(s.results) > 1 for s in sweep.standings)
    head = [*short_names([axis.field for axis in sweep.axes]).values(), "accuracy", "95 % interval"]
    head += [*(["by seed"] if several else []), "passes", "ms"]
    rows = []
    for s in sweep.standings:
        row = [*map(value_name, sweep.settings[s.name].values()), f"{s.mark.share:.1%}", s.interval]
        row += [" ".join(f"{100 * a:.0f}" for a in s.accuracies)] if several else []
        rows.append([*row, f"{s.cost('passes'):.1f}", f"{1000 * s.seconds:.2f}"])
    return head, rows


def sweep_table(sweep: Sweep) -> Table:
    """Return the table of a sweep for a terminal."""
    head, rows = columns(sweep)
    shown = Table()
    for column in head:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown

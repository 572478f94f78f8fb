"""How a method stands in a comparison: the results of its seeds as means with intervals, and files beside its runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from innerloop.bench.timing import spread
from innerloop.errors import InputError
from innerloop.experiments.svg import Mark
from innerloop.measure.statistics import over_seeds, share_noise, wilson

CONTROLS, STABILITY = "controls.json", "stability.json"


@dataclass(frozen=True)
class Standing:
    """One row of a comparison.

    Attributes:
        name: of the method, variant or run.
        results: result.json of each seed.
        folders: the run of each seed; empty where results alone are known.
        answers: the folder where each seed's predictions lie, which need not be the run's.
        turns: seconds of an example in each of several turns that all rows took together; empty: none were taken.
        memory: the peak of a turn in bytes, beyond the weights, where it was measured.
    """

    name: str
    results: Sequence[dict[str, Any]]
    folders: Sequence[Path] = ()
    answers: Sequence[Path] = ()
    turns: Sequence[float] = ()
    memory: float | None = None

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each seed."""
        return [result["accuracy"] for result in self.results]

    @property
    def n(self) -> int:
        """The rows that each seed has answered."""
        return self.results[0]["n"]

    @cached_property
    def mark(self) -> Mark:
        """Mean accuracy: with several seeds the interval over them, with one the Wilson interval over examples."""
        if len(self.results) == 1:
            low, high = self.results[0]["ci95"]
            return Mark(self.name, self.results[0]["accuracy"], low, high)
        return seed_mark(self.name, self.accuracies, self.n)

    def at(self, x: float) -> Mark:
        """Return the mark at a place on another axis."""
        return Mark(self.name, self.mark.share, self.mark.low, self.mark.high, x)

    def cost(self, name: str) -> float:
        """Return a mean cost of an answered example: passes, positions, flops, thought_tokens or loops."""
        return sum(result["cost"][name] for result in self.results) / len(self.results)

    @property
    def n_failed(self) -> int:
        """How many questions could not be answered, of all seeds."""
        return sum(result.get("failed", 0) for result in self.results)

    @property
    def seconds(self) -> float:
        """Seconds of an example: the median of the turns, or else the mean of its own evaluation."""
        if self.turns:
            return statistics.median(self.turns)
        return sum(sum(r["cost"]["seconds"].values()) for r in self.results) / len(self.results)

    @property
    def machine(self) -> tuple[Any, ...]:
        """What times depend on: device and versions, of all seeds."""
        return tuple((r.get("device"), json.dumps(r.get("versions"), sort_keys=True)) for r in self.results)

    @property
    def method(self) -> dict[str, Any]:
        """The settings of the method, empty where results do not say."""
        return self.results[0].get("method") or {}

    @property
    def interval(self) -> str:
        """The interval in words, in percent."""
        return f"{100 * self.mark.low:.1f} to {100 * self.mark.high:.1f}"

    @cached_property
    def loops(self) -> list[Mark]:
        """Accuracy by number of loops, where it was measured."""
        curves = [{int(n): at for n, at in r["loops"].items()} for r in self.results if r.get("loops")]
        if not curves:
            curves = [{at["loops"]: at for at in c["loops"]} for c in self.beside(CONTROLS) if c.get("loops")]
        if not curves:
            return []
        marks = []
        for n in sorted(curves[0]):
            points = [curve[n] for curve in curves if n in curve]
            if len(points) == 1:
                low, high = points[0].get("ci95", (points[0]["accuracy"],) * 2)
                marks.append(Mark(str(n), points[0]["accuracy"], low, high, n))
            else:
                mean = seed_mark(str(n), [point["accuracy"] for point in points], self.n)
                marks.append(Mark(mean.name, mean.share, mean.low, mean.high, n))
        return marks

    def beside(self, file: str) -> list[dict[str, Any]]:
        """Return what a JSON file beside each run holds, for the runs that have it."""
        return [read_json(folder / file) for folder in self.folders if (folder / file).exists()]


def failures(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return why points of a suite have no result: each reason once, with the points."""
    found: dict[str, list[str]] = {}
    for result in results:
        if "error" in result:
            found.setdefault(result["error"], []).append(f"{result['variant']} seed {result['seed']}")
    return found


def failure_table(failed: Mapping[str, Sequence[str]]) -> Table:
    """Return why points failed, each reason once, for a terminal."""
    table = Table("points", "failed because", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for reason, points in failed.items():
        table.add_row(escape("\n".join(points)), escape(reason))
    return table


def failure_sentence(failed: Mapping[str, Sequence[str]], n_points: int) -> str:
    """Say how many of the points failed and why: the first reason stands for all."""
    n, reason = sum(map(len, failed.values())), next(iter(failed)).rstrip(".")
    others = (
        "",
        " (and for another reason, listed above)",
        f" (and for {len(failed) - 1} other reasons, listed above)",
    )
    return f"{'all' if n == n_points else n} of {n_points} points failed: {reason}{others[min(len(failed) - 1, 2)]}"


def seed_mark(name: str, accuracies: Sequence[float], n: int) -> Mark:
    """Return the mean over seeds, each of ``n`` rows, with its interval (`over_seeds`), cut at 0 and 1."""
    mean, half = over_seeds(accuracies, share_noise(accuracies, n))
    half = half if math.isfinite(half) else 0.0
    return Mark(name, mean, max(mean - half, 0.0), min(mean + half, 1.0))


def share_mark(name: str, n_correct: int, n: int, x: float = 0.0) -> Mark:
    """Return a share of examples with its Wilson interval."""
    low, high = wilson(n_correct, n)
    return Mark(name, n_correct / max(n, 1), low, high, x)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; remove it, and measure again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; remove it, and measure again")
    return found


def against_cot(standings: Sequence[Standing]) -> list[dict[str, float] | None]:
    """Return for each how long an example takes, divided by one with written steps: median, p10 and p90 of the turns.

    Without turns it is the ratio of what each measured when it was evaluated, where that was on the same machine.
    """
    cot = next((s for s in standings if s.method.get("name") == "cot"), None)
    ratios: list[dict[str, float] | None] = []
    for s in standings:
        if cot is None or cot.seconds == 0:
            ratios.append(None)
        elif cot.turns and len(s.turns) == len(cot.turns):
            ratios.append(spread([ours / theirs for ours, theirs in zip(s.turns, cot.turns)]))
        else:
            ratios.append(spread([s.seconds / cot.seconds]) if set(s.machine) == set(cot.machine) else None)
    return ratios


def columns(standings: Sequence[Standing], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the table of a comparison: its head, and the cells of each row; ``brief`` leaves out seeds and FLOPs."""
    ratios = against_cot(standings)
    several = any(len(s.results) > 1 for s in standings) and not brief
    head = ["method", "accuracy, %", "95 % interval", *(["by seed"] if several else []), "passes", "positions"]
    head += ["thought tokens", *([] if brief else ["MFLOPs"]), "ms"]
    head += ["time / CoT"] if any(ratio is not None for ratio in ratios) else []
    head += ["memory, MiB"] if any(s.memory is not None for s in standings) else []
    rows = []
    for s, ratio in zip(standings, ratios):
        row = [s.name, f"{100 * s.mark.share:.1f}", s.interval]
        row += [" ".join(f"{100 * a:.0f}" for a in s.accuracies)] if several else []
        row += [f"{s.cost(name):.1f}" for name in ("passes", "positions", "thought_tokens")]
        row += [*([] if brief else [f"{s.cost('flops') / 1e6:.3g}"]), f"{1000 * s.seconds:.2f}"]
        row += [_ratio(ratio, brief)] if "time / CoT" in head else []
        row += ["-" if s.memory is None else f"{s.memory / 2**20:.1f}"] if "memory, MiB" in head else []
        rows.append(row)
    return head, rows


def _ratio(ratio: dict[str, float] | None, brief: bool) -> str:
    if ratio is None:
        return "-"
    ends = [f"{ratio[name]:.2f}" for name in ("p10", "p90")]
    return f"{ratio['median']:.2f}" + ("" if brief or ends[0] == ends[1] else f" ({ends[0]} to {ends[1]})")


def standing_table(standings: Sequence[Standing]) -> Table:
    """Return the table of a comparison for a terminal."""
    head, rows = columns(standings, brief=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption(standings))
    table.caption_justify = "left"
    short = {"accuracy, %": "acc., %", "positions": "pos.", "thought tokens": "thought", "memory, MiB": "MiB"}
    for i, column in enumerate(head):
        table.add_column(short.get(column, column), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def interval_kind(standings: Sequence[Standing]) -> str:
    """Say what the intervals of accuracy are."""
    over = (
        "those over seeds (t, and no narrower than rows leave open)"
        if any(len(s.results) > 1 for s in standings)
        else "Wilson's over examples"
    )
    return f"Intervals are {over}."


def failed_sentence(standings: Sequence[Standing]) -> str:
    """Say how many questions each could not answer; nothing where all were answered."""
    told = []
    for s in standings:
        if s.n_failed:
            n, seeds = sum(result["n"] for result in s.results), len(s.results)
            told.append(f"{s.name} {s.n_failed} of {n}" + (f" in {seeds} seeds" if seeds > 1 else ""))
    return f"Could not be answered, and count as wrong: {', '.join(told)}." if told else ""


def caption(standings: Sequence[Standing]) -> str:
    """Say what intervals, costs and times mean, and who could not answer everything."""
    failed = failed_sentence(standings)
    told = [*([failed] if failed else []), interval_kind(standings)]
    told.append("Costs are means over what each could answer." if failed else "Costs are means of an example.")
    turns = {len(s.turns) for s in standings}
    if turns <= {0}:
        told.append("ms is an example's share of its batch, taken when each was evaluated.")
    else:
        told.append(f"Times are medians of {max(turns)} turns that all took one after the other on one machine")
        told[-1] += ", answering what all can answer" if failed else ""
        told[-1] += ", with the middle four fifths of the ratio." if max(turns) > 1 else "."
    return " ".join(told)

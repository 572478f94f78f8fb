"""How methods compare: the results of their seeds as means with intervals, and files beside their runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from innerloop.bench.timing import spread
from innerloop.disk.files import write_text
from innerloop.errors import InputError
from innerloop.measure.accuracy import Prediction
from innerloop.measure.statistics import over_seeds, share_noise
from innerloop.text.codec import read_lines, to_json

RESULT, PREDICTIONS = "result.json", "predictions.jsonl"
CONTROLS, STABILITY = "controls.json", "stability.json"


@dataclass(frozen=True)
class Mark:
    """A share with its interval, and where it stands on another axis."""

    name: str
    share: float
    low: float
    high: float
    x: float = 0.0


@dataclass(frozen=True)
class MethodResult:
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

    @cached_property
    def mark(self) -> Mark:
        """Mean accuracy: with several seeds the interval over them, with one the Wilson interval over examples."""
        return self._mean(self.name, self.results)

    def _mean(self, name: str, found: Sequence[Mapping[str, Any]], x: float = 0.0) -> Mark:
        """Return the mean of the accuracies of seeds, with its interval cut at 0 and 1 (`over_seeds`)."""
        accuracies = [one["accuracy"] for one in found]
        if len(found) == 1:
            low, high = found[0].get("ci95", accuracies * 2)
            return Mark(name, accuracies[0], low, high, x)
        mean, half = over_seeds(accuracies, share_noise(accuracies, self.results[0]["n"]))
        return Mark(name, mean, max(mean - half, 0.0), min(mean + half, 1.0), x)

    def at(self, x: float) -> Mark:
        """Return the mark at a place on another axis."""
        return replace(self.mark, x=x)

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
        counts = sorted(curves[0]) if curves else []
        return [self._mean(str(n), [curve[n] for curve in curves if n in curve], n) for n in counts]

    def beside(self, file: str) -> list[dict[str, Any]]:
        """Return what a JSON file beside each run holds, for the runs that have it."""
        return [read_json(folder / file) for folder in self.folders if (folder / file).exists()]


def by_variant(results: Sequence[Mapping[str, Any]]) -> list[MethodResult]:
    """Return the row of each variant of a suite that has a result for any seed, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if "error" not in result:
            found.setdefault(result["variant"], []).append(dict(result))
    return [MethodResult(variant, own) for variant, own in found.items()]


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; remove it, and measure again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; remove it, and measure again")
    return found


def read_questions(folder: Path) -> list[tuple[str, str, str]]:
    """Return id, question and gold answer of each line of predictions.jsonl."""
    try:
        rows = map(json.loads, read_lines(folder / PREDICTIONS))
        return [(row["id"], row["question"], row["gold"]) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / PREDICTIONS} is not what innerloop wrote ({error}); remove the file") from None


def write_answers(folder: Path, result: Mapping[str, Any], predictions: Sequence[Prediction]) -> None:
    """Write result.json and predictions.jsonl."""
    lines = (json.dumps(to_json(p), ensure_ascii=False) for p in predictions)
    write_text(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
    write_text(folder / RESULT, json.dumps(result, indent=2) + "\n")


def failures(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return why jobs of a suite have no result: each reason once, with the jobs."""
    found: dict[str, list[str]] = {}
    for result in results:
        if "error" in result:
            found.setdefault(result["error"], []).append(f"{result['variant']} seed {result['seed']}")
    return found


def failure_lines(failed: Mapping[str, Sequence[str]]) -> list[str]:
    """Say why jobs failed, each reason once."""
    return [f"{'; '.join(jobs)}: {reason}" for reason, jobs in failed.items()]


def failure_sentence(failed: Mapping[str, Sequence[str]], n_jobs: int) -> str:
    """Say how many of the jobs failed and why: the first reason stands for all."""
    n, reason = sum(map(len, failed.values())), next(iter(failed)).rstrip(".")
    others = (
        "",
        " (and for another reason, listed above)",
        f" (and for {len(failed) - 1} other reasons, listed above)",
    )
    return f"{'all' if n == n_jobs else n} of {n_jobs} jobs failed: {reason}{others[min(len(failed) - 1, 2)]}"


def against_cot(rows: Sequence[MethodResult]) -> list[dict[str, float] | None]:
    """Return for each how long an example takes, divided by one with written steps: median, p10 and p90 of the turns.

    Without turns it is the ratio of what each measured when it was evaluated, where that was on the same machine.
    """
    cot = next((row for row in rows if row.method.get("name") == "cot"), None)
    ratios: list[dict[str, float] | None] = []
    for row in rows:
        if cot is None or cot.seconds == 0:
            ratios.append(None)
        elif cot.turns and len(row.turns) == len(cot.turns):
            ratios.append(spread([ours / theirs for ours, theirs in zip(row.turns, cot.turns)]))
        else:
            ratios.append(spread([row.seconds / cot.seconds]) if set(row.machine) == set(cot.machine) else None)
    return ratios


def columns(rows: Sequence[MethodResult], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the table of a comparison: its head, and the cells of each row; ``brief`` leaves out seeds and FLOPs."""
    ratios = against_cot(rows)
    shown = {
        "method": [row.name for row in rows],
        "accuracy, %": [f"{100 * row.mark.share:.1f}" for row in rows],
        "95 % interval": [row.interval for row in rows],
    }
    if any(len(row.results) > 1 for row in rows) and not brief:
        shown["by seed"] = [" ".join(f"{100 * a:.0f}" for a in row.accuracies) for row in rows]
    for name in ("passes", "positions", "thought_tokens"):
        shown[name.replace("_", " ")] = [f"{row.cost(name):.1f}" for row in rows]
    if not brief:
        shown["MFLOPs"] = [f"{row.cost('flops') / 1e6:.3g}" for row in rows]
    shown["ms"] = [f"{1000 * row.seconds:.{2 if row.seconds < 0.01 else 1}f}" for row in rows]
    if any(ratio is not None for ratio in ratios):
        shown["time / CoT"] = [_ratio(ratio, brief) for ratio in ratios]
    if any(row.memory is not None for row in rows):
        shown["memory, MiB"] = ["-" if row.memory is None else f"{row.memory / 2**20:.1f}" for row in rows]
    return list(shown), [list(cells) for cells in zip(*shown.values())]


def _ratio(ratio: dict[str, float] | None, brief: bool) -> str:
    if ratio is None:
        return "-"
    ends = [f"{ratio[name]:.2f}" for name in ("p10", "p90")]
    return f"{ratio['median']:.2f}" + ("" if brief or ends[0] == ends[1] else f" ({ends[0]} to {ends[1]})")


def summary_table(rows: Sequence[MethodResult]) -> Table:
    """Return the table of a comparison for a terminal."""
    short = {"accuracy, %": "acc., %", "positions": "pos.", "thought tokens": "thought", "memory, MiB": "MiB"}
    head, cells = columns(rows, brief=True)
    return terminal_table([short.get(name, name) for name in head], cells, caption(rows))


def terminal_table(head: Sequence[str], cells: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """Return a table for a terminal, whose first column names the rows."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for i, column in enumerate(head):
        table.add_column(Text(column), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def interval_kind(rows: Sequence[MethodResult]) -> str:
    """Say what the intervals of accuracy are."""
    several = any(len(row.results) > 1 for row in rows)
    over = "those over seeds (t, and no narrower than rows leave open)" if several else "Wilson's over examples"
    return f"Intervals are {over}."


def caption(rows: Sequence[MethodResult]) -> str:
    """Say what intervals, costs and times mean, and who could not answer everything."""
    failed = []
    for row in rows:
        if row.n_failed:
            n, seeds = sum(result["n"] for result in row.results), len(row.results)
            failed.append(f"{row.name} {row.n_failed} of {n}" + (f" in {seeds} seeds" if seeds > 1 else ""))
    told = [f"Could not be answered, and count as wrong: {', '.join(failed)}."] if failed else []
    told.append(interval_kind(rows))
    told.append("Costs are means over what each could answer." if failed else "Costs are means of an example.")
    turns = max((len(row.turns) for row in rows), default=0)
    if turns == 0:
        told.append("ms is an example's share of its batch, taken when each was evaluated.")
    else:
        told.append(f"Times are medians of {turns} turns that all took one after the other on one machine")
        told[-1] += ", answering what all can answer" if failed else ""
        told[-1] += ", with the middle four fifths of the ratio." if turns > 1 else "."
    return " ".join(told)

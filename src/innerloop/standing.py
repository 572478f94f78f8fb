"""How a method stands in a comparison: the results of its seeds as means with intervals, and files beside its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from innerloop.errors import InputError
from innerloop.measure.statistics import over_seeds, wilson
from innerloop.pictures import Mark

CONTROLS, STABILITY = "controls.json", "stability.json"


@dataclass(frozen=True)
class Standing:
    """One row of a comparison.

    Attributes:
        name: of the method, variant or run.
        results: result.json of each seed.
        folders: the run of each seed; empty where results alone are known.
        answers: the folder where each seed's predictions lie, which need not be the run's.
    """

    name: str
    results: Sequence[dict[str, Any]]
    folders: Sequence[Path] = ()
    answers: Sequence[Path] = ()

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each seed."""
        return [result["accuracy"] for result in self.results]

    @cached_property
    def mark(self) -> Mark:
        """Mean accuracy: with several seeds the t-interval over them, with one the Wilson interval over examples."""
        if len(self.results) == 1:
            low, high = self.results[0]["ci95"]
            return Mark(self.name, self.results[0]["accuracy"], low, high)
        return seed_mark(self.name, self.accuracies)

    def at(self, x: float) -> Mark:
        """Return the mark at a place on another axis."""
        return Mark(self.name, self.mark.share, self.mark.low, self.mark.high, x)

    def cost(self, name: str) -> float:
        """Return a mean cost of an example: passes, positions, flops, thought_tokens or loops."""
        return sum(result["cost"][name] for result in self.results) / len(self.results)

    @property
    def seconds(self) -> float:
        """Mean seconds of an example, all phases."""
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
            return []
        marks = []
        for n in sorted(curves[0]):
            points = [curve[n] for curve in curves if n in curve]
            if len(points) == 1:
                low, high = points[0].get("ci95", (points[0]["accuracy"],) * 2)
                marks.append(Mark(str(n), points[0]["accuracy"], low, high, n))
            else:
                mean = seed_mark(str(n), [point["accuracy"] for point in points])
                marks.append(Mark(mean.name, mean.share, mean.low, mean.high, n))
        return marks

    def beside(self, file: str) -> list[dict[str, Any]]:
        """Return what a JSON file beside each run holds, for the runs that have it."""
        return [read_json(folder / file) for folder in self.folders if (folder / file).exists()]


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of the points of a suite that have no result why."""
    return [f"{r['variant']} seed {r['seed']}: {r['error']}" for r in results if "error" in r]


def seed_mark(name: str, accuracies: Sequence[float]) -> Mark:
    """Return the mean over seeds with its t-interval, cut at 0 and 1."""
    mean, half = over_seeds(accuracies)
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


def against_cot(standings: Sequence[Standing]) -> list[float | None]:
    """Return for each the time of an example divided by that of written steps, measured on the same machine."""
    cot = next((s for s in standings if s.method.get("name") == "cot"), None)
    if cot is None or cot.seconds == 0:
        return [None] * len(standings)
    return [s.seconds / cot.seconds if set(s.machine) == set(cot.machine) else None for s in standings]


def columns(standings: Sequence[Standing]) -> tuple[list[str], list[list[str]]]:
    """Return the table of a comparison: its head, and the cells of each row."""
    ratios, peaks = against_cot(standings), [_peak(s) for s in standings]
    several = any(len(s.results) > 1 for s in standings)
    head = ["method", "accuracy", "95 % interval", *(["by seed"] if several else []), "passes", "positions"]
    head += ["thought tokens", "MFLOPs", "ms"]
    head += ["time / CoT"] if any(ratio is not None for ratio in ratios) else []
    head += ["memory, MiB"] if any(peak is not None for peak in peaks) else []
    rows = []
    for standing, ratio, peak in zip(standings, ratios, peaks):
        row = [standing.name, f"{standing.mark.share:.1%}", standing.interval]
        row += [" ".join(f"{100 * a:.0f}" for a in standing.accuracies)] if several else []
        row += [f"{standing.cost(name):.1f}" for name in ("passes", "positions", "thought_tokens")]
        row += [f"{standing.cost('flops') / 1e6:.3g}", f"{1000 * standing.seconds:.2f}"]
        row += ["-" if ratio is None else f"{ratio:.2f}"] if "time / CoT" in head else []
        row += ["-" if peak is None else f"{peak / 2**20:.0f}"] if "memory, MiB" in head else []
        rows.append(row)
    return head, rows


def standing_table(standings: Sequence[Standing]) -> Table:
    """Return the table of a comparison for a terminal."""
    head, rows = columns(standings)
    table = Table(title="per example", title_justify="left", caption=caption(standings), caption_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    return table


def caption(standings: Sequence[Standing]) -> str:
    """Say what intervals and times mean."""
    over = "the t-interval over seeds" if any(len(s.results) > 1 for s in standings) else "Wilson's over examples"
    return (
        f"Intervals are {over}. Costs are means of an example; ms is its share of the batch it was answered in, "
        "taken when each was evaluated."
    )


def _peak(standing: Standing) -> float | None:
    """Return the peak memory in bytes, where it was measured."""
    found = [r["cost"]["memory"] for r in standing.results if r["cost"].get("memory") is not None]
    return sum(found) / len(found) if found else None

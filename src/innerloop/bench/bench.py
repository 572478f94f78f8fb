"""What answering costs in time and memory, of a model and a baseline that take turns, against the machine's floor.

report = bench({"run": model, "baseline": other}, questions, batch_sizes=(1, 8, 32), max_new_tokens=64)

A turn answers the same questions with each model at each batch size, and runs the two jobs that show the machine's
ceilings (`innerloop.bench.roofline`). Memory is taken in a run of its own, which is not timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
from rich.table import Table
from rich.text import Text

from innerloop.bench.roofline import Ceilings, Rates, floor_of
from innerloop.bench.timing import Clock, Turn, clock_of, peak_of, ratio, seconds_of, spread, take_turns
from innerloop.checks.settings import Checked
from innerloop.checks.values import Bounds, Count, Seed
from innerloop.decoder.cost import PHASES, mean_cost
from innerloop.decoder.memory import MIB
from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.requests import check_length
from innerloop.errors import InputError, refuse
from innerloop.measure.accuracy import device_name, versions

RUN, BASELINE = "run", "baseline"


@dataclass(frozen=True)
class BenchSettings(Checked):
    """What is asked, and how often.

    Args:
        batch_sizes: rows that may run together.
        repeats: timed turns.
        questions: the least number of questions of a turn; a larger batch answers as many as it holds.
        max_new_tokens: the most tokens to write for each.
        seed: of what models draw.
    """

    batch_sizes: Annotated[tuple[Count, ...], Bounds(1)] = (1, 8, 32)
    repeats: Count = 5
    questions: Count = 8
    max_new_tokens: Count = 64
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.batch_sizes
        refuse((len(set(sizes)) < len(sizes), f"batch_sizes are {list(sizes)}: give each once"))

    def n_asked(self, batch_size: int) -> int:
        """Return how many questions a turn at a batch size answers."""
        return max(batch_size, self.questions)

    @property
    def most(self) -> int:
        """The most questions that a turn answers."""
        return self.n_asked(max(self.batch_sizes))


def bench(
    models: Mapping[str, LatentModel],
    questions: Sequence[str],
    settings: BenchSettings,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Measure models on one device; return the report, which is JSON.

    Args:
        models: what is measured, by name; those named run and baseline are compared.
        questions: as many as the largest turn answers; the first of them are asked where fewer do.
        settings: how.
        clock: tells the time in seconds; None: the wall clock, once the device is done.
    """
    if len(questions) < settings.most:
        raise InputError(
            f"a turn answers {settings.most} questions, but there are {len(questions)}: lower --batch_sizes or "
            "--questions, or name a task or split with more"
        )
    first = next(iter(models.values()))
    device, dtype = first.device, first.backbone.lm.dtype
    for model in models.values():
        if (model.device, model.backbone.lm.dtype) != (device, dtype):
            raise InputError(f"models must be alike in device and dtype: put all on {device} as {dtype}")
        for question, row in zip(questions, model.prompts(questions)):
            check_length(model, question, row)
    ceilings, points = Ceilings(device, dtype), [(name, size) for name in models for size in settings.batch_sizes]
    asks = {point: partial(_answer, models[point[0]], questions, settings, point[1]) for point in points}
    peaks = {point: peak_of(models[point[0]], ask, device) for point, ask in asks.items()}
    runs: dict[Any, Any] = {**asks, **ceilings.jobs()}
    turns: dict[Any, list[Turn]] = take_turns(runs, settings.repeats, clock or clock_of(device))
    rates = ceilings.rates(turns)
    report: dict[str, Any] = {"settings": asdict(settings), "models": {}}
    for name, model in models.items():
        report["models"][name] = {
            "method": {"name": model.method.name, **asdict(model.method)},
            "weights_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / MIB,
            "points": [
                _point(model, size, turns[name, size], peaks[name, size], rates) for size in settings.batch_sizes
            ],
        }
    if {RUN, BASELINE} <= set(models):
        report["ratios"] = [_compared(report, turns, i, size) for i, size in enumerate(settings.batch_sizes)]
    return report | {
        "ceilings": rates.report(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": settings.seed,
        "versions": versions(),
        "device": device_name(device),
    }


def _answer(model: LatentModel, questions: Sequence[str], settings: BenchSettings, size: int) -> list[Generation]:
    asked = questions[: settings.n_asked(size)]
    return model.generate(asked, max_new_tokens=settings.max_new_tokens, batch_size=size, seed=settings.seed)


def _point(
    model: LatentModel, size: int, turns: Sequence[Turn[list[Generation]]], peak: int, rates: Rates
) -> dict[str, Any]:
    """Return what was measured at one batch size. Latencies are those of a whole batch, in milliseconds."""
    costs = [generation.cost for generation in turns[0].result]
    n, n_batches, seconds = len(costs), math.ceil(len(costs) / size), seconds_of(turns)
    phases = {phase: [sum(g.cost.seconds[phase] for g in turn.result) for turn in turns] for phase in PHASES}
    latencies = {"total": seconds, **phases}
    floor, mean = floor_of(model.backbone, costs, size, rates), mean_cost(costs)
    mean.pop("seconds")  # they are the latencies
    return {
        "batch_size": size,
        "n": n,
        "latency_ms": {name: spread([1000 * one / n_batches for one in of]) for name, of in latencies.items()},
        "examples_per_second": spread([n / found for found in seconds]),
        "seconds": seconds,
        "peak_mib": peak / MIB,
        "cost": mean,
        "floor": {**floor.report(), "share": spread([floor.seconds / found for found in seconds])},
    }


def _compared(
    report: Mapping[str, Any], turns: Mapping[Any, Sequence[Turn]], index: int, size: int
) -> dict[str, float | dict[str, float]]:
    """Return how many times what the run takes the baseline takes, at one batch size."""
    mine, other = (report["models"][name]["points"][index] for name in (RUN, BASELINE))
    speedup, peak = ratio(turns[BASELINE, size], turns[RUN, size]), other["peak_mib"] / mine["peak_mib"]
    counts = {name: other["cost"][name] / mine["cost"][name] for name in ("passes", "positions", "flops")}
    return {"batch_size": size, "speedup": speedup, "peak": peak, **counts}


def bench_table(report: Mapping[str, Any]) -> Table:
    """Return the report as a table: a column for each model, a group of lines for each batch size."""
    models = report["models"]
    table = Table(title=f"answering on {report['device']}, {report['dtype']}", title_justify="left")
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("median (p10-p90)", no_wrap=True)
    for name, model in models.items():
        table.add_column(Text(f"{name}: {model['method']['name']}"), justify="right", no_wrap=True)
    for points in zip(*(model["points"] for model in models.values())):
        for i, (name, *cells) in enumerate(zip(LINES, *map(_cells, points), strict=True)):
            size = str(points[0]["batch_size"]) if i == 0 else ""
            table.add_row(size, name, *cells, end_section=i == len(LINES) - 1)
    return table


LINES = (
    "ms per batch",
    *(f"  {phase}" for phase in PHASES),
    *("examples per second", "peak memory, MiB", "floor / time"),
    *("passes per example", "positions per example", "MFLOPs per example"),
)


def _cells(point: Mapping[str, Any]) -> list[str]:
    """Return a point as the table has it, line by line as in `LINES`."""
    latency, cost, floor = point["latency_ms"], point["cost"], point["floor"]
    cells = [_spread(latency[name]) for name in ("total", *PHASES)]
    cells += [_spread(point["examples_per_second"]), f"{point['peak_mib']:.2f}"]
    cells += [f"{floor['share']['median']:.1%} ({floor['bound']})"]
    return [*cells, f"{cost['passes']:.1f}", f"{cost['positions']:.1f}", f"{cost['flops'] / 1e6:.1f}"]


def bench_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the ceilings and the comparison in words, a line each."""
    ceilings = report["ceilings"]
    lines = [
        f"ceilings: {ceilings['matmul_gflops']['best']:.1f} GFLOP/s in products of matrices, "
        f"{ceilings['memory_gb_s']['best']:.1f} GB/s from memory; floor: what the least work takes at these rates"
    ]
    for one in report.get("ratios", ()):
        lines.append(
            f"batch {one['batch_size']}: the run is {_spread(one['speedup'], 2)} times as fast as the baseline, which "
            f"needs {one['passes']:.2f} times the passes and {one['flops']:.2f} times the FLOPs"
        )
    return lines


def _spread(values: Mapping[str, float], digits: int = 1) -> str:
    median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} ({low}-{high})"

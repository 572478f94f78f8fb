"""Timing runs that take turns, so that what disturbs the machine disturbs all of them, and saying how far times spread.

turns = take_turns({"ours": f, "theirs": g}, repeats=5)
ratio(turns["theirs"], turns["ours"])  # {"median": ..., "p10": ..., "p90": ...}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import nn

from innerloop.decoder.memory import peak_memory
from innerloop.decoder.packed import release
from innerloop.errors import InputError
from innerloop.phases.phase import phase

K = TypeVar("K")
T = TypeVar("T")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Turn(Generic[T]):
    """One timed call: its seconds, what it returned, and the seconds that the process's processors worked."""

    seconds: float
    result: T
    cpu_seconds: float = 0.0


def clock_of(device: torch.device) -> Clock:
    """Return a clock that reads the time once a device has done what was asked of it."""
    return time.perf_counter if device.type != "cuda" else partial(_synchronised, device)


def _synchronised(device: torch.device) -> float:
    torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(
    runs: Mapping[K, Callable[[], T]], repeats: int, clock: Clock = time.perf_counter, warm_up: int = 1
) -> dict[K, list[Turn[T]]]:
    """Call each run ``repeats`` times, one after the other, and time every call.

    Every second turn goes backwards, so that none always follows the same other one. ``warm_up`` turns come first and
    are not counted.
    """
    if repeats < 1 or warm_up < 0:
        raise InputError(f"repeats is {repeats}, but at least one turn must be timed")
    names = list(runs)
    turns: dict[K, list[Turn[T]]] = {name: [] for name in names}
    for number in range(-warm_up, repeats):
        turn = "warming up" if number < 0 else f"turn {number + 1} of {repeats}"
        with phase(f"timing, {turn}"):
            for name in names if number % 2 == 0 else reversed(names):
                started, worked = clock(), time.process_time()
                result = runs[name]()
                seconds, cpu_seconds = clock() - started, time.process_time() - worked
                if number >= 0:
                    turns[name].append(Turn(seconds, result, cpu_seconds))
    return turns


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of some values, and between what the middle four fifths of them lie (p10, p90)."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1]}


def seconds_of(turns: Sequence[Turn]) -> list[float]:
    """Return the seconds of each turn."""
    return [turn.seconds for turn in turns]


def ratio(above: Sequence[Turn], below: Sequence[Turn]) -> dict[str, float]:
    """Return how many times longer one run took than another, as the spread over the turns that both took together."""
    return spread([a / b for a, b in zip(seconds_of(above), seconds_of(below), strict=True)])


def cpu_ratio(above: Sequence[Turn], below: Sequence[Turn]) -> dict[str, float]:
    """Return `ratio` of the seconds that processors worked, which others on the machine disturb less."""
    return spread([a.cpu_seconds / b.cpu_seconds for a, b in zip(above, below, strict=True)])


def peak_of(model: nn.Module, run: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a run holds as a model's first one, which takes memory for packed weights too."""
    release(model.modules())
    return peak_memory(run, device)

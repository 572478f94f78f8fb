"""What is said of each row of a comparison: whether it is better than the baseline, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from innerloop.experiments.committed import RIGHT, from_digits
from innerloop.experiments.summary import PREDICTIONS, MethodResult
from innerloop.measure.stability import diverged_rate
from innerloop.measure.statistics import (
    Verdict,
    difference_noise,
    over_seeds,
    read_correct,
    share_noise,
    verdict,
    verdict_of_files,
)

Answered = tuple[Mapping[str, Any], Path]
"""The result of a run, and the folder where its answers lie if they are here."""


def verdicts(rows: Sequence[MethodResult], baseline: str) -> list[str]:
    """Say of each row whether it is better than the baseline, and how sure that is.

    With one seed the same rows are compared (McNemar's test, a paired bootstrap): that is about these two runs. With
    several the differences of the seeds are, by their interval over seeds: that is about the methods.
    """
    base = next((row for row in rows if row.name == baseline), None)
    if base is None:
        return [f"{baseline} has no result, so nothing is set against it."] if rows else []
    answered = {result.get("seed"): (result, place) for result, place in zip(base.results, base.answers)}
    sentences = []
    for row in (row for row in rows if row is not base):
        pairs = [
            ((result, place), answered[result.get("seed")])
            for result, place in zip(row.results, row.answers)
            if result.get("seed") in answered
        ]
        if len(row.results) == len(base.results) == 1:
            pairs = [((row.results[0], row.answers[0]), (base.results[0], base.answers[0]))]
        sentences += _verdict((row.name, base.name), pairs)
    return sentences


def _verdict(names: tuple[str, str], pairs: Sequence[tuple[Answered, Answered]]) -> list[str]:
    """Compare two rows seed by seed: by which questions are right, or where that is not known by accuracies."""
    found = [one for one in (_paired(names, *pair) for pair in pairs) if one is not None]
    if pairs and len(found) < len(pairs):
        shares = [[answered[0]["accuracy"] for answered in side] for side in zip(*pairs)]
        differences = [ours - theirs for ours, theirs in zip(*shares)]
        if len(pairs) == 1:
            told = f"{names[0]} has {100 * differences[0]:+.1f} points against {names[1]}"
            return [f"{told}; which questions are right is not on file, so nothing is tested"]
        noise = math.hypot(*(share_noise(side, pairs[0][0][0]["n"]) for side in shares))
        return [seeds_sentence(*names, differences, noise)]
    if len(found) > 1:
        return [seeds_sentence(*names, [v.difference for v in found], difference_noise(found))]
    return [v.sentence for v in found]


def _paired(names: tuple[str, str], ours: Answered, theirs: Answered) -> Verdict | None:
    """Compare two runs question by question; None where it is not known which are right."""
    if all((place / PREDICTIONS).exists() for _, place in (ours, theirs)):
        return verdict_of_files(ours[1] / PREDICTIONS, theirs[1] / PREDICTIONS, names)
    right = [_right(*answered) for answered in (ours, theirs)]
    return None if right[0] is None or right[1] is None else verdict(right[0], right[1], names)


def _right(result: Mapping[str, Any], place: Path) -> list[bool] | None:
    """Return which questions of a suite are right, in their order."""
    if (place / PREDICTIONS).exists():
        return list(read_correct(place / PREDICTIONS).values())
    return from_digits(result[RIGHT], result["n"]) if RIGHT in result else None


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


def diverged_sentences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each variant of which a run has diverged, in training or in its loop, how many of its runs have."""
    sentences = []
    for variant in dict.fromkeys(result["variant"] for result in results):
        rate = diverged_rate([result for result in results if result["variant"] == variant])
        if rate["diverged"]:
            low, high = (100 * end for end in rate["ci95"])
            runs = f"{rate['diverged']} of {rate['n']} runs"
            sentences.append(f"{variant}: {runs} diverged (95 % interval {low:.0f} to {high:.0f} %)")
    return sentences

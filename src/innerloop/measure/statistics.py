"""What numbers over seeds and examples are worth: intervals, and the comparison of two runs on the same rows.

verdict_of_files("runs/lotus/predictions.jsonl", "runs/cot/predictions.jsonl", names=("LOTUS", "CoT")).sentence
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

import numpy as np

from innerloop.errors import InputError
from innerloop.text.codec import read_lines

Z95 = 1.959963984540054  # the 0.975 quantile of the normal distribution
RESAMPLES = 10_000


def wilson(n_correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share ``n_correct / n``."""
    if n == 0:
        return 0.0, 1.0
    from scipy import stats  # slow to import

    low, high = stats.binomtest(n_correct, n).proportion_ci(method="wilson")
    return float(low), float(high)


def clopper_pearson(n_hits: int, n: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share ``n_hits / n`` (Clopper and Pearson)."""
    from scipy import stats  # slow to import

    low = float(stats.beta.ppf(0.025, n_hits, n - n_hits + 1)) if n_hits > 0 else 0.0
    high = float(stats.beta.ppf(0.975, n_hits + 1, n - n_hits)) if n_hits < n else 1.0
    return low, high


def over_seeds(values: Sequence[float], noise: float = 0.0) -> tuple[float, float]:
    """Return the mean over seeds and the half width of its 95 % interval; infinite for a single seed.

    It is the t-interval, but no narrower than what rows leave open: a few seeds that agree by chance are no certainty.

    Args:
        values: one for each seed.
        noise: the standard deviation that each has because its rows are finite (`share_noise`, `difference_noise`).
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.inf
    from scipy import stats  # slow to import

    return mean, max(float(stats.t.ppf(0.975, n - 1)) * stdev(values), Z95 * noise) / math.sqrt(n)


def share_noise(shares: Sequence[float], n: int) -> float:
    """Return the standard deviation of each of some shares of ``n`` rows, with two rows of each kind added to them."""
    share = (sum(shares) * n + 2) / (len(shares) * n + 4)
    return math.sqrt(share * (1 - share) / max(n, 1))


def mcnemar(n_first_only: int, n_second_only: int) -> float:
    """Return the exact two-sided p-value of McNemar's test; the counts are of rows that one of two runs has right."""
    from scipy import stats  # slow to import

    n = n_first_only + n_second_only
    return float(stats.binomtest(n_first_only, n, 0.5).pvalue) if n else 1.0


def paired_bootstrap(n_first_only: int, n_second_only: int, n: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the difference of two accuracies on the same ``n`` rows, first less second.

    Rows are drawn with replacement, which for rows of four kinds (both right, one, the other, none) is a multinomial
    draw. Half a row of each kind is added first (Agresti and Min, 2005): without it an interval would have no width
    where all rows agree.
    """
    if n == 0:
        return -1.0, 1.0
    difference = (n_first_only - n_second_only) / n
    kinds = np.array([n_first_only + 0.5, n_second_only + 0.5, n - n_first_only - n_second_only + 1.0]) / (n + 2)
    drawn = np.random.default_rng(seed).multinomial(n, kinds, size=RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, (0.025, 0.975))
    return min(float(low), difference), max(float(high), difference)


@dataclass(frozen=True)
class Verdict:
    """How two runs compare on the same rows.

    Attributes:
        names: of the first and the second.
        n: the number of rows.
        accuracies: of both.
        difference: of the accuracies, first less second.
        ci95: its interval (`paired_bootstrap`).
        p: of McNemar's exact test.
        n_discordant: rows that only the first has right, and rows that only the second has right.
    """

    names: tuple[str, str]
    n: int
    accuracies: tuple[float, float]
    difference: float
    ci95: tuple[float, float]
    p: float
    n_discordant: tuple[int, int]

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0, and the exact test agrees at 5 %."""
        return (self.ci95[0] > 0 or self.ci95[1] < 0) and self.p < 0.05

    @property
    def interval(self) -> str:
        """The interval of the difference in points, in words."""
        low, high = (100 * bound for bound in self.ci95)
        return f"95 % interval {low:.1f} to {high:.1f}"

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        first, second = self.names
        points, tail = 100 * self.difference, f"{self.interval}, {p_words(self.p)}"
        if not self.told_apart:
            return f"{first} and {second} cannot be told apart: {points:+.1f} points, {tail} (n = {self.n})"
        side, low, high = ("above", *self.ci95) if points > 0 else ("below", -self.ci95[1], -self.ci95[0])
        return (
            f"{first} is {abs(points):.1f} points {side} {second}, "
            f"95 % interval {100 * low:.1f} to {100 * high:.1f}, {p_words(self.p)} (n = {self.n})"
        )


def difference_noise(found: Sequence[Verdict]) -> float:
    """Return the standard deviation that the difference of each of some comparisons has because its rows are finite.

    The rows of all are taken together, with half a row of each kind added (see `paired_bootstrap`).
    """
    n = sum(one.n for one in found)
    first, second = ((sum(one.n_discordant[side] for one in found) + 0.5) / (n + 2) for side in (0, 1))
    return math.sqrt((first + second - (first - second) ** 2) * len(found) / max(n, 1))


def p_words(p: float) -> str:
    """Write a p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def verdict(
    first: Sequence[bool], second: Sequence[bool], names: tuple[str, str] = ("the first", "the second"), seed: int = 0
) -> Verdict:
    """Compare two runs by which rows each has right, the same rows in the same order; ``seed`` is the bootstrap's."""
    if len(first) != len(second):
        raise InputError(f"two runs are compared on the same rows, but there are {len(first)} and {len(second)}")
    a, b, n = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool), len(first)
    only = int((a & ~b).sum()), int((~a & b).sum())
    shares = float(a.mean()) if n else 0.0, float(b.mean()) if n else 0.0
    difference = (only[0] - only[1]) / max(n, 1)
    return Verdict(names, n, shares, difference, paired_bootstrap(*only, n, seed), mcnemar(*only), only)


def read_correct(path: str | Path) -> dict[str, bool]:
    """Return which examples of a predictions.jsonl are right, by id."""
    try:
        rows = map(json.loads, read_lines(path))
        found = [(str(row["id"]), bool(row["correct"])) for row in rows]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; innerloop eval writes it") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no predictions.jsonl as innerloop eval writes it") from None
    if twice := [key for key, n in Counter(key for key, _ in found).items() if n > 1]:
        raise InputError(f"{path} has {len(twice)} ids more than once, such as '{twice[0]}': rows cannot be matched")
    return dict(found)


def aligned(first: str | Path, second: str | Path) -> tuple[list[bool], list[bool]]:
    """Return which rows of two predictions.jsonl are right, matched by example id, in the order of the first."""
    a, b = read_correct(first), read_correct(second)
    missing, extra = [key for key in a if key not in b], [key for key in b if key not in a]
    if missing or extra:
        example = (missing or extra)[0]
        raise InputError(
            f"{first} and {second} answer different examples: {len(missing)} of {len(a)} are only in the first and "
            f"{len(extra)} of {len(b)} only in the second, such as '{example}'; evaluate both on the same examples"
        )
    return list(a.values()), [b[key] for key in a]


def verdict_of_files(
    first: str | Path, second: str | Path, names: tuple[str, str] = ("the first", "the second"), seed: int = 0
) -> Verdict:
    """Compare two runs by their predictions.jsonl."""
    return verdict(*aligned(first, second), names, seed)

"""What numbers over seeds and examples are worth: intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

Z95 = float(stats.norm.ppf(0.975))


def wilson(n_correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share ``n_correct / n``."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = n_correct / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and the half width of its 95 % t-interval; infinite for a single seed."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def clopper_pearson(n_hits: int, n: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share ``n_hits / n`` (Clopper and Pearson)."""
    low = float(stats.beta.ppf(0.025, n_hits, n - n_hits + 1)) if n_hits > 0 else 0.0
    high = float(stats.beta.ppf(0.975, n_hits + 1, n - n_hits)) if n_hits < n else 1.0
    return low, high

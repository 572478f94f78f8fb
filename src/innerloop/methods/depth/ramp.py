"""The mean number of iterations of recurrent depth over training.

m_t = max(1, ceil(M f(u))),  u = min(t / steps, 1),  f(u) = u or 1 - sqrt(1 - u)         (recurrent_depth.md, 5)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.config.curriculum import ResetOptimizer, Schedule

RampKind = Literal["none", "linear", "1-sqrt"]


@dataclass(frozen=True)
class RampSchedule(Schedule):
    """Stages that are mean numbers of iterations: the optimizer goes on through them."""

    reset_optimizer: ClassVar[ResetOptimizer] = "never"  # type: ignore[misc]


def ramped(kind: RampKind, mean: int, step: int, n_steps: int) -> int:
    """Return m_t, the mean number of iterations at an optimizer step: from 1 to ``mean`` over ``n_steps`` steps."""
    done = min(step, n_steps)
    if kind == "linear":
        return max(1, -(-mean * done // n_steps))
    share = 1 - math.sqrt(1 - done / n_steps)
    return max(1, math.ceil(mean * share - 1e-9))

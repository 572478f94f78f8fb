"""Breadth: some rows of a loop begin at random states, and how still each comes to stand is noted.

    z_0 = RMS(h_0) eps,  eps ~ N(0, 1) cut off at two deviations, drawn anew for each row           (stable_loops.md, 3)

What the loop recalls in every iteration stays h_0; only the state that the first iteration is fed is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import erf, sqrt

import numpy as np
import torch
from torch import Tensor

from innerloop.loop.hooks import LoopHook, Step
from innerloop.loop.loop import relative_change
from innerloop.loop.stabilize import CUT, rms

LAST = 3  # iterations whose changes say how still a state stands


class RandomStarts(LoopHook):
    """Lets rows begin elsewhere.

    Args:
        seeds: what each row of the call draws its start by; None: it begins at h_0.
    """

    def __init__(self, seeds: Sequence[Sequence[int] | None]):
        self.seeds = seeds
        self.changes: list[tuple[Sequence[int], Tensor]] = []

    def on_input(self, state: Tensor, iteration: int, rows: Sequence[int]) -> Tensor:
        """Return the states (A, N, D) that the first iteration begins with."""
        drawn = [i for i, row in enumerate(rows) if self.seeds[row] is not None]
        if iteration > 1 or not drawn:
            return state
        noise = torch.stack([truncated_normal(self.seeds[rows[i]] or (), state.shape[1:]) for i in drawn]).to(state)
        index = torch.tensor(drawn, device=state.device)
        return state.index_copy(0, index, (rms(state[index]) * noise).to(state.dtype))

    def on_iteration(self, step: Step) -> None:
        """Note how much each state has changed."""
        moment = step.moment
        change_A = relative_change(moment.state, moment.previous, moment.mask_BN)
        self.changes.append((step.rows, change_A[step.part]))

    def settled(self) -> list[float]:
        """Return the mean change of each row's state over its last iterations; infinite where it has run none."""
        changes: list[list[float]] = [[] for _ in self.seeds]
        whole = torch.cat([change_A for _, change_A in self.changes]).tolist() if self.changes else []
        for row, change in zip((row for rows, _ in self.changes for row in rows), whole, strict=True):
            changes[row].append(change)
        return [sum(own[-LAST:]) / len(own[-LAST:]) if own else float("inf") for own in changes]


def truncated_normal(seed: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return normal draws (shape) in fp64, none beyond `CUT`; of more positions, the first are those of fewer."""
    tail = 0.5 * (1 - erf(CUT / sqrt(2)))
    uniform = np.random.default_rng(list(seed)).random(tuple(shape))
    return torch.special.ndtri(torch.from_numpy(tail + (1 - 2 * tail) * uniform))

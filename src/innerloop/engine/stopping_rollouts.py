"""Rollouts of a model that decides how often its latents are refined: the number is drawn, as tokens are.

    P(n) = lambda_n prod_{t<n} (1 - lambda_t),  the last iteration taking the rest          (halting.md, 3e)

The states of a loop do not depend on where it stops, so the chances of all numbers are known after one run of it.

Shapes: `B` rows, `T` iterations, `U` actions: of each row the number of its iterations, then its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from innerloop.engine.at_work import evaluating
from innerloop.engine.engine import Engine
from innerloop.engine.options import EngineOptions
from innerloop.engine.rollouts import Rollout, WritingPolicy
from innerloop.errors import refuse
from innerloop.halting.rule import StopRule
from innerloop.model.losses import state_at
from innerloop.model.model import LatentCore
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from innerloop.text.row import Row


class StoppingPolicy(WritingPolicy):
    """Draws how often the latents of a sample are refined by the gate of a learned stop, then writes.

    Args:
        model: what thinks and writes.
        temperature: of the distribution that tokens are drawn from.
        batch_size: rows that are written together.

    Raises:
        InputError: the latents are not refined together before the answer.
    """

    def __init__(self, model: LatentCore, temperature: float = 1.0, batch_size: int = 64):
        super().__init__(model, temperature, batch_size)
        name, plan = model.method.name, model.method.plan
        is_refined = plan.scope == "slots" and model.method.fixed_point.solver == "none"
        refuse((not is_refined, f"'{name}' with these settings refines no latents together: set stop.rule to none"))

    def roll_out(
        self,
        questions: Sequence[str],
        samples: int,
        seed: int,
        max_new_tokens: int,
        places: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Return the samples of each question; their numbers of iterations depend on what tokens depend on."""
        rows = self.model.prompts(questions)
        logits_TB = self._gate_of(rows)
        found = list[Rollout]()
        for i, (row, at) in enumerate(zip(rows, range(len(rows)) if places is None else places, strict=True)):
            for s in range(samples):
                n = _drawn(logits_TB[:, i], np.random.default_rng([seed, at, s, 2]).random())
                own = replace(row, n_loops=n)
                likely = float(chosen(logits_TB[:, i : i + 1], [n]))
                found.append(Rollout(i, own, None, (likely,), n))  # type: ignore[arg-type]
        options = EngineOptions(
            samples=samples,
            temperature=self.temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            replayable=True,
        )
        engine = Engine(self.model, options)
        engine.n_loops_of = {(one.question, k % samples): one.row.n_loops for k, one in enumerate(found)}
        with unstopped(self.model):
            for answered in engine.groups(questions, places=places):
                for index, generation in answered:
                    found[index] = replace(found[index], generation=generation)
        return found

    @torch.no_grad()
    def _gate_of(self, rows: Sequence[Row]) -> Tensor:
        """Return the gate's logits in each iteration of a whole run of the loop (T, B)."""
        model, parts = self.model, list(self.model.modules())
        with evaluating(parts), unstopped(model) as stop:
            return torch.cat(
                [
                    gate_logits(stop, model.think(model.batch(rows[first : first + self.batch_size])))
                    for first in range(0, len(rows), self.batch_size)
                ],
                dim=1,
            )

    def batch(self, rollouts: Sequence[Rollout]) -> Batch:
        """Return rollouts as one batch; each has an action more than it has tokens."""
        batch = super().batch(rollouts)
        batch.n_targets = [n + 1 for n in batch.n_targets]
        return batch

    def replay(self, model: LatentCore, batch: Batch, is_reference: bool = False) -> Tensor:
        """Return the log-probability of each row's number of iterations, and of its tokens (U,), with a gradient."""
        with evaluating(list(model.modules())), unstopped(model) as stop:
            thought = model.think(batch)
            stops_B = chosen(gate_logits(stop, thought), batch.n_loops, model.method.n_loops(model.method.last_stage))
            tokens = self._written(model, batch, thought).split([n - 1 for n in batch.n_targets])
        return torch.cat([part for b, own in enumerate(tokens) for part in (stops_B[b : b + 1], own)])


@contextmanager
def unstopped(model: LatentCore) -> Iterator[StopRule]:
    """Let every row of the loop run as often as it is told in a block, whatever the stop says, which is given."""
    stop, model.loop.stop = model.loop.stop, None
    assert stop is not None
    try:
        yield stop
    finally:
        model.loop.stop = stop


def gate_logits(stop: StopRule, thought: Thought) -> Tensor:
    """Return what a gate says of the states after each iteration (T, B); where a row has run fewer, of its last."""
    loop = thought.loop
    assert loop is not None
    states = [state_at(loop.states, loop.state, iteration) for iteration in range(1, len(loop.states) + 1)]
    return torch.stack([stop.halting_logit(state, thought.state_mask) for state in states])


def chosen(logits_TB: Tensor, n_loops: Sequence[int], most: int | None = None) -> Tensor:
    """Return the log-probability that rows stop after so many iterations (B,); after ``most`` (None: T) all do."""
    t = torch.arange(1, len(logits_TB) + 1, device=logits_TB.device)[:, None]
    n_B = torch.tensor(list(n_loops), device=logits_TB.device)
    logits_TB = logits_TB.float()
    goes_TB, stops_TB = torch.nn.functional.logsigmoid(-logits_TB), torch.nn.functional.logsigmoid(logits_TB)
    stops_TB = stops_TB.masked_fill(t == (most or len(logits_TB)), 0.0)
    return (goes_TB * (t < n_B)).sum(0) + (stops_TB * (t == n_B)).sum(0)


def _drawn(logits_T: Tensor, number: float) -> int:
    """Return the number of iterations at which the chances pass a number in [0, 1)."""
    rate = logits_T.double().sigmoid()
    rate[-1] = 1.0
    before = torch.cat([rate.new_ones(1), (1 - rate).cumprod(0)[:-1]])
    sums = (rate * before).cumsum(0)
    return min(int((sums <= number).sum()) + 1, len(logits_T))

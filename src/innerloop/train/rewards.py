"""What samples are rewarded for: built-in rewards, and functions of one's own with the signature of TRL's.

    def polite(prompts, completions, **columns) -> list[float | None]: ...

``columns`` are lists, one item a sample: answer, steps and id of its example, what its ``meta`` holds, completion_ids,
and n_loops, how often its latents were refined, where that is drawn (else 0). None says nothing of
a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop.checks.imported import imported
from innerloop.engine.rollouts import Rollout
from innerloop.errors import InputError, nearest
from innerloop.tasks import Task
from innerloop.text.examples import Example
from innerloop.text.wording import OURS

Reward = Callable[..., Sequence[float | None]]


class RewardError(InputError):
    """A reward cannot be used."""


class Rewards:
    """Rewards samples by several functions, each with a weight.

    Args:
        given: names of built-in rewards, import paths, or functions.
        weights: what each counts; None: 1.
        task: says which answers are right.
        longest: the most tokens that a sample may have.
        mark: what an answer is written behind.
    """

    def __init__(
        self,
        given: Sequence[str | Reward],
        weights: Sequence[float] | None = None,
        task: Task | None = None,
        longest: int = 1,
        mark: str = OURS.mark,
    ):
        if not given:
            raise InputError("there is nothing to be rewarded for: name a reward in reward_funcs, such as answer")
        if weights is not None and len(weights) != len(given):
            raise InputError(f"reward_weights are {len(weights)}, but reward_funcs {len(given)}: give one for each")
        built_in = _built_in(task, longest, mark)
        self.functions = [
            built_in.get(one) or _imported(one, built_in) if isinstance(one, str) else one for one in given
        ]
        self.names = [one if isinstance(one, str) else getattr(one, "__name__", str(one)) for one in given]
        self.weights = torch.tensor(weights or [1.0] * len(given), dtype=torch.float64)
        if task is None and (needs := {"answer", "fast_answer", "strict_answer"} & set(self.names)):
            raise InputError(f"the reward {min(needs)} needs a task that checks answers: pass task=...")

    def __call__(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> Tensor:
        """Return the rewards of samples (N, F) before they are weighted; NaN where a function says nothing.

        Args:
            examples: those that were asked.
            rollouts: the samples, which know the places of their examples.

        Raises:
            RewardError: a function fails, or returns something else than a number for each sample.
        """
        asked = [examples[one.question] for one in rollouts]
        known = set.intersection(*(set(example.meta) for example in asked))
        columns: dict[str, list[Any]] = {name: [example.meta[name] for example in asked] for name in sorted(known)}
        for name in ("answer", "steps", "id"):
            columns[name] = [getattr(example, name) for example in asked]
        columns |= {
            "prompts": [example.question for example in asked],
            "completions": [one.generation.text for one in rollouts],
            "completion_ids": [list(one.ids) for one in rollouts],
            "n_loops": [one.n_loops or 0 for one in rollouts],
        }
        columns |= {name: [one.columns[name] for one in rollouts] for name in rollouts[0].columns}
        return torch.stack([self._by(i, columns, len(rollouts)) for i in range(len(self.functions))], dim=1)

    def total(self, rewards_NF: Tensor) -> Tensor:
        """Return the weighted rewards (N,); NaN where no function says anything."""
        total_N = (rewards_NF * self.weights).nansum(1)
        return total_N.masked_fill(rewards_NF.isnan().all(1), math.nan)

    def _by(self, i: int, columns: dict[str, list[Any]], n: int) -> Tensor:
        """Return what one function gives each sample (N,)."""
        name = f"the reward '{self.names[i]}'"
        try:
            found = list(self.functions[i](**columns))
            given = [math.nan if value is None else float(value) for value in found]
        except Exception as error:
            raise RewardError(
                f"{name} failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            ) from error
        if len(given) != n:
            raise RewardError(f"{name} gave {len(given)} values for {n} samples: it must give one for each")
        for value, number in zip(found, given):
            if value is not None and not math.isfinite(number):
                raise RewardError(f"{name} gave {number}: it must give finite numbers, or None where it says nothing")
        return torch.tensor(given, dtype=torch.float64)


def _imported(name: str, built_in: dict[str, Reward]) -> Reward:
    if "." not in name:
        raise InputError(f"there is no reward '{name}'{nearest(name, built_in)}; there are {', '.join(built_in)}")
    found: Reward = imported(f"reward '{name}'", name)
    if not callable(found):
        raise InputError(f"reward '{name}' is no function")
    return found


def _built_in(task: Task | None, longest: int, mark: str) -> dict[str, Reward]:
    """Return the rewards that have a name."""

    def is_right(text: str, gold: str) -> bool:
        assert task is not None
        predicted = task.extract(text)
        return predicted is not None and task.compare(predicted, gold) is True

    def answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [float(is_right(text, gold)) for text, gold in zip(completions, answer)]

    def one_mark(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(text.count(mark) == 1) for text in completions]

    def strict_answer(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [float(text.count(mark) == 1 and is_right(text, gold)) for text, gold in zip(completions, answer)]

    def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-len(ids) / longest for ids in completion_ids]

    def loops(n_loops: Sequence[int], **_: Any) -> list[float]:
        return [-float(n) for n in n_loops]

    def fast_answer(
        completions: Sequence[str], answer: Sequence[str], speed: Sequence[float] | None = None, **_: Any
    ) -> list[float]:
        if speed is None:
            raise InputError("fast_answer counts passes over a canvas, as unmasking_policy does: choose answer")
        return [fast * is_right(text, gold) for text, gold, fast in zip(completions, answer, speed)]

    return {
        "fast_answer": fast_answer,
        "answer": answer,
        "format": one_mark,
        "strict_answer": strict_answer,
        "length": length,
        "loops": loops,
    }

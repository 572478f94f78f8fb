"""Curricula: at stage s the first s reasoning steps have left the text (coconut.md, sections 2 and 5)."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from innerloop.errors import InputError, check_choices


@dataclass(frozen=True)
class Schedule:
    """When a method's stages 0, 1, ..., last_stage are trained; a schedule of stage 0 alone is none.

    Args:
        first_stage: the stage that training begins in.
        stage_length: how long each stage lasts; the last one lasts until training ends.
        stage_unit: what stage_length counts.
        stage_mix: draw each example's stage from 0..s uniformly, or with probability proportional to i + 1 (linear).
        uniform_prob: probability that an example uses a stage drawn uniformly from 0..(its number of steps).
        reset_optimizer: when the optimizer's state is cleared.
    """

    first_stage: int = 0
    stage_length: int = 3
    stage_unit: Literal["epoch", "step"] = "epoch"
    stage_mix: Literal["none", "uniform", "linear"] = "none"
    uniform_prob: float = 0.0
    reset_optimizer: Literal["stage", "epoch", "never"] = "stage"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.stage_length < 1:
            raise InputError("stage_length must be at least 1")
        if not 0 <= self.first_stage <= self.last_stage:
            raise InputError(f"first_stage is {self.first_stage}, but the stages run from 0 to {self.last_stage}")
        if not 0.0 <= self.uniform_prob <= 1.0:
            raise InputError(f"uniform_prob is {self.uniform_prob}; a probability lies between 0 and 1")
        if self.last_stage == 0 and (self.stage_mix != "none" or self.uniform_prob > 0):
            raise InputError("stage_mix and uniform_prob draw from several stages: give the method some (max_stage)")

    @property
    def last_stage(self) -> int:
        """The stage that training ends in and questions are answered in."""
        return 0

    def stage_at(self, step: int, steps_per_epoch: int) -> int:
        """Return the scheduled stage at an optimizer step (counted from 0)."""
        done = (step if self.stage_unit == "step" else step // steps_per_epoch) // self.stage_length
        return min(self.first_stage + done, self.last_stage)

    def stage_of(self, stage: int, n_steps: int, seed: str) -> int:
        """Draw the stage one example uses when ``stage`` is scheduled; the same ``seed`` draws the same stage."""
        if self.stage_mix == "none" and self.uniform_prob == 0.0:
            return stage
        mix, uniform, choice = uniforms(seed)
        if uniform < self.uniform_prob:
            return min(int(choice * (n_steps + 1)), self.last_stage)
        if self.stage_mix == "none":
            return stage
        weights = [1 if self.stage_mix == "uniform" else i + 1 for i in range(stage + 1)]
        target = mix * sum(weights)
        for drawn, weight in enumerate(weights):
            target -= weight
            if target < 0:
                return drawn
        return stage


@dataclass(frozen=True)
class Curriculum(Schedule):
    """Stages 0, 1, ..., max_stage, and the last, in which no step is written.

    Args:
        max_stage: the last stage that still removes steps one by one; 0 trains the last stage only.
    """

    max_stage: int = 0

    def __post_init__(self) -> None:
        if self.max_stage < 0:
            raise InputError("max_stage must be at least 0")
        super().__post_init__()

    @property
    def last_stage(self) -> int:
        """The stage in which all steps have left the text."""
        return self.max_stage + 1 if self.max_stage > 0 else 0


def uniforms(seed: str) -> tuple[float, float, float]:
    """Return three numbers in [0, 1) that depend on nothing but ``seed``."""
    digest = hashlib.blake2b(seed.encode(), digest_size=24).digest()
    a, b, c = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8, 16))
    return a, b, c

"""Curricula: at stage s the first s reasoning steps have left the text (coconut.md, sections 2 and 5)."""

import hashlib
from typing import Annotated, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Bounds, Count, Share
from innerloop.errors import refuse

StageUnit = Literal["epoch", "step"]
StageMix = Literal["none", "uniform", "linear"]
ResetOptimizer = Literal["stage", "epoch", "never"]
Stage = Annotated[int, Bounds(0, 1000)]
"""A stage of a curriculum: so many steps have left the text."""


class Schedule(Checked):
    """When a method's stages 0, 1, ..., the last are trained; a schedule of stage 0 alone is none.

    A method's own schedule is a frozen dataclass whose fields are those of these that the method has.

    Args:
        first_stage: the stage that training begins in.
        length: how long each stage lasts; the last one lasts until training ends.
        unit: what length counts.
        max_stage: the last stage that still removes steps one by one; 0 trains the last stage only.
        mix: draw each example's stage from 0..s uniformly, or with probability proportional to i + 1 (linear).
        uniform_prob: probability that an example uses a stage drawn uniformly from 0..(its number of steps).
        reset_optimizer: when the optimizer's state is cleared.
    """

    first_stage: Stage = 0
    length: Count = 3
    unit: StageUnit = "epoch"
    max_stage: Stage = 0
    mix: StageMix = "none"
    uniform_prob: Share = 0.0
    reset_optimizer: ResetOptimizer = "stage"

    @property
    def last_stage(self) -> int:
        """The stage in which all steps have left the text."""
        return self.max_stage + 1 if self.max_stage > 0 else 0

    @property
    def draws(self) -> bool:
        """Whether examples draw their own stages."""
        return self.mix != "none" or self.uniform_prob > 0

    def check(self, last_stage: int) -> None:
        """Refuse stages that do not end in ``last_stage``."""
        refuse(
            (
                not 0 <= self.first_stage <= last_stage,
                f"curriculum.first_stage is {self.first_stage}, but the stages run from 0 to {last_stage}",
            ),
            (
                last_stage == 0 and self.draws,
                "curriculum.mix and uniform_prob draw from several stages: give the method some (max_stage)",
            ),
        )

    def stage_at(self, step: int, steps_per_epoch: int, last_stage: int) -> int:
        """Return the scheduled stage at an optimizer step (counted from 0)."""
        done = (step if self.unit == "step" else step // steps_per_epoch) // self.length
        return min(self.first_stage + done, last_stage)

    def stage_of(self, stage: int, n_steps: int, seed: str, last_stage: int) -> int:
        """Draw the stage one example uses when ``stage`` is scheduled; the same ``seed`` draws the same stage."""
        if not self.draws:
            return stage
        mix, uniform, choice = uniforms(seed)
        if uniform < self.uniform_prob:
            return min(int(choice * (n_steps + 1)), last_stage)
        if self.mix == "none":
            return stage
        weights = [1 if self.mix == "uniform" else i + 1 for i in range(stage + 1)]
        target = mix * sum(weights)
        for drawn, weight in enumerate(weights):
            target -= weight
            if target < 0:
                return drawn
        return stage


def shared_seed(seed: str) -> str:
    """Return what all processes have in common of a batch's seed, ``SEED/STEP/PROCESS/BATCH``."""
    parts = seed.split("/")
    return "/".join(parts[:2] + parts[3:]) if len(parts) == 4 else seed


def uniforms(seed: str) -> tuple[float, float, float]:
    """Return three numbers in [0, 1) that depend on nothing but ``seed``."""
    digest = hashlib.blake2b(seed.encode(), digest_size=24).digest()
    a, b, c = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8, 16))
    return a, b, c

"""Stepwise internalisation of the chain of thought (arXiv 2405.14838): its tokens leave the text from the front.

No latents, no passes, no parameters: a schedule. s tokens are gone at optimizer step t, s(t) = floor(t / n) with
n = round(Y / Delta) and Y steps per epoch; once s >= s_max all are (icot.md, section 5).

The authors' code skips a batch for as long as what is left of it is longer than max_len_train. Here `train.max_length`
leaves out single examples, by their length before anything is removed and for the whole training, and counts them: so
what is trained on does not change with the schedule.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import Places, Positive, SomePlaces, Weight
from innerloop.config.curriculum import ResetOptimizer, Schedule, uniforms
from innerloop.config.method import Method
from innerloop.errors import refuse
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import Kind, Row, Span


@dataclass(frozen=True)
class RemovalSchedule(Schedule):
    """When removal begins, and when the optimizer's state is cleared."""

    first_stage: SomePlaces = 0
    reset_optimizer: ResetOptimizer = "stage"


@dataclass(frozen=True)
class Icot(Method):
    """``[Q][eos][t_s+1]..[t_n][eos][### A][eos]``; stage s is the number of tokens removed.

    Args:
        removed_per_epoch: Delta.
        max_removed: s_max; from there on the whole chain of thought is gone.
        unit: what is removed: tokens, or whole steps.
        side: the end that they are removed from.
        keep_position: in training what is left keeps its position ids, the first separator and all after it jump over
            what was removed; when answering, where no one knows how much that would be, they do not.
        smoothing: lambda; each example loses o more, P(o) = (1 - e^-lambda) e^(-lambda o). None: no smoothing.
        removal_free_epochs: epochs before the first removal.
        force_empty: when answering, the second separator is given instead of awaited.
        first_stage: the number of tokens that are gone when training begins.
        reset_optimizer: when the optimizer's state is cleared: as more tokens leave (stage), each epoch, or never.
    """

    name: ClassVar[str] = "icot"
    family: ClassVar[str] = "text"
    paper: ClassVar[str] = "arXiv 2405.14838"
    summary: ClassVar[str] = "tokens of the chain of thought leave the text, until the answer stands alone"
    needs: ClassVar[str] = "question, steps, answer"

    removed_per_epoch: Positive = 8
    max_removed: Places = 39
    unit: Literal["token", "step"] = "token"
    side: Literal["left", "right"] = "left"
    keep_position: bool = False
    smoothing: Positive | None = 4.0
    removal_free_epochs: Weight = 0.0
    force_empty: bool = False
    first_stage: SomePlaces = 0
    reset_optimizer: ResetOptimizer = "stage"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.keep_position and self.side == "right",
                "keep_position is for tokens that leave from the front: set side to left",
            ),
            (
                self.first_stage > self.max_removed,
                f"first_stage is {self.first_stage}, but the stages run from 0 to {self.max_removed}",
            ),
        )

    @property
    def curriculum(self) -> Schedule:  # type: ignore[override]
        """Its stages are numbers of removed tokens."""
        return RemovalSchedule(self.first_stage, self.reset_optimizer)

    @property
    def n_ends(self) -> int:
        """One ends the chain of thought, one the answer."""
        return 1 if self.force_empty else 2

    def longest(self, example: Example, encoder: PromptEncoder) -> int:
        """Return the length before anything is removed."""
        return len(self.lay_out(example, encoder, self.first_stage))

    @property
    def last_stage(self) -> int:
        """The stage without a chain of thought."""
        return self.max_removed

    def stage_or_last(self, stage: int | None) -> int:
        """Return a stage that is asked for; -1 is the one before the first removal."""
        return -1 if stage == -1 else super().stage_or_last(stage)

    def stage_at(self, step: int, steps_per_epoch: int) -> int:
        """Return s(t), s_max at most; before the first removal -1, where nothing is drawn either."""
        begun = step - round(self.removal_free_epochs * steps_per_epoch)
        if begun < 0:
            return -1
        each = round(steps_per_epoch / self.removed_per_epoch)
        return min(self.first_stage + (begun // each if each else begun), self.max_removed)

    def stage_of(self, stage: int, n_steps: int, seed: str) -> int:
        """Draw s + o for one example."""
        if self.smoothing is None or not 0 <= stage < self.max_removed:
            return stage
        drawn = stage + removal_offset(uniforms(seed)[0], self.smoothing)
        return drawn if drawn < self.max_removed else drawn + 1  # s_max itself stands for all tokens

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out with the first (or last) ``stage`` units of the chain of thought gone, at stage s_max with all.

        A stage past s_max is what smoothing has drawn: stage - 1 units.
        """
        stage = self.first_stage if stage < 0 else stage
        is_all = stage == self.max_removed
        end = Span((encoder.eos_id,), Kind.MARKER)
        steps = encoder.steps(example)
        stage -= stage > self.max_removed
        if is_all:
            steps = []
        elif self.unit == "step":
            steps = steps[stage:] if self.side == "left" else steps[: max(len(steps) - stage, 0)]
        else:
            steps = _without(steps, stage, self.side)
        stop = Span((encoder.eos_id,), Kind.STEP, supervised=True)
        row = Row([encoder.question(example.question)], [], [end, *steps, stop, encoder.answer(example.answer)])
        if self.keep_position:
            row.skipped = sum(len(step.ids) for step in encoder.steps(example)) - sum(len(step.ids) for step in steps)
        return row

    def prompt(self, question: str, encoder: PromptEncoder, stage: int) -> Row:
        """Return ``[Q][eos]``, and the second separator if it is given."""
        end = Span((encoder.eos_id,), Kind.MARKER)
        return Row([encoder.question(question), end, *([end] if self.force_empty else [])])


def removal_offset(uniform: float, smoothing: float) -> int:
    """Return the o that a number in [0, 1) draws: P(o >= k) = e^(-lambda k)."""
    return int(-math.log(1 - uniform) / smoothing)


def _without(steps: list[Span], n: int, side: str) -> list[Span]:
    """Remove the first (left) or last (right) ``n`` tokens of some spans."""
    kept = []
    for step in steps if side == "left" else reversed(steps):
        gone = min(n, len(step.ids))
        n -= gone
        ids = step.ids[gone:] if side == "left" else step.ids[: len(step.ids) - gone]
        if ids:
            kept.append(Span(ids, Kind.STEP, supervised=True, step=step.step))
    return kept if side == "left" else kept[::-1]

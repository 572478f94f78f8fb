"""Coconut, chain of continuous thought (arXiv 2412.06769): the last hidden state is the next input.

The loop of scope `append`; stage by stage, s steps of text give way to s * c latents (`feedback`).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from innerloop.checks.values import SomePlaces
from innerloop.config.curriculum import ResetOptimizer, Schedule, StageMix, StageUnit
from innerloop.config.plan import Plan
from innerloop.errors import refuse
from innerloop.methods.latent.feedback import FeedbackLoop, FeedbackMethod
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import LAT, Row


@dataclass(frozen=True)
class CoconutSchedule(Schedule):
    """Stage s has s * c latents in place of the first s steps."""

    first_stage: int = 0
    length: int = 3
    unit: StageUnit = "epoch"
    max_stage: int = 3
    mix: StageMix = "none"
    uniform_prob: float = 0.0
    reset_optimizer: ResetOptimizer = "stage"


@dataclass(frozen=True)
class Coconut(FeedbackMethod):
    """``[Q][<bot>] | [<lat> x k] | [<eot>][T_s+1]..[T_m][### A][eos]``, k = s * c.

    Args:
        latents_per_step: c; 0 is the paper's "no thought" ablation.
        thought: what a latent holds: the state before it (feedback), or the <lat> embedding ("pause as thought").
        pad_latent_to_max: in the last stage every example has s_max * c latents; false: min(m, s_max) * c.
            False tells the model the number of gold steps, so answering always uses the maximum.
    """

    name: ClassVar[str] = "coconut"
    paper: ClassVar[str] = "arXiv 2412.06769"
    summary: ClassVar[str] = "each latent is the hidden state before it; steps leave the text stage by stage"
    needs: ClassVar[str] = "question, steps, answer"

    latents_per_step: SomePlaces = 2
    thought: Literal["feedback", "pause"] = "feedback"
    pad_latent_to_max: bool = True
    loop: FeedbackLoop = FeedbackLoop()
    curriculum: CoconutSchedule = CoconutSchedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.thought == "pause" and self.loop != FeedbackLoop(),
                "thought=pause has no loop: leave the loop's settings out",
            ),
        )

    @property
    def markers(self) -> tuple[str, ...]:
        """<bot>, <lat> and <eot>; "no thought" has none."""
        return super().markers if self.latents_per_step else ()

    @property
    def plan(self) -> Plan:
        """Pauses are read side by side."""
        return super().plan if self.thought == "feedback" else replace(super().plan, scope="slots", first_state="embed")

    def n_loops(self, stage: int) -> int:
        """Return k - 1, and none for pauses."""
        return super().n_loops(stage) if self.thought == "feedback" else 0

    def prompt(self, question: str, encoder: PromptEncoder, stage: int) -> Row:
        """Return ``[Q][<bot>] | [<lat> x k] | [<eot>]``, or ``[Q]`` for "no thought"."""
        return super().prompt(question, encoder, stage) if self.latents_per_step else Row([encoder.question(question)])

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out as every latent method does, with fewer latents for short examples if so configured."""
        row = super().lay_out(example, encoder, stage)
        if stage == self.last_stage and not self.pad_latent_to_max:
            k = min(len(example.steps), self.max_stage) * self.latents_per_step
            row.region = [encoder.marker(LAT, k)] if k else []
            row.n_loops = max(k - 1, 0) if self.thought == "feedback" else 0
        return row

"""Coconut, chain of continuous thought (arXiv 2412.06769): the last hidden state is the next input.

The loop of scope `append`: z_1 is the state at <bot>, every pass reads one latent and its state is the next; the last
latent is read together with <eot> (coconut.md, section 3). Stage by stage, s steps of text give way to s * c latents.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from innerloop.config.curriculum import Curriculum
from innerloop.config.loop import LoopSettings
from innerloop.config.method import AnswerContext, FirstState, LatentMethod, Scope
from innerloop.errors import InputError
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import LAT, Row


@dataclass(frozen=True)
class Coconut(LoopSettings, Curriculum, LatentMethod):
    """``[Q][<bot>] | [<lat> x k] | [<eot>][T_s+1]..[T_m][### A][eos]``, k = s * c.

    Args:
        latents_per_step: c; 0 is the paper's "no thought" ablation.
        thought: what a latent holds: the state before it (feedback), or the <lat> embedding ("pause as thought").
        pad_latent_to_max: in the last stage every example has max_stage * c latents; false: min(m, max_stage) * c.
            False tells the model the number of gold steps, so answering always uses the maximum.
    """

    name: ClassVar[str] = "coconut"
    paper: ClassVar[str] = "arXiv 2412.06769"
    summary: ClassVar[str] = "each latent is the hidden state before it; steps leave the text stage by stage"
    needs: ClassVar[str] = "question, steps, answer"

    max_stage: int = 3
    latents_per_step: int = 2
    thought: Literal["feedback", "pause"] = "feedback"
    pad_latent_to_max: bool = True

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        Curriculum.__post_init__(self)
        if self.latents_per_step < 0:
            raise InputError("latents_per_step cannot be negative; 0 is the 'no thought' ablation")
        if (
            self.thought == "pause"
            and LoopSettings(**{f.name: getattr(self, f.name) for f in fields(LoopSettings)}) != LoopSettings()
        ):
            raise InputError("thought=pause has no loop: leave residual, rescale, time and the other loop settings out")
        if self.max_stage < 1:
            raise InputError(
                "coconut needs max_stage >= 1; to train its last stage only, set first_stage to max_stage + 1"
            )

    @property
    def markers(self) -> tuple[str, ...]:
        """<bot>, <lat> and <eot>; "no thought" has none."""
        return super().markers if self.latents_per_step else ()

    @property
    def scope(self) -> Scope:
        """One latent after the other; pauses are read side by side."""
        return "append" if self.thought == "feedback" else "slots"

    @property
    def first_state(self) -> FirstState:
        """z_1 is the state at <bot>."""
        return "forward" if self.thought == "feedback" else "embed"

    @property
    def answer_context(self) -> AnswerContext:
        """The last latent is read in the pass of <eot>."""
        return "refeed"

    def n_latents(self, stage: int) -> int:
        """Return k = s * c."""
        return min(stage, self.max_stage) * self.latents_per_step

    def n_loops(self, stage: int) -> int:
        """Return k - 1: the first latent comes from <bot>, and the last one's own output is not fed back."""
        return max(self.n_latents(stage) - 1, 0) if self.thought == "feedback" else 0

    def prompt(self, question: str, spell: Speller, stage: int) -> Row:
        """Return ``[Q][<bot>] | [<lat> x k] | [<eot>]``, or ``[Q]`` for "no thought"."""
        return super().prompt(question, spell, stage) if self.latents_per_step else Row([spell.question(question)])

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out as every latent method does, with fewer latents for short examples if so configured."""
        row = super().lay_out(example, spell, stage)
        if stage == self.last_stage and not self.pad_latent_to_max:
            k = min(len(example.steps), self.max_stage) * self.latents_per_step
            row.region = [spell.marker(LAT, k)] if k else []
            row.n_loops = max(k - 1, 0) if self.thought == "feedback" else 0
        return row

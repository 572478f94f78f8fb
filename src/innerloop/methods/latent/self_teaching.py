"""CODI's teacher: the same model writes the chain of thought, and its states there teach those before the answer.

At the token before the answer's digits the student's states, layer by layer, are pulled to those that the same model
has there after reading the chain of thought (codi.md). That token is found from the tokens of the answer itself,
whatever it begins with.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from innerloop.config.loop import LoopSettings, RescaleKind
from innerloop.config.losses import HiddenLayers, HiddenSettings
from innerloop.config.method import LatentMethod, Method
from innerloop.config.plan import Plan
from innerloop.errors import refuse
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, HiddenTarget, Row


@dataclass(frozen=True)
class ProjectedLoop(LoopSettings):
    """A state passes through CODI's projection before it is fed; rescale=none is Coconut's raw feedback."""

    rescale: RescaleKind = "project"
    width: int = 0
    norm: bool = True


@dataclass(frozen=True)
class OwnStates(HiddenSettings):
    """L_KD, of every layer and the embeddings; the teacher is the model itself, or a run."""

    weight: float = 1.0
    teacher: str | None = "self"

    layers: ClassVar[HiddenLayers] = "all+emb"  # type: ignore[misc]


class SelfTeaching(LatentMethod):
    """Student ``[Q][<bot>] | [<lat> x k] | [<eot>][### A][eos]``, teacher ``[Q][T_1]..[T_m-1][### A][eos]``.

    L = answer_weight L_S + hid.weight L_KD + teacher_weight L_T.
    """

    include_last_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.hid.weight > 0 and self.teacher is None,
                "hid.weight needs states to follow: set hid.teacher to a chain-of-thought run's folder, or to self",
            ),
            (
                self.teacher != "self" and (self.teacher_weight > 0 or self.teacher_passes == 2),
                "teacher_weight and teacher_passes are for a model that teaches itself: set hid.teacher to self",
            ),
        )

    @property
    def needs_steps(self) -> bool:
        """The teacher reads them."""
        return self.hid.weight > 0 or self.teacher_weight > 0

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out the student, and beside it the teacher with the position that teaches."""
        row = super().lay_out(example, encoder, stage)
        if self.needs_steps:
            steps = encoder.steps(example)
            read = steps if self.include_last_step else steps[:-1]
            row.teacher = Row([encoder.question(example.question)], [], [*read, encoder.answer(example.answer)])
            n_before = encoder.n_before_answer(example.answer)
            here, there = row.answer_boundary(n_before), row.teacher.answer_boundary(n_before)
            if n_before:
                assert row.ids()[here] == row.teacher.ids()[there]
            if self.hid.weight > 0:
                row.hidden_targets = [HiddenTarget(ANSWER_PASS, here, there)]
        return row


class SequentialLatents(SelfTeaching):
    """k latents one after the other, each the projected state before it."""

    n_latents_total: int

    @property
    def plan(self) -> Plan:
        """z_1 is the projected state at <bot>."""
        return replace(super().plan, scope="append", first_state="forward")

    def n_latents(self, stage: int) -> int:
        """Return k."""
        return self.n_latents_total

    def n_loops(self, stage: int) -> int:
        """Return k - 1: z_1 comes from <bot>, and z_(k+1) is fed to nothing."""
        return max(self.n_latents_total - 1, 0)

    def with_loops(self, loops: int) -> Method:
        """Return the method for answering with k = ``loops`` + 1 latents."""
        return replace(self, n_latents_total=loops + 1)  # type: ignore[call-arg]

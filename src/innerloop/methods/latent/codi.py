"""CODI (arXiv 2502.21074): one model writes the chain of thought and answers from latents, and teaches itself.

The student thinks as Coconut does, each state passed through a projection. At the token before the answer's digits its
states, layer by layer, are pulled to those the same model has there after reading the chain of thought (codi.md).

The authors' code leaves out examples whose answer does not begin with a digit, such as negative numbers, and cuts texts
at 256 tokens; it finds the token before the answer by its text. Here that token is found from the tokens of the answer
itself, whatever it begins with, so nothing is left out on its account and nothing is cut; `train.max_length` leaves out
long examples and counts them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from innerloop.config.loop import LoopSettings, RescaleKind
from innerloop.config.losses import LossSettings
from innerloop.config.method import FirstState, LatentMethod, Scope
from innerloop.errors import refuse
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, Follow, Row


@dataclass(frozen=True)
class Codi(LoopSettings, LossSettings, LatentMethod):
    """Student ``[Q][<bot>] | [<lat> x k] | [<eot>][### A][eos]``, teacher ``[Q][T_1]..[T_m-1][### A][eos]``.

    L = answer_weight L_S + hid_weight L_KD + teacher_weight L_T.

    Args:
        n_latents_total: k, for every example.
        include_last_step: let the teacher read the last step, of which its answer is then a copy.
        rescale: project is the paper's projection; none is Coconut's raw feedback.
    """

    name: ClassVar[str] = "codi"
    paper: ClassVar[str] = "arXiv 2502.21074"
    summary: ClassVar[str] = "latents fed back through a projection; the model's own chain of thought teaches them"
    needs: ClassVar[str] = "question, steps, answer"

    n_latents_total: int = 6
    include_last_step: bool = False
    rescale: RescaleKind = "project"
    hid_weight: float = 1.0
    hid_layers: Literal["last", "all", "all+emb"] = "all+emb"
    teacher: str | None = "self"
    teacher_weight: float = 1.0

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        LossSettings.__post_init__(self)
        refuse(
            (self.n_latents_total < 0, "n_latents_total cannot be negative"),
            (
                self.step_weight > 0 or self.deep_weight > 0 or self.halt_weight > 0,
                "codi learns from answers and its teacher: set step_weight, deep_weight and halt_weight to 0",
            ),
            (
                self.solver != "none",
                "codi adds a latent in each iteration, which has no fixed point: set solver to none",
            ),
        )

    @property
    def needs_steps(self) -> bool:
        """The teacher reads them."""
        return self.hid_weight > 0 or self.teacher_weight > 0

    @property
    def scope(self) -> Scope:
        """One latent after the other."""
        return "append"

    @property
    def first_state(self) -> FirstState:
        """z_1 is the projected state at <bot>."""
        return "forward"

    def n_latents(self, stage: int) -> int:
        """Return k."""
        return self.n_latents_total

    def n_loops(self, stage: int) -> int:
        """Return k - 1: z_1 comes from <bot>, and z_(k+1) is fed to nothing."""
        return max(self.n_latents_total - 1, 0)

    def with_loops(self, loops: int) -> "Codi":
        """Return the method for answering with k = ``loops`` + 1 latents."""
        return replace(self, n_latents_total=loops + 1)

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out the student, and beside it the teacher with the position that teaches."""
        row = super().lay_out(example, spell, stage)
        if self.needs_steps:
            steps = spell.steps(example)
            read = steps if self.include_last_step else steps[:-1]
            row.teacher = Row([spell.question(example.question)], [], [*read, spell.answer(example.answer)])
            n_before = spell.n_before_answer(example.answer)
            here, there = row.answer_boundary(n_before), row.teacher.answer_boundary(n_before)
            if n_before:
                assert row.ids()[here] == row.teacher.ids()[there]
            if self.hid_weight > 0:
                row.follows = [Follow(ANSWER_PASS, here, there)]
        return row

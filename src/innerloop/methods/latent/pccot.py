"""PCCoT (arXiv 2506.18582): CODI's latents refined side by side instead of one after the other.

All k latents are read at once; in the next iteration each receives what the position before it made, the first what
<bot> made. This is Jacobi iteration on the sequential recurrence: after k iterations it is CODI, and the paper's 24
latents need 3 (codi.md, section 9; lotus.md, section 9).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.config.loop import LoopSettings, RescaleKind
from innerloop.config.losses import LossSettings
from innerloop.config.method import LatentMethod
from innerloop.errors import refuse
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, Follow, Row


@dataclass(frozen=True)
class Pccot(LoopSettings, LossSettings, LatentMethod):
    """Student ``[Q][<bot>] | [<lat> x k] | [<eot>][### A][eos]``, teacher ``[Q][T_1]..[T_m-1][### A][eos]``.

    Args:
        n_slots: k.
        max_loops: iterations; k of them make the result that of CODI.
        include_last_step: let the teacher read the last step.
    """

    name: ClassVar[str] = "pccot"
    paper: ClassVar[str] = "arXiv 2506.18582"
    summary: ClassVar[str] = "CODI's latents refined in parallel by Jacobi iterations"
    needs: ClassVar[str] = "question, steps, answer"

    n_slots: int = 24
    max_loops: int = 3
    include_last_step: bool = False
    rescale: RescaleKind = "project"
    shift: bool = True
    hid_weight: float = 1.0
    hid_layers: Literal["last", "all", "all+emb"] = "all+emb"
    teacher: str | None = "self"
    teacher_weight: float = 1.0

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        LossSettings.__post_init__(self)
        refuse(
            (self.n_slots < 1 or self.max_loops < 0, "pccot needs n_slots >= 1 and max_loops >= 0"),
            (
                self.step_weight > 0 or self.deep_weight > 0 or self.halt_weight > 0,
                "pccot learns from answers and its teacher: set step_weight, deep_weight and halt_weight to 0",
            ),
        )

    @property
    def needs_steps(self) -> bool:
        """The teacher reads them."""
        return self.hid_weight > 0 or self.teacher_weight > 0

    def n_latents(self, stage: int) -> int:
        """Return k."""
        return self.n_slots

    def n_loops(self, stage: int) -> int:
        """Return the number of iterations."""
        return self.max_loops

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

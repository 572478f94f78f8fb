"""CODI (arXiv 2502.21074): one model writes the chain of thought and answers from latents, and teaches itself.

The student thinks as Coconut does, each state passed through a projection (`self_teaching`).

The authors' code leaves out examples whose answer does not begin with a digit, such as negative numbers, and cuts texts
at 256 tokens; it finds the token before the answer by its text. Here nothing is left out on its account and nothing is
cut; `train.max_length` leaves out long examples and counts them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import SomePlaces, Weight
from innerloop.config.losses import Distance, HiddenLayers, HiddenSettings
from innerloop.methods.latent.self_teaching import ProjectedLoop, SequentialLatents


@dataclass(frozen=True)
class CodiStates(HiddenSettings):
    """L_KD; the teacher is the model itself, or a run."""

    weight: float = 1.0
    layers: HiddenLayers = "all+emb"
    distance: Distance = "smooth_l1"
    teacher: str | None = "self"


@dataclass(frozen=True)
class Codi(SequentialLatents):
    """Student ``[Q][<bot>] | [<lat> x k] | [<eot>][### A][eos]``, teacher ``[Q][T_1]..[T_m-1][### A][eos]``.

    L = answer_weight L_S + hid.weight L_KD + teacher_weight L_T.

    Args:
        n_latents_total: k, for every example.
        include_last_step: let the teacher read the last step, of which its answer is then a copy.
        answer_weight: of the student's answer.
        teacher_weight: the model also learns to write the chain of thought, with this weight.
        teacher_passes: read the targets in the pass that is learned from, or in a second one (they differ by dropout).
    """

    name: ClassVar[str] = "codi"
    paper: ClassVar[str] = "arXiv 2502.21074"
    summary: ClassVar[str] = "latents fed back through a projection; the model's own chain of thought teaches them"
    needs: ClassVar[str] = "question, steps, answer"

    n_latents_total: SomePlaces = 6
    include_last_step: bool = False
    answer_weight: Weight = 1.0
    teacher_weight: Weight = 1.0
    teacher_passes: Literal[1, 2] = 1
    loop: ProjectedLoop = ProjectedLoop()
    hid: CodiStates = CodiStates()

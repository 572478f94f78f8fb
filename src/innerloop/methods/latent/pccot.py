"""PCCoT (arXiv 2506.18582): CODI's latents refined side by side instead of one after the other.

All k latents are read at once; in the next iteration each receives what the position before it made, the first what
<bot> made. This is Jacobi iteration on the sequential recurrence: after k iterations it is CODI, and the paper's 24
latents need 3 (codi.md, section 9; lotus.md, section 9).
"""

from dataclasses import dataclass
from typing import ClassVar

from innerloop.checks.values import Loops, Places, Weight
from innerloop.methods.latent.self_teaching import OwnStates, ProjectedLoop, SelfTeaching


@dataclass(frozen=True)
class JacobiLoop(ProjectedLoop):
    """CODI's projection, of what the position before made."""

    shift: ClassVar[bool] = True  # type: ignore[misc]


@dataclass(frozen=True)
class Pccot(SelfTeaching):
    """Student ``[Q][<bot>] | [<lat> x k] | [<eot>][### A][eos]``, teacher ``[Q][T_1]..[T_m-1][### A][eos]``.

    Args:
        n_slots: k.
        max_loops: iterations; k of them make the result that of CODI.
        teacher_weight: the model also learns to write the chain of thought, with this weight.
    """

    name: ClassVar[str] = "pccot"
    paper: ClassVar[str] = "arXiv 2506.18582"
    summary: ClassVar[str] = "CODI's latents refined in parallel by Jacobi iterations"
    needs: ClassVar[str] = "question, steps, answer"

    n_slots: Places = 24
    max_loops: Loops = 3
    teacher_weight: Weight = 1.0
    loop: JacobiLoop = JacobiLoop()
    hid: OwnStates = OwnStates()

    def n_latents(self, stage: int) -> int:
        """Return k."""
        return self.n_slots

    def n_loops(self, stage: int) -> int:
        """Return the number of iterations."""
        return self.max_loops

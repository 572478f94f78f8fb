"""Coconut's rows: each latent is the state before it, and stage by stage steps of text give way to latents.

z_1 is the state at <bot>, every pass reads one latent and its state is the next; the last latent is read together with
<eot> (coconut.md, sections 2 and 3).
"""

from dataclasses import dataclass, replace

from innerloop.config.curriculum import Schedule
from innerloop.config.loop import LoopSettings, RescaleKind, ResidualKind, Site
from innerloop.config.method import LatentMethod
from innerloop.config.plan import Plan
from innerloop.errors import refuse


@dataclass(frozen=True)
class FeedbackLoop(LoopSettings):
    """How a state becomes the next latent; Coconut's is fed as it is."""

    residual: ResidualKind = "none"
    alpha: float = 0.7
    rescale: RescaleKind = "none"
    site: Site = "post_norm"
    detach: bool = False


class FeedbackMethod(LatentMethod):
    """``[Q][<bot>] | [<lat> x k] | [<eot>][T_s+1]..[T_m][### A][eos]``, k = s * c."""

    latents_per_step: int
    loop: LoopSettings = FeedbackLoop()
    curriculum: Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        self.curriculum.check(self.last_stage)
        refuse(
            (
                self.curriculum.max_stage < 1,
                f"{self.name} needs curriculum.max_stage >= 1; to train its last stage only, set "
                "curriculum.first_stage to max_stage + 1",
            ),
        )

    @property
    def max_stage(self) -> int:
        """s_max, the last stage that still removes a step."""
        return self.curriculum.max_stage

    @property
    def plan(self) -> Plan:
        """One latent follows the other, from the state at <bot> on."""
        return replace(super().plan, scope="append", first_state="forward")

    def n_latents(self, stage: int) -> int:
        """Return k = s * c."""
        return min(stage, self.max_stage) * self.latents_per_step

    def n_loops(self, stage: int) -> int:
        """Return k - 1: the first latent comes from <bot>, and the last one's own output is not fed back."""
        return max(self.n_latents(stage) - 1, 0)

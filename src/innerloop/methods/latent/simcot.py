"""SIM-CoT (arXiv 2509.20317): each latent of Coconut or CODI must tell its reasoning step to an auxiliary decoder.

The host's layout and loop stay as they are; the decoder's loss flows back into the latents that were fed, and the
decoder is left out when answering (simcot.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import Places, Weight
from innerloop.config.curriculum import ResetOptimizer, Schedule, StageUnit
from innerloop.config.losses import AuxSettings
from innerloop.config.method import Method
from innerloop.methods.latent.feedback import FeedbackLoop, FeedbackMethod
from innerloop.methods.latent.self_teaching import OwnStates, ProjectedLoop, SequentialLatents
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import FED, AuxTarget, Row

Surplus = Literal["answer", "ignore", "repeat_last"]


@dataclass(frozen=True)
class SimCotDecoder(AuxSettings):
    """The auxiliary decoder; its weight is lambda_step."""

    weight: float = 1.0
    source: str | None = None
    layers: int = 0
    lora_rank: int = 0
    embed: Literal["base", "own"] = "base"
    position: int = 1
    norm: Literal["per_row", "token_mean"] = "per_row"
    detach: bool = False
    trains: Literal["both", "base", "decoder"] = "both"


@dataclass(frozen=True)
class SimCotSchedule(Schedule):
    """Coconut's stages."""

    first_stage: int = 0
    length: int = 3
    unit: StageUnit = "epoch"
    max_stage: int = 3
    reset_optimizer: ResetOptimizer = "stage"


class ToldLatents(Method):
    """Latents that tell steps; z may be fed as alpha z + beta E^T softmax(W z), a mixture with the words it shows."""

    surplus: Surplus
    soft_alpha: Weight
    soft_beta: Weight

    @property
    def soft_thinking(self) -> tuple[float, float]:
        """(alpha, beta)."""
        return self.soft_alpha, self.soft_beta

    def _more(self, example: Example) -> str | None:
        """Return what groups tell that have no step; None: the last step again."""
        return {"answer": f"### {example.answer}", "ignore": "", "repeat_last": None}[self.surplus]


@dataclass(frozen=True)
class SimCot(ToldLatents, FeedbackMethod):
    """Coconut's rows; group k of c latents tells step k, as it is written, with its << and >>.

    Only in the last stage, where no step is written any more, the last group tells all that are left, line by line.

    Args:
        latents_per_step: c.
        surplus: what groups tell when there are more of them than steps: the answer, nothing, or the last step again.
        soft_alpha: a latent z may be fed as alpha z + beta E^T softmax(W z): alpha.
        soft_beta: beta; 0: no words.
    """

    name: ClassVar[str] = "simcot"
    paper: ClassVar[str] = "arXiv 2509.20317"
    summary: ClassVar[str] = "Coconut whose latents must tell their steps to an auxiliary decoder"
    needs: ClassVar[str] = "question, steps, answer"

    latents_per_step: Places = 2
    surplus: Surplus = "answer"
    soft_alpha: Weight = 1.0
    soft_beta: Weight = 0.0
    loop: FeedbackLoop = FeedbackLoop()
    aux: SimCotDecoder = SimCotDecoder()
    curriculum: SimCotSchedule = SimCotSchedule()

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out, with what each group of latents must tell."""
        row = super().lay_out(example, encoder, stage)
        c = self.latents_per_step
        left = example.steps if stage == self.last_stage else example.steps[:stage]  # the others are written
        texts = told_texts(left, self.n_latents(stage) // c, self._more(example), "\n")
        row.aux_targets = [AuxTarget(k, FED, k * c, c, encoder.aux_target(text)) for k, text in enumerate(texts)]
        return row


@dataclass(frozen=True)
class SimCotCodi(ToldLatents, SequentialLatents):
    """CODI's rows; of the k + 1 latents, the one from <bot> and what each pass makes, each tells a step.

    Nobody tells the last step, which the teacher does not read either; the last latent tells all others that are left.
    The loss is the mean over the latents that tell something; on Coconut it is over all groups.

    Args:
        n_latents_total: k, for every example.
        surplus: what latents tell when there are more of them than steps: the answer, nothing, or the last step again.
        answer_weight: of the student's answer.
        teacher_weight: the model also learns to write the chain of thought, with this weight.
        soft_alpha: a latent z may be fed as alpha z + beta E^T softmax(W z): alpha.
        soft_beta: beta; 0: no words.
    """

    name: ClassVar[str] = "simcot_codi"
    paper: ClassVar[str] = "arXiv 2509.20317"
    summary: ClassVar[str] = "CODI whose latents must tell their steps to an auxiliary decoder"
    needs: ClassVar[str] = "question, steps, answer"

    n_latents_total: Places = 6
    surplus: Surplus = "ignore"
    answer_weight: Weight = 1.0
    teacher_weight: Weight = 1.0
    soft_alpha: Weight = 1.0
    soft_beta: Weight = 0.0
    loop: ProjectedLoop = ProjectedLoop()
    hid: OwnStates = OwnStates()
    aux: SimCotDecoder = SimCotDecoder(norm="token_mean")

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out, with what each latent must tell; the last is fed to nothing else."""
        row = super().lay_out(example, encoder, stage)
        texts = told_texts(example.steps[:-1], self.n_latents_total + 1, self._more(example), " ")
        row.aux_targets = [AuxTarget(k, FED, k, 1, encoder.aux_target(text)) for k, text in enumerate(texts) if text]
        return row


def told_texts(steps: Sequence[str], n_groups: int, more: str | None, between: str) -> list[str]:
    """Return the text that each of some groups must tell, "" for nothing; the last group takes all steps left.

    ``more`` is told by groups that have no step, None: the last step again; ``between`` joins steps told together.
    """
    if n_groups == 0:
        return []
    texts = [*steps[: n_groups - 1], between.join(steps[n_groups - 1 :])] if len(steps) > n_groups else list(steps)
    rest = ["", *texts][-1] if more is None else more
    return [*texts, *[rest] * (n_groups - len(texts))]

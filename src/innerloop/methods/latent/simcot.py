"""SIM-CoT (arXiv 2509.20317): each latent of Coconut or CODI must tell its reasoning step to an auxiliary decoder.

The host's layout and loop stay as they are; the decoder's loss flows back into the latents that were fed, and the
decoder is left out when answering (simcot.md).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.config.curriculum import ResetOptimizer, Schedule, StageUnit
from innerloop.config.losses import AuxSettings
from innerloop.config.method import Method
from innerloop.errors import refuse
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
    position: int = 0
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


class SoftLatents(Method):
    """A latent z may be fed as alpha z + beta E^T softmax(W z), a mixture with the words that it shows."""

    soft_alpha: float
    soft_beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse((min(self.soft_alpha, self.soft_beta) < 0, "soft_alpha and soft_beta cannot be negative"))

    @property
    def soft_thinking(self) -> tuple[float, float]:
        """(alpha, beta)."""
        return self.soft_alpha, self.soft_beta


@dataclass(frozen=True)
class SimCot(SoftLatents, FeedbackMethod):
    """Coconut's rows; group k of c latents tells step k, and the last stage's last group all steps that are left.

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

    latents_per_step: int = 2
    surplus: Surplus = "answer"
    soft_alpha: float = 1.0
    soft_beta: float = 0.0
    loop: FeedbackLoop = FeedbackLoop()
    aux: SimCotDecoder = SimCotDecoder()
    curriculum: SimCotSchedule = SimCotSchedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse((self.latents_per_step < 1, "simcot reads latents: set latents_per_step to at least 1"))

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out, with what each group of latents must tell."""
        row = super().lay_out(example, encoder, stage)
        c, n_latents = self.latents_per_step, sum(len(span.ids) for span in row.region)
        texts = told_texts(example, self.max_stage, self.surplus)[: n_latents // c]
        row.aux_targets = [AuxTarget(k, FED, k * c, c, encoder.aux_target(text)) for k, text in enumerate(texts)]
        return row


@dataclass(frozen=True)
class SimCotCodi(SoftLatents, SequentialLatents):
    """CODI's rows; of the k + 1 latents, the one from <bot> and what each pass makes, each tells a step.

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

    n_latents_total: int = 6
    surplus: Surplus = "ignore"
    answer_weight: float = 1.0
    teacher_weight: float = 1.0
    soft_alpha: float = 1.0
    soft_beta: float = 0.0
    loop: ProjectedLoop = ProjectedLoop()
    hid: OwnStates = OwnStates()
    aux: SimCotDecoder = SimCotDecoder(norm="token_mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse((self.n_latents_total < 1, "simcot_codi needs n_latents_total >= 1"))

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out, with what each latent must tell; the last is fed to nothing else."""
        row = super().lay_out(example, encoder, stage)
        texts = told_texts(example, self.n_latents_total + 1, self.surplus)
        row.aux_targets = [AuxTarget(k, FED, k, 1, encoder.aux_target(text)) for k, text in enumerate(texts) if text]
        return row


def told_texts(example: Example, n_groups: int, surplus: Surplus) -> list[str]:
    """Return the text that each of some groups must tell, "" for nothing; the last group takes all steps left."""
    texts = [step.removeprefix("<<").removesuffix(">>") for step in example.steps]
    if n_groups == 0:
        return []
    if len(texts) > n_groups:
        texts = [*texts[: n_groups - 1], "\n".join(texts[n_groups - 1 :])]
    more = n_groups - len(texts)
    match surplus:
        case "answer":
            return [*texts, *[f"### {example.answer}"] * more]
        case "repeat_last" if texts:
            return [*texts, *texts[-1:] * more]
    return [*texts, *[""] * more]

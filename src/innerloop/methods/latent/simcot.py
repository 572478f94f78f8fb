"""SIM-CoT (arXiv 2509.20317): each latent of Coconut or CODI must tell its reasoning step to an auxiliary decoder.

The host's layout and loop stay as they are; the decoder's loss flows back into the latents that were fed, and the
decoder is left out when answering (simcot.md).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.config.losses import AuxSettings
from innerloop.errors import refuse
from innerloop.methods.latent.coconut import Coconut
from innerloop.methods.latent.codi import Codi
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import FED, Row, Told

Surplus = Literal["answer", "ignore", "repeat_last"]


@dataclass(frozen=True)
class SoftSettings:
    """A latent z may be fed as alpha z + beta E^T softmax(W z), a mixture with the words that it shows.

    Args:
        soft_alpha: alpha.
        soft_beta: beta; 0: no words.
    """

    soft_alpha: float = 1.0
    soft_beta: float = 0.0

    def __post_init__(self) -> None:
        refuse((min(self.soft_alpha, self.soft_beta) < 0, "soft_alpha and soft_beta cannot be negative"))

    @property
    def soft_thinking(self) -> tuple[float, float]:
        """(alpha, beta)."""
        return self.soft_alpha, self.soft_beta


@dataclass(frozen=True)
class SimCot(SoftSettings, AuxSettings, Coconut):
    """Coconut's rows; group k of c latents tells step k, and the last stage's last group all steps that are left.

    Args:
        aux_weight: lambda_step.
        surplus: what groups tell when there are more of them than steps: the answer, nothing, or the last step again.
    """

    name: ClassVar[str] = "simcot"
    paper: ClassVar[str] = "arXiv 2509.20317"
    summary: ClassVar[str] = "Coconut whose latents must tell their steps to an auxiliary decoder"

    aux_weight: float = 1.0
    surplus: Surplus = "answer"

    def __post_init__(self) -> None:
        Coconut.__post_init__(self)
        SoftSettings.__post_init__(self)
        AuxSettings.__post_init__(self)
        refuse(
            (
                self.latents_per_step < 1 or self.thought == "pause",
                "simcot reads latents that are fed back: set latents_per_step >= 1 and thought to feedback",
            )
        )

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out, with what each group of latents must tell."""
        row = super().lay_out(example, spell, stage)
        c, n_latents = self.latents_per_step, sum(len(piece.ids) for piece in row.region)
        texts = told_texts(example, self.max_stage, self.surplus)[: n_latents // c]
        row.told = [Told(k, FED, k * c, c, spell.told(text)) for k, text in enumerate(texts)]
        return row


@dataclass(frozen=True)
class SimCotCodi(SoftSettings, AuxSettings, Codi):
    """CODI's rows; of the k + 1 latents, the one from <bot> and what each pass makes, each tells a step.

    The loss is the mean over the latents that tell something; on Coconut it is over all groups.

    Args:
        aux_weight: lambda_step.
        surplus: what latents tell when there are more of them than steps: the answer, nothing, or the last step again.
    """

    name: ClassVar[str] = "simcot_codi"
    paper: ClassVar[str] = "arXiv 2509.20317"
    summary: ClassVar[str] = "CODI whose latents must tell their steps to an auxiliary decoder"

    aux_weight: float = 1.0
    aux_norm: Literal["per_row", "token_mean"] = "token_mean"
    surplus: Surplus = "ignore"

    def __post_init__(self) -> None:
        Codi.__post_init__(self)
        SoftSettings.__post_init__(self)
        AuxSettings.__post_init__(self)
        refuse(
            (self.n_latents_total < 1, "simcot_codi needs n_latents_total >= 1"),
            (
                self.feedback_site == "pre_norm",
                "the last latent is what the answer's pass shows after the norm: set feedback_site to post_norm",
            ),
        )

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out, with what each latent must tell; the last is fed to nothing else."""
        row = super().lay_out(example, spell, stage)
        texts = told_texts(example, self.n_latents_total + 1, self.surplus)
        row.told = [Told(k, FED, k, 1, spell.told(text)) for k, text in enumerate(texts) if text]
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

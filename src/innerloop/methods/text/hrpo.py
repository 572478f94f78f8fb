"""HRPO (arXiv 2505.18454): written tokens with a latent beside each, mixed by a gate that reinforcement opens."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from innerloop.checks.values import Bounds, Positive, Weight
from innerloop.config.hybrid import Control, Hybrid, LatentNorm
from innerloop.config.method import WritingMethod
from innerloop.errors import refuse

Kept = Annotated[float, Bounds(0, 1, above=True)]


@dataclass(frozen=True)
class Hrpo(WritingMethod):
    """``[Q][T_1]..[T_m][### A][eos]``, where up to the mark each token is fed as x = a e + sqrt(1 - a^2 + eps) (i h).

    e is its embedding, h the mean of all embeddings by the distribution that it was chosen from, a and i gates of e.
    It is trained by reinforcement (``train.algorithm: grpo``): nothing else knows what is fed.

    Args:
        r_min: the least share of a token's embedding before training, where its gate is open.
        r_max: the largest; dimensions are drawn between the two.
        latent_norm: h is divided by the length of the distribution (l2p), is the plain mean (sum), or as long as e
            (match_token).
        temperature: tau of the distribution where tokens are not drawn; where they are, it is that of the draw.
        gate_eps: eps.
        control: shut feeds e alone, argmax the embedding of the likeliest token for h, swap the h of another row.
    """

    name: ClassVar[str] = "hrpo"
    paper: ClassVar[str] = "arXiv 2505.18454"
    summary: ClassVar[str] = "writes every step, and is fed a latent beside each token; learned by reinforcement"

    r_min: Kept = 0.99
    r_max: Kept = 0.999
    latent_norm: LatentNorm = "l2p"
    temperature: Positive = 0.5
    gate_eps: Weight = 1e-8
    control: Control = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse((self.r_min > self.r_max, f"r_min is {self.r_min}, but must be at most r_max ({self.r_max})"))

    @property
    def hybrid(self) -> Hybrid:
        """A latent beside each token, mixed by a gate."""
        return Hybrid(
            temperature=self.temperature,
            norm=self.latent_norm,
            gate=(self.r_min, self.r_max),
            gate_eps=self.gate_eps,
            control=self.control,
        )

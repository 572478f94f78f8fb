"""Soft thinking (arXiv 2505.15778): while a model thinks it is fed mixtures of embeddings in place of tokens."""

from dataclasses import dataclass
from typing import ClassVar

from innerloop.checks.values import Count, Natural, Positive, Weight
from innerloop.config.hybrid import Control, Hybrid
from innerloop.config.method import WritingMethod


@dataclass(frozen=True)
class SoftThinking(WritingMethod):
    """``[Q][T_1]..[T_m][### A][eos]``, where up to the mark a token is fed as the mean of the likeliest embeddings.

    It needs no training: put it on a run that writes its steps. With ``noise`` it is drawn, and learns by reinforcement
    (after SofT-GRPO, arXiv 2511.06411; noise is drawn here given the token, whose log-probability is what is learned).

    Args:
        top_k: how many of the likeliest tokens are mixed, by their shares of the distribution.
        temperature: of the distribution where tokens are not drawn; where they are, it is that of the draw.
        noise: temperature of Gumbel noise in the shares: towards 0 the token itself is fed; 0: no noise.
        stop_after: cold stop: so many tokens of low entropy in a row make the answer's mark follow; 0: never.
        stop_entropy: which entropy is low, in nats.
        control: shut feeds the tokens (the cold stop by itself), argmax the likeliest, swap another row's mixture.
    """

    name: ClassVar[str] = "soft_thinking"
    paper: ClassVar[str] = "arXiv 2505.15778"
    summary: ClassVar[str] = "is fed mixtures of embeddings in place of the tokens it writes; needs no training"

    top_k: Count = 10
    temperature: Positive = 0.6
    noise: Weight = 0.0
    stop_after: Natural = 256
    stop_entropy: Weight = 0.01
    control: Control = "none"

    @property
    def hybrid(self) -> Hybrid:
        """A mixture in place of each token."""
        return Hybrid(
            temperature=self.temperature,
            top_k=self.top_k,
            norm="sum",
            noise=self.noise,
            stop_after=self.stop_after,
            stop_entropy=self.stop_entropy,
            control=self.control,
        )

"""`Hybrid`: what is fed in place of a written token's embedding while a row thinks, as a method tells the passes."""

from dataclasses import dataclass
from typing import Literal

LatentNorm = Literal["l2p", "sum", "match_token"]
Control = Literal["none", "shut", "argmax", "swap"]


@dataclass(frozen=True)
class Hybrid:
    """While a row has not written the answer's mark, it is fed a latent beside or instead of each token that it writes.

    Attributes:
        temperature: of the distribution that a latent is made of, where tokens are not drawn; else that of the draw.
        top_k: how many of the likeliest tokens are mixed into a latent; None: all.
        norm: what the mixture is divided by: the length of the distribution (l2p), nothing (sum), or so that it is as
            long as the token's embedding (match_token).
        gate: the least and the largest share of a token's embedding before training, where a gate that is learned mixes
            it with the latent; None: the latent alone is fed.
        gate_eps: what stands under the root of the latent's share.
        noise: temperature of the Gumbel noise in a latent; 0: none.
        stop_after: so many tokens of low entropy in a row make the answer's mark follow; 0: never.
        stop_entropy: which entropy is low, in nats.
        control: shut feeds tokens alone, argmax the embedding of the likeliest token in place of a latent, and swap the
            latent of another row.
    """

    temperature: float
    top_k: int | None = None
    norm: LatentNorm = "l2p"
    gate: tuple[float, float] | None = None
    gate_eps: float = 0.0
    noise: float = 0.0
    stop_after: int = 0
    stop_entropy: float = 0.0
    control: Control = "none"

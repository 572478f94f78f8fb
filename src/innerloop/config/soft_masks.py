"""Soft masks (arXiv 2510.17206): what is still masked is fed what the pass before predicted for it."""

from dataclasses import dataclass
from typing import Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Count, Share

Mix = Literal["lerp", "lerp_norm", "slerp"]
Remasked = Literal["raw", "drop", "carry"]


@dataclass(frozen=True)
class SoftSettings(Checked):
    """A mask is read as a mixture of its own embedding and those of the likeliest tokens of the pass before.

    Args:
        share: p_sm, the share of training steps whose pass is fed what a pass before it predicts, from which nothing
            is learned; 0: masks are hard. Answers and losses outside of training are always soft.
        unroll: how many passes a soft step makes before the one that is learned from, each fed by the one before it;
            1 as published: what is fed comes from hard masks, while an answer's passes are fed by soft ones.
        top_k: k, how many tokens are mixed in; none: all of them, at a temperature that is learned too.
        mix: embeddings are mixed along a line (lerp), the same at the length of the mask's (lerp_norm), or along an arc
            of that length (slerp).
        remasked: a token that remdm masks again is fed what the network said of its place (raw), nothing (drop), or
            itself (carry), as in published code.
        start: w_s before training, the most that is mixed in; 0: 1e-6 as published, for runs of many thousand steps.
    """

    share: Share = 0.0
    unroll: Count = 1
    top_k: Count | None = 3
    mix: Mix = "lerp"
    remasked: Remasked = "raw"
    start: Share = 0.05

    @property
    def is_on(self) -> bool:
        """Whether masks are soft."""
        return self.share > 0

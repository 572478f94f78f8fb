"""Learned unmasking (arXiv 2512.09106): a small network on top of a frozen predictor decides how many masks to fill.

    s_k = sigmoid(b_k / tau),  u_k ~ Bernoulli(s_k)          every mask with u_k = 1 is filled with its likeliest token
    R   = correct * (1 - passes / G)^alpha

It sees each place's confidence, whether it is a mask, and the time. ``train: {algorithm: grpo, reward_funcs:
fast_answer}``, on a run of ``llada`` or ``dream``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from innerloop.checks.values import Count, Places, Positive, Weight
from innerloop.errors import refuse
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.settings import LearnedSampler, NoiseSettings
from innerloop.text.row import MASK

if TYPE_CHECKING:  # slow to import
    from innerloop.decoder.backbone import Backbone
    from innerloop.methods.denoise.scorers import CommitScorer


@dataclass(frozen=True)
class UnmaskingPolicy(DenoisingMethod):
    """Each mask is filled with a chance of its own, in as many passes as that takes.

    Args:
        gen_length: G, the tokens of a canvas, and the most passes over it.
        shift: the place before a token predicts it, as a decoder does: for decoders that were trained to.
        write_steps: off: the answer alone is written.
        mask_token: the mask; added to the tokenizer where it is missing.
        hidden: the width of the network.
        heads: its heads.
        tau: what its logits are divided by.
        beta: what chances are multiplied by when answering; rollouts have 1.
        alpha: of the reward fast_answer, how much passes count.
        fallback: a pass in which no mask was drawn fills the one with the largest chance; such a pass is no action
            (exclude), or the action of drawing none (zeros).
    """

    name: ClassVar[str] = "unmasking_policy"
    paper: ClassVar[str] = "arXiv 2512.09106"
    summary: ClassVar[str] = "fills a canvas of masks, as many in a pass as a learned policy dares"
    has_scorer: ClassVar[bool] = True

    gen_length: Places = 64
    shift: bool = False
    write_steps: bool = True
    mask_token: str = MASK
    hidden: Count = 128
    heads: Count = 2
    tau: Positive = 1.0
    beta: Positive = 1.0
    alpha: Weight = 1.0
    fallback: Literal["exclude", "zeros"] = "exclude"
    noise: NoiseSettings = NoiseSettings()
    sampler: LearnedSampler = LearnedSampler()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.sampler.commit == "learned" and self.sampler.steps is not None,
                "the policy makes as many passes as it needs: leave sampler.steps and loops out",
            ),
            (
                self.hidden % (2 * self.heads) > 0,
                f"hidden is {self.hidden}, but each of {self.heads} heads has an even width: give a multiple of "
                f"{2 * self.heads}",
            ),
        )

    @property
    def takes_loops(self) -> bool:
        """The policy chooses the number of passes itself."""
        return self.sampler.commit != "learned"

    def make_scorer(self, backbone: Backbone) -> CommitScorer:
        """Return what scores the masks of a canvas."""
        from innerloop.methods.denoise.scorers import CommitScorer

        return CommitScorer(self.hidden, self.heads, self.gen_length).to(backbone.device)

"""DCoLT (arXiv 2505.10446): which masks are filled next is a ranking that is learned, by what the answer is worth.

log pi = sum_j [ g_j - logsumexp of g over masks not chosen yet ] + sum_j log p(token_j)

Both the ranking and the predictor learn: ``train: {algorithm: grpo}``, on a run of ``llada`` or ``dream``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from innerloop.checks.values import Places, Positive
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.settings import LearnedSampler, NoiseSettings
from innerloop.text.row import MASK

if TYPE_CHECKING:  # slow to import
    from innerloop.decoder.backbone import Backbone
    from innerloop.methods.denoise.scorers import RankingScorer


@dataclass(frozen=True)
class Dcolt(DenoisingMethod):
    """A block on top of the predictor's states scores the masks; the best are filled, K in each pass.

    Args:
        gen_length: G, the tokens of a canvas; shorter answers are filled up with ends of sequence.
        shift: the place before a token predicts it, as a decoder does: for decoders that were trained to.
        write_steps: off: the answer alone is written.
        mask_token: the mask; added to the tokenizer where it is missing.
        upm_init: what the ranking is before it has learned: random, or the logarithm of each mask's likeliest
            prediction (confidence), to which the block adds 0 at first.
        upm_time_scale: by which the share of the passes made is multiplied where the block is told it; published code
            has 1, at which its waves hardly move.
    """

    name: ClassVar[str] = "dcolt"
    paper: ClassVar[str] = "arXiv 2505.10446"
    summary: ClassVar[str] = "fills a canvas of masks in an order that reinforcement teaches"
    has_scorer: ClassVar[bool] = True

    gen_length: Places = 64
    shift: bool = False
    write_steps: bool = True
    mask_token: str = MASK
    upm_init: Literal["random", "confidence"] = "random"
    upm_time_scale: Positive = 1000.0
    noise: NoiseSettings = NoiseSettings()
    sampler: LearnedSampler = LearnedSampler()

    def make_scorer(self, backbone: Backbone) -> RankingScorer:
        """Return what scores the masks of a canvas."""
        from innerloop.methods.denoise.scorers import RankingScorer

        width, most = backbone.width, backbone.lm.config.num_attention_heads
        heads = next(n for n in range(most, 0, -1) if width % (2 * n) == 0)  # those of a decoder may be wider than it
        starts_sure = self.upm_init == "confidence"
        return RankingScorer(width, heads, starts_sure, self.upm_time_scale).to(backbone.device)

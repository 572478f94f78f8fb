"""Dream (arXiv 2508.15487): a decoder made bidirectional, which goes on predicting the token after each place.

A hidden token counts the more the more clean tokens are near it (CART): w_n = sum over clean i of
q (1 - q)^(|n - i| - 1) / 2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import Natural, Places
from innerloop.config.soft_masks import SoftSettings
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.settings import Commit, NoiseSettings, Norm, SamplerSettings, TokenWeight
from innerloop.text.row import MASK


@dataclass(frozen=True)
class DreamNoise(NoiseSettings):
    """t is the share of hidden tokens itself."""

    least: ClassVar[float] = 0.0

    weight: TokenWeight = "cart"
    norm: Norm = "masked"


@dataclass(frozen=True)
class DreamSampler(SamplerSettings):
    """Times are a grid from 1 to 1e-3; confidence is that of the distribution that tokens are drawn from."""

    counts: ClassVar[Literal["even", "grid"]] = "grid"
    is_tempered: ClassVar[bool] = True

    commit: Commit = "origin"


@dataclass(frozen=True)
class Dream(DenoisingMethod):
    """Every hidden token is predicted from the place before it, and counts by the clean tokens around it.

    Args:
        gen_length: G, the tokens of a canvas; shorter answers are filled up with ends of sequence.
        shift: the place before a token predicts it; off: its own.
        write_steps: off: the answer alone is written.
        mask_token: the mask; added to the tokenizer where it is missing.
        anneal_steps: training steps over which later places are seen with a chance that rises to 1, for a decoder that
            has not seen them before; 0: they are seen from the first.
    """

    name: ClassVar[str] = "dream"
    paper: ClassVar[str] = "arXiv 2508.15487"
    summary: ClassVar[str] = "fills a canvas of masks by the habits of a decoder"

    gen_length: Places = 64
    shift: bool = True
    write_steps: bool = True
    mask_token: str = MASK
    anneal_steps: Natural = 0
    noise: DreamNoise = DreamNoise()
    sampler: DreamSampler = DreamSampler()
    soft: SoftSettings = SoftSettings()


Dream.presets = {"soft_masked": Dream(soft=SoftSettings(share=0.8, top_k=1))}
"""Soft masks as in the paper's Dream models (soft_masked.md, 5)."""

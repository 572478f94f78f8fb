"""LLaDA (arXiv 2502.09992): a bidirectional mask predictor; the likeliest predictions are kept, the rest masked again.

-log p(answer | question) <= E_t [ 1/t sum over hidden tokens of CE ]
"""

from dataclasses import dataclass
from typing import ClassVar

from innerloop.checks.values import Natural, Places
from innerloop.config.soft_masks import SoftSettings
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.settings import NoiseSettings, SamplerSettings
from innerloop.text.row import MASK


@dataclass(frozen=True)
class Llada(DenoisingMethod):
    """Every hidden token is predicted at its own place, and counts 1/t.

    Args:
        gen_length: G, the tokens of a canvas; shorter answers are filled up with ends of sequence.
        shift: the place before a token predicts it, as a decoder does: for decoders that were trained to.
        write_steps: off: the answer alone is written.
        mask_token: the mask; added to the tokenizer where it is missing.
        anneal_steps: training steps over which later places are seen with a chance that rises to 1, for a decoder that
            has not seen them before; 0: they are seen from the first.
    """

    name: ClassVar[str] = "llada"
    paper: ClassVar[str] = "arXiv 2502.09992"
    summary: ClassVar[str] = "fills a canvas of masks, the likeliest tokens first"

    gen_length: Places = 64
    shift: bool = False
    write_steps: bool = True
    mask_token: str = MASK
    anneal_steps: Natural = 0
    noise: NoiseSettings = NoiseSettings()
    sampler: SamplerSettings = SamplerSettings()
    soft: SoftSettings = SoftSettings()


Llada.presets = {"soft_masked": Llada(soft=SoftSettings(share=0.8))}
"""Soft masks as in the paper's language models (soft_masked.md, 5)."""

"""Settings that denoising methods share: how tokens are hidden while training, and how a canvas is filled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Count, Share, SomeLoops, SomeShare, Weight
from innerloop.errors import refuse
from innerloop.methods.denoise.remasking import RemaskSettings

TokenWeight = Literal["1/t", "linear", "uniform", "cart"]
Norm = Literal["sequence", "token", "batch", "masked"]
Commit = Literal["confidence", "random", "margin", "entropy", "origin", "threshold", "remdm", "learned"]
Eos = Literal["free", "last", "never"]
Ties = Literal["random", "lowest"]
Cache = Literal["none", "prompt", "block", "dual", "delayed"]
COUNTED = ("confidence", "random", "margin", "entropy")
"""Rules that commit a number of tokens which is known before the pass."""
BLIND = ("random", "origin", "remdm")
"""Rules that look at no prediction: which places are filled is known before the pass, and they alone are read out."""


@dataclass(frozen=True)
class NoiseSettings(Checked):
    """How tokens are hidden and weighted in training.

    Args:
        weight: what a hidden token counts: one by the share of hidden tokens (1/t), 1 - t (linear), 1 (uniform), or the
            more the more clean tokens are near it (cart).
        norm: what the summed loss is divided by: each answer's length and the number of rows (sequence), all tokens
            that may be hidden (token), the rows (batch), or the hidden tokens (masked); always over the global batch.
        cart_q: q of cart: how fast the worth of clean tokens falls with their distance.
        filler: hidden tokens are read as the mask, or as tokens drawn evenly (random), as which a canvas then starts.
        truncate: the share of training batches whose running text is cut to a length that is drawn evenly.
    """

    least: ClassVar[float] = 1e-3  # p = (1 - least) t + least

    weight: TokenWeight = "1/t"
    norm: Norm = "sequence"
    cart_q: SomeShare = 0.1
    filler: Literal["mask", "random"] = "mask"
    truncate: Share = 0.0


@dataclass(frozen=True)
class SamplerSettings(Checked):
    """How a canvas of masks is filled.

    Args:
        steps: S, the passes over a canvas; none: one for each token. Passes that would commit nothing are not made.
        block_length: K: blocks of so many tokens are filled from left to right; none: the canvas is one block.
        commit: which predictions are kept: those likeliest (confidence), with the largest lead over the second
            (margin) or the least entropy, some drawn (random), each with the probability of its time (origin), all that
            are likely enough, and at least one (threshold), as origin while tokens may be masked again (remdm), or as
            a policy says that is learned (learned: dcolt and unmasking_policy).
        threshold: the confidence that is likely enough.
        position_temperature: above 0 positions are drawn by their confidence in place of the best.
        top_p: tokens beyond this share of the probability cannot be drawn; the one that crosses it can.
        guidance: w: predictions lean away from those without the question; each pass then reads two rows.
        eos: an end of sequence may be committed as any token (free), after all others (last), or not at all (never).
        ties: equal predictions and positions are told apart by a seeded draw, or the lowest is taken.
        remask: when remdm masks tokens again.
        cache: approximate where it is not none: what is not read again in every pass though what it sees changes: the
            question (prompt), blocks before the active one too (block), those after it as well (dual), or tokens from
            the second pass on in which they are there (delayed).
        refresh: approximate caches are read anew every so many passes; none: at the beginning, and of each block in
            which blocks are kept.
    """

    counts: ClassVar[Literal["even", "grid"]] = "even"
    is_tempered: ClassVar[bool] = False  # confidence is that of the distribution that tokens are drawn from

    steps: SomeLoops | None = None
    block_length: Count | None = None
    commit: Commit = "confidence"
    threshold: float = 0.9
    position_temperature: Weight = 0.0
    top_p: SomeShare = 1.0
    guidance: Weight = 0.0
    eos: Eos = "free"
    ties: Ties = "random"
    remask: RemaskSettings = RemaskSettings()
    cache: Cache = "none"
    refresh: Count | None = None

    def __post_init__(self) -> None:
        if isinstance(self.remask, Mapping):
            object.__setattr__(self, "remask", RemaskSettings(**self.remask))
        super().__post_init__()
        refuse(
            (
                self.steps is not None and self.commit == "threshold",
                "sampler.commit=threshold makes as many passes as it needs: leave steps out",
            ),
            (
                self.position_temperature > 0 and self.commit not in ("confidence", "margin", "entropy"),
                f"sampler.position_temperature draws by confidence, and commit={self.commit} has none: set it to 0",
            ),
            (
                self.eos == "last" and self.commit in BLIND,
                f"sampler.eos=last lets ends come last by their confidence, and commit={self.commit} looks at none: "
                "set eos to free or never",
            ),
            (
                self.remask != RemaskSettings() and self.commit != "remdm",
                "sampler.remask is for commit=remdm: set that, or leave remask out",
            ),
            (
                self.commit == "learned"
                and (self.guidance > 0 or self.top_p < 1 or self.eos == "last" or self.cache != "none"),
                "sampler.commit=learned knows how likely plain predictions are: leave guidance, top_p, eos=last and "
                "cache out",
            ),
            (
                self.refresh is not None and self.cache == "none",
                "sampler.refresh is for approximate caches: set sampler.cache, or leave refresh out",
            ),
        )

    def check(self, gen_length: int, block: int) -> None:
        """Refuse a canvas that does not fall into blocks, or whose passes do not."""
        name = "block_length" if self.block_length is None else "sampler.block_length"
        n_blocks = gen_length // block
        refuse(
            (
                gen_length % block != 0,
                f"gen_length is {gen_length}, which is no multiple of {name}, {block}: change either",
            ),
            (
                self.steps is not None and self.steps % max(n_blocks, 1) != 0,
                f"sampler.steps is {self.steps}, which cannot be shared evenly among {n_blocks} blocks: make it a "
                f"multiple of {n_blocks}",
            ),
        )


@dataclass(frozen=True)
class LearnedSampler(SamplerSettings):
    """Which tokens stay is learned; the other rules are there to be compared with."""

    commit: Commit = "learned"

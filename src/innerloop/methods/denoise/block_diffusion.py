"""Block diffusion (BD3-LM, arXiv 2503.09573): blocks of K tokens from left to right, masks filled in inside each.

p(answer | question) = prod over blocks of p(block | question, blocks before), each bounded as LLaDA bounds the whole.
A block sees itself and what comes before it, so keys and values of finished blocks are exact and stay in the cache.
K = 1 is a decoder, and a block as long as the row is LLaDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import Count, Places, Share, SomeShare
from innerloop.config.plan import Plan
from innerloop.config.soft_masks import SoftSettings
from innerloop.errors import refuse
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.noise import by_block, times
from innerloop.methods.denoise.settings import NoiseSettings, SamplerSettings
from innerloop.text.row import MASK, Row

Origin = Literal["answer", "row"]


@dataclass(frozen=True)
class BlockNoise(NoiseSettings):
    """Each block is hidden by a time of its own, uniform and spread evenly over all blocks of a batch.

    Args:
        t_per: a time for each block, or for each row.
        t_from: beta: the least time; a narrower range has a loss that varies less, and is no bound any more.
        t_to: omega: the last time.
    """

    t_per: Literal["block", "row"] = "block"
    t_from: Share = 0.0
    t_to: Share = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse((self.t_from > self.t_to, f"noise.t_from is {self.t_from}, which is above t_to, {self.t_to}: swap them"))


@dataclass(frozen=True)
class BlockSampler(SamplerSettings):
    """How each block is filled; random with a pass for each token is the first-hitting sampler.

    Args:
        edit: tokens of the block are overwritten where another is at least so likely; none: what is committed stays.
            For models that have learned to predict tokens that they see; training here teaches hidden ones alone.
        edit_passes: passes over a block that is full, at most, in which tokens are overwritten.
    """

    edit: SomeShare | None = None
    edit_passes: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.edit is not None and self.commit not in ("confidence", "threshold"),
                f"sampler.edit overwrites by the probability of a token, and commit={self.commit} ranks by none: set "
                "commit to confidence or threshold",
            ),
            (
                self.block_length is not None,
                "sampler.block_length is that of the method, whose passes see by it: set method.block_length",
            ),
            (
                self.cache != "none",
                f"sampler.cache={self.cache} is approximate, but finished blocks are cached exactly: leave it out",
            ),
        )


@dataclass(frozen=True)
class BlockDiffusion(DenoisingMethod):
    """Blocks are filled one after the other; each sees itself and what comes before it.

    Args:
        gen_length: G, the tokens of a canvas; shorter answers are filled up with ends of sequence.
        block_length: K.
        block_origin: blocks are counted from the first token of the answer, before which those of the question end, or
            from the first of the row: then one may hold the end of the question and the beginning of the answer.
        shift: the place before a token predicts it, as a decoder does; a block's first from the block before it.
        write_steps: off: the answer alone is written.
        mask_token: the mask; added to the tokenizer where it is missing.
    """

    name: ClassVar[str] = "block_diffusion"
    paper: ClassVar[str] = "arXiv 2503.09573"
    summary: ClassVar[str] = "fills blocks of masks from left to right, and keeps what is finished in the cache"

    goes_on_with: ClassVar[tuple[str, ...]] = ("shift", "mask_token", "block_origin")

    gen_length: Places = 64
    block_length: Places = 8
    block_origin: Origin = "answer"
    shift: bool = False
    write_steps: bool = True
    mask_token: str = MASK
    noise: BlockNoise = BlockNoise()
    sampler: BlockSampler = BlockSampler()
    soft: SoftSettings = SoftSettings()

    @property
    def canvas_block(self) -> int:
        """How many tokens of a canvas are of one block: K, or all where a block is longer and counted from the row."""
        return min(self.block_length, self.gen_length) if self.block_origin == "row" else self.block_length

    @property
    def plan(self) -> Plan:
        """Every token sees its block and those before."""
        return Plan(sees="blocks")

    def blocks(self, row: Row) -> tuple[int, ...]:
        """Return the block of each position of a row."""
        offset = self.offset(row.region_start)
        return tuple((offset + k) // self.block_length for k in range(len(row)))

    def offset(self, n_prompt: int) -> int:
        """Return how many tokens are missing in the first block of a row, given those of its question."""
        return 0 if self.block_origin == "row" else -n_prompt % self.block_length

    def times(self, rows: Sequence[Row], seed: str) -> list[dict[int, float]]:
        """Return the time of each block of each row in which tokens may be hidden."""
        return self.spread([list(by_block(row, self.blocks(row))) for row in rows], seed)

    def spread(self, blocks: Sequence[Sequence[int]], seed: str) -> list[dict[int, float]]:
        """Return the time of each block of each row: the first blocks of all rows come before the second ones."""
        noise, is_own = self.noise, self.noise.t_per == "block"
        order = [(i if is_own else 0, r) for r, own in enumerate(blocks) for i in range(len(own) if is_own else 1)]
        drawn = dict(zip(sorted(order), times(max(len(order), 1), seed)))
        clipped = {key: noise.t_from + (noise.t_to - noise.t_from) * t for key, t in drawn.items()}
        return [{b: clipped[i if is_own else 0, r] for i, b in enumerate(own)} for r, own in enumerate(blocks)]

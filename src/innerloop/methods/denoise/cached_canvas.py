"""`CachedCanvas`: a canvas behind its question, of which a pass reads some columns and knows others from the cache.

Shapes: `G` tokens of the canvas, `A` places of it, `L` columns of question and canvas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from innerloop.methods.denoise.canvas import Canvas, Ints
from innerloop.methods.denoise.method import DenoisingMethod


class CachedCanvas(Canvas, ABC):
    """What a canvas says of its columns, the first of which are the question's.

    Args:
        method: how it is filled.
        prompt: the tokens of the question.
        mask_id: the mask.
        eos_id: the end of sequence.
        seed: what draws depend on.
        first: the tokens of the first block; none: as many as of the others.

    Attributes:
        kept: the columns that are in the cache.
        reading: those that the pass reads.
    """

    def __init__(
        self,
        method: DenoisingMethod,
        prompt: Sequence[int],
        mask_id: int,
        eos_id: int,
        seed: Sequence[int],
        first: int | None = None,
    ):
        self.prompt, self.shift = np.array(prompt, dtype=np.int64), int(method.shift)
        self.kept = self.reading = self.prompt[:0]
        super().__init__(method.sampler, method.gen_length, mask_id, eos_id, seed, method.canvas_block, first)

    def whole(self, masks_prompt: bool = False) -> Ints:
        """Return what question and canvas are read as; the question as masks, if it is to be left out."""
        prompt = np.full_like(self.prompt, self.mask_id) if masks_prompt else self.prompt
        return np.concatenate([prompt, self.read_G])

    @abstractmethod
    def choose(self) -> None:
        """Set what the next pass reads, ``reading``; where everything is read anew, ``kept`` is empty then."""

    @abstractmethod
    def to_keep(self) -> Ints:
        """Return which columns stay in the cache, of those that were there or were read, once the pass is made."""

    def numbers(self, columns_L: Ints) -> Ints:
        """Return the numbers of columns by which `block_causal` tells what they see."""
        return np.zeros_like(columns_L)

    def predicting(self, places_A: Ints) -> Ints:
        """Return where among the columns that are read those are that predict some places of the canvas."""
        return self.columns(places_A - self.shift)

    def columns(self, places_A: Ints) -> Ints:
        """Return where among the columns that are read those of some places are."""
        return np.searchsorted(self.reading, len(self.prompt) + places_A)

"""`BlockCanvas`: a canvas whose finished blocks are in the cache, and what a pass reads of it (block_diffusion.md, 4).

A pass reads what has been finished since the last one and, behind it, the active block. So a block is written to the
cache in the first pass of the next one, and no pass is made for that alone.

    1  [Q1 Q2 | M M]      2  [Q1 Q2 | a M]      3  [Q1 Q2 | a b | M M]      in the cache: nothing, [Q1 Q2], [Q1 Q2] ..

Shapes: `G` tokens of the canvas, `A` of them that are asked for, `L` columns of question and canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from innerloop.methods.denoise.block_diffusion import BlockDiffusion
from innerloop.methods.denoise.cached_canvas import CachedCanvas
from innerloop.methods.denoise.canvas import Floats, Ints


class BlockCanvas(CachedCanvas):
    """A canvas of which finished blocks are read once."""

    def __init__(self, method: BlockDiffusion, prompt: Sequence[int], mask_id: int, eos_id: int, seed: Sequence[int]):
        self.size, self.offset = method.block_length, method.offset(len(prompt))
        self.n_before = (self.offset + len(prompt)) % self.size  # columns of the question, in the canvas's first block
        self.edit, self.edit_passes = method.sampler.edit, method.sampler.edit_passes
        self.n_finished_read, self.n_edited, self.settled = 0, 0, -1
        super().__init__(method, prompt, mask_id, eos_id, seed, self.size - self.n_before)

    # What is read

    @property
    def n_finished(self) -> int:
        """How many columns come before the active block."""
        return len(self.prompt) + (self.start or -self.n_before)

    @property
    def n_read(self) -> int:
        """How many tokens of the canvas come before the end of the active block."""
        return self.end

    def choose(self) -> None:
        """Read what is not in the cache up to the end of the active block.

        A block of one column whose token is predicted at the column before is not read: no one would see it.
        """
        end, self.n_finished_read = len(self.prompt) + self.end, self.n_finished
        if self.shift and end - self.n_finished == 1:
            end -= 1
        self.reading = np.arange(len(self.kept), end)

    def to_keep(self) -> Ints:
        """Keep what was finished before the pass.

        With shift the last of it is read again as long as the block after it is filled, which it helps to predict.
        """
        return np.arange(max(min(self.n_finished_read, self.n_finished - self.shift), 0))

    def numbers(self, columns_L: Ints) -> Ints:
        """Return twice the block of each column."""
        return 2 * ((columns_L + self.offset) // self.size)

    # What is overwritten

    @property
    def is_done(self) -> bool:
        """Whether no pass can change the text."""
        return super().is_done if self.edit is None else self.has_ended

    def asked(self) -> Ints:
        """Return the places (A,) that the next pass predicts: all of the block where tokens may be overwritten."""
        return super().asked() if self.edit is None else np.arange(self.start, self.end)

    def drawn(self) -> Floats:
        """Return the numbers in [0, 1) of the next step (3, G)."""
        return super().drawn() if self.edit is None else self.draws_of(self.n_passes)

    def commit(self, tokens_A: Ints, scores_A: Floats) -> Ints:
        """Keep some of what a pass predicts, over masks and over less likely tokens; return which places."""
        if self.edit is None:
            return super().commit(tokens_A, scores_A)
        asked_A = self.asked()
        now_A = self.tokens_G[asked_A]
        is_mask_A = now_A == self.mask_id
        is_edit_A = ~is_mask_A & (tokens_A != now_A) & (scores_A >= self.edit)
        edited, places = asked_A[is_edit_A], asked_A[:0]
        self.n_edited += 1
        if is_mask_A.any():
            self.n_edited = 0
            places = self._keep(asked_A[is_mask_A], tokens_A[is_mask_A], scores_A[is_mask_A])
        elif len(edited) == 0 or self.n_edited >= self.edit_passes:
            self.settled = self.start
        self.tokens_G[edited], self.likely_G[edited] = tokens_A[is_edit_A], scores_A[is_edit_A]
        self._go_on()
        return np.union1d(places, edited)

    def _is_over(self) -> bool:
        return super()._is_over() and (self.edit is None or self.settled == self.start)

    def _commits(self) -> bool:
        return self.edit is not None or super()._commits()

"""`StaleCanvas`: a canvas of which some columns are known from an earlier pass, approximately (fast_denoising.md).

What has not changed is not read again, though what it sees has. Kept are, until everything is read anew,

    prompt     the question
    block      the question and the blocks before the active one (Fast-dLLM's prefix cache)
    dual       these, and the blocks after it
    delayed    the question, and tokens from the second pass on in which they are there (dKV-Cache)

Everything is read in the first pass, in the first of each block where blocks are kept, and every ``refresh`` passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from innerloop.methods.denoise.cached_canvas import CachedCanvas
from innerloop.methods.denoise.canvas import Ints
from innerloop.methods.denoise.method import DenoisingMethod


class StaleCanvas(CachedCanvas):
    """A canvas whose passes read what may matter most."""

    def __init__(self, method: DenoisingMethod, prompt: Sequence[int], mask_id: int, eos_id: int, seed: Sequence[int]):
        self.cache, self.refresh = method.sampler.cache, method.sampler.refresh
        self.n_since, self.start_since = 0, -1  # passes since everything was read, and the active block of that one
        super().__init__(method, prompt, mask_id, eos_id, seed)
        self.was_read = self.whole()

    @property
    def is_due(self) -> bool:
        """Whether everything is read in the next pass."""
        is_new_block = self.cache in ("block", "dual") and self.start != self.start_since
        return self.n_since in (0, self.refresh) or is_new_block

    def choose(self) -> None:
        """Read everything, or all that is not kept."""
        if self.is_due:
            self.kept, self.n_since, self.start_since = self.kept[:0], 0, self.start
        self.n_since += 1
        self.was_read = self.whole()
        self.reading = np.setdiff1d(np.arange(len(self.was_read)), self.kept)

    def to_keep(self) -> Ints:
        """Return the columns that the next pass does not read: none that predicts a mask of the active block."""
        n, whole = len(self.prompt), self.whole()
        if self.is_due:
            return self.kept[:0]
        if self.cache == "delayed":
            masks, is_old = n + np.flatnonzero(self.tokens_G == self.mask_id), whole == self.was_read
            is_old[masks] = False
            return np.setdiff1d(np.flatnonzero(is_old), masks - self.shift)
        before = np.arange(n + (0 if self.cache == "prompt" else self.start) - self.shift)
        behind = np.arange(n + self.end, len(whole)) if self.cache == "dual" else before[:0]
        return np.concatenate([before, behind])

"""`Canvas`: the answer of one row while it is filled; what a pass predicts is committed here (llada.md, dream.md, 6).

All that is drawn for a canvas depends on its seed and the number of its step, so nothing depends on other rows.

Shapes: `G` tokens of the canvas, `A` of them that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from innerloop.methods.denoise.commits import Commit
from innerloop.methods.denoise.remasking import sigma_max, stay, weights
from innerloop.methods.denoise.settings import BLIND, COUNTED, SamplerSettings

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
ALIKE = 6  # confidences that agree to so many decimals are equal, as rounding differs with the rows of a batch
GRID_END = 1e-3


class Canvas:
    """Tokens of which some are masks still.

    Args:
        settings: how it is filled.
        gen_length: G.
        mask_id: the mask.
        eos_id: the end of sequence.
        seed: what draws depend on: the seed, the question's number and the sample's.
        block: the tokens of a block; none: those of the settings.
        first: the tokens of the first block; none: as many.

    Attributes:
        tokens_G: the tokens.
        n_masks: masks of the active block when it became active.
        step: of the active block, which of its S / (G / K) steps is next.
        n_passes: passes made so far.
        commits: what each pass has changed, where that is kept.
        fed: what its masks are read as in the next pass, where masks are soft.
        fillers_G: the tokens that its masks are read as; None: masks.
    """

    def __init__(
        self,
        settings: SamplerSettings,
        gen_length: int,
        mask_id: int,
        eos_id: int,
        seed: Sequence[int],
        block: int | None = None,
        first: int | None = None,
    ):
        self.settings, self.mask_id, self.eos_id, self.seed = settings, mask_id, eos_id, [*seed]
        self.tokens_G: Ints = np.full(gen_length, mask_id, dtype=np.int64)
        self.block = block or settings.block_length or gen_length
        n_blocks = gen_length // self.block
        self.n_steps = self.block if settings.steps is None else settings.steps // n_blocks
        self.start, self.end, self.step, self.n_passes = 0, min(first or self.block, gen_length), 0, 0
        self.n_masks = self.end
        self._numbers: tuple[int, Floats] | None = None
        self.commits: list[Commit] = []
        self.fed: Any = None
        self.fillers_G: Ints | None = None
        self.likely_G: Floats = np.zeros(gen_length)  # the probability of each token when it was committed
        self.keeps = settings.commit != "remdm" or not settings.remask.remasks  # what is committed stays
        self.alphas, self.is_on = settings.remask.alphas(self.n_steps)
        self._skip()

    def start_from(self, places: Ints, tokens: Ints) -> None:
        """Give some tokens before the first pass; they are part of what is filled."""
        self.tokens_G[places] = tokens
        self.n_masks = len(self.masks())
        self._skip()

    def fill(self, n_words: int) -> None:
        """Begin as tokens drawn evenly from all but the mask; what is masked again is read as it began."""
        drawn = np.random.default_rng([*self.seed, 1, 1]).integers(0, n_words - 1, len(self.tokens_G))
        self.fillers_G = drawn + (drawn >= self.mask_id)

    @property
    def read_G(self) -> Ints:
        """What the next pass reads (G,)."""
        hidden = self.tokens_G if self.fillers_G is None else self.fillers_G
        return np.where(self.tokens_G == self.mask_id, hidden, self.tokens_G)

    @property
    def n_read(self) -> int:
        """How many of its tokens the next pass sees, the first of them."""
        return len(self.tokens_G)

    def columns(self, places_A: Ints) -> Ints:
        """Return where among what the pass reads of it some places are."""
        return places_A

    # What is asked

    def masks(self) -> Ints:
        """Return the masks of the active block."""
        inside = self.tokens_G[self.start : self.end]
        return self.start + np.flatnonzero(inside == self.mask_id)

    def asked(self) -> Ints:
        """Return the places (A,) that the next pass predicts: the masks of the active block that it may fill."""
        masks = self.masks()
        match self.settings.commit:
            case "random":
                order_G = self.drawn()[1]
                return np.sort(masks[np.argsort(-order_G[masks], kind="stable")[: self._count(len(masks))]])
            case "origin":
                return masks[self.drawn()[1, masks] < self._share()]
            case "remdm":
                return masks[self.drawn()[1, masks] >= self._stay()]
        return masks

    @property
    def is_done(self) -> bool:
        """Whether no pass can change the text: it is full up to its first end of sequence, and stays so."""
        if not self.keeps:
            return self.has_ended
        ends, masks = (np.flatnonzero(self.tokens_G == i) for i in (self.eos_id, self.mask_id))
        return len(masks) == 0 or (len(ends) > 0 and ends[0] < masks[0])

    @property
    def has_ended(self) -> bool:
        """Whether no block is left, or one that is over holds an end of sequence."""
        return self.start >= len(self.tokens_G) or self.eos_id in self.tokens_G[: self.start]

    @property
    def n_final(self) -> int:
        """How many tokens at the beginning no pass can change: what is committed, or finished blocks if it may go."""
        if not self.keeps:
            return self.start
        masks = np.flatnonzero(self.tokens_G == self.mask_id)
        return int(masks[0]) if len(masks) else len(self.tokens_G)

    def written(self) -> list[int]:
        """Return the tokens up to the first end of sequence, that included."""
        ends = np.flatnonzero(self.tokens_G == self.eos_id)
        return self.tokens_G[: ends[0] + 1 if len(ends) else None].tolist()

    # What is drawn

    def drawn(self) -> Floats:
        """Return the numbers in [0, 1) of the next step (3, G): for tokens, for positions, for ties of positions."""
        at = -(-self.start // self.block) * self.n_steps + self.step  # the first block may be shorter
        at = self.n_passes if self.settings.commit == "threshold" else at
        return self.draws_of(at)

    def draws_of(self, at: int) -> Floats:
        """Return the numbers in [0, 1) of a step (3, G)."""
        if self._numbers is None or self._numbers[0] != at:
            self._numbers = at, np.random.default_rng([*self.seed, at]).random((3, len(self.tokens_G)))
        return self._numbers[1]

    # What is committed

    def commit(self, tokens_A: Ints, scores_A: Floats) -> Ints:
        """Keep some of the tokens that a pass predicts for the places asked for; return which places."""
        again = self._again()  # of what was there before
        places = self._keep(self.asked(), tokens_A, scores_A)
        self.tokens_G[again] = self.mask_id
        self._go_on()
        return places

    @property
    def n_due(self) -> int:
        """How many tokens the next step commits, where that is known before the pass."""
        return self._count(len(self.masks()))

    def take(self, places: Ints, tokens: Ints) -> None:
        """Keep tokens at places that someone else has chosen."""
        self.tokens_G[places] = tokens
        self._go_on()

    def _go_on(self) -> None:
        """Count a pass, and find the next."""
        self.step, self.n_passes = self.step + 1, self.n_passes + 1
        self._skip()

    def _keep(self, asked_A: Ints, tokens_A: Ints, scores_A: Floats) -> Ints:
        """Keep some of the tokens that are predicted for some masks; return which places."""
        settings = self.settings
        if settings.commit in BLIND:
            chosen = np.arange(len(asked_A))
        else:
            _, order_G, ties_G = self.drawn()
            scores_A, ties_A = self._ends_last(tokens_A, scores_A), ties_G[asked_A]
            if settings.commit == "threshold":
                best = self._ranked(scores_A, ties_A)[:1]
                chosen = np.union1d(best, np.flatnonzero(scores_A >= settings.threshold))
            else:
                if settings.position_temperature > 0:  # without replacement, as the largest with Gumbel's noise
                    noise_A = -np.log(-np.log(np.clip(order_G[asked_A], 1e-300, None)))
                    scores_A = scores_A / settings.position_temperature + noise_A
                chosen = np.sort(self._ranked(scores_A, ties_A)[: self._count(len(asked_A))])
        places = asked_A[chosen]
        self.tokens_G[places], self.likely_G[places] = tokens_A[chosen], scores_A[chosen]
        return places

    def _ends_last(self, tokens_A: Ints, scores_A: Floats) -> Floats:
        """Give ends of sequence the least confidence, where they come after all others."""
        if self.settings.eos != "last":
            return scores_A
        least = 0.0 if self.settings.commit in ("confidence", "threshold") else -np.inf
        return np.where(tokens_A == self.eos_id, least, scores_A)

    def _ranked(self, scores_A: Floats, ties_A: Floats) -> Ints:
        """Return the order of scores, the largest first."""
        scores_A = np.round(scores_A, ALIKE)
        if self.settings.ties == "lowest":
            return np.argsort(-scores_A, kind="stable")
        return np.lexsort((ties_A, -scores_A))

    def _skip(self) -> None:
        """Go on to the next step that commits anything, in the next block where this one is over."""
        while not self.is_done:
            if self._is_over():
                self.start, self.end, self.step = self.end, min(self.end + self.block, len(self.tokens_G)), 0
                self.n_masks = len(self.masks())
            elif self._commits():
                return
            else:
                self.tokens_G[self._again()] = self.mask_id
                self.step += 1

    def _is_over(self) -> bool:
        """Whether nothing of the active block will change any more."""
        return self.step >= self.n_steps if not self.keeps else len(self.masks()) == 0

    def _commits(self) -> bool:
        """Whether the next step commits anything, as far as that is known before the pass."""
        if self.settings.commit in BLIND:
            return len(self.asked()) > 0
        return self.settings.commit not in COUNTED or self._count(len(self.masks())) > 0

    # How many, and which again

    def _count(self, n_masks: int) -> int:
        """Return how many tokens the next step commits."""
        if self.settings.counts == "even":
            return self.n_masks // self.n_steps + (self.step < self.n_masks % self.n_steps)
        return n_masks if self.step >= self.n_steps - 1 else int(np.float32(n_masks) * np.float32(self._share()))

    def _share(self) -> float:
        """Return 1 - s / t of the next step, the share of masks that leaves it; everything in the last."""
        if self.step >= self.n_steps - 1:
            return 1.0
        grid = np.linspace(1, GRID_END, self.n_steps + 1, dtype=np.float32)
        return float(1 - grid[self.step + 1] / grid[self.step])

    def _times(self) -> tuple[float, float, float]:
        """Return alpha before and after the next step, and sigma in it."""
        a_t, a_s = self.alphas[self.step], self.alphas[self.step + 1]
        return a_t, a_s, self.settings.remask.sigma(a_t, a_s) if self.is_on[self.step] else 0.0

    def _stay(self) -> float:
        """Return how likely a mask stays one in the next step."""
        a_t, a_s, sigma = self._times()
        return stay(a_t, a_s, 0.0 if self.settings.remask.confidence == "sum" else sigma)

    def _again(self) -> Ints:
        """Return the tokens of the active block that the next step masks again."""
        if self.keeps or self.step >= self.n_steps:
            return np.zeros(0, dtype=np.int64)
        inside = slice(self.start, self.end)
        a_t, a_s, sigma = self._times()
        is_token = self.tokens_G[inside] != self.mask_id
        sigma_G = np.minimum(
            sigma * weights(self.likely_G[inside], is_token, self.settings.remask.confidence), sigma_max(a_t, a_s)
        )
        return self.start + np.flatnonzero(is_token & (self.drawn()[1, inside] < sigma_G))

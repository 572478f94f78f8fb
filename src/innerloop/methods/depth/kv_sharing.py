"""Keys and values over iterations: whose a token attends to where another stopped early, or where memory is short.

share_step: in iteration t a token that stopped at N < t is attended to as it was in iteration N  (halting.md, "KV")
last_loop, first_loop, mean: while answering, one iteration's keys and values stand for all        (looped.md, 3)

Shapes: `B` rows, `P` columns of a slot, `L` tokens of a pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from innerloop.decoder.kv_buffer import FullLayer
from innerloop.decoder.ragged_cache import DepthCache, Slot
from innerloop.methods.depth.block_loop import KvShare
from innerloop.passes.tokens import PassInput, Tokens

Sides = list[Tensor]
"""The keys, or the values, of each layer."""

SHARED = "shared"


def stopped_earlier(reading: PassInput, tokens: Tokens, iteration: int) -> list[Slot]:
    """Return the slots 1..loop - 1, each with those tokens in view that have stopped at its iteration.

    Args:
        reading: the pass, whose cache has a slot for each iteration.
        tokens: the tokens that run ``iteration`` now.
        iteration: the iteration.
    """
    cache, everyone = reading.cache, reading.tokens
    active_BL = tokens.put(torch.zeros_like(everyone.real), tokens.real)
    found = []
    for earlier in range(1, iteration):
        slot, later = cache.slots.get(earlier), cache.slots.get(earlier + 1)
        if slot is None:
            continue
        went_on = slot.real_BP & False
        if later is not None:
            went_on = went_on | _among(slot.positions_BP, later.positions_BP, later.real_BP)
        if earlier + 1 == iteration:
            went_on = went_on | _among(slot.positions_BP, everyone.positions_RN, active_BL)
        stopped = slot.real_BP & ~went_on
        if bool(stopped.any()):
            found.append(slot.showing(stopped))
    return found


def _among(positions_BP: Tensor, others_BQ: Tensor, real_BQ: Tensor) -> Tensor:
    """Return which positions (B, P) are among the real ones of others (B, Q)."""
    return ((positions_BP[:, :, None] == others_BQ[:, None, :]) & real_BQ[:, None, :]).any(-1)


class SharedKv:
    """One slot for all iterations of one pass; a token attends to it, and to its own current keys and values.

    Args:
        kind: whose keys and values the slot keeps.
        cache: of the pass; the slots of earlier passes' iterations become one at first.
        n_loops: the number of iterations.
    """

    def __init__(self, kind: KvShare, cache: DepthCache, n_loops: int):
        self.kind, self.cache, self.n_loops = kind, cache, n_loops
        if SHARED not in cache.slots:
            slots = [cache.slots.pop(loop) for loop in range(1, n_loops + 1)]
            merged = slots[0 if kind == "first_loop" else -1]
            if kind == "mean":
                keys, values = (_mean([getattr(slot, side) for slot in slots]) for side in ("keys", "values"))
                merged = replace(merged, kept=[FullLayer.holding(*pair) for pair in zip(keys, values)])
            cache.slots[SHARED] = merged
        self.before = cache.slots[SHARED]
        self.own: list[tuple[Sides, Sides]] = []  # for the mean: the pass's own keys and values in each iteration

    def slot(self) -> Slot:
        """Return a slot for one iteration to read."""
        return self.before.fork()

    def remember(self, slot: Slot, iteration: int) -> None:
        """Keep what stands for all iterations, of what ``iteration`` has read."""
        if self.kind == "mean":
            n = self.before.length
            keys, values = ([s[:, :, n:].clone() for s in side if s is not None] for side in (slot.keys, slot.values))
            self.own.append((keys, values))
            if iteration == self.n_loops:
                for layer, *new in zip(slot.kept, *(_mean([own[side] for own in self.own]) for side in (0, 1))):
                    layer.cut(n)
                    layer.update(*new)
        if iteration == (1 if self.kind == "first_loop" else self.n_loops):
            self.cache.slots[SHARED] = slot


def _mean(loops: list[Sides]) -> Sides:
    """Return the mean over iterations of each layer's keys or values."""
    return [torch.stack(layer).mean(0) for layer in zip(*loops)]

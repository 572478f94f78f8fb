"""Which keys a token finds at an iteration that others have not reached (recurrent_depth.md, KV when depths differ).

A token that has run r iterations has keys in slots 1..r. One that runs iteration i needs keys of all before it:

    latest       those of iteration i; of tokens that ended before i, their last. Decoding equals reading at once.
    skip         those of iteration i; tokens that ended before are not seen. Decoding equals reading at once.
    always_last  the last that a token has, even past i. Approximate: while tokens are read together, those not done yet
                 show iteration i. (Huginn's code does so only where some token lacks iteration i, else it takes that.)
    compress     m slots, iteration i in slot i mod m; a token that never reached the slot shows its last. Approximate
                 beyond m iterations.
    anchor       m iterations with a slot each, one more slot for all that follow. Approximate beyond m + 1 iterations.

Where a stop rule reads words through a coda all are approximate: tokens that are read together look, before they end,
at keys that the coda has made of each other's states so far; read one by one, at those of the last states. So they may
end after another number of iterations.

Tokens that end are moved to a slot of those that ended there, so that a token is found exactly once, and nothing is
computed for those that no longer run.

Shapes: `B` rows, `L` tokens of a pass, `R` and `N` rows and columns of a packed part of them, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from innerloop.decoder.ragged_cache import DepthCache, Slot
from innerloop.methods.depth.recurrent_depth import DEFAULT_SLOTS, LookupKind
from innerloop.passes.ragged import BlockPass, DepthForward, TokenPass
from innerloop.passes.tokens import PassInput, Tokens

ENDED = "ended"


class Lookup:
    """The slots of a range of layers during one pass, in which tokens end one by one.

    Args:
        kind: which keys are found.
        n_slots: m, for compress and anchor.
        depth: whose layers run.
        reading: the pass.
        layers: the range.
        n_loops: the most iterations of any token.
        n_free: so many iterations leave nothing behind; for training, where a row is read in one pass.
    """

    def __init__(
        self,
        kind: LookupKind,
        n_slots: int | None,
        depth: DepthForward,
        reading: PassInput,
        layers: range,
        n_loops: int,
        n_free: int = 0,
    ):
        self.kind, self.depth, self.reading, self.layers, self.n_free = kind, depth, reading, layers, n_free
        self.n_slots = n_slots or DEFAULT_SLOTS.get(kind, n_loops)
        self.is_fleeting = kind == "always_last"
        n_apart = self.n_slots + 1 if kind == "anchor" else self.n_slots
        self.reach = n_loops + 1 if self.is_fleeting else min(n_loops, n_apart)  # who ends earlier is moved
        self.loop = 0
        self.here = reading  # where the iteration that ran last wrote its keys
        self.n_going = -1  # how many tokens are still running; below 0: all
        self.written: dict[int, tuple[int, Tokens, int]] = {}  # the first column of each slot's newest keys, and whose

    def slot_of(self, iteration: int) -> int:
        """Return the slot of an iteration."""
        if self.kind == "compress":
            return (iteration - 1) % self.n_slots + 1
        return min(iteration, self.n_slots + 1) if self.kind == "anchor" else iteration

    def read(self, tokens: Tokens, iteration: int) -> Tensor:
        """Run the layers on tokens that are in ``iteration``; return their states (R, N, D)."""
        self.loop, number = iteration, self.slot_of(iteration)
        is_free = iteration <= self.n_free
        if self.is_fleeting or is_free:
            self.here, self.written = replace(self.reading, cache=DepthCache()), {}
        else:
            self.here = self.reading
        slot = self.here.cache.slot(number, self.layers, self.reading.tokens.positions_RN)
        if number in self.written:
            self._forget(slot, number, tokens)
        start = slot.length
        states = self.depth.run(self.here, tokens, self.layers, number, self._ended(number))
        if not is_free:
            self.written[number] = (start, tokens, self.n_going)
        return states

    def end(self, gone_BL: Tensor, n_going: int) -> None:
        """Note that some of the tokens that ran last go no deeper, and how many go on."""
        number, self.n_going = self.slot_of(self.loop), n_going
        if self.kind == "skip" or self.loop >= self.reach or number not in self.written:
            return
        slot, cache = self.here.cache.slots[number], self.reading.cache
        start, tokens, _ = self.written[number]
        part = slot.take_out(start, _of_rows(tokens, gone_BL))
        if n_going == 0:
            slot.cut(start)
        key: Hashable = (ENDED, 0 if self.is_fleeting else number)
        cache.slot(key, self.layers, slot.positions_BP).append(part)

    def _ended(self, number: int) -> list[Slot]:
        """Return the slots of the tokens that have no keys in slot ``number``, because they ended before."""
        slots = self.reading.cache.slots
        if self.kind == "skip":
            return []
        found = [0] if self.is_fleeting else range(1, number + 1)
        return [slots[key] for key in ((ENDED, i) for i in found) if key in slots]

    def _forget(self, slot: Slot, number: int, tokens: Tokens) -> None:
        """Drop the keys that tokens have in a slot which they are about to use again."""
        start, before, n_before = self.written[number]
        if n_before == self.n_going:  # these are all whose keys are there
            slot.cut(start)
            return
        whole = torch.zeros_like(self.reading.tokens.positions_RN, dtype=torch.bool)
        slot.take_out(start, _of_rows(before, tokens.put(whole, tokens.real)))


class LookupPass(BlockPass):
    """f: the layers of a `Lookup`, over all tokens of a pass.

    Args:
        lookup: the layers and their slots.
        prepare: makes what the first layer sees of the tokens in an iteration.
    """

    def __init__(self, lookup: Lookup, prepare: Callable[[Tokens, int], Tokens]):
        super().__init__(lookup.depth, lookup.reading, lookup.layers)
        self.lookup, self.prepare = lookup, prepare

    def run(self, tokens: Tokens, iteration: int) -> Tensor:
        """Run one iteration on some tokens."""
        return self.lookup.read(self.prepare(tokens, iteration), iteration)

    def finish(self) -> None:
        """Note that all tokens are done."""
        self.lookup.end(self.reading.tokens.real, 0)


class LookupTokenPass(LookupPass, TokenPass):
    """f: the layers of a `Lookup`, over tokens that end one by one.

    Args:
        lookup: the layers and their slots.
        prepare: makes what the first layer sees of the tokens in an iteration.
        beside: of other layers through which the same tokens are looked at between iterations.
    """

    def __init__(self, lookup: Lookup, prepare: Callable[[Tokens, int], Tokens], beside: Lookup | None = None):
        super().__init__(lookup, prepare)
        self.lookups = [lookup] if beside is None else [lookup, beside]

    def active(self, states_A1D: Tensor) -> Tokens:
        """Return the tokens that go on, packed, with these states."""
        tokens = self.reading.tokens.with_states(self.spread(states_A1D)).pick(self.active_BL)
        assert tokens is not None
        return tokens

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with some tokens; the others keep the keys that they have."""
        before = self.active_BL
        super().keep_rows(rows)
        for lookup in self.lookups:
            lookup.end(before & ~self.active_BL, len(rows))

    def finish(self) -> None:
        """Note that all tokens are done."""
        self.lookup.end(self.active_BL, 0)


def _of_rows(tokens: Tokens, chosen_BL: Tensor) -> Tensor:
    """Return (B, N) which of some tokens' columns are among those chosen of the pass; False in other rows."""
    chosen_RN = tokens.take(chosen_BL) & tokens.real
    if tokens.rows_R is None:
        return chosen_RN
    return chosen_RN.new_zeros(len(chosen_BL), chosen_RN.shape[1]).index_copy(0, tokens.rows_R, chosen_RN)

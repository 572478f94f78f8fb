"""`DepthRun`: what a batch of rows carries from pass to pass where tokens have unlike depth.

Shapes: `B` rows, `L` tokens of a pass, `S` columns of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from innerloop.decoder.cache import fork
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.loop.trace import Trace
from innerloop.passes.tokens import CostScope, DepthPass, PassInput, PassOutput, Tokens


@dataclass
class DepthRun:
    """Passes of a depth method over the same rows.

    Attributes:
        forward: makes a pass.
        loops: how often it iterates; None: as its method says.
        passes: what each pass gave.
        wanted_BS: how many iterations each column shall have, where that is known.
        asked_B: the position of the last token that was given, where that is known.
        may_wait: whether a token may be left unfinished, for the next pass to go on with.
        trace: of the iterations inside a pass.
    """

    forward: DepthPass
    loops: int | None = None
    passes: tuple[PassOutput, ...] = ()
    wanted_BS: Tensor | None = None
    asked_B: Tensor | None = None
    may_wait: bool = False
    trace: Trace | None = None

    @property
    def has_shown(self) -> bool:
        """Whether the last pass has read out some of its tokens already."""
        return bool(self.passes) and self.passes[-1].shown is not None

    def fresh(self) -> DepthRun:
        """Return a run of the same rows in which nothing has been read."""
        return DepthRun(self.forward, self.loops)

    def keep_rows(self, rows: Tensor) -> DepthRun:
        """Return the run of some of the rows."""
        wanted_BS, asked_B = (None if t is None else t[rows] for t in (self.wanted_BS, self.asked_B))
        return replace(self, passes=(), wanted_BS=wanted_BS, asked_B=asked_B)

    def keep_columns(self, kept: Tensor) -> DepthRun:
        """Return the run with some of the columns."""
        wanted_BS = self.wanted_BS
        if wanted_BS is not None:
            wanted_BS = wanted_BS[:, kept[kept < wanted_BS.shape[1]]]
        return replace(self, passes=(), wanted_BS=wanted_BS)

    def merged(self, runs: Sequence[DepthRun | None], places: Tensor) -> DepthRun:
        """Return one run of the rows of several, in the order ``places``."""
        asked_B, wanted_BS = self.asked_B, self.wanted_BS
        if asked_B is not None:
            known = [run.asked_B for run in runs if run is not None and run.asked_B is not None]
            asked_B = torch.cat(known)[places]
        if wanted_BS is not None:  # it speaks of columns that have been read
            wanted_BS = torch.zeros(len(places), 0, dtype=torch.long, device=places.device)
        return replace(self, passes=(), wanted_BS=wanted_BS, asked_B=asked_B)

    def read(
        self,
        tokens: Tokens,
        past: DepthCache,
        columns: range,
        cost_scope: CostScope | None,
        rows: Tensor | None,
        weights: Callable[[], AbstractContextManager[None]],
        keeps_little: bool,
    ) -> tuple[Tensor, DepthCache]:
        """Make one pass over the tokens at some columns; return their states (B, L, D) and the cache that has them.

        With ``keeps_little`` no activations are kept inside the pass; the backward pass makes them again.
        """
        wanted_BL = None if self.wanted_BS is None else self.wanted_BS[:, columns.start : columns.stop]
        choices: dict[Hashable, Tensor] = {}  # the same when a checkpointed pass is run again

        def run(embeds: Tensor, cache: DepthCache, trace: Trace | None) -> PassOutput:
            with weights():
                known = (self.loops, columns.start, cost_scope, trace, wanted_BL, choices, self.may_wait, self.asked_B)
                return self.forward(PassInput(tokens.with_states(embeds), cache, *known))

        if keeps_little:
            grown: list[DepthCache] = []

            def run_on_fork(embeds: Tensor) -> PassOutput:
                cache = fork(past)
                if not grown:
                    grown.append(cache)
                return run(embeds, cache, None)

            deep = checkpoint(run_on_fork, tokens.states_RND, use_reentrant=False)
            cache = grown[0]
        else:
            cache = fork(past)
            n_known = len(self.trace.iterations) if self.trace is not None else 0
            deep = run(tokens.states_RND, cache, self.trace)
            if self.trace is not None and rows is not None:  # rows that have ended are here no more
                places = rows.tolist()
                for entry in self.trace.iterations[n_known:]:
                    entry.rows = [places[row] for row in entry.rows]
        for slot in cache.slots.values():  # those in which nobody took part lack the pass's columns
            slot.is_dense = slot.is_dense and slot.length >= columns.stop
        self.passes = (*self.passes, deep)
        if cost_scope is not None:
            done_BL = tokens.real_RN if deep.done_BL is None else deep.done_BL
            cost_scope.meter.depths.append((rows, deep.depths_BL, done_BL))
        return deep.states_BLD, cache

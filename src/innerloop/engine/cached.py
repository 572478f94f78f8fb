"""Canvases with a cache: a pass reads some columns of each on top of what is known of the others.

Which columns, each canvas says (`CachedCanvas`): finished blocks are known exactly where passes see by blocks, and what
is known approximately is what was read in an earlier pass. Canvases of which nothing is known, because they join or
read everything anew, make a pass of their own; then all are rows of one context again, each with its own columns.

Shapes: `R` rows of the context, `L` columns of a pass, `P` columns of the cache, `A` places that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from innerloop.engine.canvases import CanvasEngine, flat
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import Request
from innerloop.methods.denoise.block_canvas import BlockCanvas
from innerloop.methods.denoise.block_diffusion import BlockDiffusion
from innerloop.methods.denoise.cached_canvas import CachedCanvas
from innerloop.methods.denoise.canvas import Canvas, Ints
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.stale_canvas import StaleCanvas
from innerloop.model.model import LatentCore
from innerloop.passes.context import Context, merge

Read = tuple[list[int], Context, Context]
"""A pass over some of the canvases: which, the context before it, and the one after it."""


def has_cache(method: DenoisingMethod) -> bool:
    """Whether passes over a method's canvases read only some of their columns."""
    return isinstance(method, BlockDiffusion) or method.sampler.cache != "none"


class CachedEngine(CanvasEngine):
    """Fills canvases of which not everything is read in every pass."""

    def __init__(self, model: LatentCore, options: EngineOptions):
        super().__init__(model, options)
        self.n_lines = 2 if self.method.sampler.guidance > 0 else 1  # rows of each: with its question, and without

    def _reset(self) -> None:
        super()._reset()
        self.context: Context | None = None
        self.reads: list[Read] = []

    def _drop(self) -> None:
        super()._drop()
        self.context, self.reads = None, []

    def _stay(self, kept: Sequence[int]) -> None:
        super()._stay(kept)
        self.context = self._rows(self.context, kept) if self.context is not None and kept else None

    def _canvas(self, request: Request) -> CachedCanvas:
        seed, method = [request.options.seed, *request.draw], self.method
        given = request.row.ids(), self.mask_id, self.model.encoder.eos_id, seed
        canvas = BlockCanvas(method, *given) if isinstance(method, BlockDiffusion) else StaleCanvas(method, *given)
        return self._begun(canvas)

    def _fill_in(self, requests: Sequence[Request], canvases: Sequence[Canvas]) -> None:
        """Make one pass, and one over those of which nothing is known; keep what each canvas wants of both."""
        super()._fill_in(requests, canvases)
        parts = [
            (self._lines(chosen), self._kept([canvases[i] for i in chosen], before, after))
            for chosen, before, after in self.reads
        ]
        self.context, self.reads = merge(parts), []

    def _predict(self, requests: Sequence[Request], canvases: Sequence[Canvas], asked: Sequence[Ints]) -> Tensor:
        own = [canvas for canvas in canvases if isinstance(canvas, CachedCanvas)]
        for canvas in own:
            canvas.choose()
        found: dict[tuple[int, int], Tensor] = {}
        for is_known in (True, False):
            chosen = [i for i, canvas in enumerate(own) if (len(canvas.kept) > 0) == is_known]
            if chosen:
                context = self._rows(self.context, chosen) if is_known and self.context is not None else None
                logits_AV = self._read_on(chosen, context, requests, own, asked)
                ends = [len(asked[i]) for i in chosen] * self.n_lines
                found |= zip([(line, i) for line in range(self.n_lines) for i in chosen], logits_AV.split(ends))
        return torch.cat([found[key] for key in sorted(found)])

    def _read_on(
        self,
        chosen: list[int],
        context: Context | None,
        requests: Sequence[Request],
        canvases: Sequence[CachedCanvas],
        asked: Sequence[Ints],
    ) -> Tensor:
        """Return the logits (A, V) of places of the chosen canvases, on what is known; (2A, V) with guidance."""
        model, n_lines = self.model, self.n_lines
        canvases, asked = [canvases[i] for i in chosen], [asked[i] for i in chosen]
        width = max(len(canvas.reading) for canvas in canvases)
        table_4RL = np.zeros((4, n_lines * len(canvases), width), dtype=np.int64)
        for r, canvas in enumerate(canvases):
            for line in range(n_lines):
                columns = canvas.reading
                whole, numbers = canvas.whole(masks_prompt=line > 0), canvas.numbers(columns)
                own = whole[columns], np.ones_like(columns), columns, numbers
                table_4RL[:, n_lines * r + line, : len(columns)] = own
        ids_RL, real_RL, positions_RL, numbers_RL = self._sent(table_4RL)
        if context is None:
            context = Context(model.backbone, len(ids_RL), self.prefill.slots.meter)
            context.rows = self.prefill.slots.of([requests[i] for i in chosen]).repeat_interleave(n_lines)
        after, sees = context.fork(), self.method.plan.sees
        halves_RL = numbers_RL if sees == "blocks" else None
        lines = [canvas for canvas in canvases for _ in range(n_lines)]
        embeds_RLD = model.backbone.embed(ids_RL) if self.soft is None else self.soft.embeds(lines, ids_RL)
        states_RLD = after.read(embeds_RLD, real_RL, sees=sees, halves_BL=halves_RL, positions_BL=positions_RL)
        self.reads.append((chosen, context, after))
        rows, columns = flat([canvas.predicting(places) for canvas, places in zip(canvases, asked)])
        of_lines = [np.stack([n_lines * rows + line, columns]) for line in range(n_lines)]
        at_2A = self._sent(np.concatenate(of_lines, axis=1))
        return model.backbone.head(states_RLD[at_2A[0], at_2A[1]]).float()

    def _kept(self, canvases: Sequence[Canvas], before: Context, after: Context) -> Context:
        """Return the context after a pass with the columns that are wanted; the one before where these are the same."""
        own = [canvas for canvas in canvases if isinstance(canvas, CachedCanvas)]
        wanted = [canvas.to_keep() for canvas in own]
        if before.length > 0 and all(np.array_equal(canvas.kept, want) for canvas, want in zip(own, wanted)):
            return before
        columns_2RP = np.zeros((2, self.n_lines * len(own), max(map(len, wanted))), dtype=np.int64)
        for r, (canvas, want) in enumerate(zip(own, wanted)):
            n, rows = len(want), slice(self.n_lines * r, self.n_lines * (r + 1))
            where = np.zeros(len(canvas.prompt) + len(canvas.tokens_G), dtype=np.int64)
            where[canvas.kept] = before.length - len(canvas.kept) + np.arange(len(canvas.kept))
            where[canvas.reading] = before.length + np.arange(len(canvas.reading))
            columns_2RP[0, rows, columns_2RP.shape[2] - n :] = where[want]
            columns_2RP[1, rows, columns_2RP.shape[2] - n :] = 1
            canvas.kept = want
        columns_RP, real_RP = self._sent(columns_2RP)
        return after.pick(columns_RP, real_RP)

    def _lines(self, canvases: Sequence[int]) -> list[int]:
        return [self.n_lines * i + line for i in canvases for line in range(self.n_lines)]

    def _rows(self, context: Context | None, canvases: Sequence[int]) -> Context:
        """Return the context of some canvases, those of which it knows."""
        assert context is not None
        rows = self._lines(canvases)
        if rows == list(range(len(context.next_position_B))):
            return context
        return context.keep_rows(torch.tensor(rows, device=self.model.device))

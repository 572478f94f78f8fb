"""`Context`: what a batch of rows has read so far - the `C` of the method cards - and how it reads more.

Every pass of every method goes through `Context.read`, which keeps masks and position ids explicit, counts the cost and
checkpoints the pass if asked. A fork reads ahead and leaves the context as it was: so a block of latents is refined
over and over on one cached prefix.

Shapes: `B` rows, `L` new positions, `P` earlier columns, `D` width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cache import (
    AnyCache,
    expect_padding,
    fork,
    join_rows,
    keep_columns,
    pick_columns,
    select_rows,
    window_of,
)
from innerloop.decoder.cost import CostMeter
from innerloop.decoder.masks import Sees, block_causal
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.decoder.token_losses import LogitsFn
from innerloop.passes.depth_run import DepthRun
from innerloop.passes.tokens import CostScope, Tokens

Weights = Callable[[], AbstractContextManager[None]]


class Context:
    """The cache, mask and positions of a batch of rows.

    Args:
        backbone: what reads.
        n_rows: the number of rows `B`.
        meter: where passes and positions are counted.
        checkpoint_passes: keep no activations inside a pass; recompute them in the backward pass.
        depth: what makes the passes in the decoder's stead, for methods whose tokens have unlike depth.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_rows: int,
        meter: CostMeter | None = None,
        checkpoint_passes: bool = False,
        depth: DepthRun | None = None,
    ):
        self.backbone = backbone
        self.depth = depth
        self.cache: AnyCache = backbone.empty_cache() if depth is None else depth.forward.empty_cache()
        self.mask_BP: Tensor | None = None  # None: no column read so far is padding
        self.halves_BP: Tensor | None = None  # the numbers of columns that were read by blocks
        self.length = 0
        self.next_position_B = torch.zeros(n_rows, dtype=torch.long, device=backbone.device)
        self.rows: Tensor | None = None  # which rows of the meter these are; None: all of them, in order
        self.meter = meter
        self.checkpoint_passes = checkpoint_passes
        self.weights: Weights = nullcontext  # what a pass runs under, such as an iteration's LoRA weights

    def fresh(self) -> Context:
        """Return a context of the same rows that has read nothing."""
        depth = None if self.depth is None else self.depth.fresh()
        empty = Context(self.backbone, len(self.next_position_B), self.meter, self.checkpoint_passes, depth)
        empty.rows = self.rows
        return empty

    def fork(self) -> Context:
        """Return a context with the same past that reads on by itself; nothing is copied."""
        twin = copy.copy(self)
        twin.cache = fork(self.cache)
        twin.depth = copy.copy(self.depth)
        return twin

    def keep_rows(self, rows: Tensor) -> Context:
        """Return the context of the rows ``rows`` (R,) alone."""
        part = copy.copy(self)
        part.cache = select_rows(self.cache, rows)
        part.mask_BP = None if self.mask_BP is None else self.mask_BP[rows]
        part.halves_BP = None if self.halves_BP is None else self.halves_BP[rows]
        part.next_position_B = self.next_position_B[rows]
        part.rows = rows if self.rows is None else self.rows[rows]
        part.depth = None if self.depth is None else self.depth.keep_rows(rows)
        return part

    def read(
        self,
        embeds_BLD: Tensor,
        mask_BL: Tensor | None = None,
        all_states: bool = False,
        counted_B: Tensor | None = None,
        normed: bool = True,
        weights: Weights | None = None,
        sees: Sees = "past",
        seen_BQP: Tensor | None = None,
        halves_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
        keeps: bool = True,
    ):
        """Read new positions in one pass and remember them.

        Args:
            embeds_BLD: their input embeddings.
            mask_BL: 1 where real, 0 where padding; None when all are real. Padding takes no position and is never
                attended to; its own output is meaningless.
            all_states: return the states after every layer, not only the last.
            normed: False gives the states before the final norm.
            weights: makes the block that the pass runs in; None: the context's own.
            counted_B: the rows whose cost counts; None: all. A row that has ended rides along without being billed.
            sees: with ``all`` each new position sees all that has been read, what comes after it too, and windows are
                lifted; what was read before stays as it was, and must have been read so too where layers have windows.
            seen_BQP: with ``all``, which columns each new position sees; None: all real ones.
                With ``blocks`` it sees by the numbers of ``halves_BL``, from the first pass on.
            halves_BL: the number of each new position, by which `block_causal` tells what it sees.
            positions_BL: their positions, where they do not follow each other behind what has been read.
            keeps: False: nothing is read after this, the first pass, so no keys and values are kept.

        Returns:
            The final-norm states (B, L, D), or the tuple of all states (see `Backbone.forward`).
        """
        assert (sees == "blocks") == (halves_BL is not None), "blocks are told by the numbers of their columns"
        n_rows, n_new, _ = embeds_BLD.shape
        if mask_BL is None:
            new_B: Tensor | int = n_new
            following_BL = self.next_position_B[:, None] + torch.arange(n_new, device=embeds_BLD.device)
        else:
            mask_BL = mask_BL.long()
            new_B = mask_BL.sum(1)
            following_BL = (self.next_position_B[:, None] + mask_BL.cumsum(1) - 1).clamp(min=0)
        positions_BL = following_BL if positions_BL is None else positions_BL
        past_B = self.next_position_B
        self._extend_mask(mask_BL, n_rows, n_new)
        seen_BQP = seen_BQP if halves_BL is None else self._seen(halves_BL, self.length)
        if self.meter is not None:
            billed_B = new_B if counted_B is None else counted_B * new_B
            real = 1 if mask_BL is None else mask_BL
            keys_B = None if seen_BQP is None else (seen_BQP.sum(2) * real).sum(1)
            self.meter.count(self.rows, billed_B, past_B, sees, keys_B)
        self.next_position_B = self.next_position_B + new_B
        self.length += n_new
        if self.depth is not None:
            return self._read_deep(embeds_BLD, mask_BL, positions_BL, weights or self.weights, counted_B)
        known = {"all_states": all_states, "normed": normed}
        cache = self.cache if keeps else None
        return self._pass(embeds_BLD, positions_BL, weights or self.weights, sees, seen_BQP, cache, known)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the time of a block towards a phase, if anything is counted."""
        return nullcontext() if self.meter is None else self.meter.phase(name)

    def trim(self) -> Context:
        """Return the context without columns that are padding in every row; this asks the device which they are."""
        if self.mask_BP is None:
            return self
        is_real = self.mask_BP.any(0)
        kept = torch.nonzero(is_real)[:, 0]
        if len(kept) < self.length and isinstance(self.cache, DepthCache):
            kept = torch.arange(int(kept[0]), self.length, device=kept.device)
        whole = len(kept) == self.length
        mask = self.mask_BP if whole else self.mask_BP[:, kept]
        part = copy.copy(self)
        part.mask_BP = None if self.depth is None and bool(mask.all()) else mask
        part.halves_BP = None if self.halves_BP is None else self.halves_BP[:, kept]
        first, window = 0, window_of(self.cache)
        if window is not None:
            n_after = mask.flip(1).cumsum(1).flip(1)
            first = int((mask.bool() & (n_after < window)).any(0).long().argmax()) if window > 1 else len(kept)
        part.depth = None if self.depth is None else self.depth.keep_columns(kept)
        if not whole or window is not None or isinstance(self.cache, DepthCache):
            part.cache = keep_columns(self.cache, kept, first, is_padded=part.mask_BP is not None)
            part.length = len(kept)
        return part

    def pick(self, columns_BP: Tensor, real_BP: Tensor) -> Context:
        """Return the context of some columns alone, each row's own; ``real_BP`` is 0 where one is padding."""
        part = copy.copy(self)
        part.cache, part.length = pick_columns(self.cache, columns_BP), columns_BP.shape[1]
        part.mask_BP, part.next_position_B = real_BP, real_BP.sum(1)
        part.halves_BP = None if self.halves_BP is None else self.halves_BP.gather(1, columns_BP)
        return part

    def shown(self, states_BLD: Tensor, rows_U: Tensor, columns_U: Tensor) -> LogitsFn:
        """Return what shows places of the last pass."""
        if self.depth is not None and self.depth.has_shown:
            return lambda part: self.read_out(states_BLD, rows_U[part], columns_U[part])
        return self.backbone.head_inputs(states_BLD[rows_U, columns_U])

    def read_out(self, states_BLD: Tensor, rows_U: Tensor, columns_U: Tensor) -> Tensor:
        """Return the logits (U, V) of places of the last pass; those that it has read out are not read out again."""
        if self.depth is None or self.depth.passes[-1].shown is None:
            return self.backbone.head(states_BLD[rows_U, columns_U])
        places_A, logits_AV = self.depth.passes[-1].shown
        index = torch.full((states_BLD[..., 0].numel() + 1,), -1, device=places_A.device)
        index[places_A] = torch.arange(len(places_A), device=places_A.device)
        index[-1] = -1
        found_U = index[rows_U * states_BLD.shape[1] + columns_U]
        rest = torch.nonzero(found_U < 0)[:, 0]
        others = self.backbone.head(states_BLD[rows_U[rest], columns_U[rest]])
        if len(rest) == len(found_U):
            return others
        return logits_AV[found_U].index_copy_(0, rest, others.to(logits_AV.dtype))

    def peek(self, embeds_BLD: Tensor, mask_BL: Tensor | None = None, **options: Any):
        """Read as `read` does, but forget it again."""
        return self.fork().read(embeds_BLD, mask_BL, **options)

    def _extend_mask(self, mask_BL: Tensor | None, n_rows: int, n_new: int) -> None:
        if mask_BL is None and self.mask_BP is None:
            return
        ones = torch.ones(n_rows, 1, dtype=torch.long, device=self.next_position_B.device)
        past = ones.expand(-1, self.length) if self.mask_BP is None else self.mask_BP
        self.mask_BP = torch.cat([past, ones.expand(-1, n_new) if mask_BL is None else mask_BL], dim=1)

    def _seen(self, halves_BL: Tensor, n_before: int) -> Tensor:
        """Remember the numbers of new columns; return which columns each of them sees (B, L, P)."""
        assert self.halves_BP is not None or n_before == 0, "what is read by blocks is read so from the first pass on"
        known = halves_BL[:, :0] if self.halves_BP is None else self.halves_BP
        self.halves_BP = torch.cat([known, halves_BL], dim=1)
        real_BP = torch.ones_like(self.halves_BP) if self.mask_BP is None else self.mask_BP
        return block_causal(self.halves_BP, real_BP, halves_BL.shape[1])

    def _read_deep(
        self,
        embeds_BLD: Tensor,
        mask_BL: Tensor | None,
        positions_BL: Tensor,
        weights: Weights,
        counted_B: Tensor | None,
    ) -> Tensor:
        """Let what the depth method owns make the pass."""
        assert self.depth is not None and isinstance(self.cache, DepthCache)
        tokens = Tokens(embeds_BLD, positions_BL, None if mask_BL is None else mask_BL.bool())
        scope = None if self.meter is None else CostScope(self.meter, self.rows, counted_B)
        columns = range(self.length - embeds_BLD.shape[1], self.length)
        keeps_little = self.checkpoint_passes and torch.is_grad_enabled()
        states, self.cache = self.depth.read(tokens, self.cache, columns, scope, self.rows, weights, keeps_little)
        return states

    def _pass(
        self,
        embeds_BLD: Tensor,
        positions_BL: Tensor,
        weights: Weights,
        sees: Sees,
        seen_BQP: Tensor | None,
        cache: AnyCache | None,
        options: dict[str, bool],
    ):
        mask: Any = self.mask_BP
        if mask is None and sees != "past":
            mask = positions_BL.new_ones(len(positions_BL), self.length)
        is_plain = sees == "past" and options == {"all_states": False, "normed": True}
        compiled = self.backbone.compiled if is_plain else None
        if compiled is not None and compiled.takes(self.cache, embeds_BLD.shape[1]):
            with weights():
                return compiled(embeds_BLD, positions_BL, mask, self.cache)
        if mask is not None and not isinstance(self.cache, DepthCache):
            window, dtype = expect_padding(self.cache), embeds_BLD.dtype
            mask = self.backbone.mask_of(mask, embeds_BLD.shape[1], window, dtype, sees, seen_BQP)
        known = {"mask": mask, "positions_BL": positions_BL, **options}
        if not (self.checkpoint_passes and torch.is_grad_enabled()):
            with weights():
                return self.backbone(embeds_BLD, cache=cache, **known)
        # What is kept for the backward pass holds on to `run`, and `run` must not hold on to the pass's own cache.
        backbone, past = self.backbone, self.cache
        grown: list[Any] = []
        is_read: list[bool] = []

        def run(embeds: Tensor):
            cache = fork(past)
            if not is_read:
                grown.append(cache)
            with weights():  # inside, so that they are the same when the pass is run again
                return backbone(embeds, cache=cache, **known)

        states = checkpoint(run, embeds_BLD, use_reentrant=False)
        is_read.append(True)
        self.cache = grown.pop()
        return states


def merge(parts: Sequence[tuple[list[int], Context]]) -> Context:
    """Put contexts side by side, their rows in the given places; shorter ones get padding before their own columns."""
    order = [row for rows, _ in parts for row in rows]
    places = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=parts[0][1].next_position_B.device)
    contexts = [context for _, context in parts]
    whole = copy.copy(contexts[0])
    whole.length = max(context.length for context in contexts)
    gaps = [whole.length - context.length for context in contexts]
    whole.cache = join_rows([context.cache for context in contexts], gaps, places)
    whole.next_position_B = torch.cat([context.next_position_B for context in contexts])[places]
    whole.depth = contexts[0].depth and contexts[0].depth.merged([context.depth for context in contexts], places)
    if any(gaps) or any(context.mask_BP is not None for context in contexts):
        masks = [
            context.next_position_B.new_ones(len(context.next_position_B), context.length)
            if context.mask_BP is None
            else context.mask_BP
            for context in contexts
        ]
        whole.mask_BP = torch.cat([pad(mask, (gap, 0)) for mask, gap in zip(masks, gaps)])[places]
    if contexts[0].halves_BP is not None:
        halves = [context.halves_BP for context in contexts if context.halves_BP is not None]
        whole.halves_BP = torch.cat([pad(half, (gap, 0)) for half, gap in zip(halves, gaps)])[places]
    if whole.rows is not None:
        whole.rows = torch.cat([context.rows for context in contexts if context.rows is not None])[places]
    return whole

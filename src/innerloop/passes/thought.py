"""The thought: from a laid-out batch to what the answer is written on. Training and generation share it.

    prefix  -- read once -->  cache C
    region  -- the inner loop, each pass on top of C -->  z_T
    pending -- what is left to read with the suffix: z_T when it is fed once more; everything, when nothing loops

Shapes: `B` rows, `N` region columns, `D` width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from innerloop.config.method import Method
from innerloop.halting.evidence import RowInfo
from innerloop.loop.loop import InnerLoop, LoopResult
from innerloop.loop.trace import Trace
from innerloop.passes.context import Context, Weights, merge
from innerloop.passes.tokens import PassOutput
from innerloop.text.batch import Batch

LoopWeights = Callable[[int], AbstractContextManager[None]]
Masked = tuple[Tensor, Tensor | None]
"""Embeddings (B, L, D) and their mask (B, L), None when all is real."""
Pinned = tuple[Tensor, Tensor]
"""Which positions of the region are text (B, N, 1), and its embeddings (B, N, D)."""


@dataclass
class Thought:
    """What thinking leaves for writing.

    Attributes:
        context: what has been read.
        pending: (embeddings, mask) still to be read, in order, in one pass with the first written token.
        first_column: the batch column at which ``pending`` begins.
        loop: what the loop did; None when nothing looped.
        region_mask: of the looped columns.
        state_mask: of the positions of the final state.
        pinned: the text between the latents, which is read as it is whatever the state.
        prompt: the states of the prefix, for a decoder that reads them, and their mask.
        answer: what the pass of the answer gave: the states of its columns (B, L, D), after every layer if asked for.
        after: the context in which the answer has been read too.
        layer_states: where asked for, the states after each layer of each pass: for each iteration, the rows that ran
            it and n_layers + 1 tensors (A, N, D).
    """

    context: Context
    pending: list[Masked]
    first_column: int
    loop: LoopResult | None = None
    region_mask: Tensor | None = None
    state_mask: Tensor | None = None
    pinned: Pinned | None = None
    prompt: Masked | None = None
    layer_states: list[tuple[Tensor, ...]] = field(default_factory=list)
    answer: tuple[Tensor, ...] = ()
    after: Context | None = None

    @property
    def deep(self) -> Sequence[PassOutput]:
        """What the passes gave in which tokens had unlike depth, the answer's among them."""
        run = (self.context if self.after is None else self.after).depth
        return () if run is None else run.passes


def think(
    method: Method,
    loop: InnerLoop,
    batch: Batch,
    context: Context,
    trace: Trace | None = None,
    read_out: Callable[[Tensor], Tensor] | None = None,
    all_states: bool = False,
    stem: Sequence[int] = (),
) -> Thought:
    """Read the prefix and refine the region of a batch; ``stem`` are the tokens that every answer begins with.

    Positions of the region that are text are read as they are in every pass, and the final state has them so.
    """
    (prefix, prefix_mask), (region, region_mask) = segments = [_embed(context, batch, s) for s in (0, 1)]
    if loop.slots is not None and region.shape[1]:
        region = loop.slots(region)
        segments[1] = (region, region_mask)
    n_loops = max(batch.n_loops)
    makes_first = method.first_state == "forward" and region.shape[1] > 0
    reads_state = method.answering.decoder != "lm_head"
    edit = loop.edit
    if edit is not None:
        edit.begin(batch, range(len(batch)) if context.rows is None else context.rows.tolist())
    if n_loops == 0 and not makes_first and not method.decode_lora and not reads_state:
        if edit is not None:
            edit.enter(None, region, batch.n_loops)
            segments[1] = edit.leave(region, batch.n_loops), region_mask
        thought = Thought(context, segments, first_column=0, region_mask=region_mask)
        return thought if edit is None else edit.show(thought, batch)
    pinned: Pinned | None = None
    state_mask = region_mask
    if batch.pinned_BN is not None:
        pinned = batch.pinned_BN[..., None].bool(), region
        state_mask = 1 - batch.pinned_BN if region_mask is None else region_mask * (1 - batch.pinned_BN)

    normed = method.loop.feedback_site == "post_norm"
    read = prefix
    if prefix.shape[1]:
        with context.phase("prefill"):
            read = context.read(prefix, prefix_mask, normed=normed)
    with context.phase("thought"):
        steps: AppendPass | RegionPass
        if method.scope == "append":
            state = loop.feed_back(read[:, -1:], None) if method.first_state == "forward" else region[:, :1]
            steps = AppendPass(context, region_mask, loop.weights, normed)
        else:
            prompt = segments[0] if method.prefix_kv == "per_iter" else None
            is_last = method.answer_context == "kv_last"
            steps = RegionPass(
                context, region_mask, loop.weights, normed, prompt, is_last, all_states, state_mask, pinned
            )
            steps.before = read[:, -1:] if prefix.shape[1] else None
            state = loop.feed_back(steps(region, 0), steps.before) if method.first_state == "forward" else region
            steps.layer_states.clear()
        if method.loop.detach and method.first_state == "forward":
            state = state.detach()
        read_answer = None
        if method.loop.stop_site == "answer" and not loop.training:
            eot = batch.ids_BS[:1, batch.bounds[1] : batch.bounds[1] + 1]
            ids = torch.cat([eot, eot.new_tensor([stem])], dim=1)
            weights = partial(loop.weights, loop.max_loops) if method.decode_lora else None
            read_answer = partial(_read_answer, method, steps, context.backbone.embed(ids), weights)
        result = loop(steps, state, batch.n_loops, trace, read_out, read_answer)
        if isinstance(steps, RegionPass) and method.answer_context == "kv_last":
            context = steps.finish(context, region, region_mask)

    if method.decode_lora:
        context.weights = partial(loop.weights, loop.max_loops)  # T, whatever a row of the batch ran
    mask = region_mask
    if method.scope == "append":
        mask = state_mask = None if mask is None else mask.amax(1, keepdim=True)  # every row feeds its last latent
    layer_states = steps.layer_states if isinstance(steps, RegionPass) else []
    thought = Thought(
        context, [], batch.bounds[1], result, region_mask, state_mask, pinned, (read, prefix_mask), layer_states
    )
    if method.answer_context == "refeed":
        fed = result.state.detach() if method.loop.detach and method.scope == "append" else result.state
        fed = fed if pinned is None else torch.where(*pinned, fed)
        thought.pending, thought.first_column = [(fed, mask)], batch.bounds[1] - fed.shape[1]
    return thought if edit is None else edit.show(thought, batch)


def _read_answer(
    method: Method,
    steps: AppendPass | RegionPass,
    begin_1LD: Tensor,
    weights: Weights | None,
    state: Tensor,
    active_B: Tensor | None,
) -> Tensor:
    """Return the logits (A, 1, V) of the answer's first own token, were ``state`` (A, N, D) the last."""
    begin: Masked = (begin_1LD.expand(len(state), -1, -1), None)
    refeeds = method.answer_context == "refeed"
    context, mask = steps.ahead(refeeds)
    pending = join([(state, mask), begin] if refeeds else [begin])
    return context.backbone.head(context.read(*pending, counted_B=active_B, weights=weights)[:, -1:])


def _embed(context: Context, batch: Batch, segment: int) -> Masked:
    columns, mask = batch.columns(segment)
    return context.backbone.embed(batch.ids_BS[:, columns]), mask


def join(pieces: Sequence[Masked]) -> Masked:
    """Put embeddings side by side, with one mask over all, or None when nothing is padded."""
    embeds = torch.cat([embed for embed, _ in pieces], dim=1)
    if all(mask is None for _, mask in pieces):
        return embeds, None
    masks = [embed.new_ones(embed.shape[:2], dtype=torch.long) if mask is None else mask for embed, mask in pieces]
    return embeds, torch.cat(masks, dim=1)


class RegionPass:
    """f over all looped positions at once, each pass on the same prefix; the cache of a pass is dropped with the next.

    Args:
        prefix: what was read before.
        mask_BN: of the looped positions.
        weights: an iteration's weights.
        normed: whether outputs are states after the final norm.
        prompt: the prefix, to be read again in every pass with its weights; None: read once, with the base weights.
        keeps_caches: rows that leave keep the cache of their last pass, for `finish`.
        all_states: keep the states after every layer, in ``layer_states``.
        state_mask: of the positions that are latents.
        pinned: the text between them.
    """

    compacts = True
    row_info: RowInfo | None = None

    def __init__(
        self,
        prefix: Context,
        mask_BN: Tensor | None,
        weights: LoopWeights,
        normed: bool,
        prompt: Masked | None = None,
        keeps_caches: bool = False,
        all_states: bool = False,
        state_mask: Tensor | None = None,
        pinned: Pinned | None = None,
    ):
        self.state_mask, self.pinned = state_mask, pinned
        self.prefix, self.mask_BN, self.weights, self.normed = prefix, mask_BN, weights, normed
        self.prompt, self.keeps_caches, self.all_states = prompt, keeps_caches, all_states
        self.before: Tensor | None = None
        self.context: Context | None = None  # the prefix and the last pass
        self.rows = list(range(len(prefix.next_position_B)))
        self.ended: list[tuple[list[int], Context | None]] = []
        self.layer_states: list[tuple[Tensor, ...]] = []

    def __call__(self, inputs_BND: Tensor, loop: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return u (B, N, D); the first ``n_extra`` inputs are no slots, and have no output."""
        weights: Weights = partial(self.weights, loop)
        if self.prompt is None:
            self.context = self.prefix.fork()
        else:
            self.context = self.prefix.fresh()
            self.context.read(*self.prompt, weights=weights)
        mask = self.mask_BN if n_extra == 0 else with_extra(self.mask_BN, n_extra)
        if self.pinned is not None:
            fed = torch.where(*self.pinned, inputs_BND[:, n_extra:])
            inputs_BND = torch.cat([inputs_BND[:, :n_extra], fed], dim=1)
        if self.all_states:
            states = self.context.read(inputs_BND, mask, all_states=True, normed=self.normed, weights=weights)
            states = tuple(s[:, n_extra:] for s in states)
            last = states[-1] if self.normed else self.context.backbone.norm(states[-1])  # as the teacher's last
            self.layer_states.append((*states[:-1], last))
            return states[-1]
        return self.context.read(inputs_BND, mask, normed=self.normed, weights=weights)[:, n_extra:]

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with some rows."""
        device = self.prefix.next_position_B.device
        if self.keeps_caches:
            leaving = [i for i in range(len(self.rows)) if i not in set(rows)]
            cache = None if self.context is None else self.context.keep_rows(torch.tensor(leaving, device=device))
            self.ended.append(([self.rows[i] for i in leaving], cache))
        index = torch.tensor(rows, device=device)
        self.prefix, self.rows = self.prefix.keep_rows(index), [self.rows[i] for i in rows]
        self.mask_BN = None if self.mask_BN is None else self.mask_BN[index]
        self.state_mask = None if self.state_mask is None else self.state_mask[index]
        self.before = None if self.before is None else self.before[index]
        if self.pinned is not None:
            is_text, text = self.pinned
            self.pinned = is_text[index], text[index]
        if self.prompt is not None:
            embeds, mask = self.prompt
            self.prompt = embeds[index], None if mask is None else mask[index]

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows, for what looks at their states."""
        if self.prefix.meter is not None:
            self.prefix.meter.add(self.prefix.rows, flops_B)

    def ahead(self, refeeds: bool) -> tuple[Context, Tensor | None]:
        """Return a context to read the answer on, before the last state is fed once more or instead, and its mask."""
        past = self.prefix if refeeds else self.context
        assert past is not None
        return past.fork(), self.mask_BN

    def probe(self) -> RegionPass:
        """Return a pass that leaves this one's cache and states alone."""
        twin = copy.copy(self)
        twin.all_states = False
        return twin

    def finish(self, prefix: Context, region: Tensor, mask_BN: Tensor | None) -> Context:
        """Return the context of all rows, each with the cache of its own last pass.

        Rows that never looped read the region as it was given.
        """
        parts: list[tuple[list[int], Context]] = []
        for rows, context in [*self.ended, (self.rows, self.context)]:
            if context is None:
                index = torch.tensor(rows, device=region.device)
                context = prefix.keep_rows(index)
                context.read(region[index], None if mask_BN is None else mask_BN[index])
            parts.append((rows, context))
        longest = max(context.length for _, context in parts)
        for rows, context in parts:  # a row that never looped has no column for the timestep's token
            if gap := longest - context.length:
                padding = region.new_zeros(len(rows), gap, region.shape[2])
                context.read(padding, padding[..., 0].long())
        return parts[0][1] if len(parts) == 1 else merge(parts)


class AppendPass:
    """f over one new latent per iteration, which stays in the context; rows that have ended read padding."""

    compacts = False
    state_mask: Tensor | None = None
    before: Tensor | None = None
    row_info: RowInfo | None = None
    peeks = False

    def __init__(self, context: Context, mask_BN: Tensor | None, weights: LoopWeights, normed: bool):
        self.context, self.mask_BN, self.weights, self.normed = context, mask_BN, weights, normed

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows, for what looks at their states."""
        if self.context.meter is not None:
            self.context.meter.add(self.context.rows, flops_B)

    def ahead(self, refeeds: bool) -> tuple[Context, Tensor | None]:
        """Return a context to read the answer on; rows that have ended read too, in vain."""
        return self.context.fork(), None

    def probe(self) -> AppendPass:
        """Return a pass that reads ahead and forgets it."""
        twin = copy.copy(self)
        twin.peeks = True
        return twin

    def __call__(self, inputs_B1D: Tensor, loop: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return u (B, 1, D)."""
        mask = None if self.mask_BN is None else self.mask_BN[:, loop - 1 : loop]
        if active_B is not None:
            mask = active_B[:, None].long() if mask is None else mask * active_B[:, None]
        context = self.context.fork() if self.peeks else self.context
        return context.read(inputs_B1D, mask, normed=self.normed, weights=partial(self.weights, loop))

    def keep_rows(self, rows: list[int]) -> None:
        """Rows stay."""


def with_extra(mask_BN: Tensor | None, n_extra: int) -> Tensor | None:
    """Return the mask with real columns before the slots."""
    if mask_BN is None or n_extra == 0:
        return mask_BN
    return torch.cat([mask_BN.new_ones(len(mask_BN), n_extra), mask_BN], dim=1)

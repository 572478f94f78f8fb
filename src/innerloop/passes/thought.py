"""The thought: from a laid-out batch to what the answer is written on. Training and generation share it.

    prefix  -- read once -->  cache C
    region  -- the inner loop, each pass on top of C -->  z_T
    pending -- what is left to read with the suffix: z_T when it is fed once more; everything, when nothing loops

Shapes: `B` rows, `N` region columns, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from innerloop.config.plan import Plan
from innerloop.loop.loop import InnerLoop, LoopResult
from innerloop.loop.trace import Trace
from innerloop.passes.context import Context
from innerloop.passes.region import AppendPass, FixedText, Masked, Region, RegionPass, join
from innerloop.passes.tokens import PassOutput
from innerloop.text.batch import Batch


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
        fixed: the text between the latents, which is read as it is whatever the state.
        prompt: the states of the prefix, for a decoder that reads them, and their mask.
        appends: whether every iteration read one new column of the region, instead of all of them.
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
    fixed: FixedText | None = None
    prompt: Masked | None = None
    appends: bool = False
    layer_states: list[tuple[Tensor, ...]] = field(default_factory=list)
    answer: tuple[Tensor, ...] = ()
    after: Context | None = None

    @property
    def deep(self) -> Sequence[PassOutput]:
        """What the passes gave in which tokens had unlike depth, the answer's among them."""
        run = (self.context if self.after is None else self.after).depth
        return () if run is None else run.passes


def think(
    plan: Plan,
    loop: InnerLoop,
    batch: Batch,
    context: Context,
    trace: Trace | None = None,
    read_out: Callable[[Tensor], Tensor] | None = None,
    all_states: bool = False,
    answer_prefix_ids: Sequence[int] = (),
) -> Thought:
    """Read the prefix and refine the region of a batch; every answer begins with the tokens ``answer_prefix_ids``.

    Positions of the region that are text are read as they are in every pass, and the final state has them so.
    """
    prefix, (region, region_mask) = _embed(context, batch, 0), _embed(context, batch, 1)
    if loop.slots is not None and region.shape[1]:
        region = loop.slots(region)
    for hook in loop.hooks:
        hook.on_batch(batch, range(len(batch)) if context.rows is None else context.rows.tolist())
    makes_first = plan.first_state == "forward" and region.shape[1] > 0
    if max(batch.n_loops) == 0 and not makes_first and not plan.decode_lora and not plan.reads_state:
        return _unread(loop, batch, Thought(context, [prefix], 0, region_mask=region_mask), region)

    read, parts = prefix[0], _parts_of(batch, region, region_mask)
    if read.shape[1]:
        with context.phase("prefill"):
            read = context.read(prefix[0], prefix[1], normed=plan.is_normed)
    with context.phase("thought"):
        f: AppendPass | RegionPass
        if plan.scope == "append":
            f = AppendPass(context, region_mask, loop.weights, plan.is_normed)
            state = loop.feed_back(read[:, -1:], None) if plan.first_state == "forward" else region[:, :1]
        else:
            again = prefix if plan.prefix_kv == "per_iter" else None
            f = RegionPass(context, parts, loop.weights, plan.is_normed, again, plan.answer_context == "kv_last")
            f.all_states, f.before = all_states, read[:, -1:] if read.shape[1] else None
            state = loop.feed_back(f(region, 0), f.before) if plan.first_state == "forward" else region
            f.layer_states.clear()
        if plan.detach and plan.first_state == "forward":
            state = state.detach()
        read_answer = (
            _answer_reader(plan, loop, batch, f, answer_prefix_ids) if plan.reads_answer and not loop.training else None
        )
        result = loop(f, state, batch.n_loops, trace, read_out, read_answer, batch.n_free or 0)
        if isinstance(f, RegionPass) and plan.answer_context == "kv_last":
            context = f.finish(context, region, region_mask)
    thought = _thought_of(plan, loop, batch, context, f, result, parts)
    thought.prompt = read, prefix[1]
    for hook in loop.hooks:
        thought = hook.on_answer(thought, batch)
    return thought


def _unread(loop: InnerLoop, batch: Batch, thought: Thought, region: Tensor) -> Thought:
    """Return the thought of rows in which nothing loops: prefix and region are read with the answer."""
    for hook in loop.hooks:
        hook.on_start(None, region, batch.n_loops)
        region = hook.on_end(region, batch.n_loops)
    thought.pending.append((region, thought.region_mask))
    for hook in loop.hooks:
        thought = hook.on_answer(thought, batch)
    return thought


def _parts_of(batch: Batch, region: Tensor, mask_BN: Tensor | None) -> Region:
    """Return what is known of the looped positions: which are real, latents, or text that stays as it is."""
    if batch.fixed_BN is None:
        return Region(mask_BN, mask_BN)
    is_latent = 1 - batch.fixed_BN
    state_mask = is_latent if mask_BN is None else mask_BN * is_latent
    return Region(mask_BN, state_mask, (batch.fixed_BN[..., None].bool(), region))


def _thought_of(
    plan: Plan,
    loop: InnerLoop,
    batch: Batch,
    context: Context,
    f: AppendPass | RegionPass,
    result: LoopResult,
    parts: Region,
) -> Thought:
    """Return what a loop leaves for writing."""
    if plan.decode_lora:
        context.weights = partial(loop.weights, loop.max_loops)  # T, whatever a row of the batch ran
    mask, state_mask = parts.mask_BN, parts.state_mask
    if plan.scope == "append":
        mask = state_mask = None if mask is None else mask.amax(1, keepdim=True)  # every row feeds its last latent
    layer_states = f.layer_states if isinstance(f, RegionPass) else []
    thought = Thought(context, [], batch.bounds[1], result, parts.mask_BN, state_mask, parts.fixed)
    thought.layer_states, thought.appends = layer_states, plan.scope == "append"
    if plan.answer_context == "refeed":
        fed = result.state.detach() if plan.detach and plan.scope == "append" else result.state
        fed = fed if parts.fixed is None else torch.where(*parts.fixed, fed)
        thought.pending, thought.first_column = [(fed, mask)], batch.bounds[1] - fed.shape[1]
    return thought


def _answer_reader(
    plan: Plan, loop: InnerLoop, batch: Batch, f: AppendPass | RegionPass, answer_prefix_ids: Sequence[int]
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what reads the logits (A, 1, V) of the answer's first own token, were a state (A, N, D) the last."""
    eot = batch.ids_BS[:1, batch.bounds[1] : batch.bounds[1] + 1]
    begin_1LD = f.context_now.backbone.embed(torch.cat([eot, eot.new_tensor([answer_prefix_ids])], dim=1))
    weights = partial(loop.weights, loop.max_loops) if plan.decode_lora else None
    refeeds = plan.answer_context == "refeed"

    def read(state: Tensor, active_B: Tensor | None) -> Tensor:
        begin: Masked = (begin_1LD.expand(len(state), -1, -1), None)
        context, mask = f.ahead(refeeds)
        pending = join([(state, mask), begin] if refeeds else [begin])
        return context.backbone.head(context.read(*pending, counted_B=active_B, weights=weights)[:, -1:])

    return read


def _embed(context: Context, batch: Batch, segment: int) -> Masked:
    columns, mask = batch.columns(segment)
    return context.backbone.embed(batch.ids_BS[:, columns]), mask

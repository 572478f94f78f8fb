"""The thought: from a laid-out batch to what the answer is written on. Training and generation share it.

    prefix  -- read once -->  cache C
    region  -- the inner loop, each pass on top of C -->  z_T
    pending -- what is left to read with the suffix: z_T when it is fed once more; everything, when nothing loops

Shapes: `B` rows, `N` region columns, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from innerloop.context import Context
from innerloop.layout import Batch
from innerloop.loop import InnerLoop, Trace

if TYPE_CHECKING:
    from innerloop.methods.method import Method


@dataclass
class Thought:
    """What thinking leaves for writing.

    Attributes:
        context: what has been read.
        pending: (embeddings, mask) still to be read, in order, in one pass with the first written token.
        first_column: the batch column at which ``pending`` begins.
        outputs: u_1..u_T, each (B, N, D).
    """

    context: Context
    pending: list[tuple[Tensor, Tensor | None]]
    first_column: int
    outputs: list[Tensor] = field(default_factory=list)


def think(method: Method, loop: InnerLoop, batch: Batch, context: Context, trace: Trace | None = None) -> Thought:
    """Read the prefix and refine the region of a batch."""
    backbone = context.backbone
    segments = []
    for segment in (0, 1):
        columns, mask = batch.columns(segment)
        segments.append((backbone.embed(batch.ids_BS[:, columns]), mask))
    (prefix, prefix_mask), (region, region_mask) = segments
    n_loops = max(batch.n_loops)
    forwards_region = method.first_state == "forward" and region.shape[1] > 0
    if n_loops == 0 and not forwards_region:
        return Thought(context, segments, first_column=0)

    normed = method.loop.feedback_site == "post_norm"
    with context.phase("prefill"):
        at_bot = context.read(prefix, prefix_mask, normed=normed)[:, -1:]
    with context.phase("thought"):
        steps: AppendPass | RegionPass
        if method.scope == "append":
            state = loop.rescale(at_bot) if method.first_state == "forward" else region[:, :1]
            steps = AppendPass(context, region_mask, normed)
        else:
            steps = RegionPass(context, region_mask, normed)
            state = loop.rescale(steps(region, 0)) if method.first_state == "forward" else region
        if method.loop.detach and method.first_state == "forward":
            state = state.detach()
        loops_B = torch.tensor(batch.n_loops, device=region.device) if min(batch.n_loops) < n_loops else None
        result = loop(steps, state, n_loops, loops_B, trace)

    if method.answer_context == "kv_last" and method.scope == "slots" and loops_B is not None:
        # Rows end at different iterations, so no one pass is the last of all: each row's last input is read once more.
        last = torch.where((loops_B > 0)[:, None, None], result.last_input, region)
        return Thought(context, [(last, region_mask)], batch.bounds[0], result.outputs)
    if method.answer_context == "kv_last":
        return Thought(steps.context, [], batch.bounds[1], result.outputs)
    fed = result.state.shape[1]
    if method.loop.detach and method.scope == "append":
        result.state = result.state.detach()  # the last link of the chain
    mask = None if region_mask is None else region_mask[:, -fed:]
    return Thought(context, [(result.state, mask)], batch.bounds[1] - fed, result.outputs)


class RegionPass:
    """f over all latents at once, each pass on the same prefix; the cache of a pass is dropped with the next."""

    def __init__(self, prefix: Context, mask_BN: Tensor | None, normed: bool):
        self.prefix, self.mask_BN, self.normed = prefix, mask_BN, normed
        self.context = prefix  # after a pass: the prefix and that pass

    def __call__(self, inputs_BND: Tensor, loop: int) -> Tensor:
        """Return u (B, N, D)."""
        self.context = self.prefix.fork()
        return self.context.read(inputs_BND, self.mask_BN, normed=self.normed)


class AppendPass:
    """f over one new latent per iteration, which stays in the context."""

    def __init__(self, context: Context, mask_BN: Tensor | None, normed: bool):
        self.context, self.mask_BN, self.normed = context, mask_BN, normed

    def __call__(self, inputs_B1D: Tensor, loop: int) -> Tensor:
        """Return u (B, 1, D)."""
        mask = None if self.mask_BN is None else self.mask_BN[:, loop - 1 : loop]
        return self.context.read(inputs_B1D, mask, normed=self.normed)

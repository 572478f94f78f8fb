"""ParScale (arXiv 2505.10475): parallel streams of one decoder, the library's axis of width.

    H_p = decoder(x | prefixes of stream p),  p = 1..P;    h = sum_p w_p H_p;    logits = Head(h)      (parscale.md, 3)

All that the streams have of their own are a few columns of keys and values in each layer, so a model of P streams has
about the weights of one. Trained as the paper does in two stages: a decoder first, then streams on it, with all weights
or with the decoder frozen (``backbone: {model: RUN, freeze: true}``). Runs that froze the same decoder share it, and P
is switched by choosing among them (`LatentModel.beside`).

With ``max_loops`` above 1 the streams run a looped block, so width and depth are two numbers of one method. One stream
has no prefixes, and is the decoder itself, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from innerloop.checks.values import Bounds, Natural, Share, SomeLoops, SomePlaces
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.block_loop import BlockLoop, LoopedDepth
from innerloop.methods.depth.streams import Aggregator, Prefixes, StreamCache
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import CostScope, PassInput, PassOutput, Tokens

Streams = Annotated[int, Bounds(1, 1000)]


@dataclass(frozen=True)
class ParScale(BlockLoop):
    """P streams of a decoder, each behind prefixes of its own, mixed by learnt weights before the head.

    Args:
        streams: P; 1 is the decoder itself, without prefixes.
        n_prefix: columns of keys and values that each layer begins with, in each stream; they count for no position.
        prefix_bias: what is added to what queries make of a prefix's keys, at first; it is learnt with them. About -8
            on a trained decoder, which then begins as it was; 0: nothing is added.
        smoothing: eps; each stream counts for at least eps / P.
        n_prelude: layers before the looped block.
        n_coda: layers after it.
        max_loops: how often the block between them is applied.
        write_steps: off: the answer alone is written, so that all thinking happens inside the tokens.
    """

    name: ClassVar[str] = "parscale"
    paper: ClassVar[str] = "arXiv 2505.10475"
    summary: ClassVar[str] = "parallel streams told apart by learnt prefixes, mixed before the head"

    streams: Streams = 2
    n_prefix: SomePlaces = 48
    prefix_bias: float = 0.0
    smoothing: Share = 0.1
    n_prelude: Natural = 0
    n_coda: Natural = 0
    max_loops: SomeLoops = 1
    write_steps: bool = True

    def with_loops(self, loops: int) -> ParScale:
        """Return the method for answering with another number of loops."""
        return replace(self, max_loops=loops)

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward:
        """Make the decoder of several streams."""
        return StreamedDecoder(self, backbone, loop)


class StreamedDecoder(LoopedDepth):
    """The streams of a row are rows of one pass."""

    method: ParScale

    def __init__(self, method: ParScale, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        n, width = method.streams, backbone.width
        self.prefixes = None
        if n > 1 and method.n_prefix > 0:
            kernels = backbone.config._attn_implementation
            refuse(
                (
                    kernels not in ("sdpa", "eager"),
                    f"prefixes need a mask of their own, which {kernels} does not take: set backbone.attention to sdpa",
                )
            )
            self.prefixes = Prefixes(backbone, n, method.n_prefix, method.prefix_bias)
        self.mix = Aggregator(width, n, method.smoothing) if n > 1 else None

    def empty_cache(self) -> DepthCache:
        """Return a cache that has read nothing but the prefixes."""
        if self.mix is None:
            return DepthCache()
        return StreamCache({}, self.method.streams, self.prefixes, self.backbone.lm.dtype)

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass of all streams, and mix them."""
        if self.mix is None:
            return super().forward(reading)
        n, tokens = self.method.streams, reading.tokens
        deep = super().forward(_in_streams(reading, n))
        states_BPLD = deep.states_BLD.unflatten(0, (-1, n))
        weights_BLP = self.mix(states_BPLD)
        mixed = torch.einsum("blp,bpld->bld", weights_BLP.to(states_BPLD.dtype), states_BPLD)
        if reading.cost_scope is not None:
            reading.cost_scope.spend(tokens, torch.zeros_like(tokens.positions_RN), 0, self.mix.flops)
        measured = self.mix.measure(states_BPLD, weights_BLP, tokens.real) if self.training else {}
        return PassOutput(mixed, deep.depths_BL[::n], measured=measured)


def _in_streams(reading: PassInput, n: int) -> PassInput:
    """Return a pass in which each row stands ``n`` times; it leaves no trace, which would speak of these rows."""

    def lines(of_B: Tensor | None) -> Tensor | None:
        return None if of_B is None else of_B.repeat_interleave(n, 0)

    whole, scope = reading.tokens, reading.cost_scope
    places = torch.arange(len(whole.positions_RN), device=whole.positions_RN.device)
    tokens = Tokens(
        whole.states_RND.repeat_interleave(n, 0), whole.positions_RN.repeat_interleave(n, 0), lines(whole.real_RN)
    )
    if scope is not None:
        rows = places if scope.rows is None else scope.rows
        scope = CostScope(scope.meter, rows.repeat_interleave(n, 0), lines(scope.counted_B))
    return replace(reading, tokens=tokens, cost_scope=scope, trace=None, asked_B=lines(reading.asked_B))

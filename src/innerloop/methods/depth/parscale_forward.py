"""ParScale's passes: the streams of a row are rows of one pass, mixed after the final norm (parscale.md, 3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.block_loop_forward import LoopedDepth
from innerloop.methods.depth.parscale import ParScale
from innerloop.methods.depth.streams import Aggregator, Prefixes, StreamCache
from innerloop.passes.tokens import CostScope, PassInput, PassOutput, Tokens


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

"""The passes of Mixture-of-Recursions: the first layer, the recursions, the last layer (`mor` has the equations)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from innerloop.decoder.backbone import Backbone
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.mor import Mor
from innerloop.methods.depth.recursion import ExpertPass, RecursiveDepth, TokenChoicePass
from innerloop.methods.depth.router import Notes, Router
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.tokens import PassInput, PassOutput


class MorDepth(RecursiveDepth):
    """The first layer, the recursions, the last layer.

    A pass's ``depths_BL`` count recursions. ``measured`` has, for each recursion, the share of tokens in it (selected);
    with expert choice that sees later tokens, the share of candidates for which the causal rule says the same
    (agreement); with token choice, how many tokens chose each depth (load).
    """

    method: Mor
    bias: Tensor

    def __init__(self, method: Mor, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        n, width, std = method.n_recursions, backbone.width, getattr(backbone.config, "initializer_range", 0.02)
        self.recursions = [segments(layers) for layers in method.recursions(backbone.n_layers)]
        is_token = method.routing == "token"
        self.routers = nn.ModuleList(Router(width, n, std) for _ in range(1)) if is_token else one_each(n, width, std)
        self.aux_routers = one_each(n if method.causality == "aux_router" else 0, width, std)
        self.register_buffer("bias", torch.zeros(n if method.balancing == "loss_free" else 0))
        self.sees_later = method.routing_mode == "topk"  # when answering

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass."""
        tokens, notes, last = reading.tokens, Notes(), self.backbone.n_layers - 1
        if self.method.is_middle:
            state = self.run(reading, tokens, range(1), "first", inner=False)
        else:
            state = self.backbone.enter(tokens.states_RND, tokens.positions_RN)
        kind = TokenChoicePass if self.method.routing == "token" else ExpertPass
        recursion = kind(self, reading, notes)
        state = self.loop(recursion, state, [self.method.n_recursions] * len(state), reading.trace).state
        if self.method.is_middle:
            state = self.run(reading, tokens.with_states(state), range(last, last + 1), "last")
        return PassOutput(self.backbone.norm(state), recursion.depths_BL, sums=notes.sums, measured=notes.measured)

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return the routers' terms; with loss-free balancing b_i += u sign(mean load - load_i)."""
        for deep in inputs.thought.deep if self.training and len(self.bias) else ():
            load = deep.measured["load"].to(self.bias.dtype)
            self.bias += self.method.bias_rate * (load.mean() - load).sign()
        return super().loss_terms(inputs)


def one_each(n: int, width: int, std: float) -> nn.ModuleList:
    """Return a router for each of n recursions."""
    return nn.ModuleList(Router(width, 1, std) for _ in range(n))


def segments(layers: list[int]) -> list[range]:
    """Return layers as ranges that run one after the other."""
    ranges: list[range] = []
    for layer in layers:
        if ranges and ranges[-1].stop == layer:
            ranges[-1] = range(ranges[-1].start, layer + 1)
        else:
            ranges.append(range(layer, layer + 1))
    return ranges

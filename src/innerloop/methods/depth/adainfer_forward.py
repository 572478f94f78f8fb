"""The passes of AdaInfer: tokens that write leave between two layers (`adainfer` says what may be chosen)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from innerloop.config.stopping import TAPPED
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.adainfer import AdaInfer
from innerloop.methods.depth.exit_pass import ExitCache, ExitPass
from innerloop.methods.depth.exits import exit_terms
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput


class ExitingDecoder(DepthForward):
    """A decoder in sections, with an exit after each but the last."""

    method: AdaInfer

    def __init__(self, method: AdaInfer, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        n = backbone.n_layers
        exits = method.layers or tuple(range(max(math.ceil(n / 4), min(2, n)), n))
        refuse((not exits or exits[-1] >= n, f"the model has {n} layers: choose layers from 1 to {n - 1}"))
        edges = (0, *exits, n)
        self.sections = [range(start, end) for start, end in pairwise(edges)]
        self.taps()

    def taps(self) -> list[str]:
        """Return of which outputs the classifier compares successive layers'."""
        classifier = None if self.loop.stop is None else self.loop.stop.classifier
        taps: list[str] = (
            [] if classifier is None else [name for name in classifier.features if name in (*TAPPED, "block")]
        )
        is_alone = len(self.sections[0]) < 2
        refuse((bool(taps) and is_alone, "the first layer has none before it to compare with: begin layers at 2"))
        return taps

    def empty_cache(self) -> DepthCache:
        """Return a cache that has read nothing."""
        return ExitCache()

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass; tokens that write leave where their score says, or after a known number of sections."""
        leaves = reading.wanted_BL is not None or self.loop.stop is not None
        return self.leaving(reading) if leaves and not self.training else self.straight(reading)

    def straight(self, reading: PassInput) -> PassOutput:
        """Run all layers on all tokens."""
        tokens = reading.tokens
        states = [tokens.states_RND]
        for section, layers in enumerate(self.sections):
            states.append(self.run(reading, tokens.with_states(states[-1]), layers, section, inner=section > 0))
        deep = PassOutput(self.backbone.norm(states[-1]), tokens.real.long() * self.backbone.n_layers)
        if self.training and self.method.exits.wants_exits:
            deep.exits = [*(self.backbone.norm(state) for state in states[1:-1]), deep.states_BLD]
        return deep

    def leaving(self, reading: PassInput) -> PassOutput:
        """Run every token that writes until it leaves."""
        method, n = self.method, len(self.sections)
        each = ExitPass(self, reading, self.sections, method.kv_missing, self.taps(), method.n_candidates)
        limits = [n] * len(each.start_A)
        if reading.wanted_BL is not None:
            limits = each.spot(reading.wanted_BL).clamp(1, n).tolist()
        states_A = sections_A = each.start_A[:0]
        if not each.is_empty:
            result = self.loop(each, each.line_up(reading.tokens.states_RND), limits, None, each.read_out)
            states_A, sections_A = result.state[:, 0], torch.tensor(result.n_loops, device=states_A.device)
        each.finish()
        ends = torch.tensor([0, *(layers.stop for layers in self.sections)], device=sections_A.device)
        states, done = (of[:, each.n_left :] for of in (each.open.states_RND, each.done_BW))
        depths = ends[done]
        if not each.is_empty:
            states, depths = each.settle(states_A, states), each.settle(ends[sections_A], depths)
        deep = PassOutput(self.backbone.norm(states), depths)
        deep.logits_BV = self.last_words(reading, each, deep)
        return deep

    def last_words(self, reading: PassInput, each: ExitPass, deep: PassOutput) -> Tensor | None:
        """Return the logits (B, V) of the last column, where some of them have been read out already."""
        words_BV, cost_scope = each.last_BV, reading.cost_scope
        if words_BV is None or cost_scope is None:
            return None
        is_new_B = words_BV.isnan().any(1)
        each.count_rows(~is_new_B * (-2.0 * self.backbone.width * words_BV.shape[1]))  # whoever writes counts it again
        rows = torch.nonzero(is_new_B)[:, 0]
        return words_BV.index_copy(0, rows, self.backbone.head(deep.states_BLD[rows, -1]).to(words_BV.dtype))

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return what is learned at the exits, too."""
        terms = super().loss_terms(inputs)
        return terms | exit_terms(self.method.exits, inputs) if inputs.thought.deep[-1].exits else terms

"""AdaInfer (arXiv 2403.02181): a frozen decoder stops at the layer that already knows the next token.

    h_d = layer_d(h_{d-1});   z_d = Head(Norm(h_d));   leave at the first exit d whose score reaches the threshold
                                                                                                      (adainfer.md, 3)

The loop is the library's inner loop, whose iteration t are the layers between two exits, and every stop score works:
AdaInfer's own is ``stop: classifier`` on statistics of words and outputs, fitted offline by `calibrate`; its plain
rules are gap and top_prob, the controls fixed and random. In training none leaves; earlier exits may learn to speak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.config.loop import LoopSettings
from innerloop.config.losses import ExitSettings
from innerloop.config.stopping import TAPPED, StopSettings
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.exit_pass import ExitCache, ExitPass, KvMissing
from innerloop.methods.depth.exits import exit_terms
from innerloop.methods.depth.method import DepthMethod
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput


class LayerLoop(LoopSettings):
    """A loop through the layers of a decoder: nothing is done to the states between them."""

    has_taps: ClassVar[bool] = True


@dataclass(frozen=True)
class AdaInfer(StopSettings, ExitSettings, DepthMethod):
    """Every token that writes may leave after one of the layers ``exits``; iteration t ends at the t-th of them.

    Args:
        exits: the layers after which tokens may leave, counted from 1; empty: all from a quarter of the depth on.
        kv_missing: later layers run ended tokens when a later token needs them (lazy_backfill, exact); they are given
            keys and values of the last state alone (propagate, approximate); or they run anyway (full_compute, exact).
        n_candidates: scores look at so many words, the likeliest at the first exit, which spares the rest of the head;
            0: at all words.
        stop_features: classifier: what it looks at: gap, top, depth (d / L), and the cosines of successive layers'
            outputs: of their attention, their mlp, and the whole block.
    """

    name: ClassVar[str] = "adainfer"
    paper: ClassVar[str] = "arXiv 2403.02181"
    summary: ClassVar[str] = "each token stops at the layer that already knows the next one"
    has_taps: ClassVar[bool] = True

    exits: tuple[int, ...] = ()
    kv_missing: KvMissing = "lazy_backfill"
    n_candidates: int = 0

    def __post_init__(self) -> None:
        StopSettings.__post_init__(self)
        ExitSettings.__post_init__(self)
        object.__setattr__(self, "exits", tuple(self.exits))
        refuse(
            (
                list(self.exits) != sorted(set(self.exits)) or min(self.exits, default=1) < 1,
                "exits are layers in ascending order, counted from 1",
            ),
            (
                self.n_candidates < 0 or self.n_candidates == 1,
                "n_candidates is at least 2, or 0 for all words",
            ),
            (
                self.stop_site == "answer" or self.stop_agg != "mean",
                "stop_site=answer and stop_agg are for latents: leave them out with adainfer",
            ),
            (self.stop == "act", "stop=act mixes the iterations of whole rows: it is for latents"),
            (
                self.gate != "none" and self.stop not in ("halt", "halt_sample"),
                f"gate={self.gate} trains the gate of a learned stop: set stop to halt or halt_sample",
            ),
            (
                self.stop == "none" and (self.kv_missing != "lazy_backfill" or self.n_candidates > 0),
                "kv_missing and n_candidates are for tokens that leave: set a stop score",
            ),
        )

    @cached_property
    def loop(self) -> LoopSettings:  # type: ignore[override]
        """How the loop through the layers ends."""
        return LayerLoop(**self.rule)

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {**super().term_weights, **self.exit_term_weights}

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward:
        """Make the decoder with exits."""
        return ExitingDecoder(self, backbone, loop)


class ExitingDecoder(DepthForward):
    """A decoder in sections, with an exit after each but the last."""

    method: AdaInfer

    def __init__(self, method: AdaInfer, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        n = backbone.n_layers
        exits = method.exits or tuple(range(max(math.ceil(n / 4), min(2, n)), n))
        refuse((not exits or exits[-1] >= n, f"the model has {n} layers: choose exits from 1 to {n - 1}"))
        edges = (0, *exits, n)
        self.sections = [range(start, end) for start, end in pairwise(edges)]
        self.taps()
        if method.gate == "improvement":
            assert loop.stop is not None
            for part in (backbone, loop):
                part.requires_grad_(False)
            loop.stop.requires_grad_(True)

    def taps(self) -> list[str]:
        """Return of which outputs the classifier compares successive layers'."""
        classifier = None if self.loop.stop is None else self.loop.stop.classifier
        taps: list[str] = (
            [] if classifier is None else [name for name in classifier.features if name in (*TAPPED, "block")]
        )
        is_alone = len(self.sections[0]) < 2
        refuse((bool(taps) and is_alone, "the first layer has none before it to compare with: begin exits at 2"))
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
        if self.training and self.method.wants_exits:
            deep.exits = [*(self.backbone.norm(state) for state in states[1:-1]), deep.states_BLD]
            if self.method.gate != "none":
                deep.gates = self.gates(states[1:])
        return deep

    def gates(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the gate's logits (B, L) at each exit."""
        stop = self.loop.stop
        assert stop is not None
        return [stop.halting_logit(state.flatten(0, 1)[:, None]).view(state.shape[:2]) for state in states]

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
        words_BV, spending = each.last_BV, reading.spending
        if words_BV is None or spending is None:
            return None
        is_new_B = words_BV.isnan().any(1)
        each.count_rows(~is_new_B * (-2.0 * self.backbone.width * words_BV.shape[1]))  # whoever writes counts it again
        rows = torch.nonzero(is_new_B)[:, 0]
        return words_BV.index_copy(0, rows, self.backbone.head(deep.states_BLD[rows, -1]).to(words_BV.dtype))

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return what is learned at the exits, too."""
        terms = super().loss_terms(inputs)
        return terms | exit_terms(self.method, inputs) if inputs.thought.deep[-1].exits else terms

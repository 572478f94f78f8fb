"""AdaInfer (arXiv 2403.02181): a frozen decoder stops at the layer that already knows the next token.

    h_d = layer_d(h_{d-1});   z_d = Head(Norm(h_d));   leave at the first exit d whose score reaches the threshold
                                                                                                      (adainfer.md, 3)

The loop is the library's inner loop, whose iteration t are the layers between two exits, and every stop score works:
AdaInfer's own is ``stop: {rule: classifier}`` on statistics of words and outputs, fitted offline by `calibrate`; its
plain rules are gap and top_prob, the controls fixed and random. In training none leaves; earlier exits may learn to
speak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from innerloop.checks.values import Count, Natural
from innerloop.config.losses import ExitSettings
from innerloop.config.stopping import TAPPED, CommonStop, ExitClassifierKind, Feature
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


@dataclass(frozen=True)
class LayerStop(CommonStop):
    """Tokens leave between two layers, so the outputs of attention and MLP can be compared, too."""

    decay: int = 0
    features: tuple[Feature, ...] = ("gap", "top", "depth")
    classifier: ExitClassifierKind = "logistic"
    per_step: bool = False

    has_taps: ClassVar[bool] = True


@dataclass(frozen=True)
class LayerExits(ExitSettings):
    """Earlier exits may learn to speak."""

    weight: float = 0.0
    schedule: Literal["equal", "linear"] = "equal"


@dataclass(frozen=True)
class AdaInfer(DepthMethod):
    """Every token that writes may leave after one of some layers; iteration t ends at the t-th of them.

    Args:
        layers: those after which tokens may leave, counted from 1; empty: all from a quarter of the depth on.
        kv_missing: later layers run ended tokens when a later token needs them (lazy_backfill, exact); they are given
            keys and values of the last state alone (propagate, approximate); or they run anyway (full_compute, exact).
        n_candidates: scores look at so many words, the likeliest at the first exit, which spares the rest of the head;
            0: at all words.
    """

    name: ClassVar[str] = "adainfer"
    paper: ClassVar[str] = "arXiv 2403.02181"
    summary: ClassVar[str] = "each token stops at the layer that already knows the next one"

    layers: tuple[Count, ...] = ()
    kv_missing: KvMissing = "lazy_backfill"
    n_candidates: Natural = 0
    stop: LayerStop = LayerStop()
    exits: LayerExits = LayerExits()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                list(self.layers) != sorted(set(self.layers)),
                "layers are those after which tokens may leave, in ascending order, counted from 1",
            ),
            (self.n_candidates == 1, "n_candidates is at least 2, or 0 for all words"),
            (
                not self.stop.stops and (self.kv_missing != "lazy_backfill" or self.n_candidates > 0),
                "kv_missing and n_candidates are for tokens that leave: set stop.rule",
            ),
        )

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward:
        """Make the decoder with exits."""
        return ExitingDecoder(self, backbone, loop)


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

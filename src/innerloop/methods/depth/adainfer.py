"""AdaInfer (arXiv 2403.02181): a frozen decoder stops at the layer that already knows the next token.

    h_d = layer_d(h_{d-1});   z_d = Head(Norm(h_d));   leave at the first exit d whose score reaches the threshold
                                                                                                      (adainfer.md, 3)

The loop is the library's inner loop, whose iteration t are the layers between two exits, and every stop score works:
AdaInfer's own is ``stop: {rule: classifier}`` on statistics of words and outputs, fitted offline by `calibrate`; its
plain rules are gap and top_prob, the controls fixed and random. In training none leaves; earlier exits may learn to
speak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import Count, Natural
from innerloop.config.losses import ExitSettings
from innerloop.config.stopping import CommonStop, ExitClassifierKind, Feature
from innerloop.errors import refuse
from innerloop.methods.depth.method import DepthMethod

KvMissing = Literal["lazy_backfill", "propagate", "full_compute"]


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
    forward: ClassVar[str] = "innerloop.methods.depth.adainfer_forward:ExitingDecoder"

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

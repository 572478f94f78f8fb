"""Mixture-of-Depths (arXiv 2404.02258): in some layers only a share c of the tokens takes part, the others pass by.

    r = W x;   I = the k = ceil(c S) tokens of a row with the highest r, in their order
    x' = x + g (layer(x) - x) for them, on keys and values of them alone, at their own positions;   x' = x else
    L = CE + lambda_aux mean_l mean_i BCE(r_i, [i in I])                                       (mod.md, 3 and 4)

Which tokens are the highest depends on later ones, so answers are written by a rule that sees one token alone, the same
one for the question and for what is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import Natural, SomeShare, Weight
from innerloop.config.routing import CapacityBase, Gate, GateTarget
from innerloop.errors import refuse
from innerloop.methods.depth.method import DepthMethod


@dataclass(frozen=True)
class Mod(DepthMethod):
    """Some layers are run by a share of the tokens.

    Args:
        routed_layers: the layers, counted from 0; empty: every second one, 1, 3, 5, ...
        capacity: c; 1 lets all tokens through.
        capacity_base: c is a share of a row's own tokens (valid), or of the columns of the batch, padding included
            (static).
        capacity_warmup: optimizer steps in which the capacity falls from 1 to c.
        gate: g: the router's score r (identity), sigmoid(r), alpha sigmoid(r) (scaled_sigmoid), or one with the
            gradient of sigmoid(r) (st), which leaves the chosen tokens of a pretrained model as they were.
        alpha: of scaled_sigmoid; None: 1.
        gate_target: what g scales: what the layer adds (delta), its whole output beside x (full), or in place of x
            (replace).
        causality: how a token is chosen when answering: by r > 0, which the auxiliary loss teaches (aux_bce); by a
            network on the side (predictor); or by r above its (1 - c) quantile (calibrated), which follows the training
            batches and may be set on other text by `innerloop.calibrate.router_thresholds`.
        aux_weight: lambda_aux, with aux_bce.
        routing_mode: when answering, choose by causality (causal); or as in training (topk), which sees later tokens:
            scores measured so are too good, and what is written token by token has another depth.
    """

    name: ClassVar[str] = "mod"
    paper: ClassVar[str] = "arXiv 2404.02258"
    summary: ClassVar[str] = "some layers are run by a share of the tokens"
    forward: ClassVar[str] = "innerloop.methods.depth.mod_forward:ModDepth"

    routed_layers: tuple[int, ...] = ()
    capacity: SomeShare = 0.125
    capacity_base: CapacityBase = "valid"
    capacity_warmup: Natural = 0
    gate: Gate = "identity"
    alpha: float | None = None
    gate_target: GateTarget = "delta"
    causality: Literal["aux_bce", "predictor", "calibrated"] = "aux_bce"
    aux_weight: Weight = 0.01
    routing_mode: Literal["causal", "topk"] = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (self.alpha is not None and self.gate != "scaled_sigmoid", "alpha is for gate=scaled_sigmoid"),
            (len(set(self.routed_layers)) < len(self.routed_layers), "routed_layers lists a layer twice"),
        )

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {**super().term_weights, "router": self.aux_weight, "predictor": 1.0}

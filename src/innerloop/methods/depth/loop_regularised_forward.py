"""The plain decoder with the penalty of looping-inspired regularisation (`loop_regularised` has the equations)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from innerloop.decoder.anatomy import Matrix
from innerloop.decoder.backbone import Backbone
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.loop_regularised import LoopRegularised
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput

EPS = 1e-8


class RegularisedDepth(DepthForward):
    """All layers, one after the other, once; what they are compared by is a term of the loss."""

    method: LoopRegularised

    def __init__(self, method: LoopRegularised, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        n = backbone.n_layers
        refuse(
            (
                method.block_size > n,
                f"the model has {n} layers, fewer than block_size={method.block_size}: lower block_size",
            )
        )
        self.look_at(matrices=[backbone.matrices(layer) for layer in range(n)])

    matrices: list[dict[str, Matrix]]

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass."""
        states = self.run(reading, reading.tokens, range(self.backbone.n_layers), "all", inner=False)
        return PassOutput(self.backbone.norm(states), reading.tokens.real.long())

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return the penalty; every row of the global batch has its share in it."""
        if self.method.cosine_weight == 0:
            return {}
        share = 1.0
        if self.method.ramp_steps and self.step is not None:
            share = min(self.step / self.method.ramp_steps, 1.0)
        return {"cosine": (share * len(inputs.batch) * self.penalty(), "rows")}

    def penalty(self) -> Tensor:
        """Return mean_G (1 - R_G)."""
        kinds = [[layer[kind].weight for layer in self.matrices] for kind in self.matrices[0]]
        return 1 - torch.stack([likeness(weights, self.method.block_size) for weights in kinds]).mean()


def likeness(weights: Sequence[Tensor], k: int) -> Tensor:
    """Return R (scalar, fp32): the mean cosine of each layer's matrix and that k layers further, over full blocks.

    A matrix of zeros has no direction and is left out; without any pair R is 1.
    """
    n = len(weights) // k * k
    if n <= k:
        return torch.ones((), device=weights[0].device)
    flat = [weight.flatten().float() for weight in weights[:n]]
    norms_N = torch.stack([weight.norm() for weight in flat])
    dots_P = torch.stack([torch.dot(flat[i], flat[i + k]) for i in range(n - k)])
    is_known_P = (norms_N[:-k] > EPS) & (norms_N[k:] > EPS)
    cosines_P = torch.where(is_known_P, dots_P / (norms_N[:-k] * norms_N[k:]).clamp(min=EPS**2), 0.0)
    return torch.where(is_known_P.any(), cosines_P.sum() / is_known_P.sum().clamp(min=1), 1.0)

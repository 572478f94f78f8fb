"""A classifier on a few statistics that says "enough" or "go on"; fitted offline, kept as plain numbers (adainfer.md).

Shapes: `K` classifiers (one for all iterations, or one for each), `F` features, `S` support vectors, `T` iterations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from innerloop.config.stopping import Feature
from innerloop.errors import InputError


class ExitClassifier(nn.Module):
    """q_t = sigmoid(margin of the standardised features) (B,); all it knows are buffers, empty until fitted.

    Args:
        features: what it looks at, in this order.
    """

    names = ("mean_KF", "scale_KF", "weight_KF", "bias_K", "vectors_KSF", "share_KS", "gamma_K", "tau_T")

    def __init__(self, features: Sequence[Feature]):
        super().__init__()
        self.features = tuple(features)
        for name in self.names:
            self.register_buffer(name, torch.zeros([0] * len(name.rpartition("_")[2])))

    mean_KF: Tensor
    scale_KF: Tensor
    weight_KF: Tensor
    bias_K: Tensor
    vectors_KSF: Tensor
    share_KS: Tensor
    gamma_K: Tensor
    tau_T: Tensor

    @property
    def is_fitted(self) -> bool:
        """Whether it has learned anything yet."""
        return len(self.bias_K) > 0

    def fill(self, numbers: Mapping[str, Tensor]) -> None:
        """Take over fitted numbers, by name."""
        for name in self.names:
            setattr(self, name, numbers[name].float().to(self.bias_K.device))

    def clear(self) -> None:
        """Forget: it knows nothing, and stops nowhere."""
        n_F = len(self.features)
        sizes = {"mean_KF": (1, n_F), "scale_KF": (1, n_F), "weight_KF": (1, n_F), "vectors_KSF": (1, 0, n_F)}
        sizes |= {"bias_K": (1,), "share_KS": (1, 0), "gamma_K": (1,), "tau_T": (0,)}
        self.fill({name: torch.ones(size) if name == "scale_KF" else torch.zeros(size) for name, size in sizes.items()})

    def forward(self, features_BF: Tensor, iteration: int) -> Tensor:
        """Return q (B,) at ``iteration``."""
        if not self.is_fitted or features_BF.shape[1] != self.mean_KF.shape[1]:
            raise InputError(
                "the classifier of stop=classifier has not been fitted to these features: calibrate the model first"
            )
        k = min(iteration, len(self.bias_K)) - 1
        z_BF = (features_BF.float() - self.mean_KF[k]) / self.scale_KF[k]
        margin_B = z_BF @ self.weight_KF[k] + self.bias_K[k]
        if self.vectors_KSF.shape[1]:
            squares_BS = (z_BF[:, None] - self.vectors_KSF[k]).square().sum(-1)
            margin_B = margin_B + (-self.gamma_K[k] * squares_BS).exp() @ self.share_KS[k]
        return margin_B.sigmoid()

    def score(self, features_BF: Tensor, iteration: int) -> Tensor:
        """Return q - tau_t (B,), minus infinity at an iteration that is closed."""
        q_B = self(features_BF, iteration)
        tau = self.tau_T[iteration - 1] if iteration <= len(self.tau_T) else torch.inf
        return q_B - tau

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Load numbers of any size: how many there are depends on what it was fitted to."""
        for name in self.names:
            if (stored := state.get(prefix + name)) is not None:
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[arg-type]

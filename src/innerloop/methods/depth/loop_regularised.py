"""Looping-inspired regularisation (arXiv 2502.17416, section 4): an ordinary model whose blocks of layers grow alike.

    R_G = mean over layers l of cos(theta_G^l, theta_G^(l+k)),      one for each kind G of matrix: queries, keys, ...
    L = CE + lambda mean_G (1 - R_G)                                                                     (looped.md, 4)

The paper prints lambda R_G, whose minimum would be the opposite of its aim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from innerloop.checks.values import Count, Natural, Weight
from innerloop.errors import refuse
from innerloop.methods.depth.method import DepthMethod


@dataclass(frozen=True)
class LoopRegularised(DepthMethod):
    """The plain decoder; in training its successive blocks of ``block_size`` layers are drawn to like weights.

    Args:
        block_size: k; layer l is compared with layer l + k. Layers after the last full block are left alone.
        cosine_weight: lambda.
        ramp_steps: optimizer steps over which lambda grows from 0, for models whose layers begin unlike; 0: none.
    """

    name: ClassVar[str] = "loop_regularised"
    paper: ClassVar[str] = "arXiv 2502.17416"
    summary: ClassVar[str] = "an ordinary model whose blocks of layers are drawn to like weights, as if it looped"
    passes_do: ClassVar[str] = ""
    forward: ClassVar[str] = "innerloop.methods.depth.loop_regularised_forward:RegularisedDepth"

    block_size: Count = 4
    cosine_weight: Weight = 10.0
    ramp_steps: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.cosine_weight == 0 and self.ramp_steps > 0,
                "ramp_steps is how long cosine_weight grows: set cosine_weight above 0, or ramp_steps to 0",
            ),
        )

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {**super().term_weights, "cosine": self.cosine_weight}

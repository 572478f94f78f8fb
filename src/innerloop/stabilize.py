"""What keeps a loop stable: rescaling, residuals and the timestep embedding (slr.md, section 3).

Shapes: `B` rows, `N` looped positions, `D` width. Statistics are in fp32 whatever the states' type.
"""

from typing import Literal

import torch
from torch import Tensor, nn

ResidualKind = Literal["none", "sum", "A", "B"]
RescaleKind = Literal["none", "rms"]
TimeKind = Literal["none", "lookup"]


def rms(states: Tensor) -> Tensor:
    """Return the root mean square over the last dimension, kept as size 1, in fp32."""
    return states.float().pow(2).mean(-1, keepdim=True).sqrt()


def rescale(states: Tensor, kind: RescaleKind, tau: Tensor) -> Tensor:
    """Bring states (..., D) to the scale of the embeddings: rho(u) = u tau / RMS(u) for ``rms`` (slr.md, 3.5)."""
    if kind == "none":
        return states
    mean_square = states.float().pow(2).mean(-1, keepdim=True).clamp(min=1e-16)  # before the root: its slope at 0
    return (states.float() * (tau * mean_square.rsqrt())).to(states.dtype)


def residual(new: Tensor, first: Tensor, previous: Tensor, kind: ResidualKind, alpha: float) -> Tensor:
    """Mix a loop's rescaled output h' with h_0 (``first``) and h_{t-1} (``previous``) (slr.md, 3.6).

    none: h'. sum: h' + h_0. A: alpha h' + (1 - alpha) h_0. B: alpha h' + (1 - alpha) h_{t-1}.
    """
    match kind:
        case "none":
            return new
        case "sum":
            return new + first
        case "A":
            return alpha * new + (1 - alpha) * first
        case "B":
            return alpha * new + (1 - alpha) * previous


class TimeEmbedding(nn.Module):
    """Tells the model which iteration it is in: a table of ``max_loops`` rows, zero at the start (slr.md, 3.1).

    Iterations past the table use its last row.
    """

    def __init__(self, max_loops: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(max_loops, width))

    def forward(self, states_BND: Tensor, loop: int) -> Tensor:
        """Return h_{t-1} + e_t for the 1-based iteration ``loop``."""
        return states_BND + self.table[min(loop, len(self.table)) - 1].to(states_BND.dtype)

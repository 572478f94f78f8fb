"""Modules that stand in a decoder for parts of it: what has been done already, what nobody reads, what is faster.

Shapes: `B` rows, `L` positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D


class ZeroPositions(nn.Module):
    """Stands in for a table of learned positions where they have been added already."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return zeros (B, L, 1), which broadcast over the width; as booleans they leave any type of state as it is."""
        return torch.zeros(*position_ids.shape, 1, dtype=torch.bool, device=position_ids.device)


class NoKeys(nn.Module):
    """Stands in for a linear map to keys or values that nobody reads: zeros, without work."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, states: Tensor) -> Tensor:
        """Return zeros (..., width)."""
        return states.new_zeros(()).expand(*states.shape[:-1], self.width)


class QueriesAlone(NoKeys):
    """Stands in for one linear map to queries, keys and values of which the first ``n_queries`` outputs are read."""

    def __init__(self, whole: nn.Linear | Conv1D, n_queries: int):
        super().__init__((whole.weight.shape[1] if isinstance(whole, Conv1D) else whole.weight.shape[0]) - n_queries)
        self.whole, self.n_queries = whole, n_queries

    def forward(self, states: Tensor) -> Tensor:
        """Return the queries, and zeros in place of keys and values."""
        whole, n = self.whole, self.n_queries
        weight = whole.weight[:, :n].T if isinstance(whole, Conv1D) else whole.weight[:n]
        queries = linear(states, weight, None if whole.bias is None else whole.bias[:n])
        return torch.cat([queries, super().forward(queries)], dim=-1)


def fuse_activations(lm: PreTrainedModel) -> None:
    """Let GPT-2's activation be one operator instead of eight, which a CPU takes a fifth of a pass for."""
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))

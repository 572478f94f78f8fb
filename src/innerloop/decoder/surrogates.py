"""Modules that stand in a decoder for parts of it: what has been done already, what nobody reads, what is faster.

With them a *section* is made: a shallow copy of a decoder that holds some of its layers. It shares all weights, and
nothing in the decoder is edited.

Shapes: `B` rows, `L` positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from innerloop.decoder.anatomy import Anatomy, head_dim_of, n_outputs


class ZeroPositions(nn.Module):
    """Stands in for a table of learned positions where they have been added already."""

    def forward(self, *args: Any, position_ids: Tensor | None = None) -> Tensor:
        """Return zeros (B, L, 1), which broadcast over the width; as booleans they leave any type of state as it is."""
        position_ids = args[0] if position_ids is None else position_ids
        return torch.zeros(*position_ids.shape, 1, dtype=torch.bool, device=position_ids.device)


class SkipKV(nn.Module):
    """Stands in for a linear map to keys or values that nobody reads: zeros, without work."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, states: Tensor) -> Tensor:
        """Return zeros (..., width)."""
        return states.new_zeros(()).expand(*states.shape[:-1], self.width)


class QueryOnly(SkipKV):
    """Stands in for one linear map to queries, keys and values of which the first ``n_queries`` outputs are read."""

    def __init__(self, whole: nn.Linear | Conv1D, n_queries: int):
        super().__init__(n_outputs(whole) - n_queries)
        self.whole, self.n_queries = whole, n_queries

    def forward(self, states: Tensor) -> Tensor:
        """Return the queries, and zeros in place of keys and values."""
        whole, n = self.whole, self.n_queries
        weight = whole.weight[:, :n].T if isinstance(whole, Conv1D) else whole.weight[:n]
        queries = linear(states, weight, None if whole.bias is None else whole.bias[:n])
        return torch.cat([queries, super().forward(queries)], dim=-1)


def keyless(attention: nn.Module, config: Any) -> dict[str, SkipKV]:
    """Return what stands in for parts of a layer's attention when keys and values are not wanted.

    A fused map that is not plain (low-rank updates, hooks) is left as it is: its keys are made in vain.
    """
    found = dict[str, SkipKV]()
    for name, part in attention.named_children():
        if name in ("k_proj", "v_proj"):
            found[name] = SkipKV(int(part.out_features))  # type: ignore[arg-type]
        elif name in ("c_attn", "qkv_proj") and type(part) in (Conv1D, nn.Linear) and not part._forward_hooks:
            found[name] = QueryOnly(part, config.num_attention_heads * head_dim_of(config))  # type: ignore[arg-type]
    return found


def queryless(attention: nn.Module, config: Any) -> dict[str, SkipKV]:
    """Return what stands in for the map to queries when they are not wanted, where they have a map of their own."""
    queries: Any = attention._modules.get("q_proj")
    return {} if queries is None else {"q_proj": SkipKV(queries.out_features)}


def replaced(layer: nn.Module, stand_ins: Any, config: Any) -> nn.Module:
    """Return a shallow copy of a layer in which `keyless` or `queryless` stands in for parts of its attention."""
    twin = copy.copy(layer)
    twin._modules = dict(layer._modules)
    for name, attention in layer.named_children():
        if found := stand_ins(attention, config):
            part = twin._modules[name] = copy.copy(attention)
            part._modules = {**attention._modules, **found}
    return twin


def n_made_by(layers: Iterable[nn.Module]) -> int:
    """Return how many weights of some layers make their keys and values for a token."""
    maps = ("k_proj", "v_proj", "c_attn", "qkv_proj")
    parts = [a._modules.get(name) for layer in layers for a in layer.children() for name in maps]
    return sum(p.numel() for part in parts if part is not None for p in part.parameters())


def n_key_weights(layers: Iterable[nn.Module], config: Any) -> int:
    """Return how many weights of some layers are not used where no keys and values are made."""
    spared = 0
    for attention in (child for layer in layers for child in layer.children()):
        for name, part in keyless(attention, config).items():
            n = sum(p.numel() for p in getattr(attention, name).parameters())
            spared += n * part.width // (part.width + part.n_queries) if isinstance(part, QueryOnly) else n
    return spared


def section(decoder: nn.Module, anatomy: Anatomy, config: Any, layers: dict[int, nn.Module], inner: bool) -> nn.Module:
    """Return a decoder of some layers, by their places in the whole one, without final norm.

    ``inner``: what is done to embeddings is not done to its input, the states between two layers.
    """
    maybe_install_capturing_hooks(decoder)  # once for all sections: they sit on the layers, which are shared
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)
    setattr(part, anatomy.layers, nn.ModuleList(layers.values()))
    setattr(part, anatomy.norm, nn.Identity())
    if inner:
        if anatomy.positions:
            setattr(part, anatomy.positions, ZeroPositions())
        if anatomy.dropout:
            setattr(part, anatomy.dropout, nn.Identity())
        if isinstance(getattr(part, "dropout", None), float):  # BioGPT
            setattr(part, "dropout", 0.0)  # noqa: B010 - not a field that modules declare
        if hasattr(part, "embedding_multiplier"):  # Granite
            setattr(part, "embedding_multiplier", 1.0)  # noqa: B010 - not a field that modules declare
    part.config = config = copy.copy(config)
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = [layer_types[i] for i in layers]
    config.num_hidden_layers = len(layers)
    return part


def fuse_activations(lm: PreTrainedModel) -> None:
    """Let GPT-2's activation be one operator instead of eight, which a CPU takes a fifth of a pass for."""
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))

"""What tells the depths of a tied block apart: low-rank corrections of its matrices, gains and biases of each depth.

    W_l = W'_j + B_l A_l,   B_l A_l the best rank-r approximation of (original W_l) - W'_j     (relaxed_recursive.md, 3)

Depth l = b K + j is iteration b of block layer j, so each is a bank indexed by the iteration, set around a pass as
loop-wise LoRA is. Shapes: `B` iterations, `r` rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.onlooker import Onlooker
from innerloop.loop.lora import LoraBank

Split = Literal["svd", "split_sqrt"]


@torch.no_grad()
def truncated(residual: Tensor, rank: int, split: Split) -> tuple[Tensor, Tensor]:
    """Return (B, A), (out, r) and (r, in), whose product is the best approximation of a residual (out, in) of a rank.

    svd: B = U S, A = V^T, as in the paper; split_sqrt: B = U sqrt(S), A = sqrt(S) V^T.
    """
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    return (u * s, vt) if split == "svd" else (u * s.sqrt(), s.sqrt()[:, None] * vt)


class ResidualLora(LoraBank):
    """A low-rank correction of every matrix of a block for each iteration; of fused ones, for each part.

    Args:
        backbone: whose layers these are.
        block: the layers.
        n_loops: B.
        rank: r of the attention's matrices, at most the smaller side of each.
        mlp_rank: r of the others.
    """

    def __init__(self, backbone: Backbone, block: range, n_loops: int, rank: int, mlp_rank: int):
        super().__init__(n_loops, n_loops, 1.0, "clamp", backbone.device)
        for layer in block:
            keys: dict[nn.Linear | Conv1D, list[str]] = {}
            for name, matrix in backbone.matrices(layer).items():
                n_out, n_in = matrix.weight.shape
                chosen = min(rank_of(name, rank, mlp_rank), n_in, n_out)
                key = key_of(layer - block.start, name)
                if chosen > 0:
                    self.add(key, n_in, n_out, chosen)
                keys.setdefault(matrix.module, []).append(key)
            for module, parts in keys.items():
                if any(key in self.down for key in parts):
                    module.register_forward_hook(partial(self._add_update, parts))

    def _add_update(
        self, keys: Sequence[str], module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        if self.entry is None:
            return None
        if len(keys) == 1:
            return output + self.update(keys[0], args[0]).to(output.dtype)
        return output + torch.cat([self.update(key, args[0]) for key in keys], dim=-1).to(output.dtype)


def rank_of(name: str, rank: int, mlp_rank: int) -> int:
    """Return the rank asked for a matrix by its name within its layer."""
    return rank if "attn" in name else mlp_rank


def key_of(layer: int, name: str) -> str:
    """Return the key of a parameter of a block layer."""
    return f"{layer}/{name.replace('.', '/')}"


class GainsAndBiases(Onlooker):
    """The one-dimensional parameters of a block, a copy for each iteration; at the start all are the block's own.

    Args:
        backbone: whose layers these are.
        block: the layers.
        n_loops: B.
    """

    def __init__(self, backbone: Backbone, block: range, n_loops: int):
        super().__init__()
        self.copies = nn.ParameterDict()
        places: dict[str, tuple[nn.Module, str]] = {}
        for layer in block:
            for name, parameter in backbone.layers[layer].named_parameters():
                if parameter.ndim == 1:
                    key = key_of(layer - block.start, name)
                    owner, _, last = name.rpartition(".")
                    places[key] = backbone.layers[layer].get_submodule(owner), last
                    self.copies[key] = nn.Parameter(parameter.detach().expand(n_loops, -1).clone())
        self.look_at(places=places)

    places: dict[str, tuple[nn.Module, str]]

    @contextmanager
    def at(self, iteration: int) -> Iterator[None]:
        """Use ``iteration``'s copies in the block."""
        own = {key: module._parameters[name] for key, (module, name) in self.places.items()}
        try:
            for key, (module, name) in self.places.items():
                module._parameters[name] = self.copies[key][iteration - 1]  # type: ignore[assignment]
            yield
        finally:
            for key, (module, name) in self.places.items():
                module._parameters[name] = own[key]


def vectors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's one-dimensional parameters: gains and biases."""
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.ndim == 1}

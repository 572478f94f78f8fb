"""Fewer layers made of many: those of a pretrained decoder are chosen or averaged (relaxed_recursive.md, section 2).

A stack of n = B K layers becomes a block of K that is run B times; depth l = b K + j is then run by block layer j.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from innerloop.decoder.anatomy import PER_LAYER
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError


def stepwise(n: int, k: int) -> list[int]:
    """Return k of n layers spread evenly, the first and the last among them; halves are rounded up."""
    return [0] if k == 1 else [(2 * i * (n - 1) + k - 1) // (2 * (k - 1)) for i in range(k)]


def depths_of(n: int, k: int) -> list[list[int]]:
    """Return the depths that each of k block layers runs, of n: j, k + j, 2 k + j, ..."""
    if n % k:
        raise InputError(
            f"{n} layers cannot be tied to blocks of {k}: choose a number that divides {n}, or leave some layers "
            "unshared with n_prelude and n_coda"
        )
    return [list(range(j, n, k)) for j in range(k)]


def with_ends(block: Sequence[Sequence[int]], n_prelude: int, n_layers: int, n_coda: int) -> list[Sequence[int]]:
    """Return the layers that a whole stack is made of: prelude and coda as they are, and a block between them.

    ``block`` counts layers from the first after the prelude.
    """
    inner = [[n_prelude + j for j in group] for group in block]
    return [*([i] for i in range(n_prelude)), *inner, *([i] for i in range(n_layers - n_coda, n_layers))]


@torch.no_grad()
def rebuild(backbone: Backbone, sources: Sequence[Sequence[int]], kinds: Sequence[int] | None = None) -> None:
    """Replace the stack of layers; new layer i has the mean weights of the old layers ``sources[i]``.

    Args:
        backbone: the decoder.
        sources: the layers that each new one is made of.
        kinds: the old layer that each new one is shaped as, such as with sliding attention; None: its first source.
    """
    old = list(backbone.layers)
    chosen = [group[0] for group in sources] if kinds is None else list(kinds)
    layers: list[nn.Module] = []
    for group, kind in zip(sources, chosen, strict=True):
        layer = copy.deepcopy(old[kind])
        weights = [old[source].state_dict() for source in group]
        for name, tensor in layer.state_dict().items():
            if len(group) == 1:
                tensor.copy_(weights[0][name])
            else:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                tensor.copy_(torch.stack([one[name].to(wide) for one in weights]).mean(0))
        layers.append(layer)
    backbone.replace_layers(layers, chosen)


def check_kinds(backbone: Backbone, groups: Sequence[Sequence[int]]) -> None:
    """Refuse to tie layers that do not attend alike."""
    for name in PER_LAYER:
        listed = getattr(backbone.config, name, None) or ()
        for group in groups if listed else ():
            if len({listed[layer] for layer in group}) > 1:
                kinds = ", ".join(str(listed[layer]) for layer in group)
                raise InputError(
                    f"layers {', '.join(map(str, group))} differ in {name} ({kinds}), so one cannot stand for all: "
                    "choose blocks whose length is a multiple of the pattern's"
                )


def draw(backbone: Backbone, layers: range) -> None:
    """Draw the matrices of some layers afresh, always the same."""
    generator = torch.Generator().manual_seed(0)
    std = getattr(backbone.config, "initializer_range", 0.02)
    with torch.no_grad():
        for layer in layers:
            for parameter in backbone.layers[layer].parameters():
                if parameter.ndim > 1:
                    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def initialise(backbone: Backbone, layers: range) -> None:
    """Give some layers the weights that a fresh decoder has there."""
    fresh = Backbone(AutoModelForCausalLM.from_config(backbone.config))
    for i in layers:
        backbone.layers[i].load_state_dict(fresh.layers[i].state_dict())

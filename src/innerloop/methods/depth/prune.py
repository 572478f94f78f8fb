"""Fewer layers for the same model: the one is deleted that is missed least (tah.md, 2).

Each layer is left out in turn; the model reads a few calibration rows without it, and the layer goes whose removal
raises their perplexity least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError

N_ROWS, MAX_LENGTH = 16, 4096  # of the calibration


def prune_layers(backbone: Backbone, rows: Sequence[Sequence[int]], n: int) -> list[int]:
    """Delete ``n`` layers one by one; return which, numbered as in the model before."""
    rows = [row[:MAX_LENGTH] for row in rows[:N_ROWS] if len(row) > 1]
    if not rows:
        raise InputError("layers are chosen by perplexity on calibration rows: give at least one of two tokens")
    if n >= backbone.n_layers:
        raise InputError(f"the model has {backbone.n_layers} layers, which leaves none: lower prune_layers")
    left, gone = list(range(backbone.n_layers)), []
    for _ in range(n):
        losses = [loss_without(backbone, rows, i) for i in range(backbone.n_layers)]
        least = losses.index(min(losses))
        kept = [i for i in range(backbone.n_layers) if i != least]
        backbone.replace_layers([backbone.layers[i] for i in kept], kept)
        gone.append(left.pop(least))
    return gone


@torch.no_grad()
def loss_without(backbone: Backbone, rows: Sequence[Sequence[int]], layer: int) -> float:
    """Return the mean cross-entropy of rows of token ids, read without a layer."""
    total, n_tokens = 0.0, 0
    was_training = backbone.lm.training
    backbone.lm.eval()
    for row in rows:
        ids = torch.tensor([list(row)], device=backbone.device)
        logits = backbone.head(backbone.norm(_states(backbone, ids, layer)))[0, :-1]
        total += cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        n_tokens += len(row) - 1
    backbone.lm.train(was_training)
    mean = total / n_tokens
    return mean if math.isfinite(mean) else math.inf


def _states(backbone: Backbone, ids: Tensor, layer: int) -> Tensor:
    """Return the states (1, L, D) before the final norm."""
    states = backbone.embed(ids)
    for i, part in enumerate((range(layer), range(layer + 1, backbone.n_layers))):
        if len(part):
            out = backbone(states, layers=part, inner=i > 0 and layer > 0)
            assert isinstance(out, Tensor)
            states = out
    return states

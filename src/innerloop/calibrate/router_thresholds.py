"""Thresholds of Mixture-of-Depths routers, set on held-out text (mod.md, causality=calibrated)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.methods.depth.mod_forward import ModDepth
from innerloop.text.examples import Example


@torch.no_grad()
def calibrate_routers(model: LatentModel, examples: Sequence[Example], batch_size: int = 32) -> None:
    """Set the thresholds of causality=calibrated to the (1 - c) quantiles of the routers' scores on held-out examples.

    They are means over batches.
    """
    depth, was_training = model.depth, model.training
    if not isinstance(depth, ModDepth) or depth.method.causality != "calibrated":
        raise InputError("thresholds are calibrated for mod with causality=calibrated: set it so")
    quantiles, saw = [], depth.sees_later
    model.eval()
    depth.sees_later = True
    for start in range(0, len(examples), batch_size):
        batch = model.batch(model.rows(examples[start : start + batch_size]))
        thought = model.think(batch)
        model.written_logits(batch, thought)
        quantiles += [deep.measured["quantile"] for deep in thought.deep]
    depth.sees_later = saw
    model.train(was_training)
    depth.thresholds.copy_(torch.stack(quantiles).mean(0))

"""How much of what is written with an approximate cache is what would be written without (fast_denoising.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from innerloop.engine.latent_model import LatentModel
from innerloop.methods.denoise.method import DenoisingMethod


def agreement(model: LatentModel, questions: Sequence[str], **options: Any) -> float | None:
    """Return the share of tokens that are the same with and without the cache, place by place.

    None where the method keeps no approximate cache. ``options`` are those of `generate`, the same both times.
    """
    method = model.method
    if not isinstance(method, DenoisingMethod) or method.sampler.cache == "none":
        return None
    with_cache = model.generate(questions, strict=False, **options)
    model.method = replace(method, sampler=replace(method.sampler, cache="none", refresh=None))  # type: ignore[call-arg]
    try:
        without = model.generate(questions, strict=False, **options)
    finally:
        model.method = method
    alike = [a == b for one, other in zip(with_cache, without) for a, b in zip_longest(one.ids, other.ids)]
    return sum(alike) / max(len(alike), 1)

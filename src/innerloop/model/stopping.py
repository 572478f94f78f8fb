"""Letting a model stop by another rule: for good, or in a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from innerloop.config.stopping import StopKind, StopSettings
from innerloop.errors import InputError
from innerloop.halting.rule import rule_for
from innerloop.methods import Method
from innerloop.model.model import LatentCore

TRAINED_BY: dict[str, tuple[Any, tuple[StopKind, ...]]] = {
    "gate": ("none", ("halt", "halt_sample")),
    "halt_weight": (0.0, ("halt", "halt_sample")),
    "ponder_weight": (0.0, ("act",)),
}
"""Settings of training that some rules learn by: what they are without, and the rules."""


def use_rule(model: LatentCore, **options: Any) -> None:
    """Let a model stop by other `StopSettings` than it has; those not named get their usual values.

    What a rule has learned is kept where the new one is of the same kind. What a rule of another kind was trained by is
    set aside.
    """
    if not isinstance(model.method, StopSettings):
        raise InputError(f"'{model.method.name}' has no loop that could stop by itself")
    usual = {field.name: field.default for field in fields(StopSettings)}
    if unknown := set(options) - set(usual):
        raise InputError(f"{', '.join(sorted(unknown))}: no setting of stopping; these are {', '.join(usual)}")
    stop = options.get("stop", "none")
    aside = {
        name: off for name, (off, kinds) in TRAINED_BY.items() if hasattr(model.method, name) and stop not in kinds
    }
    use_method(model, replace(model.method, **{**usual, **options, **aside}))


def use_method(model: LatentCore, method: Method) -> None:
    """Let a model reason by other settings of its method, of those that have no weights but the stop rule's."""
    old, new = model.loop.stop, rule_for(method.loop, model.backbone.width)
    if old is not None and new is not None:
        known, wanted = old.state_dict(), new.state_dict()
        fits = {name: value for name, value in known.items() if name in wanted and _fits(name, value, wanted[name])}
        new.load_state_dict({**wanted, **fits})
    model.method, model.loop.settings = method, method.loop
    model.loop.stop = None if new is None else new.to(model.device).train(model.loop.training)
    if model.depth is not None:
        object.__setattr__(model.depth, "method", method)


@contextmanager
def ruled_by(model: LatentCore, **options: Any) -> Iterator[None]:
    """Let a model stop by other settings in a block; see `use_rule`."""
    loop, before = model.loop, (model.method, model.loop.settings, model.loop.stop)
    use_rule(model, **options)
    try:
        yield
    finally:
        model.method, loop.settings, loop.stop = before
        if model.depth is not None:
            object.__setattr__(model.depth, "method", model.method)


def _fits(name: str, value: Tensor, wanted: Tensor) -> bool:
    return name.startswith("classifier.") or value.shape == wanted.shape

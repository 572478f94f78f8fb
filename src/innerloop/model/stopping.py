"""Letting a model stop by another rule: for good, or in a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from innerloop.config.stopping import GATED
from innerloop.errors import InputError, nearest
from innerloop.halting.rule import rule_for
from innerloop.methods import Method
from innerloop.model.model import LatentCore


def use_rule(model: LatentCore, **options: Any) -> None:
    """Let a model stop by other settings of its method's ``stop``; those not named get their usual values.

    What a rule has learned is kept where the new one is of the same kind. What a rule of another kind was trained by is
    set aside.
    """
    method = model.method
    known = [field.name for field in fields(method) if field.name == "stop"] and _names(method.stop)
    if not known:
        raise InputError(f"'{method.name}' has no loop that could stop by itself")
    for name in options:
        if name not in known:
            raise InputError(f"stop.{name}: '{method.name}' has no such setting{nearest(name, known)}")
    rule, aside = options.get("rule", "none"), dict[str, Any]()
    if rule not in GATED and method.halt.weight > 0:
        aside["halt"] = type(method.halt)()
    if rule not in GATED and method.exits.gate != "none":
        aside["exits"] = replace(method.exits, gate="none")  # type: ignore[type-var]
    if rule != "act" and method.ponder_weight > 0:
        aside["ponder_weight"] = 0.0
    use_method(model, replace(method, stop=type(method.stop)(**options), **aside))  # type: ignore[call-arg]


def use_method(model: LatentCore, method: Method) -> None:
    """Let a model reason by other settings of its method, of those that have no weights but the stop rule's."""
    old, new = model.loop.stop, rule_for(method.stop, model.backbone.width)
    if old is not None and new is not None:
        known, wanted = old.state_dict(), new.state_dict()
        fits = {name: value for name, value in known.items() if name in wanted and _fits(name, value, wanted[name])}
        new.load_state_dict({**wanted, **fits})
    model.loop.stop = None if new is None else new.to(model.device).train(model.loop.training)
    _look_at(model, method)


@contextmanager
def ruled_by(model: LatentCore, **options: Any) -> Iterator[None]:
    """Let a model stop by other settings in a block; see `use_rule`."""
    method, stop = model.method, model.loop.stop
    use_rule(model, **options)
    try:
        yield
    finally:
        model.loop.stop = stop
        _look_at(model, method)


def _look_at(model: LatentCore, method: Method) -> None:
    """Let all parts of a model see its method's settings."""
    model.method, model.loop.settings, model.loop.stopping = method, method.loop, method.stop
    if model.depth is not None:
        model.depth.look_at(method=method)


def _names(settings: Any) -> list[str]:
    return [field.name for field in fields(settings)]


def _fits(name: str, value: Tensor, wanted: Tensor) -> bool:
    return name.startswith("classifier.") or value.shape == wanted.shape

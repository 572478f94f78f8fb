"""Settings of methods written by their paths, and groups of settings that have every option there is.

    make(Slr, n_slots=3, **{"loop.residual": "B"})          change(method, **{"stop.rule": "kl"})

A method's own groups have the options of its paper; the loop reads all of them, whoever asks. So a group with every
option stands in where a test asks for one that the method's own has not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from innerloop.config.loop import LoopSettings
from innerloop.config.losses import AuxSettings, ExitSettings, HiddenSettings, KdSettings
from innerloop.config.method import Method
from innerloop.config.stopping import StopSettings

M = TypeVar("M", bound=Method)


def _full(base: type, **constants: Any) -> type:
    """Return a frozen dataclass whose fields are all options of a group."""
    hints = {name: hint for name, hint in base.__annotations__.items() if "ClassVar" not in str(hint)}
    options = [(name, hint, getattr(base, name)) for name, hint in hints.items()]
    made = dataclasses.make_dataclass(f"Full{base.__name__}", options, bases=(base,), frozen=True)
    for name, value in constants.items():
        setattr(made, name, value)
    return made


FullLoop = _full(LoopSettings)
FullStop = _full(StopSettings, untrained=(), has_taps=True)
FULL = {
    "loop": FullLoop,
    "stop": FullStop,
    "hid": _full(HiddenSettings),
    "aux": _full(AuxSettings),
    "kd": _full(KdSettings),
    "exits": _full(ExitSettings),
}


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with those written by paths, such as ``loop.residual``, put into their groups."""
    found: dict[str, Any] = {}
    for path, value in fields.items():
        name, _, field = path.partition(".")
        changes = {field: value} if field else value
        found[name] = {**found.get(name, {}), **changes} if isinstance(changes, Mapping) else changes
    return found


def changed(group: Any, name: str, fields: Mapping[str, Any]) -> Any:
    """Return a group with some of its fields changed; one with every option where it has not got them."""
    known = {field.name for field in dataclasses.fields(group)}
    if fields.keys() <= known or name not in FULL:
        return dataclasses.replace(group, **fields)
    own = {field.name: getattr(group, field.name) for field in dataclasses.fields(FULL[name])}
    return FULL[name](**{**own, **fields})


def _applied(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: changed(values[name], name, value) if isinstance(value, Mapping) and name in values else value
        for name, value in nested(fields).items()
    }


def make(cls: type[M], **fields: Any) -> M:
    """Return a method with some fields set, those of groups by their paths."""
    return cls(**_applied({field.name: field.default for field in dataclasses.fields(cls)}, fields))


def change(method: M, **fields: Any) -> M:
    """Return a method with some fields changed, those of groups by their paths."""
    return dataclasses.replace(method, **_applied(vars(method), fields))

"""Typing of YAML: plain values become frozen dataclasses, field by field, through nested groups.

    method: {name: lotus, n_blocks: 6, loop: {residual: sum}, stop: {rule: kl}}

A *group* is a field that holds a dataclass of its own. What is written of a group changes fields of the default that
the dataclass around it has there; where a group may be None, fields make one and null removes it.
"""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from inspect import get_annotations
from typing import Any, TypeVar, get_args, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from innerloop.checks.settings import kinds_of
from innerloop.checks.values import fitted, takes_none, told
from innerloop.errors import InputError, nearest

T = TypeVar("T")


def named(section: Any, key: str, find: Callable[[str], type]) -> Any:
    """Build a task or method from ``{name: ..., field: value}`` or from its bare name; fields override its preset's."""
    section = {"name": section} if isinstance(section, str) else section
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise InputError(f"the {key} section needs a name, for example {key}: {{name: ...}}")
    settings = dict(section)
    cls: Any = find(settings.pop("name"))
    base = None
    if "preset" in settings:
        presets, chosen = getattr(cls, "presets", {}), settings.pop("preset")
        if not isinstance(chosen, str) or chosen not in presets:
            raise InputError(
                f"{key}.preset: '{cls.name}' has no preset '{chosen}'{nearest(str(chosen), presets)}; "
                f"it has {', '.join(presets) or 'none'}"
            )
        base = presets[chosen]
    return typed(cls, settings, key, base)


def typed(cls: type, settings: Any, key: str, base: Any = None) -> Any:
    """Build a dataclass from plain values, with types checked and unknown fields answered by the nearest name.

    Args:
        cls: the dataclass.
        settings: its fields by name; those of a group by name in turn.
        key: where they are written, such as ``method`` or ``method.loop``.
        base: an instance whose fields hold where ``settings`` has none; None: the defaults hold.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"the {key} section must list fields, not {settings!r}")
    types, inner, kinds, made = field_types(cls), groups(cls), kinds_of(cls), dict[str, Any]()
    for name, value in settings.items():
        if name not in types:
            title, known, path = getattr(cls, "name", key), field_names(cls), str(name).split(".")
            hint = f"; write {': {'.join(path)}: ...{'}' * (len(path) - 1)}" if name in known else ""
            raise InputError(f"{key}.{name}: '{title}' has no field '{name}'{hint or nearest(str(name), known)}")
        if value is None and not takes_none(types[name]):
            raise InputError(f"{key}.{name} is empty, but must be {told(kinds[name])}")
        if name in inner:
            before = field_default(cls, name) if base is None else getattr(base, name)
            has_before = isinstance(before, inner[name])
            group, start = (type(before), before) if has_before else (inner[name], None)
            made[name] = None if value is None else typed(group, value, f"{key}.{name}", start)
        else:
            made[name] = fitted(f"{key}.{name}", value, kinds[name], is_text=True)
    if base is not None:
        return replace(base, **made)
    if lacking := [name for name in types if name not in made and field_default(cls, name) is MISSING]:
        raise InputError(f"{key} needs {', '.join(lacking)}")
    return cls(**made)


def merged(before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with others put in their place, inside groups as well."""
    both = {**before, **changes}
    for name in before.keys() & changes.keys():
        if isinstance(before[name], Mapping) and isinstance(changes[name], Mapping):
            both[name] = merged(before[name], changes[name])
    return both


def filled(settings: T, mark: str, text: str) -> T:
    """Return a dataclass with a mark, such as ``{out}``, replaced in every text of it and of its groups."""
    changes: dict[str, Any] = {}
    for field in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = filled(value, mark, text)
        elif isinstance(value, str) and mark in value:
            changes[field.name] = value.replace(mark, text)
    return replace(settings, **changes) if changes else settings  # type: ignore[type-var]


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, those that it declares itself first."""
    hints, own = get_type_hints(cls), get_annotations(cls)
    names = [field.name for field in fields(cls)]
    return {name: hints[name] for name in sorted(names, key=lambda name: name not in own)}


@cache
def groups(cls: type) -> dict[str, type]:
    """Return the dataclass of each field that holds one, or may."""
    kinds = [(name, kind) for name, hint in field_types(cls).items() for kind in (hint, *get_args(hint))]
    return {name: kind for name, kind in kinds if isinstance(kind, type) and is_dataclass(kind)}


def field_names(cls: type) -> list[str]:
    """Return the names of all fields, those of groups with their path, such as ``loop.residual``."""
    inner = [f"{name}.{field}" for name, group in groups(cls).items() for field in field_names(group)]
    return [*field_types(cls), *inner]


def field_default(cls: type, name: str) -> Any:
    """Return the default of a field, or MISSING where it must be given."""
    field = next(field for field in fields(cls) if field.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


@cache
def field_parser(cls: type, prefix: str = "") -> ArgumentParser:
    """Return a parser of a dataclass's fields but for its groups, which prints their help."""
    parser = ArgumentParser(exit_on_error=False, usage=SUPPRESS, add_help=False)
    add_fields(parser.add_argument_group(prefix.rstrip(".") or cls.__name__), cls, prefix)
    return parser


def add_fields(parser: Any, cls: type, prefix: str = "") -> None:
    """Add the fields of a dataclass but for its groups to a parser, or a group of it, as ``--PREFIXname``."""
    docs = [parse_docstring(base.__doc__ or "").params for base in reversed(cls.__mro__)]
    told = {param.arg_name: (param.description or "").rstrip(".") for params in docs for param in params}
    for name, hint in field_types(cls).items():
        if name not in groups(cls):
            default = field_default(cls, name)
            own = {} if default is MISSING else {"default": default}
            parser.add_argument(f"--{prefix}{name}", type=hint, help=told.get(name), **own)

"""A verb of the command line: a typed function, whose signature is its arguments and whose docstring is its help.

A parameter that is a dataclass stands for its fields; one called ``overrides`` takes every option that the verb does
not have itself, such as ``--method.loop.residual A``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from innerloop.checks.settings import kinds_of
from innerloop.checks.values import TRUTHS, fitted
from innerloop.config.typed import add_fields, field_default, field_types
from innerloop.errors import InputError, nearest


class Verb:
    """A function as the command line calls it.

    Attributes:
        types: the type of each argument by name.
        places: the names of those that are written without ``--``.
    """

    def __init__(self, name: str, function: Callable[..., None]):
        self.name, self.function = name, function
        self.types = {name: kind for name, kind in get_type_hints(function).items() if name != "return"}
        self.kinds = get_type_hints(function, include_extras=True)
        self.takes_overrides = self.types.pop("overrides", None) is not None
        self.bundles = {n: kind for n, kind in self.types.items() if isinstance(kind, type) and is_dataclass(kind)}
        self.defaults = {name: parameter.default for name, parameter in signature(function).parameters.items()}
        self.places = [n for n in self.types if n not in self.bundles and self.defaults[n] is Parameter.empty]
        for name, bundle in self.bundles.items():
            del self.types[name]
            self.types |= field_types(bundle)
            self.kinds |= kinds_of(bundle)
            self.defaults |= {field.name: field_default(bundle, field.name) for field in fields(bundle)}

    @property
    def parser(self) -> ArgumentParser:
        """The parser that types the arguments, and prints their help."""
        about = (self.function.__doc__ or "").strip().partition("\n")[0]
        usage = " ".join(("innerloop", self.name, *map(str.upper, self.places), "[--OPTION VALUE ...]"))
        parser = ArgumentParser(exit_on_error=False, usage=usage, description=about)
        told = {param.arg_name: param.description for param in parse_docstring(self.function.__doc__ or "").params}
        own = [name for name in signature(self.function).parameters if name not in (*self.bundles, "overrides")]
        for name in own:
            if name in self.places:
                parser.add_argument(name, type=self.types[name], help=told.get(name))
            else:
                default = self.defaults[name]
                parser.add_argument(f"--{name}", type=self.types[name], help=told.get(name), default=default)
        for bundle in self.bundles.values():
            add_fields(parser.add_argument_group((bundle.__doc__ or "").partition("\n")[0].rstrip(".").lower()), bundle)
        return parser

    def run(self, words: Sequence[str]) -> None:
        """Call the function with the arguments as they are written."""
        given, places, overrides = self.split(words)
        more = f"innerloop {self.name} --help lists what it takes"
        for name in self.places:
            if _is_list(self.types[name]) and places:
                given[name], places = places, []
            elif places:
                given[name], *places = places
        if places:
            raise InputError(f"innerloop {self.name} does not take {places[0]}; {more}")
        if lacking := [name.upper() for name in self.places if name not in given]:
            raise InputError(f"innerloop {self.name} needs {', '.join(lacking)}; {more}")
        called = {name: name.upper() if name in self.places else f"--{name}" for name in self.types}
        values = {name: self.defaults[name] for name in self.types}
        values |= {n: fitted(called[n], value, self.kinds[n], is_text=True) for n, value in given.items()}
        for name, bundle in self.bundles.items():
            values[name] = bundle(**{field.name: values.pop(field.name) for field in fields(bundle)})
        self.function(**values, **({"overrides": overrides} if self.takes_overrides else {}))

    def split(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
        """Return what is written: options by name, words without a name, and overrides.

        A flag needs no value, an option may list several numbers, and one that takes a list may be given again.
        """
        given, places, overrides, rest = dict[str, Any](), list[str](), list[str](), list(words)
        while rest:
            word = rest.pop(0)
            name, has_value, value = word[2:].partition("=")
            if not word.startswith("--"):
                places.append(word)
            elif name in self.types:
                if not has_value:
                    value = self._next(name, rest)
                given[name] = [*given.get(name, []), *_items(value, rest)] if _is_list(self.types[name]) else value
            elif self.takes_overrides:
                overrides += [word, *([] if has_value else rest[:1])]
                rest = rest if has_value else rest[1:]
            else:
                close = nearest(f"--{name}", [f"--{known}" for known in self.types])
                more = f"innerloop {self.name} --help lists what it takes"
                raise InputError(f"innerloop {self.name} does not take --{name}{close}; {more}")
        return given, places, overrides

    def _next(self, name: str, rest: list[str]) -> str:
        """Take the value of an option from the words that follow it."""
        if self.types[name] is bool and not (rest and rest[0].lower() in TRUTHS):
            return "true"
        if not rest or rest[0].startswith("--"):
            raise InputError(f"--{name} needs a value; innerloop {self.name} --help lists what it takes")
        return rest.pop(0)


def _is_list(kind: Any) -> bool:
    """Tell whether a type is a list, or None."""
    origins = [get_origin(part) for part in (kind, *get_args(kind))]
    return any(isinstance(origin, type) and issubclass(origin, Sequence) for origin in origins)


def _items(value: str, rest: list[str]) -> list[str]:
    """Return the items of a list: ``[1,2]``, ``1,2`` and ``1 2`` are numbers, other text is one item."""
    if not value.strip("[]").replace(",", "").replace(" ", "").isdigit():
        return [value]
    found = [item.strip() for item in value.strip("[]").split(",")]
    while rest and rest[0].isdigit():
        found.append(rest.pop(0))
    return found

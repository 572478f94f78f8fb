"""Functions whose arguments are checked where they are called, by their type hints.

@checked
def generate(model, questions: Sequence[str], max_new_tokens: Count = 64): ...

generate(model, "text")     # InputError: generate: questions is text, but must be a list of texts, as [one, two]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar, Unpack, get_args, get_origin, get_type_hints

from innerloop.checks.settings import check_names
from innerloop.checks.values import fitted
from innerloop.errors import InputError

F = TypeVar("F", bound=Callable[..., Any])
OWNERS = ("self", "cls")


def checked(function: F) -> F:
    """Return a function that answers wrong arguments by an InputError that names them."""
    taken, title = signature(function), function.__name__
    title = function.__qualname__.split(".")[-2] if title == "__init__" else title

    @cache
    def kinds() -> Mapping[str, Any]:
        return _kinds(function, taken)

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        _check_names(title, taken, given, named, kinds())
        bound = taken.bind(*given, **named)
        for name, value in bound.arguments.items():
            if taken.parameters[name].kind is Parameter.VAR_KEYWORD:
                for key, item in value.items():
                    fitted(f"{title}: {key}", item, kinds().get(key, Any))
            elif name not in OWNERS and value is not taken.parameters[name].default:
                fitted(f"{title}: {name}", value, kinds().get(name, Any))
        return function(*given, **named)

    return call  # type: ignore[return-value]


def _kinds(function: Callable[..., Any], taken: Signature) -> dict[str, Any]:
    """Return the kind of each argument by name, those of an unpacked TypedDict among them."""
    kinds = get_type_hints(function, include_extras=True)
    kinds.pop("return", None)
    for name, parameter in taken.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD and get_origin(kinds.get(name)) is Unpack:
            kinds |= get_type_hints(get_args(kinds.pop(name))[0], include_extras=True)
    return kinds


def _check_names(
    title: str, taken: Signature, given: tuple[Any, ...], named: Mapping[str, Any], kinds: Mapping[str, Any]
) -> None:
    """Refuse arguments that the function does not take, and say which are lacking."""
    parameters = [p for p in taken.parameters.values() if p.name not in OWNERS]
    n_owners = len(taken.parameters) - len(parameters)
    places = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    takes_all = any(p.kind is Parameter.VAR_KEYWORD and p.name in kinds for p in parameters)
    if not takes_all:
        check_names(title, named, {*(p.name for p in parameters if p.kind not in VARIABLE), *kinds})
    if len(given) - n_owners > len(places):
        raise InputError(f"{title} takes {len(places)} arguments by place; write the others as NAME=VALUE")
    written = {p.name for p in places[: max(len(given) - n_owners, 0)]}
    if twice := written & named.keys():
        raise InputError(f"{title}: {', '.join(sorted(twice))} is given twice")
    needed = [p.name for p in parameters if p.default is Parameter.empty and p.kind not in VARIABLE]
    if lacking := [name for name in needed if name not in written and name not in named]:
        raise InputError(f"{title} needs {', '.join(lacking)}")


VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

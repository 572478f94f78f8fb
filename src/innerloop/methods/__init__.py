"""The methods, one file each."""

from innerloop.errors import InputError, nearest
from innerloop.methods.coconut import Coconut
from innerloop.methods.cot import Cot, NoCot
from innerloop.methods.method import LatentMethod, Method
from innerloop.methods.pause import Pause
from innerloop.methods.slr import Slr

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (NoCot, Cot, Pause, Coconut, Slr)}


def method_named(name: str) -> type[Method]:
    """Return the method class of a recipe's ``method: {name: ...}``."""
    if name not in METHODS:
        raise InputError(f"there is no method '{name}'{nearest(name, METHODS)}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "Coconut", "Cot", "LatentMethod", "Method", "NoCot", "Pause", "Slr", "method_named"]

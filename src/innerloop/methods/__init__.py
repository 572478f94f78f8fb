"""The methods, one file each."""

from innerloop.errors import InputError, nearest
from innerloop.methods.coconut import Coconut
from innerloop.methods.codi import Codi
from innerloop.methods.cot import Cot, NoCot
from innerloop.methods.icot import Icot
from innerloop.methods.lotus import Lotus
from innerloop.methods.method import LatentMethod, Method
from innerloop.methods.pause import Pause
from innerloop.methods.pccot import Pccot
from innerloop.methods.simcot import SimCot, SimCotCodi
from innerloop.methods.slr import Slr
from innerloop.methods.spiralthinker import SpiralThinker

_ALL = (NoCot, Cot, Icot, Pause, Coconut, SimCot, Codi, SimCotCodi, Pccot, Slr, Lotus, SpiralThinker)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _ALL}


def method_named(name: str) -> type[Method]:
    """Return the method class of a recipe's ``method: {name: ...}``."""
    if name not in METHODS:
        raise InputError(f"there is no method '{name}'{nearest(name, METHODS)}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "Coconut",
    "Codi",
    "Cot",
    "Icot",
    "LatentMethod",
    "Lotus",
    "Method",
    "NoCot",
    "Pause",
    "Pccot",
    "SimCot",
    "SimCotCodi",
    "Slr",
    "SpiralThinker",
    "method_named",
]

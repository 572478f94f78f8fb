"""The methods, one file each."""

from innerloop.errors import InputError, nearest
from innerloop.methods.adainfer import AdaInfer
from innerloop.methods.coconut import Coconut
from innerloop.methods.codi import Codi
from innerloop.methods.cot import Cot, NoCot
from innerloop.methods.icot import Icot
from innerloop.methods.loop_regularised import LoopRegularised
from innerloop.methods.looped import Looped
from innerloop.methods.lotus import Lotus
from innerloop.methods.method import LatentMethod, Method
from innerloop.methods.mod import Mod
from innerloop.methods.mor import Mor
from innerloop.methods.pause import Pause
from innerloop.methods.pccot import Pccot
from innerloop.methods.recurrent_depth import RecurrentDepth
from innerloop.methods.relaxed_recursive import RelaxedRecursive
from innerloop.methods.simcot import SimCot, SimCotCodi
from innerloop.methods.slr import Slr
from innerloop.methods.spiralthinker import SpiralThinker
from innerloop.methods.tah import Tah

_ALL = (
    NoCot,
    Cot,
    Icot,
    Pause,
    Coconut,
    SimCot,
    Codi,
    SimCotCodi,
    Pccot,
    Slr,
    Lotus,
    SpiralThinker,
    Looped,
    LoopRegularised,
    RelaxedRecursive,
    Mod,
    Mor,
    Tah,
    RecurrentDepth,
    AdaInfer,
)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _ALL}


def method_named(name: str) -> type[Method]:
    """Return the method class of a recipe's ``method: {name: ...}``."""
    if name not in METHODS:
        raise InputError(f"there is no method '{name}'{nearest(name, METHODS)}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "AdaInfer",
    "Coconut",
    "Codi",
    "Cot",
    "Icot",
    "LatentMethod",
    "LoopRegularised",
    "Looped",
    "Lotus",
    "Method",
    "Mod",
    "Mor",
    "NoCot",
    "Pause",
    "Pccot",
    "RecurrentDepth",
    "RelaxedRecursive",
    "SimCot",
    "SimCotCodi",
    "Slr",
    "SpiralThinker",
    "Tah",
    "method_named",
]

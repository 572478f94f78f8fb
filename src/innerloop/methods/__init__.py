"""The methods, one file each."""

from innerloop.config.method import LatentMethod, Method
from innerloop.errors import InputError, nearest
from innerloop.methods.depth.adainfer import AdaInfer
from innerloop.methods.depth.loop_regularised import LoopRegularised
from innerloop.methods.depth.looped import Looped
from innerloop.methods.depth.mod import Mod
from innerloop.methods.depth.mor import Mor
from innerloop.methods.depth.recurrent_depth import RecurrentDepth
from innerloop.methods.depth.relaxed_recursive import RelaxedRecursive
from innerloop.methods.depth.tah import Tah
from innerloop.methods.latent.coconut import Coconut
from innerloop.methods.latent.codi import Codi
from innerloop.methods.latent.lotus import Lotus
from innerloop.methods.latent.pccot import Pccot
from innerloop.methods.latent.simcot import SimCot, SimCotCodi
from innerloop.methods.latent.slr import Slr
from innerloop.methods.latent.spiralthinker import SpiralThinker
from innerloop.methods.text.cot import Cot, NoCot
from innerloop.methods.text.icot import Icot
from innerloop.methods.text.pause import Pause

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

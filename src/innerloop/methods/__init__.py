"""The methods, one file each."""

from innerloop.checks.imported import imported
from innerloop.config.method import LatentMethod, Method
from innerloop.errors import InputError, nearest
from innerloop.methods.denoise.block_diffusion import BlockDiffusion
from innerloop.methods.denoise.dcolt import Dcolt
from innerloop.methods.denoise.dream import Dream
from innerloop.methods.denoise.llada import Llada
from innerloop.methods.denoise.unmasking_policy import UnmaskingPolicy
from innerloop.methods.depth.adainfer import AdaInfer
from innerloop.methods.depth.loop_regularised import LoopRegularised
from innerloop.methods.depth.looped import Looped
from innerloop.methods.depth.mod import Mod
from innerloop.methods.depth.mor import Mor
from innerloop.methods.depth.parscale import ParScale
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
from innerloop.methods.text.hrpo import Hrpo
from innerloop.methods.text.icot import Icot
from innerloop.methods.text.pause import Pause
from innerloop.methods.text.soft_thinking import SoftThinking

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
    ParScale,
    Llada,
    Dream,
    BlockDiffusion,
    Hrpo,
    SoftThinking,
    Dcolt,
    UnmaskingPolicy,
)
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in _ALL}


def method_named(name: str) -> type[Method]:
    """Return the method class of a recipe's ``method: {name: ...}``; ``my_package.module.Class`` is one of one's own.

    Raises:
        InputError: there is none of that name, or what has it is no method.
    """
    if name in METHODS:
        return METHODS[name]
    if "." not in name:
        raise InputError(f"there is no method '{name}'{nearest(name, METHODS)}; the methods are {', '.join(METHODS)}")
    found = imported(f"method '{name}'", name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"method '{name}' is no class derived from innerloop.Method")
    return found


def name_of(method: Method) -> str:
    """Return the name by which a recipe or a saved run finds a method's class again."""
    cls = type(method)
    return cls.name if METHODS.get(cls.name) is cls else f"{cls.__module__}.{cls.__qualname__}"


__all__ = [
    "METHODS",
    "AdaInfer",
    "BlockDiffusion",
    "Coconut",
    "Codi",
    "Cot",
    "Dream",
    "Hrpo",
    "Icot",
    "LatentMethod",
    "Llada",
    "LoopRegularised",
    "Looped",
    "Lotus",
    "Method",
    "Mod",
    "Mor",
    "NoCot",
    "ParScale",
    "Pause",
    "Pccot",
    "RecurrentDepth",
    "RelaxedRecursive",
    "SimCot",
    "SimCotCodi",
    "Slr",
    "SoftThinking",
    "SpiralThinker",
    "Tah",
    "method_named",
    "name_of",
]

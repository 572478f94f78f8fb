"""innerloop: train, run, measure and look inside language models that reason in latent space."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from innerloop.config.curriculum import Schedule
from innerloop.config.loop import LoopSettings
from innerloop.config.losses import AuxSettings, ExitSettings, HiddenSettings
from innerloop.config.method import LatentMethod, Method
from innerloop.config.stopping import StopSettings
from innerloop.engine.test_time import TestTimeCompute
from innerloop.errors import InputError
from innerloop.methods import (
    AdaInfer,
    BlockDiffusion,
    Coconut,
    Codi,
    Cot,
    Dcolt,
    Dream,
    Hrpo,
    Icot,
    Llada,
    Looped,
    LoopRegularised,
    Lotus,
    Mod,
    Mor,
    NoCot,
    ParScale,
    Pause,
    Pccot,
    RecurrentDepth,
    RelaxedRecursive,
    SimCot,
    SimCotCodi,
    Slr,
    SoftThinking,
    SpiralThinker,
    Tah,
    UnmaskingPolicy,
)
from innerloop.tasks import Chain, FileTask, Gsm8k, ProsQA, Task
from innerloop.text.examples import Example, read_examples, write_examples

if TYPE_CHECKING:  # slow to import: they need torch, which is imported when one of them is first asked for
    from innerloop.engine.incremental import IncrementalEngine
    from innerloop.engine.latent_model import LatentModel
    from innerloop.train.grpo import GrpoTrainer
    from innerloop.train.grpo_arguments import GrpoArguments
    from innerloop.train.trainer import LatentTrainer
    from innerloop.train.training_arguments import LatentTrainingArguments

__all__ = [
    "AdaInfer",
    "AuxSettings",
    "BlockDiffusion",
    "Chain",
    "Coconut",
    "Codi",
    "Cot",
    "Dcolt",
    "Dream",
    "Example",
    "ExitSettings",
    "FileTask",
    "GrpoArguments",
    "GrpoTrainer",
    "Gsm8k",
    "HiddenSettings",
    "Hrpo",
    "Icot",
    "IncrementalEngine",
    "InputError",
    "LatentMethod",
    "LatentModel",
    "LatentTrainer",
    "LatentTrainingArguments",
    "Llada",
    "LoopRegularised",
    "LoopSettings",
    "Looped",
    "Lotus",
    "Method",
    "Mod",
    "Mor",
    "NoCot",
    "ParScale",
    "Pause",
    "Pccot",
    "ProsQA",
    "RecurrentDepth",
    "RelaxedRecursive",
    "Schedule",
    "SimCot",
    "SimCotCodi",
    "Slr",
    "SoftThinking",
    "SpiralThinker",
    "StopSettings",
    "Tah",
    "Task",
    "TestTimeCompute",
    "UnmaskingPolicy",
    "read_examples",
    "write_examples",
]

_SLOW = {
    "GrpoArguments": "train.grpo_arguments",
    "GrpoTrainer": "train.grpo",
    "IncrementalEngine": "engine.incremental",
    "LatentModel": "engine.latent_model",
    "LatentTrainer": "train.trainer",
    "LatentTrainingArguments": "train.training_arguments",
}


def __getattr__(name: str) -> Any:
    if name not in _SLOW:
        raise AttributeError(f"module 'innerloop' has no attribute '{name}'")
    globals()[name] = found = getattr(import_module(f"innerloop.{_SLOW[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

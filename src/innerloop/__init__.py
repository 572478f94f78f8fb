"""innerloop: train, run, measure and look inside language models that reason in latent space."""

__version__ = "0.1.0"

from innerloop.engine.latent_model import LatentModel
from innerloop.engine.test_time import Attempts
from innerloop.errors import InputError
from innerloop.methods import (
    AdaInfer,
    Coconut,
    Codi,
    Cot,
    Icot,
    Looped,
    LoopRegularised,
    Lotus,
    Mod,
    Mor,
    NoCot,
    Pause,
    Pccot,
    RecurrentDepth,
    RelaxedRecursive,
    SimCot,
    SimCotCodi,
    Slr,
    SpiralThinker,
    Tah,
)
from innerloop.tasks import Chain, Gsm8k, ProsQA
from innerloop.text.examples import Example, read_examples, write_examples
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_arguments import LatentTrainingArguments

__all__ = [
    "AdaInfer",
    "Attempts",
    "Chain",
    "Coconut",
    "Codi",
    "Cot",
    "Example",
    "Gsm8k",
    "Icot",
    "InputError",
    "LatentModel",
    "LatentTrainer",
    "LatentTrainingArguments",
    "LoopRegularised",
    "Looped",
    "Lotus",
    "Mod",
    "Mor",
    "NoCot",
    "Pause",
    "Pccot",
    "ProsQA",
    "RecurrentDepth",
    "RelaxedRecursive",
    "SimCot",
    "SimCotCodi",
    "Slr",
    "SpiralThinker",
    "Tah",
    "read_examples",
    "write_examples",
]

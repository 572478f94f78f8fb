"""innerloop: train, run, measure and look inside language models that reason in latent space."""

__version__ = "0.1.0"

from innerloop.errors import InputError
from innerloop.examples import Example, read_examples, write_examples
from innerloop.methods import (
    Coconut,
    Codi,
    Cot,
    Icot,
    Lotus,
    NoCot,
    Pause,
    Pccot,
    SimCot,
    SimCotCodi,
    Slr,
    SpiralThinker,
)
from innerloop.model import LatentModel
from innerloop.tasks import Chain, Gsm8k, ProsQA
from innerloop.trainer import LatentTrainer, LatentTrainingArguments

__all__ = [
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
    "Lotus",
    "NoCot",
    "Pause",
    "Pccot",
    "ProsQA",
    "SimCot",
    "SimCotCodi",
    "Slr",
    "SpiralThinker",
    "read_examples",
    "write_examples",
]

"""What a recipe's ``train: {algorithm: ...}`` names: the settings of an algorithm, and what trains by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from innerloop.errors import InputError, nearest
from innerloop.train.grpo import GrpoTrainer
from innerloop.train.grpo_arguments import GrpoArguments
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_arguments import LatentTrainingArguments, training_arguments

ALGORITHMS: dict[str, tuple[type[LatentTrainingArguments], type[LatentTrainer]]] = {
    "supervised": (LatentTrainingArguments, LatentTrainer),
    "grpo": (GrpoArguments, GrpoTrainer),
}


def arguments_class(settings: Mapping[str, Any]) -> type[LatentTrainingArguments]:
    """Return the class of the settings in a ``train:`` section."""
    name = settings.get("algorithm", "supervised")
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise InputError(f"train.algorithm is {name!r}{nearest(name, ALGORITHMS)}: choose {' or '.join(ALGORITHMS)}")
    return ALGORITHMS[name][0]


def arguments_of(output_dir: str | Path, settings: dict[str, Any]) -> LatentTrainingArguments:
    """Make training arguments from a recipe's ``train:`` section, of the class that its algorithm has."""
    return training_arguments(output_dir, settings, arguments_class(settings))


def trainer_for(args: LatentTrainingArguments) -> type[LatentTrainer]:
    """Return what trains by the algorithm of some arguments."""
    return ALGORITHMS[args.algorithm][1]

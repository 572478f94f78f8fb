"""Running a recipe: data, model, training, stage after stage, into one folder.

RUN/config.yaml      the recipe, every field spelled out
RUN/metrics.jsonl    what was logged
RUN/checkpoint/      the best model
RUN/stages/1/ ...    the stages before the last, each a run of its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from innerloop import checkpoint
from innerloop.errors import InputError
from innerloop.examples import Example
from innerloop.methods import Method
from innerloop.model import LatentModel
from innerloop.recipe import BackboneChoice, Recipe
from innerloop.tokenizer import train_tokenizer
from innerloop.trainer import LatentTrainer, training_arguments

CONFIG = "config.yaml"
FINISHED = "finished"  # an empty file: this stage need not run again


def run_recipe(
    recipe: Recipe, resume: bool = False, callbacks: Callable[[Recipe, str], Sequence[Any]] = lambda recipe, title: ()
) -> Path:
    """Train a recipe, all its stages; return its folder.

    Args:
        recipe: what to train.
        resume: go on where an earlier run of the same folder was interrupted.
        callbacks: makes the trainer callbacks of a stage from its recipe and title.
    """
    out = Path(recipe.out)
    if (out / CONFIG).exists() and not resume:
        raise InputError(f"{out} holds a run already; go on with --resume, or choose another folder with --out")
    stages = recipe.stages or (recipe,)
    folders = [out / "stages" / str(i + 1) for i in range(len(stages) - 1)] + [out]
    for stage in stages:
        training_arguments(out, stage.train)  # wrong arguments are found before anything is trained or written
    data = [_data(stage) for stage in stages]
    recipe.save(out / CONFIG)
    start: Path | None = None
    for number, (stage, folder, (train, valid)) in enumerate(zip(stages, folders, data), 1):
        title = stage.method.name if len(stages) == 1 else f"{number}/{len(stages)} {stage.method.name}"
        if not (resume and (folder / FINISHED).exists()):
            finished = train_stage(
                replace(stage, stages=()), folder, start, train, valid, resume, callbacks(stage, title)
            )
            if not finished:
                return out
        start = folder
    return out


def train_stage(
    stage: Recipe,
    folder: Path,
    start: Path | None,
    train: list[Example],
    valid: list[Example] | None,
    resume: bool,
    callbacks: Sequence[Any],
) -> bool:
    """Train one stage from the weights in ``start``; return whether it came to its end."""
    args = training_arguments(folder, stage.train)
    backbone = stage.backbone
    if start is not None:
        backbone = replace(backbone, model=str(start), scratch=None)
    model = build(backbone, stage.method, train, args.seed)
    trainer = LatentTrainer(model, args, train, valid, stage.task, callbacks=callbacks)
    if trainer.n_left_out:
        print(f"left out {trainer.n_left_out} examples longer than train.max_length={args.max_length}")
    saved = resume and any(folder.glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=True if saved else None)
    if trainer.interrupted:
        return False
    (folder / FINISHED).touch()
    return True


def build(backbone: BackboneChoice, method: Method, train: Sequence[Example], seed: int = 0) -> LatentModel:
    """Make the model a recipe asks for; ``train`` is the text a scratch backbone's tokenizer learns from."""
    if backbone.scratch is not None:
        tokenizer = train_tokenizer(train, backbone.vocab_size)
        model = checkpoint.from_scratch(backbone.scratch, tokenizer, method, seed)
        if backbone.lora is not None:
            checkpoint.add_lora(model, backbone.lora)
        return model
    assert backbone.model is not None
    return checkpoint.load(
        backbone.model,
        method,
        lora=backbone.lora,
        dtype=backbone.dtype,
        marker_init=backbone.marker_init,
        device="cpu",  # the trainer moves it
        trust_remote_code=backbone.trust_remote_code,
    )


def _data(stage: Recipe) -> tuple[list[Example], list[Example] | None]:
    """Return training examples, and validation examples when the stage validates."""
    validates = str(stage.train.get("eval_strategy", "no")) != "no"
    return stage.task.examples("train"), stage.task.examples("valid") if validates else None

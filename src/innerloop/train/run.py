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

from transformers import set_seed

from innerloop.decoder.adapters import add_lora, freeze
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.methods import Method
from innerloop.model import loading
from innerloop.text.examples import Example
from innerloop.text.tokenizer import train_tokenizer
from innerloop.train.callbacks import remove_interrupted
from innerloop.train.recipe import BackboneChoice, Recipe, load_recipe
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_arguments import training_arguments

CONFIG = "config.yaml"
FINISHED = "finished"  # an empty file: this stage need not run again
MAY_CHANGE = ("max_steps", "num_train_epochs", "logging_", "save_", "eval_", "report_to", "disable_tqdm")


def run_recipe(
    recipe: Recipe, resume: bool = False, callbacks: Callable[[Recipe, str], Sequence[Any]] = lambda recipe, title: ()
) -> Path:
    """Train a recipe, all its stages; return its folder. An interrupted run has no file ``finished``.

    Args:
        recipe: what to train.
        resume: go on where an earlier run of the same folder was interrupted.
        callbacks: makes the trainer callbacks of a stage from its recipe and title.
    """
    out = Path(recipe.out)
    if taken := next((p for p in (out, *out.parents) if p.exists() and not p.is_dir()), None):
        raise InputError(f"{out} cannot be a folder, as {taken} is a file: choose another folder with --out")
    if (out / CONFIG).exists() and not resume:
        raise InputError(f"{out} holds a run already; go on with --resume, or choose another folder with --out")
    if resume and (out / CONFIG).exists():
        _check_same(load_recipe(out / CONFIG), recipe)
    stages = recipe.stages or (recipe,)
    folders = [out / "stages" / str(i + 1) for i in range(len(stages) - 1)] + [out]
    for stage in stages:
        training_arguments(out, stage.train)  # wrong arguments are found before anything is trained or written
    data = [_data(stage) for stage in stages]
    start: Path | None = None
    words = _read_by(stages, [train for train, _ in data])
    for number, (stage, folder, (train, valid)) in enumerate(zip(stages, folders, data), 1):
        title = stage.method.name if len(stages) == 1 else f"{number}/{len(stages)} {stage.method.name}"
        if not (resume and (folder / FINISHED).exists()):
            trainer = prepare_stage(stage.with_paths(), folder, start, train, valid, callbacks(stage, title), words)
            recipe.save(out / CONFIG)  # nothing is left behind by a recipe that cannot start
            if not train_stage(trainer, resume):
                return out
        start = folder
    return out


def _read_by(stages: Sequence[Recipe], examples: Sequence[list[Example]]) -> list[Example]:
    """Return the training examples of all stages, of stages with the same task once: what a tokenizer must spell."""
    tasks = [stage.task for stage in stages]
    return [example for i, found in enumerate(examples) if tasks[i] not in tasks[:i] for example in found]


def prepare_stage(
    stage: Recipe,
    folder: Path,
    start: Path | None,
    train: list[Example],
    valid: list[Example] | None,
    callbacks: Sequence[Any],
    words: Sequence[Example] | None = None,
) -> LatentTrainer:
    """Make the trainer of a stage, which begins with the weights in ``start``.

    A scratch backbone's tokenizer learns from ``words``, or without from the training examples.
    """
    args = training_arguments(folder, stage.train)
    backbone = stage.backbone
    if start is not None:
        backbone = replace(backbone, model=str(start), scratch=None)
    set_seed(args.seed)  # what the method and LoRA add is drawn too
    model = build(backbone, stage.method, train if words is None else words, args.seed)
    return LatentTrainer(model, args, train, valid, stage.task, callbacks=callbacks)


def train_stage(trainer: LatentTrainer, resume: bool) -> bool:
    """Train one stage; return whether it came to its end."""
    if trainer.n_left_out:
        print(f"left out {trainer.n_left_out} examples longer than train.max_length={trainer.args.max_length}")
    folder = Path(trainer.args.output_dir)
    saved = resume and any(folder.glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=True if saved else None)
    if trainer.interrupted:
        return False
    if trainer.reached_stage < trainer.curriculum.last_stage:
        print(
            f"note: training ended in stage {trainer.reached_stage} of {trainer.curriculum.last_stage}, before the "
            "curriculum did; train longer, or shorten it"
        )
    (folder / FINISHED).touch()
    if trainer.args.should_save:
        remove_interrupted(folder)
    return True


def _check_same(old: Recipe, new: Recipe) -> None:
    """Refuse to resume with another recipe: only how long to train, and what is logged and saved, may change."""

    def fixed(recipe: Recipe) -> list[tuple[str, Any]]:
        parts: list[tuple[str, Any]] = []
        for number, stage in enumerate(recipe.stages or (recipe,), 1):
            parts += [(f"stage {number}: {name}", getattr(stage, name)) for name in ("task", "backbone", "method")]
            train = {name: value for name, value in stage.train.items() if not name.startswith(MAY_CHANGE)}
            parts.append((f"stage {number}: train", train))
        return parts

    differ = [name for (name, was), (_, now) in zip(fixed(old), fixed(new)) if was != now]
    if differ or len(fixed(old)) != len(fixed(new)):
        raise InputError(
            f"this run was begun with another recipe ({', '.join(differ) or 'other stages'}); resume with the one in "
            f"{Path(new.out) / CONFIG}, or choose another folder with --out"
        )


def build(backbone: BackboneChoice, method: Method, train: Sequence[Example], seed: int = 0) -> LatentModel:
    """Make the model a recipe asks for; ``train`` is the text a scratch backbone's tokenizer learns from."""
    if backbone.scratch is not None:
        tokenizer = train_tokenizer(train, backbone.vocab_size)
        if backbone.freeze:
            raise InputError("backbone.freeze needs weights worth keeping: give backbone.model, or a stage before")
        model = loading.from_scratch(LatentModel, backbone.scratch, tokenizer, method, seed)
        _choose_attention(model, backbone.attention)
        if backbone.lora is not None:
            add_lora(model.backbone, model.marker_ids(), backbone.lora)
        return model
    assert backbone.model is not None
    model = loading.load(
        LatentModel,
        backbone.model,
        method,
        lora=backbone.lora,
        dtype=backbone.dtype,
        marker_init=backbone.marker_init,
        device="cpu",  # the trainer moves it
        trust_remote_code=backbone.trust_remote_code,
    )
    _choose_attention(model, backbone.attention)
    if backbone.freeze:
        freeze(model.backbone, model.marker_ids())
    return model


def _choose_attention(model: LatentModel, kind: str | None) -> None:
    """Let kernels of a kind compute attention, for as long as the model is in memory."""
    if kind is None:
        return
    try:
        model.backbone.lm.set_attn_implementation(kind)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"backbone.attention={kind} cannot be used here ({reason}); choose sdpa or eager") from None


def _data(stage: Recipe) -> tuple[list[Example], list[Example] | None]:
    """Return training examples, and validation examples when the stage validates."""
    validates = str(stage.train.get("eval_strategy", "no")) != "no"
    return stage.task.examples("train"), stage.task.examples("valid") if validates else None

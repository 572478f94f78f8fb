"""Running a recipe: data, model, training, stage after stage, into one folder.

RUN/config.yaml      the recipe, every field spelled out
RUN/metrics.jsonl    what was logged
RUN/checkpoint/      the best model
RUN/stages/1/ ...    the stages before the last, each a run of its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from innerloop.decoder.adapters import add_lora, freeze
from innerloop.disk.files import write_text
from innerloop.disk.lock import locked
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.methods import Method
from innerloop.model import loading
from innerloop.tasks.task import warn_of_overlap
from innerloop.text.examples import Example
from innerloop.text.tokenizer import train_tokenizer
from innerloop.train.algorithms import arguments_of, trainer_for
from innerloop.train.callbacks import Begun
from innerloop.train.checkpoints import remove_interrupted, saved
from innerloop.train.recipe import CONFIG, BackboneChoice, Recipe, load_recipe
from innerloop.train.resumable import WRITTEN as OF_TRAINING
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_arguments import check_libraries

FINISHED = "finished"  # an empty file: this stage need not run again
WRITTEN = (CONFIG, FINISHED, "stages", *OF_TRAINING)  # what a run writes into its folder
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
    is_begun = (out / CONFIG).exists()
    for stage in stages:
        args = arguments_of(out, stage.train)  # wrong arguments are found before anything is trained or written
        check_libraries(args)
    with locked(out, () if is_begun else WRITTEN) if args.process_index == 0 else nullcontext():
        return _run_stages(recipe, stages, resume, callbacks)


def _run_stages(
    recipe: Recipe, stages: Sequence[Recipe], resume: bool, callbacks: Callable[[Recipe, str], Sequence[Any]]
) -> Path:
    """Train the stages that are not finished."""
    out = Path(recipe.out)
    folders = [out / "stages" / str(i + 1) for i in range(len(stages) - 1)] + [out]
    data = [_data(stage) for stage in stages]
    for stage, (train, valid) in zip(stages, data):
        warn_of_overlap(stage.task, {"train": train, **({} if valid is None else {"valid": valid})})
    start: Path | None = None
    words = _read_by(stages, [train for train, _ in data])
    for number, (stage, folder, (train, valid)) in enumerate(zip(stages, folders, data), 1):
        title = stage.method.name if len(stages) == 1 else f"{number}/{len(stages)} {stage.method.name}"
        if resume and (folder / FINISHED).exists():
            remove_interrupted(folder)  # what a kill left to do
        else:
            begun = Begun(lambda: recipe.save(out / CONFIG))  # nothing is left behind by a recipe that cannot start
            calls = [*callbacks(stage, title), begun]
            trainer = prepare_stage(stage.with_paths(), folder, start, train, valid, calls, words)
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
    args = arguments_of(folder, stage.train)
    backbone = stage.backbone
    if start is not None:
        backbone = replace(backbone, model=str(start), scratch=None)
    set_seed(args.seed)  # what the method and LoRA add is drawn too
    model = build(backbone, stage.method, train if words is None else words, args.seed)
    return trainer_for(args)(model, args, train, valid, stage.task, callbacks=callbacks)


def train_stage(trainer: LatentTrainer, resume: bool) -> bool:
    """Train one stage; return whether it came to its end."""
    if trainer.n_left_out and trainer.args.should_save:
        print(f"left out {trainer.n_left_out} examples longer than train.max_length={trainer.args.max_length}")
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=resume and bool(saved(folder)))
    if trainer.interrupted:
        return False
    if trainer.reached_stage < trainer.model.method.last_stage and trainer.args.should_save:
        print(
            f"note: training ended in stage {trainer.reached_stage} of {trainer.model.method.last_stage}, before the "
            "curriculum did; train longer, or shorten it"
        )
    if trainer.args.should_save:
        write_text(folder / FINISHED, "")
        remove_interrupted(folder)
    trainer.accelerator.wait_for_everyone()  # all find the stage finished
    return True


def _check_same(old: Recipe, new: Recipe) -> None:
    """Refuse to resume with another recipe: only how long to train, and what is logged and saved, may change."""

    def fixed(recipe: Recipe) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, stage in enumerate(recipe.stages or (recipe,), 1):
            train = {name: value for name, value in stage.train.items() if not name.startswith(MAY_CHANGE)}
            parts = {"task": stage.task, "backbone": stage.backbone, "method": stage.method, "train": train}
            found |= {f"stage {number}: {name}": part for name, part in parts.items()}
        return found

    was, now = fixed(old), fixed(new)
    if differ := [name for name in {**was, **now} if was.get(name) != now.get(name)]:
        raise InputError(
            f"this run was begun with another recipe ({', '.join(differ)}); resume with the one in "
            f"{Path(new.out) / CONFIG}, or choose another folder with --out"
        )


def build(backbone: BackboneChoice, method: Method, train: Sequence[Example], seed: int = 0) -> LatentModel:
    """Make the model a recipe asks for; ``train`` is the text a scratch backbone's tokenizer learns from."""
    if backbone.scratch is not None:
        if backbone.freeze:
            raise InputError("backbone.freeze needs weights worth keeping: give backbone.model, or a stage before")
        tokenizer = train_tokenizer(train, backbone.vocab_size)
        model = loading.from_scratch(LatentModel, backbone.scratch, tokenizer, method, seed)
        if backbone.lora is not None:
            add_lora(model.backbone, model.marker_ids(), backbone.lora)
    else:
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
            chat=backbone.chat,
        )
    if backbone.attention is not None:
        try:
            model.backbone.lm.set_attn_implementation(backbone.attention)
        except (ImportError, ValueError) as error:
            reason, kind = " ".join(str(error).split())[:200], f"backbone.attention={backbone.attention}"
            raise InputError(f"{kind} cannot be used here ({reason}); choose sdpa or eager") from None
    if backbone.freeze:
        freeze(model.backbone, model.marker_ids())
    return model


def _data(stage: Recipe) -> tuple[list[Example], list[Example] | None]:
    """Return training examples, and validation examples when the stage validates."""
    validates = str(stage.train.get("eval_strategy", "no")) != "no"
    return stage.task.examples("train"), stage.task.examples("valid") if validates else None

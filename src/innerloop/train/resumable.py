"""A `transformers.Trainer` whose checkpoints are whole, and whose runs end alike wherever they were killed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from innerloop.disk import folders
from innerloop.disk.files import told
from innerloop.disk.lock import locked
from innerloop.model import run_folder
from innerloop.train import checkpoints
from innerloop.train.training_arguments import LatentTrainingArguments

STAGING = ".checkpoint.staging"  # inside a run: where checkpoints are written
WRITTEN = ("metrics.jsonl", "checkpoint", "checkpoint-*")  # what training writes into a folder


class ResumableTrainer(Trainer, ABC):
    """Trains in a folder that it alone writes, from the beginning or from a whole checkpoint."""

    args: LatentTrainingArguments
    _staging: Path | None = None  # where a checkpoint is being written

    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps in an epoch."""

    @property
    @abstractmethod
    def is_good_enough(self) -> bool:
        """Whether training may end before its last step."""

    @abstractmethod
    def _check_weights(self) -> None:
        """Refuse to save weights that have gone wrong."""

    @abstractmethod
    def _save_result(self) -> None:
        """Write what the training is for, unless validation has."""

    @property
    def best_folder(self) -> Path:
        """Where the best model is kept."""
        return Path(self.args.output_dir) / run_folder.RUN_CHECKPOINT

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, and leave the best model (without validation: the last) in ``output_dir/checkpoint``.

        Args:
            resume_from_checkpoint: a checkpoint-<step> folder, or True for the newest whole one.
            kwargs: see transformers.

        Raises:
            InputError: no checkpoint is whole, another process trains in ``output_dir``, or others' files are there.
        """
        folder = Path(self.args.output_dir)
        given = folder / "any" if resume_from_checkpoint is True else Path(resume_from_checkpoint or "/")
        is_own = given.resolve().parent == folder.resolve()
        lock = locked(folder, () if is_own else WRITTEN) if self.args.process_index == 0 else nullcontext()
        with lock:
            if self.args.should_save:
                folders.clear(folder / STAGING)
                folders.settle_all(folder)
            self.accelerator.wait_for_everyone()
            start = self._start(resume_from_checkpoint)
            if self.args.should_save:
                if start is None:
                    folders.remove(self.best_folder)
                    checkpoints.remove_all(folder)
                elif is_own:
                    self._rotate(start)
            try:
                output = super().train(None if start is None else str(start), **kwargs)
            except BaseException:
                self.callback_handler.on_train_end(self.args, self.state, self.control)  # bars and signals are put away
                raise
            self._save_result()
            self.accelerator.wait_for_everyone()  # whoever goes on reads what the first process has saved
        return output

    def _start(self, resume: str | bool | None) -> Path | None:
        """Return the checkpoint to go on from, which is whole; None: from the beginning."""
        if not resume:
            return None
        if resume is not True:
            checkpoints.check_whole(Path(resume))
            return Path(resume)
        folder, line = checkpoints.newest_whole(self.args.output_dir)
        if self.args.process_index == 0:
            print(line)
        return folder

    def _run_epoch(self, **given: Any) -> None:
        """Run an epoch; none where a run that had made its last step is resumed."""
        self._evaluate_what_is_due(given["trial"])
        if self.state.global_step < self.state.max_steps and not self.is_good_enough:
            super()._run_epoch(**given)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, trial: Any, *given: Any) -> Any:
        self._evaluate_what_is_due(trial)
        return super()._finalize_training(trial, *given)

    def _evaluate_what_is_due(self, trial: Any) -> None:
        """Make up for the validation at an epoch's end that a kill prevented after the checkpoint of the same step."""
        step, last = self.state.global_step, self.state.max_steps
        if not 0 < step == self._initial_global_step or self.args.eval_strategy != IntervalStrategy.EPOCH:
            return
        is_end = step >= last or step % self.steps_per_epoch() == 0
        if is_end and not any(log["step"] == step and "eval_accuracy" in log for log in self.state.log_history):
            self._evaluate(trial, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, seal it when all processes have written, and put it in place."""
        self._check_weights()
        run = Path(self.args.output_dir)
        folder, staging = checkpoints.folder_of(run, self.state.global_step), run / STAGING
        older = checkpoints.saved(run)
        end = f"{older[-1]} is untouched: make room and resume from it" if older else "make room and --resume"
        self._staging = staging
        try:
            with told(f"could not save {folder} (is the disk full?)", end):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    folders.place(staging / folder.name, folder)
                    self._rotate(folder)
        finally:
            self._staging = None
            if self.args.should_save:
                folders.clear(staging)

    def _rotate(self, newest: Path) -> None:
        best = self.state.best_model_checkpoint
        kept = [newest, *([Path(best)] if best else [])]
        checkpoints.rotate(self.args.output_dir, self.args.save_total_limit, *kept)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

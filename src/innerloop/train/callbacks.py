"""Trainer callbacks: a live bar with the terms of the loss, metrics.jsonl, and an end by signal that loses nothing."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from innerloop.disk.files import append, write_text
from innerloop.terminal.progress import bar
from innerloop.train.checkpoints import INTERRUPTED, folder_of, log_entries

METRICS = "metrics.jsonl"
SHOWN = {
    "loss": "loss",
    "loss_answer": "answer",
    "loss_step": "step",
    "stage": "stage",
    "reward": "reward",
    "eval_accuracy": "accuracy",
}


class LiveProgress(TrainerCallback):
    """Shows steps done, time left, the terms of the loss, the stage and the last validation accuracy."""

    def __init__(self, title: str = "training", console: Console | None = None):
        self.title = title
        self.progress = bar(console)
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        self.progress.disable = not state.is_world_process_zero
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest numbers."""
        self.shown |= {SHOWN[name]: value for name, value in (logs or {}).items() if name in SHOWN}
        note = "  ".join(f"{name} {value:.4g}" for name, value in self.shown.items())
        self.progress.update(self.task, note=note)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.progress.stop()  # also after an error: the cursor comes back


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl; on resuming, lines past the resumed step are taken back first."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the file at the step training begins at."""
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir or ".") / METRICS
        old = log_entries(path) if state.global_step > 0 else []
        kept = [entry for entry in old if entry["step"] <= state.global_step][: len(state.log_history)]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero:
            return
        append(Path(args.output_dir or ".") / METRICS, json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class Begun(TrainerCallback):
    """Does something once, when training begins: when all that could be refused has been checked."""

    def __init__(self, does: Callable[[], object]):
        self.does = does

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do it, in one process."""
        if state.is_world_process_zero:
            self.does()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C, or SIGTERM, ends the step at hand, saves a checkpoint and stops; Ctrl-C again stops at once.

    Args:
        every: steps that belong together, and are ended together.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.asked = False
        self.saves_early = False
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listen, where this is the main thread: signals come to no other."""
        self.asked = self.saves_early = False
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop, if asked to; all processes do so after the same step."""
        if args.world_size > 1:
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked and state.global_step % self.every == 0:
            ends_epoch = args.save_strategy == SaveStrategy.EPOCH and float(state.epoch or 0).is_integer()
            self.saves_early = not (control.should_save or ends_epoch)
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark a checkpoint that is there only because training was interrupted."""
        if self.saves_early and state.is_world_process_zero:
            write_text(folder_of(args.output_dir or ".", state.global_step) / INTERRUPTED, "")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave signals as they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

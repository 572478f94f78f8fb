"""Trainer callbacks: a live bar with the terms of the loss, metrics.jsonl, and an end by signal that loses nothing."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from innerloop.terminal.progress import bar

METRICS = "metrics.jsonl"
INTERRUPTED = "interrupted"  # an empty file in a checkpoint that train.save_strategy would not have made
SHOWN = {"loss": "loss", "loss_answer": "answer", "loss_step": "step", "stage": "stage", "eval_accuracy": "accuracy"}


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
        path.parent.mkdir(parents=True, exist_ok=True)
        old = path.read_text().splitlines() if path.exists() and state.global_step > 0 else []
        kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= state.global_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero:
            return
        with (Path(args.output_dir or ".") / METRICS).open("a") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C, or SIGTERM, ends the step at hand, saves a checkpoint and stops; Ctrl-C again stops at once."""

    def __init__(self) -> None:
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
        """Save and stop, if asked to."""
        if self.asked:
            ends_epoch = args.save_strategy == SaveStrategy.EPOCH and float(state.epoch or 0).is_integer()
            self.saves_early = not (control.should_save or ends_epoch)
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark a checkpoint that is there only because training was interrupted."""
        if self.saves_early and state.is_world_process_zero:
            (Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / INTERRUPTED).touch()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave signals as they were."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def remove_interrupted(folder: Path) -> None:
    """Remove the checkpoints that interruptions left in a folder, once the training there has come to its end."""
    for mark in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{INTERRUPTED}"):
        shutil.rmtree(mark.parent)

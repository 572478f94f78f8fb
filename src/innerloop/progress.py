"""Trainer callbacks: a live bar with the terms of the loss, metrics.jsonl, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

METRICS = "metrics.jsonl"
SHOWN = {"loss": "loss", "loss_answer": "answer", "loss_step": "step", "stage": "stage", "eval_accuracy": "accuracy"}


def bar(console: Console | None = None) -> Progress:
    """Return a progress bar with counts, time used and time left."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


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
    """The first Ctrl-C ends the step at hand, saves a checkpoint and stops; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listen for Ctrl-C, where this is the main thread."""
        self.asked = False
        try:
            self.before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread: Ctrl-C does not come here
            self.before = None

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop, if asked to."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave Ctrl-C as it was."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

"""What verbs have in common: a task and a model as arguments, examples left out, folders, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from innerloop.config.typed import named
from innerloop.disk.files import check_writable
from innerloop.errors import InputError
from innerloop.methods import Method, method_named
from innerloop.model import run_folder
from innerloop.tasks import Task, task_named
from innerloop.terminal.plain import plain_console
from innerloop.text.examples import Example
from innerloop.text.wording import Chat

if TYPE_CHECKING:  # slow to import
    import torch

    from innerloop.engine.latent_model import LatentModel
    from innerloop.measure.result_cache import ResultCache

console = plain_console()
Dtype = Literal["auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"]
MOST_NAMED = 8  # examples that are left out


@dataclass(frozen=True)
class TaskArguments:
    """What is answered.

    Args:
        task: a task's name, or {name: ..., field: value}; by default the one the run was trained on.
        data: a file or Hub data set to read the split from.
    """

    task: str | None = None
    data: str | None = None

    def task_of(self, run: str, split: str) -> Task:
        """Return the task asked for, or the one a run was trained on, with ``data`` as the source of a split."""
        from innerloop.train.recipe import CONFIG, parse_value, read_recipe

        run_folder.resolve(run)
        config = Path(run) / CONFIG
        if self.task is not None:
            section = parse_value(self.task, "--task")
        elif config.exists():
            section = read_recipe(config).get("task")
        else:
            raise InputError(f"{run} is no folder with a {CONFIG}, so say what to answer: --task NAME")
        if not isinstance(section, str | dict):
            if self.task is None:
                raise InputError(f"{config} does not say which task it is for: restore it, or give --task NAME")
            raise InputError(f"--task {self.task}: write a task's name, or {{name: ..., field: value}}")
        section = {"name": section} if isinstance(section, str) else dict(section)
        if self.data is not None:
            if split not in getattr(task_named(str(section.get("name", ""))), "__dataclass_fields__", {}):
                raise InputError(f"task '{section['name']}' makes its own examples and reads no --data")
            section[split] = self.data
        return named(section, "task", task_named)


@dataclass(frozen=True)
class SplitArguments(TaskArguments):
    """What is answered.

    Args:
        split: train, valid or test.
    """

    split: str = "test"

    def load_task(self, run: str) -> Task:
        """Return the task asked for, or the one a run was trained on."""
        return self.task_of(run, self.split)


@dataclass(frozen=True)
class ModelArguments:
    """Who answers, and where.

    Args:
        method: reason by another method than the run was trained with: its name, or {name: ..., field: value}.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        dtype: the type of the weights; auto keeps the file's, which is fp32 for what was trained so.
        chat: ask a model that is no run through its chat template, or not; auto: if it has one.
    """

    method: str | None = None
    device: str | None = None
    dtype: Dtype = "auto"
    chat: Literal["auto", "true", "false"] = "auto"

    def read_method(self) -> Method | None:
        """Return the method that was written."""
        from innerloop.train.recipe import parse_value

        return None if self.method is None else named(parse_value(self.method, "--method"), "method", method_named)

    @property
    def asked_as(self) -> Chat:
        """Whether questions are turns of a chat, as loading takes it."""
        return "auto" if self.chat == "auto" else self.chat == "true"

    def find_device(self) -> torch.device | None:
        """Return the device, if it is there."""
        own = os.environ.get("LOCAL_RANK")  # of several processes each has a GPU
        if self.device is None and own is None:
            return None
        import torch

        if self.device is None:
            return torch.device("cuda", int(own or 0)) if torch.cuda.device_count() > int(own or 0) else None
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise InputError(f"--device {self.device} is no device: write cpu, cuda or cuda:N") from None
        n_cuda = torch.cuda.device_count()
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= n_cuda):
            raise InputError(f"--device {self.device}: there are the CPU and {n_cuda} CUDA devices")
        return device

    def load_model(self, run: str, compile: bool = False) -> LatentModel:
        """Load a run, or any model with the method asked for."""
        method = self.read_method()  # refused before what is slow to import
        from innerloop.engine.latent_model import LatentModel

        model = LatentModel.from_pretrained(
            run, method, device=self.find_device(), dtype=self.dtype, chat=self.asked_as
        )
        if compile:
            model.backbone.compile_passes()
        return model


def askable(models: Sequence[LatentModel], examples: Sequence[Example], most: int | None = None) -> list[Example]:
    """Return the examples that all models can be asked, at most so many; say which were left out, and how many."""
    from innerloop.engine.requests import fits

    kept, left = list[Example](), list[str]()
    for example in examples:
        if len(kept) == most:
            break
        if all(fits(model, example.question) for model in models):
            kept.append(example)
        else:
            left.append(example.id)
    if left:
        more = f" and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
        counted = f"({len(left)} of {len(kept) + len(left)})"
        told = ", ".join(left[:MOST_NAMED]) + more
        console.print(f"left out, as they cannot be answered: {told} {counted}", soft_wrap=True)
    return kept


def writable(folder: Path, hint: str = "give another folder by --out DIR") -> Path:
    """Make a folder for results, and see that it can be written to, before anything is measured."""
    check_writable(folder, hint)
    return folder


def results_folder(run: str, out: str | None) -> Path:
    """Return where results of a model go, as `writable` does: OUT, or the model's own folder, if it has one here."""
    if out is None and not Path(run).is_dir():
        raise InputError(f"{run} is a name on the Hub, where results cannot be kept: give a folder by --out DIR")
    return writable(Path(out or run))


@contextmanager
def going_on(parts: ResultCache, names: str, hint: str = " (--fresh true starts over)") -> Iterator[None]:
    """Say what is known from before (``names``), if anything is; after Ctrl-C, what is kept and where."""
    if parts.known:
        console.print(f"measured before: {names}{hint}", soft_wrap=True)
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"{len(parts.known)} parts are kept in {parts.path}; the same command goes on", soft_wrap=True)
        raise


@contextmanager
def progress_of(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; what is yielded is told how much has been done since the last call."""
    from innerloop.terminal.progress import bar

    with bar(console) as progress:
        row = progress.add_task(title, total=total, note="")
        yield partial(progress.advance, row)
        progress.update(row, completed=total)

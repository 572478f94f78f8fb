"""What the command line was given, as objects: where to print, a task, what can be asked, a method, a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from innerloop.engine.generation import fits
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.measure.result_cache import ResultCache
from innerloop.methods import Method, method_named
from innerloop.model import checkpoint
from innerloop.tasks import Task, task_named
from innerloop.text.examples import Example
from innerloop.train.recipe import named, parse_value, read_recipe
from innerloop.train.run import CONFIG

console = Console()
Dtype = Literal["auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"]
MOST_NAMED = 8  # examples that are left out


def model_given(
    run: str, method: Method | None, device: str | None, dtype: Dtype, compile: bool = False
) -> LatentModel:
    """Load the model of every verb that answers: a run or any model, where and in the type that was asked for."""
    model = LatentModel.from_pretrained(run, method, device=device_given(device), dtype=dtype)
    if compile:
        model.backbone.compile_passes()
    return model


def device_given(text: str | None) -> torch.device | None:
    """Return the device of a name, if it is there."""
    if text is None:
        return None
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"--device {text} is no device: write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise InputError(f"--device {text}: there are the CPU and {torch.cuda.device_count()} CUDA devices")
    return device


def task_given(run: str, task: str | None, data: str | None, split: str) -> Task:
    """Return the task asked for, or the one a run was trained on, with ``data`` as the source of the split."""
    checkpoint.resolve(run)
    config = Path(run) / CONFIG
    if task is not None:
        section = parse_value(task, "--task")
    elif config.exists():
        section = read_recipe(config).get("task")
    else:
        raise InputError(f"{run} is no folder with a {CONFIG}, so say what to answer: --task NAME")
    if not isinstance(section, str | dict):
        if task is None:
            raise InputError(f"{config} does not say which task it is for: restore it, or give --task NAME")
        raise InputError(f"--task {task}: write a task's name, or {{name: ..., field: value}}")
    section = {"name": section} if isinstance(section, str) else dict(section)
    if data is not None:
        if split not in getattr(task_named(str(section.get("name", ""))), "__dataclass_fields__", {}):
            raise InputError(f"task '{section['name']}' makes its own examples and reads no --data")
        section[split] = data
    return named(section, "task", task_named)


def askable(models: Sequence[LatentModel], examples: Sequence[Example], most: int | None = None) -> list[Example]:
    """Return the examples that all models can be asked, at most so many; say which were left out, and how many."""
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
        named = ", ".join(left[:MOST_NAMED]) + more
        console.print(f"left out, as they cannot be answered: {named} {counted}", soft_wrap=True, markup=False)
    return kept


def folder_given(folder: Path, hint: str = "give another folder by --out DIR") -> Path:
    """Make a folder for results, and see that it can be written to, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): {hint}") from None
    checkpoint.write_text(probe := folder / ".can_be_written", "")
    probe.unlink(missing_ok=True)
    return folder


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


def method_given(text: str | None) -> Method | None:
    """Return the method written as a name or as {name: ..., field: value}."""
    return None if text is None else named(parse_value(text, "--method"), "method", method_named)

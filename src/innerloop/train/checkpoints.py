"""The checkpoint-<step> folders of a run: which is whole, which may go.

Each is sealed by a manifest when it is complete (`disk/folders.py`). What decides is the step in a folder's name, never
the clock.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from innerloop.disk.folders import damage, manifest, remove
from innerloop.errors import InputError

INTERRUPTED = "interrupted"  # an empty file in a checkpoint that train.save_strategy would not have made
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def folder_of(run: str | Path, step: int) -> Path:
    """Return the folder of a run's checkpoint at a step."""
    return Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def saved(run: str | Path) -> list[Path]:
    """Return the checkpoints of a run, by step, damaged ones too; none that something else has made."""
    steps = {path: int(found[1]) for path in Path(run).glob("*") if (found := NAME.fullmatch(path.name))}
    return [path for path in sorted(steps, key=steps.__getitem__) if path.is_dir()]


def last_kept(run: str | Path) -> str:
    """Say which checkpoint training that has gone wrong leaves."""
    found = saved(run)
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been saved yet"


def newest_whole(run: str | Path) -> tuple[Path, str]:
    """Return the newest checkpoint that is whole, and a line that says so, with what is damaged in newer ones.

    Raises:
        InputError: there is none.
    """
    damaged = list[str]()
    for folder in reversed(saved(run)):
        if (what := damage(folder)) is None:
            return folder, f"going on from {folder}" + (f", as {'; '.join(damaged)}" if damaged else "")
        damaged.append(f"{folder.name} is damaged ({what})")
    if not damaged:
        raise InputError(f"there is no checkpoint in {run} to resume from")
    raise InputError(
        f"no checkpoint in {run} is whole: {'; '.join(damaged)}; restore one, or begin again in "
        "another folder with --out"
    )


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint that lacks something, or has changed."""
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint {folder} to resume from")
    if what := damage(folder):
        raise InputError(f"{folder} is damaged ({what}): resume from an earlier checkpoint")


def rotate(run: str | Path, limit: int | None, *kept: Path) -> None:
    """Remove the oldest checkpoints beyond a limit, but not those named; what others put into them stays."""
    if not limit or limit < 0:
        return
    found = [path for path in saved(run) if manifest(path) is not None]
    free = [path for path in found if path not in kept]
    for path in free[: max(len(found) - limit, 0)]:
        remove(path, [INTERRUPTED])


def remove_all(run: str | Path) -> None:
    """Remove the checkpoints of a run."""
    for path in saved(run):
        remove(path, [INTERRUPTED])


def remove_interrupted(run: Path) -> None:
    """Remove the checkpoints that interruptions left, once the training has come to its end."""
    for path in saved(run):
        if (path / INTERRUPTED).exists():
            remove(path, [INTERRUPTED])


def log_entries(path: Path) -> list[dict]:
    """Return the entries of a log, without a line that a kill has cut short."""
    entries = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries

"""Time and memory of runs that answer the same questions in turns, so that what disturbs the machine disturbs all.

What was measured is kept (times.json) and taken as it is the next time, as long as runs, device and versions are the
same: one comparison gives one report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from innerloop.bench.timing import clock_of, peak_of, seconds_of, take_turns
from innerloop.disk.files import write_text
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.requests import fits
from innerloop.engine.test_time import ONCE, TestTimeCompute
from innerloop.measure.accuracy import device_name, versions
from innerloop.measure.result_cache import digest
from innerloop.model import run_folder
from innerloop.tasks import Task

TIMES = "times.json"
REPEATS = 5


def time_runs(
    runs: Mapping[str, Path],
    task: Task,
    questions: Sequence[str],
    folder: Path,
    attempts: Mapping[str, TestTimeCompute] | None = None,
) -> dict[str, Any]:
    """Return, and keep in FOLDER/times.json, the times of runs that take turns, and the memory each needs.

    Args:
        runs: folders by name; all models are held in memory together, one for each folder.
        task: says how much may be written.
        questions: what each answers in a turn, as one batch; those that a run cannot answer are asked of none.
        folder: where times.json lies.
        attempts: by name, how often each question is tried, where it is not once.

    Returns:
        ``n`` questions, their hash, ``max_new_tokens``, ``repeats``, ``device``, ``versions``, and in ``runs`` by name
        ``seconds``, of an example in each turn, and ``memory``, the peak in bytes beyond the weights; no runs where
        no question can be answered by all.
    """
    loaded = {path: LatentModel.from_pretrained(path).eval() for path in dict.fromkeys(runs.values())}
    models = {name: loaded[path] for name, path in runs.items()}
    tried = {name: one for name, one in (attempts or {}).items() if not one.is_plain}
    device = next(iter(models.values())).device
    questions = [question for question in questions if all(fits(model, question) for model in loaded.values())]
    if not questions:
        return {"n": 0, "runs": {}}
    asked = {"n": len(questions), "repeats": REPEATS, "device": device_name(device), "versions": versions()}
    asked |= {"questions": digest(list(questions)), "max_new_tokens": task.max_new_tokens}
    asked["folders"] = {name: str(path.resolve()) for name, path in runs.items()}
    asked["saved"] = [run_folder.identity(folder) for folder in loaded]
    asked["attempts"] = {name: asdict(one) for name, one in tried.items()} or None
    if (known := _known(folder / TIMES, asked)) is not None:
        return known
    options: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "batch_size": len(questions)}
    options["strict"] = False  # what does not fit into memory was told when it was evaluated
    jobs = {name: partial(tried.get(name, ONCE).answer, model, questions, **options) for name, model in models.items()}
    turns = take_turns(jobs, REPEATS, clock_of(device))
    found = {
        name: {
            "seconds": [s / len(questions) for s in seconds_of(turns[name])],
            "memory": peak_of(models[name], job, device),
        }
        for name, job in jobs.items()
    }
    write_text(folder / TIMES, json.dumps({**asked, "runs": found}, indent=1) + "\n")
    return {**asked, "runs": found}


def _known(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was measured before, if it was the same; what cannot be read is measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_same = isinstance(found, dict) and all(found.get(name) == value for name, value in asked.items())
    return found if is_same else None

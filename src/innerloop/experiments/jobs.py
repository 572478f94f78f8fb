"""Jobs: the variants of a suite with their seeds, trained and tested side by side; what is done is not run again."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from innerloop.errors import InputError, InputNote
from innerloop.experiments.suite import EvalConfig, Key, Suite
from innerloop.experiments.summary import RESULT
from innerloop.experiments.testing import tested
from innerloop.experiments.workers import Workers, is_ending, local_workers, notes_sent
from innerloop.methods import name_of
from innerloop.model.run_folder import identity
from innerloop.phases.phase import heard_by
from innerloop.tasks import Task
from innerloop.terminal.progress import bar
from innerloop.text.codec import to_json
from innerloop.train.algorithms import arguments_of
from innerloop.train.checkpoints import remove_all
from innerloop.train.recipe import CONFIG, Recipe, load_recipe
from innerloop.train.run import FINISHED, run_recipe

MAY_DIFFER = ("logging_", "save_", "report_to", "disable_tqdm")  # training arguments that change no weight
INTERRUPTED = "interrupted; run the suite again to go on"


NOTHING: Mapping[Key, dict[str, Any]] = {}

On = Callable[[], AbstractContextManager[Workers]]
"""Opens other workers than those of this machine."""


def run_suite(
    suite: Suite,
    workers: int = 2,
    console: Console | None = None,
    on: On | None = None,
    elsewhere: Mapping[Key, dict[str, Any]] = NOTHING,
) -> list[dict[str, Any]]:
    """Train and test what is missing, side by side; return the result of every job, in order.

    Args:
        suite: what to run.
        workers: jobs trained at a time on this machine, each on one thread.
        console: where progress is shown.
        on: other workers, such as those of a cluster.
        elsewhere: results of jobs that were trained elsewhere and are not to be trained here.

    Returns:
        For each job its result.json, with ``variant`` and where asked for ``loops``, accuracy and interval by number
        of iterations, and ``change``, the relative change of the state in each; or ``error`` in place of all but
        variant and seed.

    Raises:
        InputError: before anything is trained, where a folder holds a job of another recipe.
    """
    check_jobs(suite)
    missing = [key for key in suite.jobs if key not in elsewhere and known_result(suite, key) is None]
    failed: dict[Key, str] = {}
    if missing:
        with (on or (lambda: local_workers(workers)))() as chosen, bar(console) as progress:
            failed = _shown(suite, missing, chosen, progress)
    return [
        {"variant": key[0], "seed": key[1], "error": failed[key]}
        if key in failed
        else elsewhere.get(key) or known_result(suite, key) or {}
        for key in suite.jobs
    ]


def check_jobs(suite: Suite) -> None:
    """Refuse tasks and training arguments that cannot be, and folders that hold what another recipe trained."""
    for (variant, _), recipe in suite.jobs.items():
        if recipe.task.running_text:
            raise InputError(
                f"variant '{variant}' ends with task '{recipe.task.name}', which has no right answers to compare by: "
                "add a stage with another task"
            )
    warm_ups = {("warm_up", seed): recipe for seed, recipe in suite.warm_ups.items()}
    for (variant, _), recipe in {**warm_ups, **suite.jobs}.items():
        try:
            for stage in recipe.stages or (recipe,):
                arguments_of(recipe.out, stage.train)
        except InputError as error:
            raise InputError(f"'{variant}': {error}") from None
        config = Path(recipe.out) / CONFIG
        if not config.exists():
            continue
        differ = [name for name, was in _sections(load_recipe(config)).items() if was != _sections(recipe).get(name)]
        if differ:
            raise InputError(
                f"{recipe.out} was trained with another recipe ({', '.join(differ)} differ): choose another folder "
                "with --out, or remove it"
            )


def check_tasks(suite: Suite, elsewhere: Mapping[Key, Any] = NOTHING) -> None:
    """Refuse tasks that cannot give the examples that missing jobs ask for, before anything is trained.

    Of each split that is read it is the first example that is looked at; jobs with a result ``elsewhere`` are left out.
    """
    asked: dict[str, tuple[Task, str, int | None, list[str]]] = {}
    for variant, task, split, limit in _splits(suite, elsewhere):
        asked.setdefault(repr((task, split, limit)), (task, split, limit, []))[-1].append(variant)
    reasons: dict[str, list[str]] = {}
    for task, split, limit, variants in asked.values():
        try:
            task.check(split, limit)
        except InputError as error:
            reasons.setdefault(str(error), []).extend(variants)
    if reasons:
        told = [f"{reason} ({', '.join(dict.fromkeys(variants))})" for reason, variants in reasons.items()]
        raise InputError("nothing was trained: " + "; ".join(told))


def _splits(suite: Suite, elsewhere: Mapping[Key, Any]) -> Iterator[tuple[str, Task, str, int | None]]:
    """Yield for each missing job, and the warm-ups they need, the variant's name, a task, a split and its limit."""
    wanted = {key: recipe for key, recipe in suite.jobs.items() if key not in elsewhere}
    missing = {key: recipe for key, recipe in wanted.items() if known_result(suite, key) is None}
    for (variant, seed), recipe in {**_warm_ups(suite, list(missing)), **missing}.items():
        if not (Path(recipe.out) / FINISHED).exists() and variant not in suite.runs:
            for stage in recipe.stages or (recipe,):
                yield variant, stage.task, "train", None
                if str(stage.train.get("eval_strategy", "no")) != "no":
                    yield variant, stage.task, "valid", None
        if (variant, seed) in missing:
            for fields in ({}, *suite.test.also.values()):
                task = replace(recipe.task, **fields)  # type: ignore[type-var]
                yield variant, task, suite.test.split, suite.test.limit


def _warm_ups(suite: Suite, missing: Sequence[Key]) -> dict[Key, Recipe]:
    """Return the warm-ups that missing jobs start from."""
    seeds = dict.fromkeys(seed for _, seed in missing)
    return {("warm-up", seed): suite.warm_ups[seed] for seed in seeds if seed in suite.warm_ups}


def _sections(recipe: Recipe) -> dict[str, str]:
    """Return the sections of a job's recipe as text in which the suite's folder is left out: it may be moved."""
    folder = str(Path(recipe.out).parent.parent)
    written = recipe.as_dict()
    for part in (written, *written.get("stages", ())):
        part["train"] = {k: v for k, v in part["train"].items() if not k.startswith(MAY_DIFFER)}
    return {k: json.dumps(v, sort_keys=True).replace(folder, "{suite}") for k, v in written.items() if k != "out"}


def _next(messages: Any) -> Any:
    """Return the next thing that a worker reports; None at the end, also where this process was asked twice to end."""
    try:
        return messages.get()
    except (EOFError, OSError):  # the queue's process has gone
        return None


def _shown(suite: Suite, missing: Sequence[Key], workers: Workers, progress: Any) -> dict[Key, str]:
    """Run what is missing with a bar for each job; return why those that failed did."""
    rows = _warm_ups(suite, missing) | {key: suite.jobs[key] for key in missing}
    has_seeds = len({seed for _, seed in rows}) > 1
    bars = {
        key: progress.add_task(
            f"{key[0]} {key[1]}" if has_seeds else key[0],
            total=None if key[0] in suite.runs else n_steps(r),
            note="",
        )
        for key, r in rows.items()
    }

    begun = set[Key]()

    def listen() -> None:
        while (message := _next(workers.messages)) is not None:
            key, done, note = message
            if key is None:
                warnings.warn(note, InputNote, stacklevel=2)  # of many jobs alike, and told once
                continue
            if key not in begun:
                begun.add(key)
                progress.reset(bars[key])  # its time begins now
            progress.update(bars[key], completed=done, **({"note": note} if note else {}))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        return _run_pool(suite, missing, workers)
    finally:
        workers.messages.put(None)
        listener.join()


def n_steps(recipe: Recipe) -> int | None:
    """Return the optimizer steps of all stages, None where they are not told in steps."""
    return sum(stage.train.get("max_steps", 0) for stage in recipe.stages or (recipe,)) or None


def known_result(suite: Suite, key: Key) -> dict[str, Any] | None:
    """Return the result of a job that has been tested as the suite says, with the run as it is."""
    path, run = Path(suite.jobs[key].out) / RESULT, Path(suite.run_of(*key))
    result = json.loads(path.read_text()) if path.exists() else {}
    if "variant" not in result or not is_same_test(result, suite.test_of(key[0])):
        return None
    if Path(result["model"]).parts[-2:] != run.parts[-2:]:  # the suite's folder may be moved
        return None
    if key[0] not in suite.runs:
        return result
    is_of_it = (run / FINISHED).exists() and result.get("saved") == identity(run)
    asked, trained = suite.jobs[key].method, suite.jobs[suite.runs[key[0]], key[1]].method
    is_so = asked == trained or result["method"] == {"name": name_of(asked), **to_json(asdict(asked))}
    return result if is_of_it and is_so else None


def is_same_test(result: Mapping[str, Any], test: EvalConfig) -> bool:
    """Tell whether a result is of a test; what it does not say of its own was as it is by default."""
    return {**to_json(EvalConfig()), **result.get("exam", {})} == to_json(test)


def _run_pool(suite: Suite, missing: Sequence[Key], workers: Workers) -> dict[Key, str]:
    """Train the warm-ups that are needed, then the jobs, and test them; return why those that failed did.

    Jobs that answer with the runs of others come last.
    """
    failed: dict[Key, str] = {}
    messages = workers.messages
    warm_ups = {
        key[1]: workers.submit(train_job, key, recipe, messages) for key, recipe in _warm_ups(suite, missing).items()
    }
    jobs: dict[Future[Any], Key] = {}
    for seed in dict.fromkeys(seed for _, seed in missing):
        reason = _reason(warm_ups[seed]) if seed in warm_ups else None
        for key in (key for key in missing if key[1] == seed):
            if reason is not None:
                failed[key] = f"the warm-up failed: {reason}"
            elif key[0] not in suite.runs:
                jobs[workers.submit(run_job, key, suite.jobs[key], suite.test_of(key[0]), messages)] = key
    failed |= _finished(jobs, messages)
    jobs = {}
    for key in (key for key in missing if key[0] in suite.runs and key not in failed):
        if reason := failed.get((suite.runs[key[0]], key[1])):
            failed[key] = f"'{suite.runs[key[0]]}' failed, whose run it answers with: {reason}"
        else:
            rest = (suite.test_of(key[0]), messages, suite.run_of(*key))
            jobs[workers.submit(run_job, key, suite.jobs[key], *rest)] = key
    return failed | _finished(jobs, messages)


def _finished(jobs: Mapping[Future[Any], Key], messages: Any) -> dict[Key, str]:
    """Wait for jobs; return why those that failed did."""
    failed = {}
    for done in as_completed(jobs):
        if (reason := _reason(done)) is not None:
            failed[jobs[done]] = reason
            messages.put((jobs[done], 0, f"failed: {reason}"))
    return failed


def _reason(job: Future[Any]) -> str | None:
    """Wait for a job; return why it failed."""
    error = job.exception()
    error = getattr(error, "cause", None) or error  # Ray hands over its own report of it
    name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return None if error is None else " ".join(f"{name}{error}".split())


def train_job(key: Key, recipe: Recipe, messages: Any) -> None:
    """Train a recipe, unless it has been."""
    out = Path(recipe.out)
    if is_ending():
        raise InputError(INTERRUPTED)
    if (out / FINISHED).exists():
        return
    finished = [s.train.get("max_steps", 0) for s in recipe.stages]
    with heard_by(partial(_noted, key, messages)), notes_sent(messages):
        run_recipe(recipe, resume=True, callbacks=lambda stage, title: [_Report(key, messages, finished, title)])
    if (out / FINISHED).exists():
        for folder in (out, *out.glob("stages/*")):
            remove_all(folder)  # what was kept to resume from


def _noted(key: Key, messages: Any, words: str) -> AbstractContextManager[object]:
    """Send what a job does, before there is a step to tell."""
    messages.put((key, None, words))
    return nullcontext()


def run_job(key: Key, recipe: Recipe, test: EvalConfig, messages: Any, run: str | None = None) -> None:
    """Train and test a job; or test another's ``run`` in its way."""
    if run is None:
        train_job(key, recipe, messages)
        if not (Path(recipe.out) / FINISHED).exists():
            raise InputError(INTERRUPTED)
    steps = 0 if run is not None else n_steps(recipe) or 0
    tested(key, recipe, test, lambda name: messages.put((key, steps, f"test: {name}")), run)


class _Report(TrainerCallback):
    """Sends progress to the process that shows it; steps are counted over all stages."""

    def __init__(self, key: Key, messages: Any, stages: Sequence[int], title: str):
        number = title.partition("/")[0]
        done = int(number) - 1 if stages and number.isdigit() else 0
        self.key, self.messages, self.before = key, messages, sum(stages[:done])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send the step, now and then."""
        if state.global_step % 5 == 0 or state.global_step == state.max_steps:
            self.messages.put((self.key, self.before + state.global_step, ""))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Send the newest loss."""
        if logs and "loss" in logs:
            self.messages.put((self.key, self.before + state.global_step, f"loss {logs['loss']:.3f}"))

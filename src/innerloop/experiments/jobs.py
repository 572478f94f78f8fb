"""Points: the variants of a suite with their seeds, trained and tested side by side; what is there is not run again."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from innerloop.engine.generation import fits
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.experiments.suite import Exam, Suite
from innerloop.experiments.summary import CONTROLS, STABILITY
from innerloop.experiments.workers import Workers, is_ending, local_workers
from innerloop.measure.accuracy import Prediction, accuracy_of, evaluate, result_of
from innerloop.measure.controls import controls
from innerloop.measure.parts import Parts, digest_of, kept_predictions, made_of
from innerloop.measure.stability import Stability, has_loop, stability
from innerloop.measure.statistics import wilson
from innerloop.model.checkpoint import SETTINGS, resolve, write_text
from innerloop.tasks import Task
from innerloop.text.examples import Example
from innerloop.train.callbacks import bar
from innerloop.train.recipe import Recipe, load_recipe
from innerloop.train.run import CONFIG, FINISHED, run_recipe
from innerloop.train.training_arguments import training_arguments

N_TRACED = 64
EXAM_PARTS = "exam.parts.json"  # beside a point until it has been tested
MAY_DIFFER = ("logging_", "save_", "report_to", "disable_tqdm")  # training arguments that change no weight
INTERRUPTED = "interrupted; run the suite again to go on"
Key = tuple[str, int]  # a variant and a seed


def run_suite(
    suite: Suite,
    workers: int = 2,
    console: Console | None = None,
    on: Callable[[], AbstractContextManager[Workers]] | None = None,
) -> list[dict[str, Any]]:
    """Train and test what is missing, side by side; return the result of every point, in order.

    Args:
        suite: what to run.
        workers: points trained at a time on this machine, each on one thread.
        console: where progress is shown.
        on: other workers, such as those of a cluster.

    Returns:
        For each point its result.json, with ``variant`` and where asked for ``loops``, accuracy and interval by number
        of iterations, and ``change``, the relative change of the state in each; or ``error`` in place of all but
        variant and seed.

    Raises:
        InputError: before anything is trained, where a folder holds a point of another recipe.
    """
    check_points(suite)
    missing = [key for key in suite.points if _known(suite, key) is None]
    failed: dict[Key, str] = {}
    if missing:
        with (on or (lambda: local_workers(workers)))() as chosen, bar(console or Console()) as progress:
            failed = _shown(suite, missing, chosen, progress)
    results: list[dict[str, Any]] = []
    for variant, seed in suite.points:
        if (variant, seed) in failed:
            results.append({"variant": variant, "seed": seed, "error": failed[variant, seed]})
        else:
            results.append(_known(suite, (variant, seed)) or {})
    return results


def check_points(suite: Suite) -> None:
    """Refuse tasks and training arguments that cannot be, and folders that hold what another recipe trained."""
    for (variant, _), recipe in suite.points.items():
        if recipe.task.running_text:
            raise InputError(
                f"variant '{variant}' ends with task '{recipe.task.name}', which has no right answers to compare by: "
                "add a stage with another task"
            )
    for recipe in [*suite.warm_ups.values(), *suite.points.values()]:
        for stage in recipe.stages or (recipe,):
            training_arguments(recipe.out, stage.train)
        config = Path(recipe.out) / CONFIG
        if not config.exists():
            continue
        differ = [name for name, was in _sections(load_recipe(config)).items() if was != _sections(recipe).get(name)]
        if differ:
            raise InputError(
                f"{recipe.out} was trained with another recipe ({', '.join(differ)} differ): choose another folder "
                "with --out, or remove it"
            )


def check_tasks(suite: Suite) -> None:
    """Refuse tasks that cannot give the examples that missing points ask for, before anything is trained.

    Of each split the first example is made or read.
    """
    asked: dict[str, tuple[Task, str, list[str]]] = {}
    for variant, task, split in _splits(suite):
        asked.setdefault(repr((task, split)), (task, split, []))[2].append(variant)
    reasons: dict[str, list[str]] = {}
    for task, split, variants in asked.values():
        try:
            task.examples(split, 1)
        except InputError as error:
            reasons.setdefault(str(error), []).extend(variants)
    if reasons:
        told = [f"{reason} ({', '.join(dict.fromkeys(variants))})" for reason, variants in reasons.items()]
        raise InputError("nothing was trained: " + "; ".join(told))


def _splits(suite: Suite) -> Iterator[tuple[str, Task, str]]:
    """Yield for each missing point, and the warm-ups they need, the name of the variant, a task and a split of it."""
    missing = {key: recipe for key, recipe in suite.points.items() if _known(suite, key) is None}
    seeds = {seed for _, seed in missing}
    needed = {**{("warm-up", seed): r for seed, r in suite.warm_ups.items() if seed in seeds}, **missing}
    for (variant, seed), recipe in needed.items():
        if not (Path(recipe.out) / FINISHED).exists() and variant not in suite.runs:
            for stage in recipe.stages or (recipe,):
                yield variant, stage.task, "train"
                if str(stage.train.get("eval_strategy", "no")) != "no":
                    yield variant, stage.task, "valid"
        if (variant, seed) in missing:
            for fields in ({}, *suite.exam.also.values()):
                yield variant, replace(recipe.task, **fields), suite.exam.split  # type: ignore[type-var]


def _sections(recipe: Recipe) -> dict[str, str]:
    """Return the sections of a point's recipe as text in which the suite's folder is left out: it may be moved."""
    folder = str(Path(recipe.out).parent.parent)
    written = recipe.as_dict()
    for part in (written, *written.get("stages", ())):
        part["train"] = {k: v for k, v in part["train"].items() if not k.startswith(MAY_DIFFER)}
    return {k: json.dumps(v).replace(folder, "{suite}") for k, v in written.items() if k != "out"}


def _shown(suite: Suite, missing: Sequence[Key], workers: Workers, progress: Any) -> dict[Key, str]:
    """Run what is missing with a bar for each point; return why those that failed did."""
    rows: dict[Key, Recipe] = {
        ("warm-up", seed): suite.warm_ups[seed]
        for seed in dict.fromkeys(seed for _, seed in missing)
        if seed in suite.warm_ups
    }
    rows |= {key: suite.points[key] for key in missing}
    bars = {
        key: progress.add_task(f"{key[0]} {key[1]}", total=None if key[0] in suite.runs else _n_steps(r), note="")
        for key, r in rows.items()
    }

    def listen() -> None:
        while (message := workers.messages.get()) is not None:
            key, done, note = message
            progress.update(bars[key], completed=done, **({"note": note} if note else {}))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        return _run_pool(suite, missing, workers)
    finally:
        workers.messages.put(None)
        listener.join()


def _n_steps(recipe: Recipe) -> int | None:
    """Return the steps of training of all stages, None where they are not told in steps."""
    return sum(stage.train.get("max_steps", 0) for stage in recipe.stages or (recipe,)) or None


def _known(suite: Suite, key: Key) -> dict[str, Any] | None:
    """Return the result of a point that has been tested as the suite says, with the run as it is."""
    recipe, result = suite.points[key], _result(suite.points[key], suite.exam_of(key[0]))
    run = Path(suite.run_of(*key))
    if result is None or Path(result["model"]).parts[-2:] != run.parts[-2:]:  # the suite's folder may be moved
        return None
    if key[0] not in suite.runs:
        return result
    if not (run / FINISHED).exists():
        return None
    trained = (Path(resolve(run)) / SETTINGS).stat().st_mtime
    return result if (Path(recipe.out) / "result.json").stat().st_mtime >= trained else None


def _result(recipe: Recipe, exam: Exam) -> dict[str, Any] | None:
    """Return the result of a point that has been tested by this exam."""
    path = Path(recipe.out) / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if "variant" in result and _is_same(result, exam) else None


def _is_same(result: Mapping[str, Any], exam: Exam) -> bool:
    """Tell whether a result is of an exam; what it does not say of its own was as it is by default."""
    return {**_written(Exam()), **result.get("exam", {})} == _written(exam)


def _written(exam: Exam) -> dict[str, Any]:
    return {**asdict(exam), "loops": list(exam.loops)}


def _run_pool(suite: Suite, missing: Sequence[Key], workers: Workers) -> dict[Key, str]:
    """Train the warm-ups that are needed, then the points, and test them; return why those that failed did.

    Points that answer with the runs of others come last.
    """
    failed: dict[Key, str] = {}
    messages = workers.messages
    first: dict[int, Future[Any]] = {
        seed: workers.submit(_train, ("warm-up", seed), suite.warm_ups[seed], messages)
        for seed in dict.fromkeys(seed for _, seed in missing)
        if seed in suite.warm_ups
    }
    jobs: dict[Future[Any], Key] = {}
    for seed, job in [*first.items(), *((s, None) for s in sorted({s for _, s in missing} - set(first)))]:
        error = None if job is None else job.exception()
        for key in (k for k in missing if k[1] == seed):
            if error is not None:
                failed[key] = f"the warm-up failed: {error}"
            elif key[0] not in suite.runs:
                jobs[workers.submit(_point, key, suite.points[key], suite.exam_of(key[0]), messages)] = key
    failed |= _finished(jobs, messages)
    jobs = {}
    for key in (k for k in missing if k[0] in suite.runs and k not in failed):
        if reason := failed.get((suite.runs[key[0]], key[1])):
            failed[key] = f"'{suite.runs[key[0]]}' failed, whose run it answers with: {reason}"
        else:
            rest = (suite.exam_of(key[0]), messages, suite.run_of(*key))
            jobs[workers.submit(_point, key, suite.points[key], *rest)] = key
    return failed | _finished(jobs, messages)


def _finished(jobs: Mapping[Future[Any], Key], messages: Any) -> dict[Key, str]:
    """Wait for points; return why those that failed did."""
    failed = {}
    for done in as_completed(jobs):
        if (error := done.exception()) is not None:
            name = "" if type(error) is InputError else f"{type(error).__name__}: "
            reason = " ".join(f"{name}{error}".split())
            failed[jobs[done]] = reason
            messages.put((jobs[done], 0, f"failed: {reason}"))
    return failed


def _train(key: Key, recipe: Recipe, messages: Any) -> None:
    """Train a recipe, unless it has been."""
    out = Path(recipe.out)
    if is_ending():
        raise InputError(INTERRUPTED)
    if (out / FINISHED).exists():
        return
    finished = [s.train.get("max_steps", 0) for s in recipe.stages]
    run_recipe(recipe, resume=True, callbacks=lambda stage, title: [_Report(key, messages, finished, title)])
    if (out / FINISHED).exists():
        for checkpoint in out.rglob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)  # what was kept to resume from


def _point(key: Key, recipe: Recipe, exam: Exam, messages: Any, run: str | None = None) -> None:
    """Train and test a point; or test another's ``run`` in its way."""
    out = Path(recipe.out)
    if run is None:
        _train(key, recipe, messages)
        if not (out / FINISHED).exists():
            raise InputError(INTERRUPTED)
    out.mkdir(parents=True, exist_ok=True)
    model, task = LatentModel.from_pretrained(run or recipe.out), recipe.task
    attempts, asked = exam.attempts, exam.attempts.asked(key[1])
    answer = partial(evaluate, attempts=attempts, seed=key[1])
    examples = task.examples(exam.split, exam.limit)
    facts = made_of(model, task, exam.split, examples, {"limit": exam.limit, **asked}, key[1])
    parts = Parts(out / EXAM_PARTS, facts)
    steps = 0 if run is not None else _n_steps(recipe) or 0
    parts.begins = lambda name: messages.put((key, steps, f"test: {name}"))
    predictions = kept_predictions(parts, "accuracy", lambda: answer(model, task, examples))
    result = {"variant": key[0], "exam": _written(exam)} | result_of(
        model, task, exam.split, predictions, key[1], run or recipe.out
    )
    if asked:
        result["asked"] = asked
    iterates = bool(exam.loops) and hasattr(model.method, "max_loops")
    for name, fields in exam.also.items():
        other = replace(task, **fields)  # type: ignore[type-var]
        others = other.examples(exam.split, exam.limit)
        at, about = result.setdefault("also", {}).setdefault(name, {}), f"{name} {fields} {digest_of(others)[:8]}"
        at["trained"] = parts(f"{about} as trained", partial(_score, answer, model, other, others, None))
        at.update(_curve(answer, model, other, others, exam.loops, parts, about)[0] if iterates else {})
    if iterates:
        result["loops"], refused = _curve(answer, model, task, examples, exam.loops, parts, "accuracy")
        if refused:
            result["loops_refused"] = refused
        if result["loops"]:
            result["change"] = _change(model, [e.question for e in examples[:N_TRACED]], max(result["loops"]))
    what = {"method": model.method.name, "model": recipe.out, "task": task.name, "split": exam.split, "seed": key[1]}
    if exam.controls:
        found = controls(model, task, examples, predictions, seed=key[1], parts=parts)
        told = {**what, "n": len(found.unedited), **found.as_dict()}
        write_text(out / CONTROLS, json.dumps(told, indent=2) + "\n")
    if exam.stability and has_loop(model):
        read = [example for example in examples if fits(model, example.question)]
        behaves = Stability.read(parts("stability", lambda: asdict(stability(model, read))))
        result["diverged"] = behaves.diverged
        write_text(out / STABILITY, json.dumps({**what, "n": len(read), **behaves.as_dict()}, indent=2) + "\n")
    lines = (json.dumps(asdict(p), ensure_ascii=False) for p in predictions)
    write_text(out / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
    (out / EXAM_PARTS).unlink(missing_ok=True)


def _curve(
    answer: Callable[..., list[Prediction]],
    model: LatentModel,
    task: Task,
    examples: list[Example],
    loops: Sequence[int],
    parts: Parts,
    about: str,
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return accuracy by number of iterations, and of numbers that the method cannot run with why not."""
    scores: dict[int, dict[str, Any]] = {}
    refused: dict[int, str] = {}
    for n in loops:
        try:
            scores[n] = parts(f"{about} of {n} loops", partial(_score, answer, model, task, examples, n))
        except InputError as error:
            refused[n] = str(error)
    return scores, refused


def _score(
    answer: Callable[..., list[Prediction]], model: LatentModel, task: Task, examples: list[Example], loops: int | None
) -> dict[str, Any]:
    """Return accuracy and interval with a number of iterations."""
    answered = answer(model, task, examples, loops=loops)
    n_correct = sum(p.correct for p in answered)
    return {"accuracy": accuracy_of(answered), "ci95": list(wilson(n_correct, len(answered)))}


def _change(model: LatentModel, questions: Sequence[str], loops: int) -> list[float | None]:
    """Return the relative change of the state in each iteration, a mean over questions; None where it has diverged.

    Questions that cannot be answered are left out.
    """
    answers = model.generate(questions, loops=loops, trace=True, max_new_tokens=1, strict=False)
    changes = [[entry.delta[0].item() for entry in a.trace.iterations] for a in answers if a.trace is not None]
    means = [sum(column) / len(column) for column in zip(*changes)]
    return [mean if math.isfinite(mean) else None for mean in means]


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

"""Suites: variants of one recipe, each with several seeds, trained and tested alike; what is compared is one file.

    task: {name: chain, n_ops: 3}
    backbone: {scratch: {...}}
    warm_up: {method: {name: cot}, train: {max_steps: 400}}     # once for each seed; every variant goes on from it
    train: {max_steps: 900, ...}
    variants:                                                   # each overrides sections of the recipe
      pause: {method: {name: pause, n_pauses: 3}}
      slr: {method: {name: slr, n_slots: 3, max_loops: 3}}
    seeds: [0, 1, 2]
    test: {split: test, loops: [1, 2, 4, 8]}                    # loops: also answer with other numbers of iterations
    out: runs/suites/NAME

A point is one variant with one seed, a run of its own in OUT/VARIANT/SEED. Points that are there are not trained again;
a point that fails is listed and stops no other. In fields of a method, ``{warm_up}`` is the folder of the warm-up.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from innerloop.checkpoint import write_text
from innerloop.errors import InputError, nearest
from innerloop.examples import Example
from innerloop.measure.accuracy import accuracy_of, evaluate, result_of, wilson
from innerloop.measure.statistics import over_seeds
from innerloop.model import LatentModel
from innerloop.progress import bar
from innerloop.recipe import SECTIONS, Recipe, parse_recipe, read_recipe, typed
from innerloop.run import FINISHED, run_recipe
from innerloop.tasks import Task

SUITE_SECTIONS = (*SECTIONS, "warm_up", "variants", "seeds", "test")
N_TRACED = 64
COSTS = ("passes", "positions", "flops", "thought_tokens", "loops")


@dataclass(frozen=True)
class Exam:
    """How every point is tested.

    Args:
        split: which examples are answered.
        limit: how many; None: all.
        loops: for methods that iterate, numbers of iterations to answer with besides that of training.
        also: by name, fields of the task in which other tests differ, such as ``{longer: {n_ops: 5, min_ops: 5}}``;
            each is answered as trained, and with every number of ``loops``.
    """

    split: str = "test"
    limit: int | None = None
    loops: tuple[int, ...] = ()
    also: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loops", tuple(self.loops))


@dataclass(frozen=True)
class Suite:
    """Recipes to be compared.

    Attributes:
        out: the folder of all runs.
        warm_ups: for each seed, what is trained first; empty: nothing is.
        points: the recipe of each (variant, seed), in the order of training.
        exam: how they are tested.
    """

    out: str
    warm_ups: Mapping[int, Recipe]
    points: Mapping[tuple[str, int], Recipe]
    exam: Exam = field(default_factory=Exam)

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in order."""
        return list(dict.fromkeys(name for name, _ in self.points))


def is_suite(path: str | Path) -> bool:
    """Tell whether a file is a suite, rather than a recipe or a run."""
    return Path(path).suffix in (".yaml", ".yml") and "variants" in read_recipe(path)


def load_suite(
    path: str | Path, out: str | None = None, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Suite:
    """Read a suite and type all its recipes, so that a mistake in any is found before anything is trained.

    ``overrides``, such as ``["--train.max_steps", "9"]``, are of what variants share; what one sets itself stays.
    """
    raw = read_recipe(path, overrides)
    if out is not None:
        raw["out"] = out
    if seeds is not None:
        raw["seeds"] = list(seeds)
    for name in raw:
        if name not in SUITE_SECTIONS:
            raise InputError(f"a suite has no section '{name}'{nearest(str(name), SUITE_SECTIONS)}")
    variants = raw.get("variants")
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()) or not variants:
        raise InputError("a suite needs variants, for example variants: {pause: {method: {name: pause}}}")
    chosen = raw.get("seeds", [0])
    if not isinstance(chosen, list) or not all(isinstance(s, int) for s in chosen) or len(set(chosen)) != len(chosen):
        raise InputError(f"seeds is {chosen!r}, but must be a list of different whole numbers")
    if not isinstance(raw.get("out"), str):
        raise InputError("the suite has no 'out' folder")
    common = {name: value for name, value in raw.items() if name in SECTIONS}
    warm_ups, points = {}, {}
    for seed in chosen:
        start = None
        if raw.get("warm_up") is not None:
            start = f"{raw['out']}/warm_up/{seed}"
            warm_ups[seed] = parse_recipe(_variant(common, raw["warm_up"], "warm_up", seed, start))
        for name, changes in variants.items():
            point = _variant(common, changes, name, seed, f"{raw['out']}/{name}/{seed}", start)
            try:
                points[name, seed] = parse_recipe(point)
            except InputError as error:
                raise InputError(f"variant '{name}': {error}") from None
    return Suite(raw["out"], warm_ups, points, typed(Exam, raw.get("test") or {}, "test"))


def _variant(
    common: Mapping[str, Any], changes: Mapping[str, Any], name: str, seed: int, out: str, start: str | None = None
) -> dict[str, Any]:
    """Return the recipe of a point: what all share, what the variant changes, its seed and folder."""
    raw = copy.deepcopy(dict(common))
    for section, value in changes.items():
        if section not in SECTIONS or section == "out":
            raise InputError(f"variant '{name}' overrides '{section}'{nearest(str(section), SECTIONS)}, no section")
        value = {"name": value} if section in ("task", "method") and isinstance(value, str) else copy.deepcopy(value)
        before = raw.get(section)
        same = isinstance(before, dict) and isinstance(value, dict)
        same = same and value.get("name", before.get("name")) == before.get("name")  # type: ignore[union-attr]
        raw[section] = {**before, **value} if same else value  # type: ignore[dict-item]
    if start is not None:
        raw["backbone"] = {k: v for k, v in (raw.get("backbone") or {}).items() if k not in ("scratch", "vocab_size")}
        raw["backbone"]["model"] = start
        raw = _filled(raw, start)
    raw["train"] = {**(raw.get("train") or {}), "seed": seed}
    raw["out"] = out
    return raw


def _filled(value: Any, warm_up: str) -> Any:
    """Return a section with ``{warm_up}`` replaced by its folder."""
    if isinstance(value, dict):
        return {k: _filled(v, warm_up) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, warm_up) for v in value]
    return value.replace("{warm_up}", warm_up) if isinstance(value, str) else value


def run_suite(suite: Suite, workers: int = 2, console: Console | None = None) -> list[dict[str, Any]]:
    """Train and test what is missing, side by side; return the result of every point, in order.

    Args:
        suite: what to run.
        workers: points trained at a time, each on one thread.
        console: where progress is shown.

    Returns:
        For each point its result.json, with ``variant`` and where asked for ``loops``, accuracy and interval by number
        of iterations, and ``change``, the relative change of the state in each; or ``error`` in place of all but
        variant and seed.
    """
    if workers < 1:
        raise InputError("a suite needs workers >= 1")
    missing = [key for key, recipe in suite.points.items() if _result(recipe) is None]
    context = multiprocessing.get_context("spawn")
    failed: dict[tuple[str, int], str] = {}
    with context.Manager() as manager, bar(console or Console()) as progress:
        messages = manager.Queue()
        rows = {}
        for seed in dict.fromkeys(seed for _, seed in missing):
            if seed in suite.warm_ups:
                rows["warm-up", seed] = suite.warm_ups[seed]
        rows |= {key: suite.points[key] for key in missing}
        bars = {
            key: progress.add_task(
                f"{key[0]} {key[1]}", total=sum(s.train.get("max_steps", 0) for s in r.stages or (r,)) or None, note=""
            )
            for key, r in rows.items()
        }

        def listen() -> None:
            while (message := messages.get()) is not None:
                key, done, note = message
                progress.update(bars[key], completed=done, **({"note": note} if note else {}))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            failed = _run_pool(context, suite, missing, messages, workers)
        finally:
            messages.put(None)
            listener.join()
    results: list[dict[str, Any]] = []
    for (variant, seed), recipe in suite.points.items():
        if (variant, seed) in failed:
            results.append({"variant": variant, "seed": seed, "error": failed[variant, seed]})
        else:
            results.append(_result(recipe) or {})
    return results


def _result(recipe: Recipe) -> dict[str, Any] | None:
    """Return the result of a point that has been tested."""
    path = Path(recipe.out) / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if "variant" in result else None


def _run_pool(
    context: BaseContext, suite: Suite, missing: Sequence[tuple[str, int]], messages: Any, workers: int
) -> dict[tuple[str, int], str]:
    """Train the warm-ups that are needed, then the points; return why those that failed did."""
    failed = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:  # type: ignore[arg-type]
        try:
            first: dict[int, Future[Any]] = {
                seed: pool.submit(_train, ("warm-up", seed), suite.warm_ups[seed], messages)
                for seed in dict.fromkeys(seed for _, seed in missing)
                if seed in suite.warm_ups
            }
            jobs: dict[Future[Any], tuple[str, int]] = {}
            for seed, job in [*first.items(), *((s, None) for s in {s for _, s in missing} - set(first))]:
                error = None if job is None else job.exception()
                for key in (k for k in missing if k[1] == seed):
                    if error is not None:
                        failed[key] = f"the warm-up failed: {error}"
                    else:
                        jobs[pool.submit(_point, key, suite.points[key], suite.exam, messages)] = key
            for done in as_completed(jobs):
                if (error := done.exception()) is not None:
                    failed[jobs[done]] = f"{type(error).__name__}: {error}"
                    messages.put((jobs[done], 0, f"failed: {error}"))
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    return failed


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # tiny models run faster so, and the workers share the cores
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _train(key: tuple[str, int], recipe: Recipe, messages: Any) -> None:
    """Train a recipe, unless it has been."""
    out = Path(recipe.out)
    if (out / FINISHED).exists():
        return
    finished = [s.train.get("max_steps", 0) for s in recipe.stages]
    run_recipe(recipe, resume=True, callbacks=lambda stage, title: [_Report(key, messages, finished, title)])
    for checkpoint in out.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)  # what was kept to resume from


def _point(key: tuple[str, int], recipe: Recipe, exam: Exam, messages: Any) -> None:
    """Train and test a point."""
    _train(key, recipe, messages)
    out = Path(recipe.out)
    if not (out / FINISHED).exists():
        raise InputError("interrupted; run the suite again to go on")
    model, task = LatentModel.from_pretrained(recipe.out), recipe.task
    examples = task.examples(exam.split, exam.limit)
    predictions = evaluate(model, task, examples)
    result = {"variant": key[0]} | result_of(model, task, exam.split, predictions, key[1], recipe.out)
    iterates = bool(exam.loops) and hasattr(model.method, "max_loops")
    for name, fields in exam.also.items():
        other = replace(task, **fields)  # type: ignore[type-var]
        found = other.examples(exam.split, exam.limit)
        at = result.setdefault("also", {}).setdefault(name, {})
        at["trained"] = _score(model, other, found, None)
        at |= {loops: _score(model, other, found, loops) for loops in exam.loops if iterates}
    if iterates:
        result["loops"] = {loops: _score(model, task, examples, loops) for loops in exam.loops}
        questions = [example.question for example in examples[:N_TRACED]]
        answers = model.generate(questions, loops=max(exam.loops), trace=True, max_new_tokens=1)
        changes = [[entry.delta[0].item() for entry in a.trace.iterations] for a in answers if a.trace is not None]
        result["change"] = [sum(column) / len(column) for column in zip(*changes)]
    lines = (json.dumps(asdict(p), ensure_ascii=False) for p in predictions)
    write_text(out / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(out / "result.json", json.dumps(result, indent=2) + "\n")


def _score(model: LatentModel, task: Task, examples: list[Example], loops: int | None) -> dict[str, Any]:
    """Return accuracy and interval with a number of iterations."""
    answered = evaluate(model, task, examples, loops=loops)
    n_correct = sum(p.correct for p in answered)
    return {"accuracy": accuracy_of(answered), "ci95": list(wilson(n_correct, len(answered)))}


class _Report(TrainerCallback):
    """Sends progress to the process that shows it; steps are counted over all stages."""

    def __init__(self, key: tuple[str, int], messages: Any, stages: Sequence[int], title: str):
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


def suite_report(path: str | Path, results: Sequence[dict[str, Any]], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what is written of a suite: the file that defines it, and every point without what they share."""
    first = next((r for r in results if "error" not in r), {})
    shared = ("task", "split", "n", "versions", "device")
    raw = read_recipe(path, overrides)
    return {
        "suite": {name: value for name, value in raw.items() if name != "out"},
        **{name: first[name] for name in shared if name in first},
        "points": [
            {k: v for k, v in r.items() if k not in (*shared, "model", "method", "accuracy_by_match")} for r in results
        ],
    }


def seed_means(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each variant that has results their means over seeds.

    ``accuracy`` with ``half``, the half width of its 95 % t-interval; ``accuracies`` by seed; the costs of an example;
    ``loops``, the mean accuracy by number of iterations, where it was measured.
    """
    means = []
    for variant in dict.fromkeys(r["variant"] for r in results if "error" not in r):
        points = [r for r in results if r["variant"] == variant and "error" not in r]
        accuracy, half = over_seeds([r["accuracy"] for r in points])
        costs = {name: sum(r["cost"][name] for r in points) / len(points) for name in COSTS}
        seconds = sum(sum(r["cost"]["seconds"].values()) for r in points) / len(points)
        curves = [{int(n): at["accuracy"] for n, at in r["loops"].items()} for r in points if "loops" in r]
        loops = {n: sum(curve[n] for curve in curves) / len(curves) for n in curves[0]} if curves else {}
        means.append(
            {
                "variant": variant,
                "accuracy": accuracy,
                "half": half,
                "accuracies": [r["accuracy"] for r in points],
                **costs,
                "seconds": seconds,
                "loops": loops,
            }
        )
    return means


def suite_table(results: Sequence[dict[str, Any]]) -> Table:
    """Return the means over seeds as a table."""
    table = Table(
        Column("variant", no_wrap=True),
        caption="accuracy: mean over seeds and its 95 % t-interval; costs are per example",
    )
    for column in ("accuracy", "interval", "by seed", "passes", "positions", "MFLOPs", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in seed_means(results):
        table.add_row(
            row["variant"],
            f"{row['accuracy']:.1%}",
            "-" if math.isinf(row["half"]) else f"± {row['half']:.1%}",
            " ".join(f"{100 * value:.0f}" for value in row["accuracies"]),
            f"{row['passes']:.1f}",
            f"{row['positions']:.1f}",
            f"{row['flops'] / 1e6:.3g}",
            f"{1000 * row['seconds']:.2f}",
        )
    return table

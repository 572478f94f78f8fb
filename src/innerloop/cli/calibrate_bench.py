"""Verbs that measure a run: calibrate, bench."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from innerloop.bench.bench import BASELINE, RUN, BenchSettings, bench_lines, bench_table
from innerloop.bench.bench import bench as benchmark
from innerloop.calibrate.calibrate import CALIBRATION_PARTS, FEWEST
from innerloop.calibrate.calibrate import calibrate as calibration
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.cli.arguments import (
    Dtype,
    askable,
    console,
    device_given,
    folder_given,
    going_on,
    method_given,
    model_given,
    task_given,
)
from innerloop.config.stopping import StopKind
from innerloop.engine.generation import fits
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.measure.result_cache import ResultCache, made_of
from innerloop.model import checkpoint
from innerloop.terminal.views import calibration_line
from innerloop.text.examples import Example


def calibrate(
    run: str,
    rule: StopKind = "kl",
    max_drop: float = 0.01,
    agreement: float | None = None,
    mean_loops: float | None = None,
    task: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    check: int = 0,
    method: str | None = None,
    adopt: bool = False,
    out: str | None = None,
    patience: int | None = None,
    min_loops: int | None = None,
    fresh: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Choose the threshold of a stop rule for a stated loss on validation data; writes RUN/calibration.json.

    Args:
        run: a run's folder, or any model with --method.
        rule: the stop score.
        max_drop: the most that accuracy may fall.
        agreement: instead, the least share of answers as at full depth.
        mean_loops: instead, the most iterations on average.
        task: a task's name, or {name: ..., field: value}; by default the one the run was trained on.
        data: a file or Hub data set to read the validation split from.
        limit: use only the first validation examples; those that cannot be answered are left out.
        check: test examples on which the choice is measured once more.
        method: put this method on the model first, such as adainfer.
        adopt: from now on the run stops by the chosen rule.
        out: save the model with the chosen rule to this folder, which must be given where the run is a plain model.
        patience: consecutive iterations for which the score must hold.
        min_loops: iterations before a row may stop.
        fresh: start over; by default what was answered before of the same weights and data is taken as it is.
        seed: of draws in fitting.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        dtype: the type of the weights; auto keeps the file's, which is fp32 for what was trained so. What --out saves
            has it too.
    """
    if not checkpoint.is_run(run) and (adopt or out is None):
        raise InputError(f"{run} is no run that could keep a rule: save the model with its rule by --out DIR")
    chosen = task_given(run, task, data, "valid")
    examples = chosen.examples("valid", limit)
    checked = chosen.examples("test", check) if check else []
    folder = folder_given(Path(out or run))
    model = model_given(run, method_given(method), device, dtype)
    examples, checked = _calibratable(model, examples, checked)
    settings = CalibrationSettings(max_drop, agreement, mean_loops, seed=seed)
    options: dict[str, Any] = {"patience": patience, "min_loops": min_loops}
    cache = ResultCache(folder / CALIBRATION_PARTS, made_of(model, chosen, "valid", examples, {}, seed), fresh)
    with going_on(cache, f"{len(cache.known)} sets of answers"):
        found = calibration(
            model,
            chosen,
            examples,
            rule,
            settings,
            checked,
            progress=lambda done: console.print(done, style="dim"),
            cache=cache,
            **{name: value for name, value in options.items() if value is not None},
        )
    if out is not None:
        found.model.save_pretrained(out)
    path = found.save(folder, adopt)
    report = found.report
    for title, asked in (("validation", report), ("test", report.get("check"))):
        if asked is not None:
            console.print(calibration_line(title, asked), soft_wrap=True)
    console.print(f"{path}" + ("; the run stops by this rule from now on" if adopt else ""), soft_wrap=True)


def _calibratable(
    model: LatentModel, examples: Sequence[Example], checked: Sequence[Example]
) -> tuple[list[Example], list[Example]]:
    """Leave out of both the examples that cannot be asked; refuse to go on where too few are left."""
    kept, kept_checked = askable([model], examples), askable([model], checked)
    if len(kept) < min(len(examples), FEWEST):
        raise InputError(
            f"calibrating needs at least {FEWEST} examples, but of {len(examples)} validation examples {len(kept)} can "
            "be answered: the others leave no room for an answer, or are no text"
        )
    if checked and not kept_checked:
        raise InputError(f"none of {len(checked)} test examples can be answered: leave --check out, or name other data")
    return kept, kept_checked


def bench(
    run: str,
    baseline: str | None = None,
    out: str | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    repeats: int = 5,
    questions: int = 8,
    max_new_tokens: int | None = None,
    task: str | None = None,
    data: str | None = None,
    split: str = "test",
    method: str | None = None,
    baseline_method: str | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
    compile: bool = False,
    threads: int | None = None,
    seed: int = 0,
) -> None:
    """Measure time, memory and the share of the machine's floor, against a baseline that takes turns; bench.json.

    Args:
        run: a run's folder, or any model with --method.
        baseline: another, answering the same questions.
        out: the file to write; by default RUN/bench.json.
        batch_sizes: rows that may run together.
        repeats: timed turns.
        questions: the least number of questions of a turn; a larger batch answers as many as it holds. What a model
            cannot answer is left out.
        max_new_tokens: the most tokens to write per question; by default as the task says.
        task: a task's name, or {name: ..., field: value}; by default the one the run was trained on.
        data: a file or Hub data set to read the split from.
        split: train, valid or test.
        method: reason by another method than the run was trained with.
        baseline_method: the same for the baseline.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        dtype: the type of the weights; auto keeps the file's, which is fp32 for what was trained so.
        compile: compile short passes, as CUDA graphs on a GPU; the first answers wait for it.
        threads: threads of a CPU; by default as many as torch takes.
        seed: of what models draw.
    """
    if baseline_method is not None and baseline is None:
        raise InputError("--baseline_method is for a --baseline, and there is none")
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads}: give at least one thread, or leave it out")
    device_given(device)  # before long work starts
    chosen = task_given(run, task, data, split)
    path = Path(out) if out is not None else Path(run) / "bench.json"
    if path.is_dir() or (out is None and not path.parent.is_dir()):
        raise InputError(f"the report cannot be written to {path}: name a file by --out FILE")
    folder_given(path.parent, "name another file by --out FILE")
    n_tokens = chosen.max_new_tokens if max_new_tokens is None else max_new_tokens
    settings = BenchSettings(tuple(batch_sizes), repeats, questions, n_tokens, seed)
    examples = chosen.examples(split, settings.most)
    if threads is not None:
        torch.set_num_threads(threads)
    named_models = {RUN: (run, method), BASELINE: (baseline, baseline_method)}
    models = {
        name: model_given(folder, method_given(written), device, dtype, compile)
        for name, (folder, written) in named_models.items()
        if folder is not None
    }
    if not all(fits(model, example.question) for model in models.values() for example in examples):
        examples = chosen.examples(split)  # others stand in for those that cannot be asked
    asked = askable(list(models.values()), examples, settings.most)
    if len(asked) < min(len(examples), settings.most):
        by = "the run" if len(models) == 1 else "both models"
        raise InputError(
            f"a turn answers {settings.most} questions, but of {len(examples)} only {len(asked)} can be answered by "
            f"{by}: lower --batch_sizes or --questions, or name a task or split with more"
        )
    report = benchmark(models, [example.question for example in asked], settings)
    for name, found in report["models"].items():
        found["model"] = named_models[name][0]
    asked_of = {"task": {"name": chosen.name, "version": chosen.version, **asdict(chosen)}, "split": split}
    report = {"kind": "bench", **asked_of, **report}
    checkpoint.write_text(path, json.dumps(report, indent=1) + "\n")
    console.print(bench_table(report))
    for line in bench_lines(report):
        console.print(line, soft_wrap=True)
    console.print(f"{path}", soft_wrap=True)

"""Verbs that measure a run: calibrate, bench."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from innerloop.checks.values import Bounds, Count, Natural, Seed, Share, SomeLoops, Weight
from innerloop.cli.arguments import (
    ModelArguments,
    SplitArguments,
    TaskArguments,
    askable,
    console,
    going_on,
    results_folder,
    writable,
)
from innerloop.config.stopping import StopKind
from innerloop.disk.files import write_text
from innerloop.errors import InputError, refuse
from innerloop.model import run_folder
from innerloop.tasks import Task
from innerloop.text.examples import Example

if TYPE_CHECKING:  # slow to import
    from innerloop.bench.bench import BenchSettings
    from innerloop.engine.latent_model import LatentModel


@dataclass(frozen=True)
class CalibrateArguments(TaskArguments, ModelArguments):
    """What is chosen.

    Args:
        rule: the stop score.
        max_drop: the most that accuracy may fall.
        agreement: instead, the least share of answers as at full depth.
        mean_loops: instead, the most iterations on average.
        patience: consecutive iterations for which the score must hold.
        min_loops: iterations before a row may stop.
        limit: use only the first validation examples; those that cannot be answered are left out.
        check: test examples on which the choice is measured once more.
        adopt: from now on the run stops by the chosen rule.
        out: save the model, in the type of --dtype, with the chosen rule to this folder, which must be given where the
            run is a plain model.
        fresh: start over; by default what was answered before of the same weights and data is taken as it is.
        on: answer in this process, or in parts on the Ray cluster that is there.
        seed: of draws in fitting.
    """

    rule: StopKind = "kl"
    max_drop: Share = 0.01
    agreement: Share | None = None
    mean_loops: Weight | None = None
    patience: SomeLoops | None = None
    min_loops: SomeLoops | None = None
    limit: Count | None = None
    check: Natural = 0
    adopt: bool = False
    out: str | None = None
    fresh: bool = False
    on: Literal["local", "ray"] = "local"
    seed: Seed = 0

    def answering(self, run: str) -> AbstractContextManager[Any]:
        """Return what, once entered, is where examples are answered; None: in this process."""
        if self.on == "local":
            return nullcontext()
        from innerloop.experiments.ray_calibration import answering_on_ray

        return answering_on_ray((run, self.read_method(), self.dtype), self.device == "cpu")


def calibrate(run: str, options: CalibrateArguments) -> None:
    """Choose the threshold of a stop rule for a stated loss on validation data; writes RUN/calibration.json.

    Args:
        run: a run's folder, or any model with --method, such as adainfer, which it is put under first.
        options: what is chosen.
    """
    if not run_folder.is_run(run) and (options.adopt or options.out is None):
        raise InputError(f"{run} is no run that could keep a rule: save the model with its rule by --out DIR")
    if options.on == "ray":
        from innerloop.experiments.ray import check_ray

        check_ray()
    from innerloop.calibrate.calibrate import check_rule

    check_rule(options.rule)
    task = options.task_of(run, "valid")
    examples = task.examples("valid", options.limit)
    checked = task.examples("test", options.check) if options.check else []
    folder = results_folder(run, options.out)
    from innerloop.calibrate.calibrate import CALIBRATION_PARTS
    from innerloop.calibrate.calibrate import calibrate as calibration
    from innerloop.calibrate.settings import CalibrationSettings
    from innerloop.measure.result_cache import ResultCache, made_of
    from innerloop.terminal.views import calibration_line

    model = options.load_model(run)
    examples, checked = _calibratable(model, examples, checked)
    stopping = {"patience": options.patience, "min_loops": options.min_loops}
    stopping = {name: value for name, value in stopping.items() if value is not None}
    settings = CalibrationSettings(options.max_drop, options.agreement, options.mean_loops, seed=options.seed)
    about = made_of(model, task, "valid", examples, {}, options.seed)
    cache = ResultCache(folder / CALIBRATION_PARTS, about, options.fresh)
    with going_on(cache, f"{len(cache.known)} sets of answers"), options.answering(run) as elsewhere:
        how: dict[str, Any] = {"progress": lambda done: console.print(done, style="dim"), "cache": cache, **stopping}
        how["elsewhere"] = elsewhere
        found = calibration(model, task, examples, options.rule, settings, checked, **how)
    if options.out is not None:
        found.model.save_pretrained(options.out)
    path = found.save(folder, options.adopt)
    for title, report in (("validation", found.report), ("test", found.report.get("check"))):
        if report is not None:
            console.print(calibration_line(title, report), soft_wrap=True)
    console.print(f"{path}" + ("; the run stops by this rule from now on" if options.adopt else ""), soft_wrap=True)


def _calibratable(
    model: LatentModel, examples: Sequence[Example], checked: Sequence[Example]
) -> tuple[list[Example], list[Example]]:
    """Leave out of both the examples that cannot be asked; refuse to go on where too few are left."""
    from innerloop.calibrate.calibrate import FEWEST

    kept, kept_checked = askable([model], examples), askable([model], checked)
    if len(kept) < min(len(examples), FEWEST):
        raise InputError(
            f"calibrating needs at least {FEWEST} examples, but of {len(examples)} validation examples {len(kept)} can "
            "be answered: the others leave no room for an answer, or are no text"
        )
    if checked and not kept_checked:
        raise InputError(f"none of {len(checked)} test examples can be answered: leave --check out, or name other data")
    return kept, kept_checked


@dataclass(frozen=True)
class BenchArguments(SplitArguments, ModelArguments):
    """What is timed.

    Args:
        baseline: another model, answering the same questions.
        baseline_method: the method that it reasons by.
        out: the file to write; by default RUN/bench.json.
        batch_sizes: rows that may run together.
        repeats: timed turns.
        questions: the least number of questions of a turn; a larger batch answers as many as it holds. What a model
            cannot answer is left out.
        max_new_tokens: the most tokens to write per question; by default as the task says.
        compile: compile short passes, as CUDA graphs on a GPU; the first answers wait for it.
        threads: threads of a CPU; by default as many as torch takes.
        seed: of what models draw.
    """

    baseline: str | None = None
    baseline_method: str | None = None
    out: str | None = None
    batch_sizes: tuple[Count, ...] = (1, 8, 32)
    repeats: Count = 5
    questions: Count = 8
    max_new_tokens: Count | None = None
    compile: bool = False
    threads: Annotated[int, Bounds(1, 1024)] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        is_alone = self.baseline_method is not None and self.baseline is None
        refuse((is_alone, "--baseline_method is for a --baseline, and there is none"))

    def settings(self, task: Task) -> BenchSettings:
        """Return what is asked, and how often."""
        from innerloop.bench.bench import BenchSettings

        n_tokens = task.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return BenchSettings(self.batch_sizes, self.repeats, self.questions, n_tokens, self.seed)


def bench(run: str, options: BenchArguments) -> None:
    """Measure time, memory and the share of the machine's floor, against a baseline that takes turns; bench.json.

    Args:
        run: a run's folder, or any model with --method.
        options: what is timed.
    """
    options.find_device()  # before long work starts
    task = options.load_task(run)
    path = Path(options.out) if options.out is not None else Path(run) / "bench.json"
    if path.is_dir() or (options.out is None and not path.parent.is_dir()):
        raise InputError(f"the report cannot be written to {path}: name a file by --out FILE")
    writable(path.parent, "name another file by --out FILE")
    import torch

    from innerloop.bench.bench import BASELINE, RUN, bench_lines, bench_table
    from innerloop.bench.bench import bench as benchmark

    settings = options.settings(task)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models = {RUN: options.load_model(run, options.compile)}
    if options.baseline is not None:
        other = replace(options, method=options.baseline_method)
        models[BASELINE] = other.load_model(options.baseline, options.compile)
    questions = _questions(models, task, options.split, settings)
    report = benchmark(models, questions, settings)
    for name, found in report["models"].items():
        found["model"] = run if name == RUN else options.baseline
    asked_of = {"task": {"name": task.name, "version": task.version, **asdict(task)}, "split": options.split}
    report = {"kind": "bench", **asked_of, **report}
    write_text(path, json.dumps(report, indent=1) + "\n")
    console.print(bench_table(report))
    for line in bench_lines(report):
        console.print(line, soft_wrap=True)
    console.print(f"{path}", soft_wrap=True)


def _questions(models: Mapping[str, LatentModel], task: Task, split: str, settings: BenchSettings) -> list[str]:
    """Return the questions of a turn, which all models can be asked."""
    from innerloop.engine.requests import fits

    examples = task.examples(split, settings.most)
    if not all(fits(model, example.question) for model in models.values() for example in examples):
        examples = task.examples(split)  # others stand in for those that cannot be asked
    asked = askable(list(models.values()), examples, settings.most)
    if len(asked) < min(len(examples), settings.most):
        by = "the run" if len(models) == 1 else "both models"
        raise InputError(
            f"a turn answers {settings.most} questions, but of {len(examples)} only {len(asked)} can be answered by "
            f"{by}: lower --batch_sizes or --questions, or name a task or split with more"
        )
    return [example.question for example in asked]

"""The verb eval: accuracy, its cost, and what is measured besides."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.table import Table

from innerloop.checks.values import Bounds, Count, Loops, Natural, Seed
from innerloop.cli.arguments import (
    ModelArguments,
    SplitArguments,
    console,
    going_on,
    progress_of,
    results_folder,
)
from innerloop.cli.main import is_first_process
from innerloop.disk.files import write_text
from innerloop.engine.options import Many
from innerloop.engine.test_time import TestTimeCompute
from innerloop.errors import InputError, refuse
from innerloop.model import run_folder
from innerloop.tasks import Task
from innerloop.tasks.task import warn_of_overlap
from innerloop.text.examples import Example

if TYPE_CHECKING:  # slow to import
    from innerloop.engine.latent_model import LatentModel
    from innerloop.measure.accuracy import Prediction
    from innerloop.measure.result_cache import ResultCache


@dataclass(frozen=True)
class EvalArguments(SplitArguments, ModelArguments):
    """What is measured.

    Args:
        limit: answer only the first examples.
        out: the folder for result.json and predictions.jsonl; by default the run's own.
        batch_size: rows per batch.
        max_new_tokens: the most tokens to write per example; by default as the task says.
        stage: answer in the layout of this stage of the method's curriculum; by default the last.
        loops: another number of loops than the model was trained with.
        seed: of the draws.
        controls: also answer with the latents replaced, hidden, or refined more or less often; writes controls.json.
        stability: also measure how the loop behaves, iteration by iteration; writes stability.json.
        bound: also bound the likelihood of the right answers by so many draws; of methods that denoise, 128 are usual.
        probes: also read step results off the latents, and swap latents between examples; writes probes.json.
        fresh: start over; by default what was measured before of the same weights, data and options is taken as it is.
        on: answer in this process, or processes that torchrun started; or in parts on the Ray cluster that is there.
        compile: compile short passes, as CUDA graphs on a GPU; the first answers wait for it.
        backend: lm-eval answers tasks of lm-evaluation-harness instead, and writes lm_eval.json.
        tasks: of lm-eval, names of tasks with commas between them.
        tasks_dir: of lm-eval, a folder with tasks of your own.
        shots: of lm-eval, examples put before a question; by default as the task says.
    """

    limit: Count | None = None
    out: str | None = None
    batch_size: Many = 64
    max_new_tokens: Count | None = None
    stage: Natural | None = None
    loops: Loops | None = None
    seed: Seed = 0
    controls: bool = False
    stability: bool = False
    bound: Count | None = None
    probes: bool = False
    fresh: bool = False
    on: Literal["local", "ray"] = "local"
    compile: bool = False
    backend: Literal["innerloop", "lm-eval"] = "innerloop"
    tasks: str | None = None
    tasks_dir: str | None = None
    shots: Annotated[int, Bounds(0, 1000)] | None = None

    def __post_init__(self) -> None:
        of_harness = (self.tasks, self.tasks_dir, self.shots) != (None, None, None)
        refuse(
            (self.backend == "lm-eval" and not self.tasks, "--backend lm-eval needs --tasks NAME,NAME"),
            (
                self.backend != "lm-eval" and of_harness,
                "--tasks, --tasks_dir and --shots are of --backend lm-eval; a task of ours is named by --task",
            ),
            (
                self.on == "ray" and (self.backend == "lm-eval" or "LOCAL_RANK" in os.environ),
                "--on ray answers a task of ours, from one process: leave lm-eval, torchrun and accelerate out",
            ),
        )

    @property
    def besides(self) -> tuple[bool, bool, bool]:
        """What is measured besides accuracy: controls, stability and probes."""
        return self.controls, self.stability, self.probes

    @property
    def answering(self) -> dict[str, Any]:
        """How examples are answered, as `evaluate` takes it."""
        return {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "stage": self.stage}


def eval_(run: str, options: EvalArguments, attempts: TestTimeCompute) -> None:
    """Measure accuracy with its 95 % interval, and the cost per example; of running text, how well it is predicted.

    Args:
        run: a run's folder, or any model with --method.
        options: what is measured, and of which model.
        attempts: how often a question is tried.
    """
    if options.backend == "lm-eval":
        told = "lm-eval's tasks say how they are answered: leave --samples, --starts, --temperature and --beams out"
        refuse((not attempts.is_plain, told))
        from innerloop.measure.harness import check_harness

        check_harness()
        if is_first_process():
            _eval_harness(options.load_model(run, options.compile), run, options)
        return
    if options.on == "ray":
        from innerloop.experiments.ray import check_ray

        check_ray()
    if options.method is not None and options.out is None and run_folder.is_run(run):
        raise InputError("this would overwrite the run's own result: give --out DIR for another method's")
    run_folder.resolve(run)
    if options.probes:
        from innerloop.measure.probes import check_sklearn

        check_sklearn()
    folder = results_folder(run, options.out)
    task = options.load_task(run)
    examples = task.examples(options.split, options.limit)
    warn_of_overlap(task, {options.split: examples})
    model = options.load_model(run, options.compile)
    _check_stage(run, model, options)
    evaluation = Evaluation(run, model, task, examples, options, attempts, folder)
    if not task.running_text:
        evaluation.answer()
    elif is_first_process():
        evaluation.read_text()


def _check_stage(run: str, model: LatentModel, options: EvalArguments) -> None:
    """Refuse a stage that the method does not have; say where a run ended before its last."""
    stage, last = options.stage, model.method.last_stage
    if stage is not None and not 0 <= stage <= last:
        raise InputError(f"--stage {stage}: the stages of '{model.method.name}' run from 0 to {last}")
    if stage is None and options.method is None and (reached := run_folder.recorded(run, "stage", last)) < last:
        console.print(f"note: trained up to stage {reached} of {last} only; --stage {reached} answers in its layout")


@dataclass(frozen=True)
class Evaluation:
    """A model and the examples of a task that it is measured on; results are written to a folder and printed."""

    run: str
    model: LatentModel
    task: Task
    examples: list[Example]
    options: EvalArguments
    attempts: TestTimeCompute
    folder: Path

    def answer(self) -> None:
        """Answer the examples, then measure what is asked for besides."""
        from innerloop.measure.accuracy import Prediction
        from innerloop.measure.bound import check_bound
        from innerloop.measure.reports import check_asked
        from innerloop.measure.result_cache import PARTS, ResultCache, made_of
        from innerloop.measure.shards import processes

        model, task, examples, options = self.model, self.task, self.examples, self.options
        split = options.split
        check_asked(
            model, task, split, examples, options.stage, options.loops, *options.besides, attempts=self.attempts
        )
        if options.bound is not None:
            check_bound(model, examples)
        decides = {**options.answering, "loops": options.loops, **self.attempts.asked(options.seed)}
        how = {**options.answering, "loops": options.loops, "attempts": self.attempts, "seed": options.seed}
        with processes(model.device.type == "cpu") as all_of_us:
            is_first = all_of_us.rank == 0
            path = self.folder / PARTS if is_first else None
            parts = ResultCache(path, made_of(model, task, split, examples, decides), options.fresh)
            if all_of_us.told("accuracy" in parts) and not is_first:
                return
            with going_on(parts, ", ".join(parts.known)):
                with progress_of(f"eval {task.name}", len(examples)) as advance:
                    share = self._on_ray if options.on == "ray" else all_of_us.evaluate
                    measure = partial(share, model, task, examples, how, advance)
                    predictions = parts.value(list[Prediction], "accuracy", measure)
                if is_first:
                    self._report(predictions, parts)

    def _on_ray(
        self,
        model: LatentModel,
        task: Task,
        examples: Sequence[Example],
        how: dict[str, Any],
        progress: Callable[[int], None],
    ) -> list[Prediction]:
        """Answer examples on a Ray cluster."""
        from innerloop.experiments.ray import evaluate_on_ray

        who = self.run, self.options.read_method(), self.options.dtype
        return evaluate_on_ray(who, task, examples, how, progress, self.options.device == "cpu")

    def _report(self, predictions: Sequence[Prediction], parts: ResultCache) -> None:
        """Write and print the result, then measure what is asked for besides, in this process."""
        from innerloop.measure.accuracy import answered, result_of
        from innerloop.measure.reports import Measurement
        from innerloop.measure.subject import Subject

        model, task, split, options = self.model, self.task, self.options.split, self.options
        result = result_of(model, task, split, predictions, run_folder.recorded(self.run, "seed"), self.run)
        lines = (json.dumps(asdict(p), ensure_ascii=False) for p in predictions)
        write_text(self.folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        asked = {"max_new_tokens": options.max_new_tokens, "stage": options.stage}
        self._write(result, asked | self._asked | self.attempts.asked(options.seed))
        self._print(result)
        self._tell_agreement()
        if options.bound is not None:
            self._bound(result, options.bound)
        subject = Subject(model, task, *answered(self.examples, predictions), **options.answering, cache=parts)
        Measurement(subject, split, self.run, result["seed"], self.folder, console).run(*options.besides)

    def _tell_agreement(self) -> None:
        """Tell how much of the first batch an approximate cache leaves as it would be without."""
        from innerloop.measure.agreement import agreement

        size = self.options.batch_size
        answering = {"batch_size": size, "loops": self.options.loops, "seed": self.options.seed}
        share = agreement(self.model, [example.question for example in self.examples[:size]], **answering)
        if share is not None:
            console.print(
                f"approximate cache: {share:.1%} of the tokens of the first {min(size, len(self.examples))} answers "
                "are those written without",
                soft_wrap=True,
            )

    def _bound(self, result: dict[str, Any], n_draws: int) -> None:
        """Bound the likelihood of the right answers, and add that to the result."""
        from innerloop.measure.bound import bounds, summary

        with progress_of(f"bound {self.task.name}", len(self.examples)) as advance:
            found = summary(bounds(self.model, self.examples, n_draws, self.options.seed, self.options.batch_size,
                                   progress=advance))  # fmt: skip
        write_text(self.folder / "result.json", json.dumps(result | {"bound": found}, indent=2) + "\n")
        error = "" if found["mc_error"] is None else f" (standard error of the draws {found['mc_error']:.2g})"
        console.print(f"nll of the right answers at most {found['nll']:.4f} nats each{error}", soft_wrap=True)

    def read_text(self) -> None:
        """Measure how well running text is predicted."""
        from innerloop.measure.likelihood import likelihood, text_result

        options = self.options
        of_answers = (
            any(options.besides) or options.bound is not None or (options.stage, options.max_new_tokens) != (None, None)
        )
        refuse((options.on == "ray", "--on ray answers examples in parts, and of running text none is answered"))
        if of_answers or not self.attempts.is_plain:
            raise InputError(
                "of running text nothing is answered: leave controls, stability, probes, bound, stage, samples, "
                "starts, temperature, beams and max_new_tokens out"
            )
        with progress_of(f"eval {self.task.name}", len(self.examples)) as advance:
            found = likelihood(self.model, self.examples, options.batch_size, options.loops, progress=advance)
        seed = run_folder.recorded(self.run, "seed")
        result = text_result(self.model, self.task, options.split, found, seed, self.run)
        self._write(result, self._asked)
        low, high = result["ci95"]
        console.print(
            f"{self.model.method.name} on {self.task.name}/{options.split}: nll {result['nll']:.4f} (95 % {low:.4f} "
            f"to {high:.4f}), perplexity {result['perplexity']:.2f} over {result['n_tokens']} tokens of {result['n']} "
            f"chunks, of which {result['n_unknown']} are unknown words; {result['n_left_out']} chunks are longer than "
            f"the model reads\n{self.folder / 'result.json'}",
            soft_wrap=True,
        )

    @property
    def _asked(self) -> dict[str, Any]:
        dtype = str(self.model.backbone.lm.dtype).removeprefix("torch.")
        return {"loops": self.options.loops, "dtype": None if self.options.dtype == "auto" else dtype}

    def _write(self, result: dict[str, Any], asked: dict[str, Any]) -> None:
        """Write the result, with what was asked for where answers are not those of the run as it is."""
        if asked := {name: value for name, value in asked.items() if value is not None}:
            result["asked"] = asked
        write_text(self.folder / "result.json", json.dumps(result, indent=2) + "\n")

    def _print(self, result: dict[str, Any]) -> None:
        if "failed" in result:
            console.print(
                f"note: {result['failed']} examples could not be answered, and count as wrong; "
                "predictions.jsonl says why"
            )
        if "timed_out" in result:
            console.print(
                f"note: {result['timed_out']} answers took too long to compare, and count as wrong; predictions.jsonl "
                "marks them as timed_out"
            )
        (low, high), cost = result["ci95"], result["cost"]
        fills = self.model.method.family == "denoise"
        per_pass = f" ({cost['written'] / max(cost['passes'], 1):.1f} tokens a pass)" if fills else ""
        unlike = f"; diversity of its samples {result['diversity']:.0%}" if "diversity" in result else ""
        console.print(
            f"{self.model.method.name}{self.attempts.told} on {self.task.name}/{self.options.split}: accuracy "
            f"{result['accuracy']:.1%} (95 % {low:.1%} to {high:.1%}, n = {result['n']}, unparsable "
            f"{result['unparsable']}); per example {cost['passes']:.1f} passes{per_pass}, "
            f"{cost['positions']:.1f} positions, {1000 * sum(cost['seconds'].values()):.1f} ms"
            f"{unlike}\n{self.folder / 'result.json'}",
            soft_wrap=True,
        )


def _eval_harness(model: LatentModel, run: str, options: EvalArguments) -> None:
    """Answer tasks of lm-evaluation-harness."""
    from innerloop.measure.harness import PARTS, RESULT, evaluate_tasks
    from innerloop.measure.result_cache import ResultCache, of_model
    from innerloop.terminal.progress import bar

    folder = results_folder(run, options.out)
    names = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    parts = ResultCache(folder / PARTS, of_model(model) | {"batch_size": options.batch_size}, options.fresh)
    with going_on(parts, f"{len(parts.known)} parts"), bar(console) as progress:
        row = progress.add_task("eval lm-eval", total=None, note="")
        asked = (options.shots, options.limit, options.batch_size, options.tasks_dir, parts)
        planned, advance = (lambda n: progress.update(row, total=n)), partial(progress.advance, row)
        report = evaluate_tasks(model, names, run, folder, *asked, planned, advance)
    table = Table("task", "measure", "value", "standard error")
    for task, measures in report["results"].items():
        for name, value in measures.items():
            kind, _, filtered = name.partition(",")
            if isinstance(value, float) and not kind.endswith("_stderr"):
                error = measures.get(f"{kind}_stderr,{filtered}")
                shown = f"{error:.4f}" if isinstance(error, float) else "-"
                table.add_row(task, name.removesuffix(",none"), f"{value:.4f}", shown)
    console.print(table)
    console.print(f"{folder / RESULT}", soft_wrap=True)

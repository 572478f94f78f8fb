"""Verbs that answer and look: eval, ask, lens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from innerloop.cli.arguments import (
    Dtype,
    askable,
    console,
    folder_given,
    going_on,
    method_given,
    model_given,
    task_given,
)
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.test_time import Attempts, Pick
from innerloop.errors import InputError, refuse
from innerloop.lens import look, page_path, terminal_view, write_page
from innerloop.lens.latents import names_of_columns
from innerloop.measure import evaluate, result_of
from innerloop.measure.accuracy import Prediction, answered
from innerloop.measure.harness import PARTS as HARNESS_PARTS
from innerloop.measure.harness import RESULT as HARNESS_RESULT
from innerloop.measure.harness import evaluate_tasks
from innerloop.measure.likelihood import likelihood, text_result
from innerloop.measure.reports import Measurement, check_asked
from innerloop.measure.result_cache import PARTS, ResultCache, made_of, of_model
from innerloop.measure.subject import Subject
from innerloop.methods import Cot
from innerloop.model import checkpoint
from innerloop.tasks import Task
from innerloop.terminal.progress import bar
from innerloop.terminal.views import answer_view
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example


def eval_(
    run: str,
    task: str | None = None,
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    out: str | None = None,
    method: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    stage: int | None = None,
    loops: int | None = None,
    samples: int = 1,
    pick: Pick = "vote",
    temperature: float | None = None,
    beams: int = 1,
    seed: int = 0,
    backend: Literal["innerloop", "lm-eval"] = "innerloop",
    tasks: str | None = None,
    tasks_dir: str | None = None,
    shots: int | None = None,
    controls: bool = False,
    stability: bool = False,
    probes: bool = False,
    fresh: bool = False,
    device: str | None = None,
    dtype: Dtype = "auto",
    compile: bool = False,
) -> None:
    """Measure accuracy with its 95 % interval, and the cost per example; of running text, how well it is predicted.

    Args:
        run: a run's folder, or any model with --method.
        task: a task's name, or {name: ..., field: value}; by default the one the run was trained on.
        data: a file or Hub data set to read the split from.
        split: train, valid or test.
        limit: answer only the first examples.
        out: the folder for result.json and predictions.jsonl; by default the run's own.
        method: reason by another method than the run was trained with.
        batch_size: rows per batch.
        max_new_tokens: the most tokens to write per example; by default as the task says.
        stage: answer in the layout of this stage of the method's curriculum; by default the last.
        loops: another number of loops than the model was trained with.
        samples: answers drawn for each example, of which one counts; the cost is that of all.
        pick: which of them counts: the answer with most votes (self-consistency), or the likeliest text (best of n).
        temperature: of the draws; by default 0.7 for several samples, and 0, which draws nothing, for one.
        beams: texts that a beam search follows; 1 searches for nothing.
        seed: of the draws.
        backend: lm-eval answers tasks of lm-evaluation-harness instead, and writes lm_eval.json.
        tasks: of lm-eval, names of tasks with commas between them.
        tasks_dir: of lm-eval, a folder with tasks of your own.
        shots: of lm-eval, examples put before a question; by default as the task says.
        controls: also answer with the latents replaced, hidden, or refined more or less often; writes controls.json.
        stability: also measure how the loop behaves, iteration by iteration; writes stability.json.
        probes: also read step results off the latents, and swap latents between examples; writes probes.json.
        fresh: start over; by default what was measured before of the same weights, data and options is taken as it is.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        dtype: the type of the weights; auto keeps the file's, which is fp32 for what was trained so.
        compile: compile short passes, as CUDA graphs on a GPU; the first answers wait for it.
    """
    attempts = Attempts(samples, pick, temperature, beams)
    refuse(
        (batch_size < 1, f"--batch_size {batch_size}: give at least one row"),
        (
            max_new_tokens is not None and max_new_tokens < 1,
            f"--max_new_tokens {max_new_tokens}: let at least one be written",
        ),
        (loops is not None and loops < 0, f"--loops {loops}: give 0 or more"),
    )
    if backend == "lm-eval":
        if not attempts.is_plain:
            raise InputError(
                "lm-eval's tasks say themselves how they are answered: leave --samples, --temperature, --beams out"
            )
        if not tasks:
            raise InputError("--backend lm-eval needs --tasks NAME,NAME")
        model = model_given(run, method_given(method), device, dtype, compile)
        _eval_harness(model, run, tasks, Path(out or run), limit, batch_size, tasks_dir, shots, fresh)
        return
    if (tasks, tasks_dir, shots) != (None, None, None):
        raise InputError("--tasks, --tasks_dir and --shots are of --backend lm-eval; a task of ours is named by --task")
    if method is not None and out is None and checkpoint.is_run(run):
        raise InputError("this would overwrite the run's own result: give --out DIR for another method's")
    checkpoint.resolve(run)
    folder = folder_given(Path(out or run))
    chosen = task_given(run, task, data, split)
    examples = chosen.examples(split, limit)
    model = model_given(run, method_given(method), device, dtype, compile)
    last = model.method.curriculum.last_stage
    if stage is not None and not 0 <= stage <= last:
        raise InputError(f"--stage {stage}: the stages of '{model.method.name}' run from 0 to {last}")
    if stage is None and method is None and (reached := checkpoint.recorded(run, "stage", last)) < last:
        console.print(f"note: trained up to stage {reached} of {last} only; --stage {reached} answers in its layout")
    if chosen.running_text:
        if controls or stability or probes or stage is not None or max_new_tokens is not None or not attempts.is_plain:
            raise InputError(
                "of running text nothing is answered: leave controls, stability, probes, stage, samples, temperature, "
                "beams and max_new_tokens out"
            )
        _measure_text(run, model, chosen, split, examples, batch_size, loops, dtype, folder)
        return
    check_asked(model, chosen, split, examples, stage, loops, controls, stability, probes, attempts)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stage": stage}
    decides = {**options, "loops": loops, **attempts.asked(seed)}
    parts = ResultCache(folder / PARTS, made_of(model, chosen, split, examples, decides), fresh)
    with going_on(parts, ", ".join(parts.known)):
        _measure(
            run,
            model,
            chosen,
            split,
            examples,
            options,
            loops,
            dtype,
            folder,
            parts,
            (controls, stability, probes),
            attempts,
            seed,
        )


def _measure(
    run: str,
    model: LatentModel,
    task: Task,
    split: str,
    examples: Sequence[Example],
    options: dict[str, Any],
    loops: int | None,
    dtype: Dtype,
    folder: Path,
    parts: ResultCache,
    flags: tuple[bool, bool, bool],
    attempts: Attempts,
    seed: int,
) -> None:
    """Answer examples, write and print the result, then measure what the flags ask for."""
    with bar(console) as progress:
        row = progress.add_task(f"eval {task.name}", total=len(examples), note="")
        advance = partial(progress.advance, row)
        how = {**options, "loops": loops, "progress": advance, "attempts": attempts, "seed": seed}
        predictions = parts.value(list[Prediction], "accuracy", lambda: evaluate(model, task, examples, **how))
        progress.update(row, completed=len(examples))
    result = result_of(model, task, split, predictions, checkpoint.recorded(run, "seed"), run)
    asked_dtype = None if dtype == "auto" else str(model.backbone.lm.dtype).removeprefix("torch.")
    asked = {name: options[name] for name in ("max_new_tokens", "stage")} | {"loops": loops, "dtype": asked_dtype}
    asked |= attempts.asked(seed)
    if asked := {name: value for name, value in asked.items() if value is not None}:
        result["asked"] = asked  # answers that are not those of the run as it is
    lines = (json.dumps(asdict(p), ensure_ascii=False) for p in predictions)
    checkpoint.write_text(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    checkpoint.write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    if "failed" in result:
        console.print(
            f"note: {result['failed']} examples could not be answered, and count as wrong; predictions.jsonl says why"
        )
    low, high = result["ci95"]
    cost = result["cost"]
    console.print(
        f"{model.method.name}{attempts.told} on {task.name}/{split}: accuracy {result['accuracy']:.1%} "
        f"(95 % {low:.1%} to {high:.1%}, n = {result['n']}, unparsable {result['unparsable']}); "
        f"per example {cost['passes']:.1f} passes, {cost['positions']:.1f} positions, "
        f"{1000 * sum(cost['seconds'].values()):.1f} ms\n{folder / 'result.json'}",
        soft_wrap=True,
    )
    known = answered(examples, predictions)
    subject = Subject(model, task, *known, **options, cache=parts)
    Measurement(subject, split, run, result["seed"], folder, console).run(*flags)


def _measure_text(
    run: str,
    model: LatentModel,
    task: Task,
    split: str,
    examples: Sequence[Example],
    batch_size: int,
    loops: int | None,
    dtype: Dtype,
    folder: Path,
) -> None:
    """Measure how well running text is predicted; write and print the result."""
    with bar(console) as progress:
        row = progress.add_task(f"eval {task.name}", total=len(examples), note="")
        found = likelihood(model, examples, batch_size, loops, progress=partial(progress.advance, row))
    result = text_result(model, task, split, found, checkpoint.recorded(run, "seed"), run)
    asked = {"loops": loops, "dtype": None if dtype == "auto" else str(model.backbone.lm.dtype).removeprefix("torch.")}
    if asked := {name: value for name, value in asked.items() if value is not None}:
        result["asked"] = asked
    checkpoint.write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    low, high = result["ci95"]
    console.print(
        f"{model.method.name} on {task.name}/{split}: nll {result['nll']:.4f} (95 % {low:.4f} to {high:.4f}), "
        f"perplexity {result['perplexity']:.2f} over {result['n_tokens']} tokens of {result['n']} chunks, of which "
        f"{result['n_unknown']} are unknown words; {result['n_left_out']} chunks are longer than the model reads\n"
        f"{folder / 'result.json'}",
        soft_wrap=True,
    )


def _eval_harness(
    model: LatentModel,
    run: str,
    tasks: str,
    folder: Path,
    limit: int | None,
    batch_size: int,
    tasks_dir: str | None,
    shots: int | None,
    fresh: bool,
) -> None:
    """Answer tasks of lm-evaluation-harness."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    folder_given(folder)
    parts = ResultCache(folder / HARNESS_PARTS, of_model(model) | {"batch_size": batch_size}, fresh)
    with going_on(parts, f"{len(parts.known)} parts"), bar(console) as progress:
        row = progress.add_task("eval lm-eval", total=None, note="")
        asked = (model, names, run, folder, shots, limit, batch_size, tasks_dir, parts)
        planned, advance = (lambda n: progress.update(row, total=n)), partial(progress.advance, row)
        report = evaluate_tasks(*asked, planned, advance)
    table = Table("task", "measure", "value", "standard error")
    for task, measures in report["results"].items():
        for name, value in measures.items():
            kind, _, filtered = name.partition(",")
            if isinstance(value, float) and not kind.endswith("_stderr"):
                error = measures.get(f"{kind}_stderr,{filtered}")
                shown = f"{error:.4f}" if isinstance(error, float) else "-"
                table.add_row(task, name.removesuffix(",none"), f"{value:.4f}", shown)
    console.print(table)
    console.print(f"{folder / HARNESS_RESULT}", soft_wrap=True)


def ask(
    run: str,
    question: str,
    method: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    device: str | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Answer one question, and show what the latents held at each loop.

    Args:
        run: a run's folder, or any model; a plain model writes freely.
        question: the question.
        method: reason by another method than the run was trained with.
        max_new_tokens: the most tokens to write.
        temperature: 0 writes the likeliest tokens.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        dtype: the type of the weights; auto keeps the file's, which is fp32 for what was trained so.
    """
    if not question.strip():
        raise InputError("the question is empty")
    chosen = method_given(method)
    if chosen is None and not checkpoint.is_run(run):
        chosen = Cot()
    model = model_given(run, chosen, device, dtype)
    model.spell = Speller(model.tokenizer, checkpoint.recorded(run, "running_text", False))
    answer = model.generate([question], max_new_tokens=max_new_tokens, temperature=temperature, trace=True)[0]
    console.print(answer_view(answer, model.tokenizer, *names_of_columns(model, question)))


def lens(
    run: str,
    examples: int = 8,
    task: str | None = None,
    data: str | None = None,
    split: str = "test",
    loops: int | None = None,
    out: str | None = None,
    method: str | None = None,
    max_new_tokens: int | None = None,
    terminal: bool = False,
    device: str | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Look inside a run's answers: one HTML file with what every latent and loop shows, or a view in the terminal.

    Args:
        run: a run's folder, or any model with --method.
        examples: how many examples the page holds.
        task: a task's name, or {name: ..., field: value}; by default the one the run was trained on.
        data: a file or Hub data set to read the split from.
        split: train, valid or test.
        loops: another number of loops than the model was trained with.
        out: the file; by default RUN/lens.html for a run, and lens.html here for another model.
        method: reason by another method than the run was trained with.
        max_new_tokens: the most tokens to write per example; by default as the task says.
        terminal: show the first example in the terminal, and write no file.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        dtype: the type of the weights; auto keeps the file's, which is fp32 for what was trained so.
    """
    if examples < 1 or (loops is not None and loops < 0) or (max_new_tokens is not None and max_new_tokens < 1):
        raise InputError("lens needs examples >= 1, loops >= 0 and max_new_tokens >= 1")
    chosen = task_given(run, task, data, split)
    if method is None and not checkpoint.is_run(run):
        raise InputError(f"{run} is no run, so say how it shall reason: --method NAME")
    asked = chosen.examples(split, 1 if terminal else examples)
    path = None if terminal else page_path(run, out)
    model = model_given(run, method_given(method), device, dtype)
    model.spell = Speller(model.tokenizer, chosen.running_text)
    if path is None:
        console.print(terminal_view(model, chosen, asked[0], loops, max_new_tokens))
        return
    asked = askable([model], asked) or asked  # what it says of a question that it cannot be asked tells why
    decides = {"loops": loops, "max_new_tokens": max_new_tokens}
    parts = ResultCache(path.with_suffix(".parts.json"), made_of(model, chosen, split, [], decides))
    with going_on(parts, f"{len(parts.known)} examples", ""), bar(console) as progress:
        row = progress.add_task(f"lens {model.method.name}", total=len(asked), note="")
        advance = partial(progress.advance, row)
        record = look(model, chosen, asked, split, run, loops, max_new_tokens, progress=advance, parts=parts)
    write_page(record, path)
    parts.forget()
    n_right = sum(one.is_right for one in record.looks)
    console.print(f"{path}: {len(asked)} examples, {n_right} right; open it in a browser", soft_wrap=True)

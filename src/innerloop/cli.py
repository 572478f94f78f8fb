"""The command line, `innerloop VERB`: each verb is a typed function, its signature is its arguments."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from innerloop import checkpoint
from innerloop.bench import BASELINE, RUN, BenchSettings, bench_lines, bench_table
from innerloop.bench import bench as benchmark
from innerloop.calibrate import calibrate as calibration
from innerloop.cluster import ray_workers
from innerloop.compare import compare_folders, compare_suite
from innerloop.demo import demo
from innerloop.errors import InputError, nearest
from innerloop.examples import read_examples, write_examples
from innerloop.halting import StopKind
from innerloop.layout import Speller
from innerloop.lens import look, page_path, terminal_view, write_page
from innerloop.measure import evaluate, result_of
from innerloop.measure.harness import RESULT as HARNESS_RESULT
from innerloop.measure.harness import evaluate_tasks
from innerloop.measure.reports import Measurement, check_asked
from innerloop.methods import METHODS, Cot, Method, method_named
from innerloop.model import LatentModel
from innerloop.progress import LiveProgress, bar
from innerloop.recipe import field_parser, load_recipe, named, parse_overrides, parse_value, read_recipe, typed
from innerloop.run import CONFIG, FINISHED, run_recipe
from innerloop.show import answer_view, calibration_line, print_rows
from innerloop.standing import failures
from innerloop.suite import is_suite
from innerloop.sweep import best_line, read_sweep, run_grid, run_search, sweep_table, write_sweep
from innerloop.tasks import TASKS, Task, task_named
from innerloop.tokenizer import train_tokenizer

console = Console()


def methods() -> None:
    """List the methods: family, paper, stages, what they need."""
    table = Table("method", "family", "what it does", "paper", "stages", "needs")
    for method in METHODS.values():
        n_stages = method().curriculum.last_stage + 1
        table.add_row(method.name, method.family, method.summary, method.paper, str(n_stages), method.needs)
    console.print(table)


def data_list() -> None:
    """List the tasks."""
    table = Table("task", "what it is")
    for task in TASKS.values():
        table.add_row(task.name, task.summary)
    console.print(table)


def data_make(name: str, out: str | None = None, fields: Sequence[str] = ()) -> None:
    """Write the splits of a task as JSONL, generated or converted.

    Args:
        name: the task.
        out: the folder for train.jsonl, valid.jsonl and test.jsonl; by default data/NAME.
        fields: the task's own options, written --field value.
    """
    task = typed(task_named(name), dict(parse_overrides(fields)), "task")
    written = 0
    for split in ("train", "valid", "test"):
        if getattr(task, split, "made") is None and any(getattr(task, s, None) for s in ("train", "valid", "test")):
            continue  # files were given, but none for this split
        path = Path(out or f"data/{name}") / f"{split}.jsonl"
        examples = task.examples(split)
        write_examples(examples, path)
        console.print(f"{path}: {len(examples)} examples")
        written += 1
    if not written:
        raise InputError(f"task '{name}' has nothing to write: give --train FILE, --valid FILE or --test FILE")


def data_show(
    file: str, method: str = "cot", tokenizer: str | None = None, stage: int | None = None, n: int = 2
) -> None:
    """Show how a method lays out examples: tokens, slots, labels and positions, in colour.

    Args:
        file: a JSONL file of examples.
        method: a method's name, or {name: ..., field: value}.
        tokenizer: a model folder or Hub name; by default a word tokenizer is trained on the file.
        stage: the curriculum's stage; by default the last.
        n: how many examples.
    """
    chosen = named(parse_value(method, "--method"), "method", method_named)
    last = chosen.curriculum.last_stage
    if n < 1 or (stage is not None and not 0 <= stage <= last):
        raise InputError(f"show at least one example, of a stage from 0 to {last}")
    examples = read_examples(file, limit=None if tokenizer is None else n)
    words = train_tokenizer(examples) if tokenizer is None else checkpoint.load_tokenizer(tokenizer)
    words.add_tokens([marker for marker in chosen.markers if marker not in words.get_vocab()], special_tokens=True)
    print_rows(console, chosen.rows(examples[:n], Speller(words), stage), words)


def train(recipe: str, resume: bool = False, overrides: Sequence[str] = ()) -> None:
    """Train a recipe; every field can be overridden: --section.field value.

    Args:
        recipe: a YAML recipe.
        resume: go on where an earlier run of the same folder was interrupted.
        overrides: fields of the recipe, written --section.field value.
    """
    loaded = load_recipe(recipe, overrides)
    folder = run_recipe(loaded, resume, lambda stage, title: [LiveProgress(title, console)])
    if not (folder / FINISHED).exists():
        raise InputError(f"interrupted; go on with: {' '.join(['innerloop train', recipe, *overrides, '--resume'])}")
    console.print(f"the trained model is in {folder}; next: innerloop eval {folder}", soft_wrap=True)


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
    backend: Literal["innerloop", "lm-eval"] = "innerloop",
    tasks: str | None = None,
    tasks_dir: str | None = None,
    shots: int | None = None,
    controls: bool = False,
    stability: bool = False,
    probes: bool = False,
) -> None:
    """Measure accuracy with its 95 % interval, and the cost per example.

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
        backend: lm-eval answers tasks of lm-evaluation-harness instead, and writes lm_eval.json.
        tasks: of lm-eval, names of tasks with commas between them.
        tasks_dir: of lm-eval, a folder with tasks of your own.
        shots: of lm-eval, examples put before a question; by default as the task says.
        controls: also answer with the latents replaced, hidden, or refined more or less often; writes controls.json.
        stability: also measure how the loop behaves, iteration by iteration; writes stability.json.
        probes: also read step results off the latents, and swap latents between examples; writes probes.json.
    """
    if backend == "lm-eval":
        _eval_harness(run, tasks, method, Path(out or run), limit, batch_size, tasks_dir, shots)
        return
    if (tasks, tasks_dir, shots) != (None, None, None):
        raise InputError("--tasks, --tasks_dir and --shots are of --backend lm-eval; a task of ours is named by --task")
    if method is not None and out is None and checkpoint.is_run(run):
        raise InputError("this would overwrite the run's own result: give --out DIR for another method's")
    checkpoint.resolve(run)
    folder = Path(out or run)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(folder / "predictions.jsonl.partial", "")  # a folder that cannot be written is found now
    (folder / "predictions.jsonl.partial").unlink()
    chosen = _task(run, task, data, split)
    examples = chosen.examples(split, limit)
    model = LatentModel.from_pretrained(run, _method(method))
    last = model.method.curriculum.last_stage
    if stage is not None and not 0 <= stage <= last:
        raise InputError(f"--stage {stage}: the stages of '{model.method.name}' run from 0 to {last}")
    if stage is None and method is None and (reached := checkpoint.recorded(run, "stage", last)) < last:
        console.print(f"note: trained up to stage {reached} of {last} only; --stage {reached} answers in its layout")
    check_asked(model, stage, loops, controls, stability, probes)
    with bar(console) as progress:
        row = progress.add_task(f"eval {chosen.name}", total=len(examples), note="")
        predictions = evaluate(
            model,
            chosen,
            examples,
            max_new_tokens,
            batch_size,
            stage,
            loops,
            progress=lambda n: progress.advance(row, n),
        )
    result = result_of(model, chosen, split, predictions, checkpoint.recorded(run, "seed"), run)
    asked = {"max_new_tokens": max_new_tokens, "stage": stage, "loops": loops}
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
        f"{model.method.name} on {chosen.name}/{split}: accuracy {result['accuracy']:.1%} "
        f"(95 % {low:.1%} to {high:.1%}, n = {result['n']}, unparsable {result['unparsable']}); "
        f"per example {cost['passes']:.1f} passes, {cost['positions']:.1f} positions, "
        f"{1000 * sum(cost['seconds'].values()):.1f} ms\n{folder / 'result.json'}",
        soft_wrap=True,
    )
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stage": stage}
    measured = (model, chosen, split, examples, predictions, run, result["seed"], folder, console, options)
    Measurement(*measured).run(controls, stability, probes)


def _eval_harness(
    run: str,
    tasks: str | None,
    method: str | None,
    folder: Path,
    limit: int | None,
    batch_size: int,
    tasks_dir: str | None,
    shots: int | None,
) -> None:
    """Answer tasks of lm-evaluation-harness."""
    if not tasks:
        raise InputError("--backend lm-eval needs --tasks NAME,NAME")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    model = LatentModel.from_pretrained(run, _method(method))
    folder.mkdir(parents=True, exist_ok=True)
    report = evaluate_tasks(model, names, run, folder, shots, limit, batch_size, tasks_dir)
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
    run: str, question: str, method: str | None = None, max_new_tokens: int = 128, temperature: float = 0.0
) -> None:
    """Answer one question, and show what the latents held at each loop.

    Args:
        run: a run's folder, or any model; a plain model writes freely.
        question: the question.
        method: reason by another method than the run was trained with.
        max_new_tokens: the most tokens to write.
        temperature: 0 writes the likeliest tokens.
    """
    if not question.strip():
        raise InputError("the question is empty")
    chosen = _method(method)
    if chosen is None and not checkpoint.is_run(run):
        chosen = Cot()
    model = LatentModel.from_pretrained(run, chosen)
    answer = model.generate([question], max_new_tokens=max_new_tokens, temperature=temperature, trace=True)[0]
    console.print(answer_view(answer, model.tokenizer))


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
    """
    if examples < 1 or (loops is not None and loops < 0) or (max_new_tokens is not None and max_new_tokens < 1):
        raise InputError("lens needs examples >= 1, loops >= 0 and max_new_tokens >= 1")
    chosen = _task(run, task, data, split)
    if method is None and not checkpoint.is_run(run):
        raise InputError(f"{run} is no run, so say how it shall reason: --method NAME")
    asked = chosen.examples(split, 1 if terminal else examples)
    path = None if terminal else page_path(run, out)
    model = LatentModel.from_pretrained(run, _method(method))
    if path is None:
        console.print(terminal_view(model, chosen, asked[0], loops, max_new_tokens))
        return
    with bar(console) as progress:
        row = progress.add_task(f"lens {model.method.name}", total=len(asked), note="")
        record = look(
            model, chosen, asked, split, run, loops, max_new_tokens, progress=lambda n: progress.advance(row, n)
        )
    write_page(record, path)
    n_right = sum(one.is_right for one in record.looks)
    console.print(f"{path}: {len(asked)} examples, {n_right} right; open it in a browser", soft_wrap=True)


def compare(
    subjects: list[str],
    out: str | None = None,
    baseline: str | None = None,
    seeds: list[int] | None = None,
    workers: int = 2,
    results: str | None = None,
    task: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    timed: int = 64,
    overrides: Sequence[str] = (),
) -> None:
    """Compare a suite's variants, or runs: train and evaluate what is missing, print the table, write report.html.

    Args:
        subjects: a YAML file with variants or a grid, or the folders of two runs or more.
        out: the folder of the suite's runs, by default its own; of runs, where the report and what is evaluated go, by
            default runs/compare.
        baseline: the row that the others are set against; by default the first.
        seeds: of a suite, other seeds than its own.
        workers: of a suite, points trained at a time, each on one thread.
        results: of a suite, also write the points to this file; by default OUT/results.json alone.
        task: of runs, what to answer: a task's name, or {name: ..., field: value}; by default what they learned.
        split: of runs, train, valid or test; by default test. A suite says so itself, under test.
        limit: of runs, answer only the first examples.
        timed: examples that all answer in turns, for times and memory; 0: times are those of each evaluation.
        overrides: of a suite, fields that all variants share, written --section.field value.
    """
    if timed < 0:
        raise InputError(f"--timed is {timed}, but must be 0 or more")
    if len(subjects) == 1 and is_suite(subjects[0]):
        if (task, split, limit) != (None, None, None):
            raise InputError("--task, --split and --limit are of runs: a suite says under 'test' what is answered")
        compare_suite(subjects[0], out, baseline, seeds, workers, results, overrides, console, timed)
        return
    if overrides:
        raise InputError(f"runs take no {overrides[0]}: they are compared as they are")
    if Path(subjects[0]).suffix in (".yaml", ".yml"):
        raise InputError(
            f"{subjects[0]} has no variants to compare; train a single recipe: innerloop train {subjects[0]}"
        )
    if len(subjects) < 2:
        raise InputError("compare takes a suite, or two runs or more")
    chosen = None if task is None else _task(subjects[0], task, None, split or "test")
    compare_folders(subjects, Path(out or "runs/compare"), baseline, console, chosen, split or "test", limit, timed)


def sweep(
    recipe: str,
    grid: list[str] = [],  # noqa: B006  (jsonargparse shows it)
    search: Literal["none", "optuna"] = "none",
    trials: int = 20,
    seeds: list[int] | None = None,
    out: str | None = None,
    workers: int = 2,
    on: Literal["local", "ray"] = "local",
    split: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train a recipe over a grid of values, or over points that a search draws; writes sweep.html and results.json.

    Args:
        recipe: a YAML recipe, or a suite that has a grid.
        grid: FIELD=VALUE,VALUE,.. or, for a search, FIELD=LOW..HIGH or FIELD=LOW..HIGH:log; one --grid for each field.
        search: none trains every combination of values; optuna draws points, told by the accuracy of those before.
        trials: points that a search draws.
        seeds: seeds of every point; by default the recipe's.
        out: the folder of the points; by default the recipe's with -sweep behind it. What is there is not run again.
        workers: points trained at a time, each on one thread; on Ray, points that a search draws at a time.
        on: this machine, or the Ray cluster that is there.
        split: the examples that points are chosen by; by default valid.
        limit: how many of them.
        overrides: other fields of the recipe, written --section.field value.
    """
    raw, axes = read_sweep(recipe, grid, out, seeds, split, limit, overrides)
    place = ray_workers if on == "ray" else None
    if search == "optuna":
        swept = run_search(raw, axes, trials, workers, console, place)
    else:
        swept = run_grid(raw, axes, workers, console, place)
    folder = Path(raw["out"])
    write_sweep(swept, f"Sweep of {Path(recipe).stem}", folder)
    console.print(sweep_table(swept))
    if swept.best is not None:
        console.print(best_line(swept), soft_wrap=True)
    console.print(
        f"the picture is in {folder / 'sweep.html'}, every point in {folder / 'results.json'}", soft_wrap=True
    )
    if failed := failures(swept.results):
        raise InputError(f"{len(failed)} of {len(swept.results)} points failed:\n" + "\n".join(failed))


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
    seed: int = 0,
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
        limit: use only the first validation examples.
        check: test examples on which the choice is measured once more.
        method: put this method on the model first, such as adainfer.
        adopt: from now on the run stops by the chosen rule.
        out: save the model with the chosen rule to this folder, which must be given where the run is a plain model.
        patience: consecutive iterations for which the score must hold.
        min_loops: iterations before a row may stop.
        seed: of draws in fitting.
    """
    if not checkpoint.is_run(run) and (adopt or out is None):
        raise InputError(f"{run} is no run that could keep a rule: save the model with its rule by --out DIR")
    chosen = _task(run, task, data, "valid")
    examples = chosen.examples("valid", limit)
    checked = chosen.examples("test", check) if check else []
    model = LatentModel.from_pretrained(run, _method(method))
    options: dict[str, Any] = {"patience": patience, "min_loops": min_loops}
    found = calibration(
        model,
        chosen,
        examples,
        rule,
        max_drop,
        agreement=agreement,
        mean_loops=mean_loops,
        check=checked,
        seed=seed,
        progress=lambda done: console.print(done, style="dim"),
        **{name: value for name, value in options.items() if value is not None},
    )
    if out is not None:
        found.model.save_pretrained(out)
    path = found.save(out or run, adopt)
    report = found.report
    for title, asked in (("validation", report), ("test", report.get("check"))):
        if asked is not None:
            console.print(calibration_line(title, asked), soft_wrap=True)
    console.print(f"{path}" + ("; the run stops by this rule from now on" if adopt else ""), soft_wrap=True)


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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
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
        questions: the least number of questions of a turn; a larger batch answers as many as it holds.
        max_new_tokens: the most tokens to write per question; by default as the task says.
        task: a task's name, or {name: ..., field: value}; by default the one the run was trained on.
        data: a file or Hub data set to read the split from.
        split: train, valid or test.
        method: reason by another method than the run was trained with.
        baseline_method: the same for the baseline.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        dtype: the type of the weights; auto keeps the file's.
        threads: threads of a CPU; by default as many as torch takes.
        seed: of what models draw.
    """
    if baseline_method is not None and baseline is None:
        raise InputError("--baseline_method is for a --baseline, and there is none")
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads}: give at least one thread, or leave it out")
    where = _device(device)
    chosen = _task(run, task, data, split)
    path = Path(out) if out is not None else Path(run) / "bench.json"
    if path.is_dir() or (out is None and not path.parent.is_dir()):
        raise InputError(f"the report cannot be written to {path}: name a file by --out FILE")
    n_tokens = chosen.max_new_tokens if max_new_tokens is None else max_new_tokens
    settings = BenchSettings(tuple(batch_sizes), repeats, questions, n_tokens, seed)
    asked = [example.question for example in chosen.examples(split, settings.most)]
    if threads is not None:
        torch.set_num_threads(threads)
    named_models = {RUN: (run, method), BASELINE: (baseline, baseline_method)}
    models = {
        name: LatentModel.from_pretrained(folder, _method(written), device=where, dtype=dtype)
        for name, (folder, written) in named_models.items()
        if folder is not None
    }
    report = benchmark(models, asked, settings)
    for name, found in report["models"].items():
        found["model"] = named_models[name][0]
    asked_of = {"task": {"name": chosen.name, "version": chosen.version, **asdict(chosen)}, "split": split}
    report = {"kind": "bench", **asked_of, **report}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(path, json.dumps(report, indent=1) + "\n")
    console.print(bench_table(report))
    for line in bench_lines(report):
        console.print(line, soft_wrap=True)
    console.print(f"{path}", soft_wrap=True)


def _device(text: str | None) -> torch.device | None:
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


def _task(run: str, task: str | None, data: str | None, split: str) -> Task:
    """Return the task asked for, or the one a run was trained on, with ``data`` as the source of the split."""
    checkpoint.resolve(run)
    if task is not None:
        section = parse_value(task, "--task")
    elif (Path(run) / CONFIG).exists():
        section = read_recipe(Path(run) / CONFIG)["task"]
    else:
        raise InputError(f"{run} is no folder with a {CONFIG}, so say what to answer: --task NAME")
    if not isinstance(section, str | dict):
        raise InputError(f"--task {task}: write a task's name, or {{name: ..., field: value}}")
    section = {"name": section} if isinstance(section, str) else dict(section)
    if data is not None:
        if split not in getattr(task_named(section.get("name", "")), "__dataclass_fields__", {}):
            raise InputError(f"task '{section['name']}' makes its own examples and reads no --data")
        section[split] = data
    return named(section, "task", task_named)


def _method(text: str | None) -> Method | None:
    """Return the method written as a name or as {name: ..., field: value}."""
    return None if text is None else named(parse_value(text, "--method"), "method", method_named)


VERBS: dict[str, Callable[..., None] | dict[str, Callable[..., None]]] = {
    "demo": demo,
    "methods": methods,
    "data": {"list": data_list, "make": data_make, "show": data_show},
    "train": train,
    "eval": eval_,
    "ask": ask,
    "lens": lens,
    "compare": compare,
    "sweep": sweep,
    "calibrate": calibrate,
    "bench": bench,
}
# verbs that take any --field: where these go, and which are the verb's own
OPEN_ENDED = {("train",): "overrides", ("data", "make"): "fields", ("compare",): "overrides", ("sweep",): "overrides"}
OWN = {
    ("train",): {"--resume"},
    ("data", "make"): {"--resume", "--out"},
    ("compare",): {
        "--out", "--baseline", "--seeds", "--workers", "--results", "--task", "--split", "--limit", "--timed",
    },
    ("sweep",): {
        "--grid", "--search", "--trials", "--seeds", "--out", "--workers", "--on", "--split", "--limit",
    },
}  # fmt: skip
LISTED: dict[tuple[str, ...], str] = {
    ("compare",): "",
    ("sweep",): "--grid",
}  # what may be given several times: '' are the positional arguments


def build_parser() -> ArgumentParser:
    """Return the parser of all verbs."""
    parser = ArgumentParser(
        prog="innerloop", exit_on_error=False, description="Language models that reason in latents."
    )
    verbs = parser.add_subcommands(dest="verb", metavar="VERB", title="verbs")
    for name, verb in VERBS.items():
        if callable(verb):
            verbs.add_subcommand(name, _verb_parser(verb), help=_first_line(verb))
            continue
        group = ArgumentParser(exit_on_error=False)
        verbs.add_subcommand(name, group, help="list, make and look at examples")
        inner = group.add_subcommands(dest="action", metavar="ACTION")
        for action, function in verb.items():
            inner.add_subcommand(action, _verb_parser(function), help=_first_line(function))
    return parser


def _verb_parser(function: Callable[..., None]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=_first_line(function))
    parser.add_function_arguments(function, as_positional=True, skip=set(OPEN_ENDED.values()))
    return parser


def _first_line(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return the exit code. Errors are one sentence on stderr; --debug shows where they arose."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [_underscored(a) for a in arguments if a != "--debug"]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        _run(arguments)
    except (InputError, ArgumentError) as error:
        if debug:
            traceback.print_exc()
        print(
            f"innerloop: {' '.join(str(error).split()) if isinstance(error, ArgumentError) else error}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("innerloop: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # a defect, or something a library refuses in its own words
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        print(f"innerloop: {type(error).__name__}: {reason} (--debug shows where it arose)", file=sys.stderr)
        return 1
    return 0


def _underscored(argument: str) -> str:
    """Return an option as it is called here: --max-drop is --max_drop."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _run(arguments: list[str]) -> None:
    if not arguments:
        arguments = ["--help"]
    words = [a for a in arguments[:2] if not a.startswith("-")]
    if words and words[0] not in VERBS:
        raise InputError(f"there is no verb '{words[0]}'{nearest(words[0], VERBS)}; the verbs are {', '.join(VERBS)}")
    key = next((k for k in OPEN_ENDED if tuple(arguments[: len(k)]) == k), None)
    extra: list[str] = []
    if key is not None:
        arguments, extra = _split_open(key, arguments)
    parsed = build_parser().parse_args(arguments)
    settings: dict[str, Any] = parsed.as_dict()
    verb = VERBS[settings["verb"]]
    values = settings[settings["verb"]] or {}
    if isinstance(verb, dict):
        if values.get("action") is None:
            raise InputError(f"innerloop {settings['verb']} needs one of {', '.join(verb)}")
        verb, values = verb[values["action"]], values[values["action"]] or {}
    if key is not None:
        values[OPEN_ENDED[key]] = extra
    verb(**values)


def _split_open(key: tuple[str, ...], arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take the open-ended overrides out of a verb's arguments; with --help after a recipe or task, show its fields."""
    own, listed = OWN[key], LISTED.get(key)
    kept, rest = list(key), list(arguments[len(key) :])
    extra: list[str] = []
    several: list[str] = []
    subjects: list[str] = []
    while rest:
        argument = rest.pop(0)
        name, is_given, value = argument.partition("=")
        if name in ("-h", "--help"):
            kept.append(argument)
        elif not argument.startswith("-"):
            subjects.append(argument)
        elif argument == "--resume":
            kept.append("--resume=true")
        elif name == listed and (is_given or rest):
            several.append(value if is_given else rest.pop(0))
        else:
            target = kept if name in own else extra
            if name == "--seeds":
                numbers = [value] if is_given else []
                while rest and (not numbers or rest[0].isdigit()):
                    numbers.append(rest.pop(0))
                target.append(f"--seeds=[{','.join(numbers).strip('[]')}]")
                continue
            target.append(argument)
            if not is_given and rest:
                target.append(rest.pop(0))
    if subjects and {"-h", "--help"} & set(kept) and key in (("train",), ("data", "make")):
        _print_fields(key, subjects[0], extra)
        raise SystemExit(0)
    if listed == "":
        kept += [json.dumps(subjects)] if subjects else []
    else:
        kept += subjects + ([f"{listed}={json.dumps(several)}"] if several else [])
    return kept, extra


def _print_fields(key: tuple[str, ...], subject: str, extra: Sequence[str]) -> None:
    """Print the fields that a recipe's sections, or a task, take."""
    if key == ("train",):
        recipe = load_recipe(subject, extra)
        sections = {"task": type(recipe.task), "backbone": type(recipe.backbone), "method": type(recipe.method)}
        field_parser(sections, f"innerloop train {subject}").print_help()
        print("train:\n  --train.NAME VALUE    transformers' TrainingArguments by name, and batch_size, max_length,")
        print("                        eval_limit, max_new_tokens")
    else:
        parser = ArgumentParser(prog=f"innerloop data make {subject} --out DIR")
        parser.add_class_arguments(task_named(subject))
        parser.print_help()

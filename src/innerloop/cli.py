"""The command line, `innerloop VERB`: each verb is a typed function, its signature is its arguments."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from innerloop import checkpoint
from innerloop.calibrate import calibrate as calibration
from innerloop.demo import demo
from innerloop.errors import InputError, nearest
from innerloop.examples import read_examples, write_examples
from innerloop.halting import StopKind
from innerloop.layout import Speller
from innerloop.measure import evaluate, result_of
from innerloop.measure.reports import Measurement, check_asked
from innerloop.methods import METHODS, Cot, Method, method_named
from innerloop.model import LatentModel
from innerloop.progress import LiveProgress, bar
from innerloop.recipe import field_parser, load_recipe, named, parse_overrides, parse_value, read_recipe, typed
from innerloop.run import CONFIG, FINISHED, run_recipe
from innerloop.show import blocks_view, calibration_line, depth_view, print_rows, trace_view
from innerloop.suite import is_suite, load_suite, run_suite, suite_report, suite_table
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
        controls: also answer with the latents replaced, hidden, or refined more or less often; writes controls.json.
        stability: also measure how the loop behaves, iteration by iteration; writes stability.json.
        probes: also read step results off the latents, and swap latents between examples; writes probes.json.
    """
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
    lines = (json.dumps(asdict(p), ensure_ascii=False) for p in predictions)
    checkpoint.write_text(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    checkpoint.write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
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
    if answer.trace is not None and answer.trace.iterations and model.depth is None:
        console.print(trace_view(answer.trace, model.tokenizer))
        if answer.blocks:
            console.print(blocks_view(answer.blocks))
    console.print(answer.text, markup=False, highlight=False)
    if answer.depths:
        console.print(depth_view(answer.depths))
    cost = answer.cost
    console.print(
        f"{cost.passes} passes, {cost.positions} positions, {1000 * sum(cost.seconds.values()):.0f} ms"
        + ("" if answer.ended else f"; stopped at max_new_tokens={max_new_tokens}"),
        style="dim",
    )


def compare(
    suite: str,
    out: str | None = None,
    seeds: list[int] | None = None,
    workers: int = 2,
    results: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train and test the variants of a suite with all its seeds, and print one table; what is there is not run again.

    Args:
        suite: a YAML file with variants.
        out: the folder of the runs; by default the suite's own.
        seeds: other seeds than the suite's.
        workers: points trained at a time, each on one thread.
        results: also write the points to this file; by default OUT/results.json alone.
        overrides: fields that all variants share, written --section.field value.
    """
    if not is_suite(suite):
        raise InputError(f"{suite} has no variants to compare; train a single recipe with: innerloop train {suite}")
    loaded = load_suite(suite, out, seeds, overrides)
    points = run_suite(loaded, workers, console)
    report = json.dumps(suite_report(suite, points, overrides), indent=1) + "\n"
    for path in [Path(loaded.out) / "results.json", *([Path(results)] if results else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, report)
    console.print(suite_table(points))
    failed = [f"{r['variant']} seed {r['seed']}: {r['error']}" for r in points if "error" in r]
    console.print(f"every point is in {Path(loaded.out) / 'results.json'}", soft_wrap=True)
    if failed:
        raise InputError(f"{len(failed)} of {len(points)} points failed:\n" + "\n".join(failed))


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
    if adopt and not checkpoint.is_run(run):
        raise InputError(f"{run} is no run that could adopt a rule: save the model with its rule by --out DIR")
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
    "compare": compare,
    "calibrate": calibrate,
}
# verbs that take any --field: where these go, and which are the verb's own
OPEN_ENDED = {("train",): "overrides", ("data", "make"): "fields", ("compare",): "overrides"}
OWN = {
    ("train",): {"--resume"},
    ("data", "make"): {"--resume", "--out"},
    ("compare",): {"--out", "--seeds", "--workers", "--results"},
}


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
    arguments = [a for a in arguments if a != "--debug"]
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
    own = OWN[key]
    kept, rest = list(key), list(arguments[len(key) :])
    extra: list[str] = []
    while rest:
        argument = rest.pop(0)
        name = argument.partition("=")[0]
        if not argument.startswith("-") or name in ("-h", "--help"):
            kept.append(argument)
        elif argument == "--resume":
            kept.append("--resume=true")
        else:
            target = kept if name in own else extra
            target.append(argument)
            if "=" not in argument and rest:
                target.append(rest.pop(0))
    subject = [a for a in kept[len(key) :] if not a.startswith("-")]
    if subject and {"-h", "--help"} & set(kept) and key != ("compare",):
        _print_fields(key, subject[0], extra)
        raise SystemExit(0)
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

"""Verbs that list what there is and make or show examples."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from innerloop.checks.values import Count, Natural, fitted
from innerloop.cli.arguments import console
from innerloop.config.typed import field_parser, named, typed
from innerloop.disk.names import check_folder
from innerloop.errors import InputError
from innerloop.methods import METHODS, method_named
from innerloop.tasks import TASKS, task_named
from innerloop.tasks.task import warn_of_overlap


def methods() -> None:
    """List the methods: family, paper, stages, what they need."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("method", "family", "what it does", "paper", "stages", "needs"):
        table.add_column(name, no_wrap=name in ("method", "family", "stages"), overflow="fold")
    for method in METHODS.values():
        n_stages = method().last_stage + 1
        paper = method.paper.replace("arXiv ", "")
        table.add_row(method.name, method.family, method.summary, paper, str(n_stages), method.needs)
    console.print(table)
    console.print("Papers are numbers of arXiv. innerloop train RECIPE --help lists the fields of a recipe's method.")


def data_list() -> None:
    """List the tasks."""
    table = Table("task", "what it is")
    for task in TASKS.values():
        table.add_row(task.name, task.summary)
    console.print(table)


def data_make(name: str, out: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Write the splits of a task as JSONL, generated or converted.

    Args:
        name: the task.
        out: the folder for train.jsonl, valid.jsonl and test.jsonl; by default data/NAME.
        overrides: the task's own options, written --field value.
    """
    from innerloop.text.examples import write_examples
    from innerloop.train.recipe import parse_overrides

    task = typed(task_named(name), dict(parse_overrides(overrides)), "task")
    folder, written = check_folder(out or f"data/{name}", "--out"), {}
    for split in ("train", "valid", "test"):
        if getattr(task, split, "made") is None and any(getattr(task, s, None) for s in ("train", "valid", "test")):
            continue  # files were given, but none for this split
        path = folder / f"{split}.jsonl"
        examples = task.examples(split)
        write_examples(examples, path)
        console.print(f"{path}: {len(examples)} examples")
        written[split] = examples
    warn_of_overlap(task, written)
    if not written:
        raise InputError(f"task '{name}' has nothing to write: give --train FILE, --valid FILE or --test FILE")


def fields_help(name: str, overrides: Sequence[str] = ()) -> str:
    """Return the options of a task."""
    return field_parser(task_named(name)).format_help()


def data_show(
    file: str,
    method: str = "cot",
    tokenizer: str | None = None,
    stage: Natural | None = None,
    n: Count = 2,
    columns: str | None = None,
    steps_split: str | None = None,
) -> None:
    """Show how a method lays out examples: tokens, slots, labels and positions, in colour.

    Args:
        file: a file of examples, such as .jsonl, .csv or .parquet.
        method: a method's name, or {name: ..., field: value}.
        tokenizer: a model folder or Hub name; by default a word tokenizer is trained on the file.
        stage: the curriculum's stage; by default the last.
        n: how many examples.
        columns: what the file calls ours, such as {question: prompt, steps: reasoning, answer: target}.
        steps_split: what stands between steps that are one text, such as a newline.
    """
    from innerloop.text.encoder import PromptEncoder
    from innerloop.text.examples import read_examples
    from innerloop.train.recipe import parse_value

    chosen = named(parse_value(method, "--method"), "method", method_named)
    chosen.stage_or_last(stage)
    renaming = (
        None if columns is None else fitted("--columns", parse_value(columns, "--columns"), dict[str, str | None])
    )
    limit = None if tokenizer is None else n
    examples = read_examples(file, limit=limit, columns=renaming, steps_split=steps_split)
    from innerloop.model.loading import load_tokenizer
    from innerloop.terminal.views import print_rows
    from innerloop.text.tokenizer import train_tokenizer

    words = train_tokenizer(examples) if tokenizer is None else load_tokenizer(tokenizer)
    words.add_tokens([marker for marker in chosen.markers if marker not in words.get_vocab()], special_tokens=True)
    print_rows(console, chosen.rows(examples[:n], PromptEncoder(words), stage), words)

"""Examples (question, steps, answer): reading and writing them, and as rows of a Hugging Face data set.

examples = read_examples("valid.jsonl")
write_examples(examples, "copy.jsonl.gz")
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from innerloop.checks.arguments import checked
from innerloop.checks.values import Count, fitted
from innerloop.disk.files import check_writable, replacing
from innerloop.disk.names import check_folder
from innerloop.errors import InputError
from innerloop.phases.phase import says
from innerloop.text.sources import Row, Rows, check_columns, listed, open_rows, renamed

if TYPE_CHECKING:
    import datasets

ANSWER_PREFIX = "### "  # what an answer is written behind, on a line of its own
FIELDS = ("id", "question", "steps", "answer", "meta")
MAX_PROBLEMS_SHOWN = 20
SPLIT_HINT = "; steps_split says what stands between steps that are one text"
HALF = re.compile("[\\ud800-\\udfff]")  # of a surrogate pair


@dataclass(frozen=True, slots=True)
class Example:
    """One problem: its question, the written steps that lead to the answer, and the answer.

    ``meta`` holds what a data set knows besides; it takes part in equality, not in the hash.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    id: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        steps = self.steps
        if type(steps) is not tuple or not all(
            isinstance(text, str) for text in (self.question, self.answer, self.id, *steps)
        ):
            for name in ("question", "answer", "id"):
                fitted(name, getattr(self, name), str)
            steps = fitted("steps", steps, tuple[str, ...])
        object.__setattr__(self, "steps", steps)  # a list would make the example unhashable


@checked
@says(lambda source, *_, **__: f"reading {source}")
def read_examples(
    source: str | Path,
    split: str | None = None,
    limit: Count | None = None,
    parse_row: Callable[[Row], Row] = dict,
    columns: Mapping[str, str | None] | None = None,
    steps_split: str | None = None,
) -> list[Example]:
    """Read examples from a file or from a data set on the Hub.

    A file is ``.jsonl`` (one object a line), ``.json`` (one list of objects), ``.csv`` (with a line of names, cells
    apart by commas, semicolons or tabs), ``.parquet`` or ``.txt`` (each line a row ``{"text": line}``), each but
    ``.parquet`` possibly with ``.gz``. Anything else names a Hub data set: ``NAME``, ``NAME:CONFIG`` or
    ``NAME:CONFIG:SPLIT``, where a split written in the name goes before ``split``.

    Args:
        source: the file or data set.
        split: which split of a data set.
        limit: only the first rows are read.
        parse_row: turns rows of a foreign format, after ``columns``, into ``{"id", "question", "steps", "answer",
            "meta"}`` and raises InputError for a bad one.
        columns: what rows call ours, as ``{"question": "prompt"}``; ``{"steps": None}`` where there are none.
        steps_split: what stands between the steps where they are one text; the steps around it are stripped.

    Raises:
        InputError: all bad rows are reported in one.
    """
    rows = open_rows(source, split)
    if columns and rows.columns is not None:
        check_columns(rows.origin, columns, rows.columns)
    if columns or steps_split is not None:
        own_names = partial(renamed, columns=columns or {}, steps_split=steps_split)
        return _collect(rows, limit, lambda row: parse_row(own_names(row)))
    return _collect(rows, limit, parse_row)


def check_limit(limit: int | None) -> None:
    """Refuse a limit that is no whole number from 1 on; None is no limit."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit is {limit}: give at least 1, or leave it out for all examples")


def from_rows(rows: Iterable[Row], origin: str) -> list[Example]:
    """Return the examples in ``rows`` (of a data set, say); ``origin`` names them in messages and default ids."""
    return _collect(Rows(origin, origin, enumerate(rows, 1)), None, dict)


def n_shared(examples: Iterable[Example], others: Iterable[Example]) -> int:
    """Count the examples whose question is among those of others, however it is spaced."""
    known = {" ".join(other.question.split()) for other in others}
    return sum(" ".join(example.question.split()) in known for example in examples)


def to_dataset(examples: Iterable[Example]) -> "datasets.Dataset":
    """Return the examples as a Hugging Face data set that ``from_rows`` turns back into them.

    ``meta`` becomes JSON text, because the columns of a table cannot differ from row to row.
    """
    import datasets

    text = datasets.Value("string")
    columns = {"id": text, "question": text, "steps": datasets.List(text), "answer": text, "meta": text}
    rows = [
        {"id": e.id, "question": e.question, "steps": list(e.steps), "answer": e.answer, "meta": _to_json(dict(e.meta))}
        for e in examples
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


@checked
def write_examples(examples: Iterable[Example], path: str | Path) -> None:
    """Write examples to a ``.jsonl`` or ``.jsonl.gz`` file; whole or not at all, the same bytes each time."""
    path = check_folder(path, "the file")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"cannot write examples to {path}: name the file .jsonl or .jsonl.gz")
    check_writable(path.parent, "choose another folder")
    with replacing(path) as aside, aside.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                packed.writelines(_to_line(example) for example in examples)
        else:
            raw.writelines(_to_line(example) for example in examples)


def _to_line(example: Example) -> bytes:
    row: dict[str, Any] = {
        "id": example.id,
        "question": example.question,
        "steps": list(example.steps),
        "answer": example.answer,
    }
    if not example.id:
        del row["id"]
    if example.meta:
        row["meta"] = dict(example.meta)
    return (_to_json(row) + "\n").encode()


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# From entries (lines, rows) to examples, collecting what is wrong with each.


def _collect(rows: Rows, limit: int | None, parse_row: Callable[[Row], Row]) -> list[Example]:
    examples: list[Example] = []
    problems: list[str] = []
    taken: dict[str, int] = {}  # id -> number of the entry that has it
    for number, entry in islice(rows.entries, limit):
        try:
            example = _to_example(parse_row(rows.load(entry)), f"{rows.stem}-{number}")
            if example.id in taken:
                raise InputError(f"id '{example.id}' is already that of {rows.unit} {taken[example.id]}")
        except InputError as problem:
            problems.append(f"{rows.unit} {number}: {problem}")
            continue
        taken[example.id] = number
        examples.append(example)
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if not examples and len(told := {problem.partition(": ")[2] for problem in problems}) == 1 < len(problems):
            shown = [f"each {rows.unit}: {told.pop()}"]
        elif len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        count = f"{len(problems)} bad {rows.unit}{'s' if len(problems) > 1 else ''}"
        raise InputError(f"{count} in {rows.origin}:\n  " + "\n  ".join(shown))
    if not examples:
        raise InputError(f"{rows.origin} holds no examples")
    return examples


def _to_example(row: Row, default_id: str) -> Example:
    steps, identity = row.get("steps"), row.get("id")
    meta: Any = row.get("meta")
    if isinstance(meta, str):  # to_dataset writes it so
        with suppress(ValueError):  # then it stays text, which is reported below
            meta = json.loads(meta)
    problems = [_what_is_wrong(name, row.get(name)) for name in ("question", "answer")]
    if steps is None:
        problems.append("no 'steps' (write [] where there are none)")
    elif not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
        problems.append("'steps' is not a list of strings" + SPLIT_HINT * isinstance(steps, str))
    if isinstance(identity, bool) or not isinstance(identity, str | int | None):
        problems.append("'id' is not text")
    if not isinstance(meta, Mapping | None):
        problems.append("'meta' is not an object")
    problems += [f"'{name}' holds half of a surrogate pair, which is no text" for name in row if _has_half(row[name])]
    if any(problems):
        others = [name for name in row if name not in FIELDS]
        if others and any(row.get(name) is None for name in ("question", "steps", "answer")):
            problems.append(f"it has {listed(row)}: say which is which, as columns: {{question: {others[0]}}}")
        raise InputError("; ".join(filter(None, problems)))
    return Example(
        question=row["question"],
        steps=tuple(row["steps"]),
        answer=str(row["answer"]),
        id=default_id if identity in (None, "") else str(identity),
        meta={**{name: value for name, value in row.items() if name not in FIELDS}, **(meta or {})},
    )


def _has_half(value: Any) -> bool:
    """Tell whether there is half of a surrogate pair in a value, as JSON may hold it; no file or tokenizer takes it."""
    if isinstance(value, str):
        return not value.isascii() and HALF.search(value) is not None
    if isinstance(value, Mapping):
        return any(map(_has_half, value)) or any(map(_has_half, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_half, value))


def _what_is_wrong(name: str, value: Any) -> str:
    """Say what is wrong with a question or an answer; an answer may be a number."""
    if value is None:
        return f"no '{name}'"
    if name == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
        return ""
    if not isinstance(value, str):
        return f"'{name}' is not text"
    return "" if value.strip() else f"'{name}' is empty"

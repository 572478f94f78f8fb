"""Examples (question, steps, answer): reading and writing them as JSONL, and as rows of a Hugging Face data set.

examples = read_examples("valid.jsonl")
write_examples(examples, "copy.jsonl.gz")
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from innerloop.checks.arguments import checked
from innerloop.checks.values import Count, fitted
from innerloop.disk.files import check_writable, replacing
from innerloop.disk.names import check_folder
from innerloop.errors import InputError, nearest
from innerloop.phases.phase import says

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]

ANSWER_PREFIX = "### "  # what an answer is written behind, on a line of its own
FIELDS = ("id", "question", "steps", "answer", "meta")
MAX_PROBLEMS_SHOWN = 20
HALF = re.compile("[\\ud800-\\udfff]")  # of a surrogate pair
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*(:[^:]+)?)?")
HUB_SPLITS = {"valid": ("valid", "validation", "val", "dev")}  # what data sets on the Hub call a split


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
) -> list[Example]:
    """Read examples from a file or from a data set on the Hub.

    A file is ``.jsonl`` (one object a line), ``.json`` (one list of objects) or ``.txt`` (each line a row
    ``{"text": line}``), each possibly with ``.gz``. Anything else names a Hub data set: ``NAME``, ``NAME:CONFIG`` or
    ``NAME:CONFIG:SPLIT``, where a split written in the name goes before ``split``. ``parse_row`` turns rows of a
    foreign format into ``{"id", "question", "steps", "answer", "meta"}`` and raises InputError for a bad one.
    With ``limit`` only the first rows are read. All bad rows are reported in one InputError.
    """
    path = check_folder(source, "the data's file")
    unpacked = Path(path.name.removesuffix(".gz"))
    if unpacked.suffix in (".jsonl", ".txt"):
        load = _load_json if unpacked.suffix == ".jsonl" else _load_text
        return _collect(islice(_lines(path), limit), load, parse_row, str(path), unpacked.stem, "line")
    if unpacked.suffix == ".json":
        rows = islice(enumerate(_json_list(path), 1), limit)
        return _collect(rows, _check_object, parse_row, str(path), unpacked.stem, "row")
    if path.is_file():
        raise InputError(f"cannot tell what {path} holds: name it .jsonl, .json or .txt (with or without .gz)")
    if not path.is_dir() and (not HUB_NAME.fullmatch(str(source)) or (path.parts[1:] and path.parent.is_dir())):
        _raise_missing(path)
    name = str(source).partition(":")[0]
    rows = islice(enumerate(_hub_rows(str(source), split), 1), limit)
    return _collect(rows, _check_object, parse_row, str(source), name.split("/")[-1], "row")


def check_limit(limit: int | None) -> None:
    """Refuse a limit that is no whole number from 1 on; None is no limit."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit is {limit}: give at least 1, or leave it out for all examples")


def from_rows(rows: Iterable[Row], origin: str) -> list[Example]:
    """Return the examples in ``rows`` (of a data set, say); ``origin`` names them in messages and default ids."""
    return _collect(enumerate(rows, 1), _check_object, dict, origin, origin, "row")


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


def _collect(
    entries: Iterable[tuple[int, Any]],
    load: Callable[[Any], Row],
    parse_row: Callable[[Row], Row],
    origin: str,
    id_prefix: str,
    unit: str,
) -> list[Example]:
    examples: list[Example] = []
    problems: list[str] = []
    taken: dict[str, int] = {}  # id -> number of the entry that has it
    for number, entry in entries:
        try:
            example = _to_example(parse_row(load(entry)), f"{id_prefix}-{number}")
            if example.id in taken:
                raise InputError(f"id '{example.id}' is already that of {unit} {taken[example.id]}")
        except InputError as problem:
            problems.append(f"{unit} {number}: {problem}")
            continue
        taken[example.id] = number
        examples.append(example)
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        count = f"{len(problems)} bad {unit}{'s' if len(problems) > 1 else ''}"
        raise InputError(f"{count} in {origin}:\n  " + "\n  ".join(shown))
    if not examples:
        raise InputError(f"{origin} holds no examples")
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
        problems.append("'steps' is not a list of strings")
    if isinstance(identity, bool) or not isinstance(identity, str | int | None):
        problems.append("'id' is not text")
    if not isinstance(meta, Mapping | None):
        problems.append("'meta' is not an object")
    problems += [f"'{name}' holds half of a surrogate pair, which is no text" for name in row if _has_half(row[name])]
    if any(problems):
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


def _check_object(value: Any) -> Row:
    if not isinstance(value, Mapping):
        raise InputError("not an object {...}")
    return value


def _load_json(line: bytes) -> Row:
    return _check_object(_parse_json(line))


def _load_text(line: bytes) -> Row:
    return {"text": _decode(line).strip()}


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None


def _parse_json(data: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON value")

    text = _decode(data)
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"broken JSON ({error})") from None


# Where entries come from.


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except FileNotFoundError:
        _raise_missing(path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, numbered from 1."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _json_list(path: Path) -> list[Any]:
    with _opened(path) as file:
        content = file.read()
    try:
        rows = _parse_json(content)
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"cannot read {path}: a .json file must hold one list of objects; use .jsonl for one a line")
    return rows


def _raise_missing(path: Path) -> NoReturn:
    if not path.parent.is_dir():
        raise InputError(f"no such file: {path} (there is no folder {path.parent} either)") from None
    near = nearest(path.name, (other.name for other in path.parent.iterdir()))
    raise InputError(f"no such file: {path}{near}") from None


def _hub_rows(source: str, split: str | None) -> "datasets.Dataset":
    """Return the rows of one split of ``NAME[:CONFIG[:SPLIT]]``."""
    import datasets

    name, _, rest = source.partition(":")
    config, _, own_split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=own_split or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot load data set '{source}' ({reason}); give a .jsonl file or a Hub name") from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    for known_as in HUB_SPLITS.get(split or "", (split,)):
        if known_as in loaded:
            return loaded[known_as]
    asked = "several splits" if split is None else f"no split '{split}'"
    raise InputError(f"data set '{source}' has {asked}: name one of {', '.join(loaded)} as '{name}:{config}:SPLIT'")

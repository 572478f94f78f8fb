"""Where rows come from: files of lines, lists and tables, and data sets on the Hub; and what their columns are called.

rows = open_rows("mine.csv")
rows.columns                              # ["prompt", "reasoning", "target"]
[rows.load(entry) for _, entry in rows.entries]
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from innerloop.disk.names import check_folder
from innerloop.errors import InputError, nearest

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]

KINDS = ".jsonl, .json, .csv or .txt (with or without .gz) or .parquet"
DELIMITERS = ",;\t"
MOST_COLUMNS_SHOWN = 20
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*(:[^:]+)?)?")
HUB_SPLITS = {"valid": ("valid", "validation", "val", "dev")}  # what data sets on the Hub call a split
ESCAPES = {"\\n": "\n", "\\t": "\t"}  # as a shell hands them over


def check_object(value: Any) -> Row:
    """Return a row that is one."""
    if not isinstance(value, Mapping):
        raise InputError("not an object {...}")
    return value


@dataclass(frozen=True)
class Rows:
    """The rows of a source, read as they are asked for.

    Args:
        origin: what messages call the source.
        stem: what default ids begin with.
        entries: each row as it stands there, with its number from 1.
        load: makes a row of an entry, or raises InputError.
        unit: what an entry is called.
        columns: what every row has; None where rows may differ.
    """

    origin: str
    stem: str
    entries: Iterable[tuple[int, Any]]
    load: Callable[[Any], Row] = check_object
    unit: str = "row"
    columns: Sequence[str] | None = None


def open_rows(source: str | Path, split: str | None = None) -> Rows:
    """Return the rows of a file or of a data set on the Hub; ``innerloop.read_examples`` says which there are."""
    path = check_folder(source, "the data's file")
    unpacked = Path(path.name.removesuffix(".gz"))
    stem = unpacked.stem
    if unpacked.suffix in (".jsonl", ".txt"):
        load = _load_json if unpacked.suffix == ".jsonl" else _load_text
        return Rows(str(path), stem, _lines(path), load, "line")
    if unpacked.suffix == ".json":
        return Rows(str(path), stem, _numbered(_json_list(path)))
    if unpacked.suffix == ".csv":
        return _csv(path, stem)
    if path.suffix == ".parquet":
        return _parquet(path, stem)
    if path.is_file():
        raise InputError(f"cannot tell what {path} holds: name it {KINDS}")
    if not path.is_dir() and (not HUB_NAME.fullmatch(str(source)) or (path.parts[1:] and path.parent.is_dir())):
        _raise_missing(path)
    found = _hub_rows(str(source), split)
    name = str(source).partition(":")[0].split("/")[-1]
    return Rows(str(source), name, _numbered(found), lambda row: _as_json(check_object(row)), columns=_names(found))


def check_columns(origin: str, wanted: Mapping[str, str | None], found: Sequence[str]) -> None:
    """Refuse a map that names a column which a table does not have; the message names those that it has."""
    for ours, theirs in wanted.items():
        if theirs is not None and theirs not in found:
            near = nearest(theirs, found)
            raise InputError(f"columns.{ours}: {origin} has no column '{theirs}'{near}; it has {listed(found)}")


def listed(columns: Iterable[str]) -> str:
    """Return the names of columns as they are told."""
    names = [str(name) for name in columns]
    more = f" and {len(names) - MOST_COLUMNS_SHOWN} more" if len(names) > MOST_COLUMNS_SHOWN else ""
    return (", ".join(names[:MOST_COLUMNS_SHOWN]) or "none") + more


def renamed(row: Row, columns: Mapping[str, str | None], steps_split: str | None) -> Row:
    """Return a row under our names, its steps a list if they were one text."""
    check_columns("the row", columns, list(row))
    ours = {name: [] if theirs is None else row[theirs] for name, theirs in columns.items()}
    both = {name: value for name, value in row.items() if name not in columns.values()} | ours
    if steps_split is not None and isinstance(steps := both.get("steps"), str):
        for written, meant in ESCAPES.items():
            steps_split = steps_split.replace(written, meant)
        both["steps"] = [step.strip() for step in steps.split(steps_split) if step.strip()]
    return both


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    return iter(enumerate(rows, 1))


def _load_json(line: bytes) -> Row:
    return check_object(_parse_json(line))


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


def _csv(path: Path, stem: str) -> Rows:
    """Return the rows of a table whose first line names its columns; every cell is text."""
    cells = _cells(path)
    names = [name.strip() for name in next(cells, [])]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"cannot read {path}: its first line names a column '{twice[0]}' twice; give each its own name"
        )

    def load(row: list[str]) -> Row:
        if len(row) != len(names):
            raise InputError(f"{len(row)} cells, but the first line names {len(names)} columns; is a quote missing?")
        return dict(zip(names, row, strict=True))

    return Rows(str(path), stem, _numbered(row for row in cells if row), load, columns=names)


def _cells(path: Path) -> Iterator[list[str]]:
    """Yield the cells of each line; what stands between them is read off the first."""
    with _opened(path) as file, TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            first = text.readline()
            delimiter = max(DELIMITERS, key=first.count)
            yield from csv.reader(chain([first], text), delimiter=delimiter, strict=True)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}: {error}; save it as comma-separated UTF-8") from None


def _parquet(path: Path, stem: str) -> Rows:
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        _raise_missing(path)
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
    return Rows(str(path), stem, _numbered(rows), _as_json, columns=file.schema_arrow.names)


def _as_json(value: Any) -> Any:
    """Return a value of a table as JSON has it: dates as text, bytes and objects of other kinds left out."""
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if value != value:  # NaN: an empty cell
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _names(rows: Any) -> Sequence[str] | None:
    return getattr(rows, "column_names", None)


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

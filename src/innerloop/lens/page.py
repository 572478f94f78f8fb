"""A `Record` as one HTML file: no network, no second file, opens from disk.

The page is `page.html` with `page.css` and `page.js` from this folder, plotly.js for the curves, and the record as JSON
in a script element. Nothing of the record becomes markup: what could end the element is escaped, and the script writes
text nodes only. A content security policy forbids every request.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from innerloop.errors import InputError
from innerloop.lens.record import Record
from innerloop.model.checkpoint import is_run, write_text

NAME = "lens.html"
DIGITS = 6  # significant digits of a number on the page


def page_path(run: str, out: str | None = None) -> Path:
    """Return where the page goes: RUN/lens.html for a run, lens.html here for another model, or ``out``.

    Raises:
        InputError: the page could not be made or written, which is found here before anything is answered.
    """
    path = Path(out) if out is not None else Path(run if is_run(run) and Path(run).is_dir() else ".") / NAME
    if path.is_dir():
        raise InputError(f"{path} is a folder: give --out a file, such as {path / NAME}")
    _plotly()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made: {error}; give --out another file") from error
    write_text(aside := path.with_name(f".{path.name}.partial"), "")
    aside.unlink()
    return path


def write_page(record: Record, path: Path) -> None:
    """Write the page of a record to a file."""
    write_text(path, page_of(record))


def page_of(record: Record) -> str:
    """Return the page of a record."""
    title = f"{record.method} on {record.task}: inside {len(record.looks)} answers"
    page = _resource("page.html")
    for name, text in {
        "TITLE": html.escape(title),
        "STYLE": _resource("page.css"),
        "RECORD": escaped(data_of(record)),
        "PLOTLY": _plotly(),
        "SCRIPT": _resource("page.js"),
    }.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    return page


def data_of(record: Record) -> dict[str, Any]:
    """Return a record as JSON values, its numbers rounded to `DIGITS` significant digits."""
    return _plain(asdict(record))


def escaped(data: Any) -> str:
    """Return JSON that no HTML parser takes for the end of the script element that it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _resource(name: str) -> str:
    return (files("innerloop.lens") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError("the page draws its curves with plotly: pip install 'innerloop[viz]'") from error
    return get_plotlyjs()

"""Pages that open from disk: one HTML file each, no network, no second file; and the lens's, a `Record` as a page.

A page is a Jinja2 template with plotly.js for its curves. Nothing of the data becomes markup: text is escaped, data lie
as JSON in a script element that they cannot end. A content security policy forbids every request.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from innerloop.disk.files import check_writable, write_text
from innerloop.disk.names import check_folder
from innerloop.errors import InputError, check_installed
from innerloop.lens.record import Record
from innerloop.model.run_folder import is_run
from innerloop.text.codec import to_json

NAME = "lens.html"
DIGITS = 6  # significant digits of a number on the page


def check_viz() -> None:
    """Refuse to go on without what pages are made with."""
    check_installed("pages are made with plotly and Jinja2", "viz", "plotly", "jinja2")


def page(package: str, template: str, **values: Any) -> str:
    """Return the page of a template in a package's folder, whose other files and plotly.js it may include."""
    check_viz()
    from jinja2 import Environment, FunctionLoader
    from plotly.offline import get_plotlyjs

    def load(name: str) -> str:
        return get_plotlyjs() if name == "plotly.js" else (files(package) / name).read_text(encoding="utf-8")

    pages = Environment(loader=FunctionLoader(load), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.globals["source"] = load
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "ensure_ascii": True}
    return pages.get_template(template).render(values)


def page_path(run: str, out: str | None = None) -> Path:
    """Return where the page goes: RUN/lens.html for a run, lens.html here for another model, or ``out``.

    Raises:
        InputError: the page could not be made or written, which is found here before anything is answered.
    """
    beside = Path(run if is_run(run) and Path(run).is_dir() else ".") / NAME
    path = beside if out is None else check_folder(out, "--out")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give --out a file, such as {path / NAME}")
    check_viz()
    check_writable(path.parent, "give --out another file")
    return path


def write_page(record: Record, path: Path) -> None:
    """Write the page of a record to a file."""
    write_text(path, page_of(record))


def page_of(record: Record) -> str:
    """Return the page of a record."""
    title = f"{record.method} on {record.task}: inside {len(record.looks)} answers"
    return page("innerloop.lens", "page.html", title=title, record=_rounded(to_json(record)))


def _rounded(value: Any) -> Any:
    """Return JSON values with numbers of `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value

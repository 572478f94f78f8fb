"""Charts of shares as plotly figures: bars, points with a Pareto front, curves with bands, heat maps.

Colours are written as the page's CSS variables, which follow light and dark (`report.html`).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from innerloop.experiments.summary import Mark

COLOURS = [f"var(--c{i})" for i in range(8)]
DASHES, SYMBOLS = ("solid", "dash", "dot"), ("circle", "square", "diamond")
GREY, INK = COLOURS[7], "var(--ink)"
MOST_LETTERS = 34  # of a name in a chart
Figure = dict[str, Any]
"""The ``data`` and ``layout`` of plotly, and a ``label`` that says what is drawn."""


@dataclass(frozen=True)
class Curve:
    """Shares along an axis, in its order, and where on it a run was trained."""

    name: str
    marks: Sequence[Mark]
    trained: float | None = None


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: None where nothing was measured, with ``note`` telling why."""

    share: float | None
    note: str = ""
    is_best: bool = False


def bars(marks: Sequence[Mark]) -> Figure:
    """Draw a bar for each mark with its interval."""
    x, y = [mark.share for mark in marks], list(range(len(marks)))
    bar = {"type": "bar", "orientation": "h", "x": x, "y": y, "marker": {"color": COLOURS[0]}}
    told = {"error_x": _interval(marks, INK, 4), "hovertemplate": "%{x:.1%}<extra></extra>"}
    axis = {"tickvals": y, "ticktext": [_text(mark.name) for mark in marks], "autorange": "reversed", "showgrid": False}
    layout = {"xaxis": {"range": [0, 1.005], "tickformat": ".0%"}, "yaxis": axis, "height": 30 * len(marks) + 50}
    return _figure([bar | told], layout, "; ".join(f"{mark.name} {mark.share:.1%}" for mark in marks))


def scatter(marks: Sequence[Mark], title: str, log: bool = False, best_is_low: bool = True) -> Figure:
    """Draw shares against ``x`` with intervals; where less is better, the Pareto front. Nameless marks are grey."""
    front = pareto(marks) if best_is_low else []
    line = {"mode": "lines", "line": {"shape": "hv", "dash": "dash", "color": GREY, "width": 1}, **_at(front)}
    data = [{**line, "hoverinfo": "skip", "showlegend": False}]
    for i, mark in enumerate(marks):
        colour = COLOURS[i % len(COLOURS)] if mark.name else GREY
        dot = {"size": 10, "color": colour, "symbol": SYMBOLS[i // len(COLOURS) % len(SYMBOLS)]}
        shown = {"name": _text(mark.name), "showlegend": bool(mark.name), "mode": "markers", "marker": dot}
        told = {"error_y": _interval([mark], colour, 0), "hovertemplate": f"%{{y:.1%}}, {title} %{{x:.4g}}"}
        data.append(_at([mark]) | shown | told)
    axis = {"title": {"text": title}, "type": "log" if log and min(mark.x for mark in marks) > 0 else "linear"}
    told_at = "; ".join(f"{mark.name} {mark.share:.1%} at {mark.x:.4g}" for mark in marks)
    layout = {"xaxis": axis, "yaxis": _shares(marks), "height": 400}
    return _figure(data, layout, f"accuracy against {title}: {told_at}")


def curves(lines: Sequence[Curve], title: str, are_shares: bool = True) -> Figure:
    """Draw a line with its band for each curve; a ring marks where it was trained."""
    data: list[dict[str, Any]] = []
    every = [mark for line in lines for mark in line.marks]
    form = ".1%" if are_shares else ".4g"
    for i, line in enumerate(lines):
        colour, x = COLOURS[i % len(COLOURS)], [mark.x for mark in line.marks]
        own = {"legendgroup": str(i), "showlegend": False, "name": _text(line.name)}
        edges = [mark.high for mark in line.marks] + [mark.low for mark in reversed(line.marks)]
        band = {"x": x + x[::-1], "y": edges, "fill": "toself", "fillcolor": colour, "opacity": 0.16, "mode": "none"}
        stroke = {"color": colour, "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
        told = {"hovertemplate": f"%{{y:{form}}}, {title} %{{x:.4g}}"}
        ring = {"size": 15, "symbol": "circle-open", "color": colour, "line": {"width": 2}}
        trained = _at([mark for mark in line.marks if mark.x == line.trained])
        data += [
            {**own, **band, "hoverinfo": "skip"},
            {**own, **_at(line.marks), **told, "mode": "lines+markers", "line": stroke, "showlegend": True},
            {**own, **trained, "mode": "markers", "marker": ring, "hovertemplate": "trained here"},
        ]
    axis: dict[str, Any] = {"title": {"text": title}}
    if all(float(mark.x).is_integer() for mark in every):
        axis |= {"tickformat": "d", "dtick": 1 if len({mark.x for mark in every}) < 16 else None}
    height = _shares(every) if are_shares else {"rangemode": "tozero"}
    told_at = (", ".join(f"{mark.share:{form}} at {mark.x:.4g}" for mark in line.marks) for line in lines)
    label = "; ".join(f"{line.name}: {told}" for line, told in zip(lines, told_at))
    return _figure(data, {"xaxis": axis, "yaxis": height, "height": 400}, f"against {title}: {label}")


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], row_title: str, column_title: str
) -> Figure:
    """Draw cells whose colour is their share; in each the share and its note, the best one framed."""
    placed = [(i, j, cell) for i, line in enumerate(cells) for j, cell in enumerate(line)]
    shares = {"z": [[cell.share for cell in line] for line in cells], "xgap": 2, "ygap": 2, "showscale": False}
    look = {"colorscale": [[0, "var(--low)"], [1, "var(--high)"]], "hoverinfo": "none", "texttemplate": "%{text}"}
    text = [["" if c.share is None else f"<b>{100 * c.share:.1f}</b><br>{c.note}" for c in line] for line in cells]
    frame = {"type": "rect", "line": {"color": COLOURS[1], "width": 3}}
    best = [{"x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5} for i, j, cell in placed if cell.is_best]
    gaps = [{"x": j, "y": i, "text": _text(cell.note)} for i, j, cell in placed if cell.share is None]
    x, y = (
        {"tickvals": list(range(len(names))), "ticktext": list(map(_text, names)), "title": {"text": title}}
        for names, title in ((columns, column_title), (rows, row_title))
    )
    layout = {
        "xaxis": {**x, "showgrid": False},
        "yaxis": {**y, "showgrid": False, "autorange": "reversed"},
        "shapes": [frame | box for box in best],
        "annotations": [gap | {"showarrow": False} for gap in gaps],
        "height": 50 * len(rows) + 90,
    }
    told = [
        f"{row_title} {rows[i]}, {column_title} {columns[j]}: "
        + (cell.note if cell.share is None else f"{cell.share:.1%} {cell.note}")
        for i, j, cell in placed
    ]
    return _figure([{"type": "heatmap", "text": text, **shares, **look}], layout, "; ".join(told))


def pareto(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that no other beats: none is as good at less, in order of what they need."""
    front: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, -m.share)):
        if not front or mark.share > front[-1].share:
            front.append(mark)
    return front


def _figure(data: list[dict[str, Any]], layout: dict[str, Any], label: str) -> Figure:
    return {"data": data, "layout": layout, "label": label}


def _at(marks: Sequence[Mark]) -> dict[str, Any]:
    return {"x": [mark.x for mark in marks], "y": [mark.share for mark in marks]}


def _interval(marks: Sequence[Mark], colour: str, cap: int) -> dict[str, Any]:
    high, low = [mark.high - mark.share for mark in marks], [mark.share - mark.low for mark in marks]
    return {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "color": colour, "width": cap}


def _shares(marks: Sequence[Mark]) -> dict[str, Any]:
    """Return an axis of shares, which begins at 0 unless all are above a half."""
    low = min(mark.low for mark in marks)
    return {"range": [int(low * 10) / 10 if low > 0.5 else 0.0, 1.04], "tickformat": ".0%"}


def _text(name: str) -> str:
    """Return text as plotly shows it, which takes some tags for markup; what is long is cut."""
    return html.escape(name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 1] + "…")

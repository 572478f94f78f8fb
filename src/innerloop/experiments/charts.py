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
GREY = COLOURS[7]
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
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": [mark.share for mark in marks],
        "y": list(range(len(marks))),
        "error_x": _interval(marks, "var(--ink)", 2),
        "marker": {"color": COLOURS[0]},
        **_hover([_told(mark) for mark in marks]),
    }
    names = {"tickvals": bar["y"], "ticktext": [_text(mark.name) for mark in marks], "autorange": "reversed"}
    axes = {"xaxis": {"range": [0, 1.005], "tickformat": ".0%"}, "yaxis": {**names, "showgrid": False}}
    label = "; ".join(f"{mark.name} {mark.share:.1%}" for mark in marks)
    return _figure([bar], {**axes, "bargap": 0.35, "height": 30 * len(marks) + 50}, label)


def scatter(marks: Sequence[Mark], title: str, log: bool = False, best_is_low: bool = True) -> Figure:
    """Draw shares against ``x`` with intervals; where less is better, the Pareto front. Nameless marks are grey."""
    front = pareto(marks) if best_is_low else []
    line = {"mode": "lines", "line": {"shape": "hv", "dash": "dash", "color": GREY, "width": 1}, **_at(front)}
    data = [{**line, "hoverinfo": "skip", "showlegend": False}]
    for i, mark in enumerate(marks):
        colour = COLOURS[i % len(COLOURS)] if mark.name else GREY
        dot = {"size": 10, "color": colour, "symbol": SYMBOLS[i // len(COLOURS) % len(SYMBOLS)]}
        shown = {"name": _text(mark.name), "showlegend": bool(mark.name), "mode": "markers", "marker": dot}
        told = _hover([f"{_told(mark)}, {title} {_number(mark.x)}"])
        data.append({**_at([mark]), **shown, "error_y": _interval([mark], colour, 0), **told})
    axis = {"title": {"text": title}, "type": "log" if log and min(mark.x for mark in marks) > 0 else "linear"}
    label = f"accuracy against {title}: " + "; ".join(f"{m.name} {m.share:.1%} at {_number(m.x)}" for m in marks)
    return _figure(data, {"xaxis": axis, "yaxis": _shares(marks), "height": 400}, label)


def curves(lines: Sequence[Curve], title: str, are_shares: bool = True) -> Figure:
    """Draw a line with its band for each curve; a ring marks where it was trained."""
    data: list[dict[str, Any]] = []
    every = [mark for line in lines for mark in line.marks]
    for i, line in enumerate(lines):
        colour, own = COLOURS[i % len(COLOURS)], {"legendgroup": str(i), "showlegend": False}
        x = [mark.x for mark in line.marks]
        edges = [mark.high for mark in line.marks] + [mark.low for mark in reversed(line.marks)]
        band = {"x": x + x[::-1], "y": edges, "fill": "toself", "fillcolor": colour, "opacity": 0.16, "mode": "none"}
        stroke = {"color": colour, "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
        drawn = {"mode": "lines+markers", "name": _text(line.name), "line": stroke}
        told = _hover([f"{_told(mark, are_shares, line.name)}, {title} {_number(mark.x)}" for mark in line.marks])
        ring = {"size": 15, "symbol": "circle-open", "color": colour, "line": {"width": 2}}
        trained = _at([mark for mark in line.marks if mark.x == line.trained])
        data += [
            {**own, **band, "hoverinfo": "skip"},
            {**own, **_at(line.marks), **drawn, **told, "showlegend": True},
            {**own, **trained, "mode": "markers", "marker": ring, **_hover(["trained here"])},
        ]
    axis: dict[str, Any] = {"title": {"text": title}}
    if all(float(mark.x).is_integer() for mark in every):
        axis |= {"tickformat": "d", "dtick": 1 if len({mark.x for mark in every}) < 16 else None}
    height = _shares(every) if are_shares else {"rangemode": "tozero"}
    marked = (", ".join(f"{_told(m, are_shares, '')} at {_number(m.x)}" for m in line.marks) for line in lines)
    label = "; ".join(f"{line.name}: {told}" for line, told in zip(lines, marked))
    return _figure(data, {"xaxis": axis, "yaxis": height, "height": 400}, f"against {title}: {label}")


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], row_title: str, column_title: str
) -> Figure:
    """Draw cells whose colour is their share; in each the share and its note, the best one framed."""
    placed = [(i, j, cell) for i, line in enumerate(cells) for j, cell in enumerate(line)]
    map_ = {
        "type": "heatmap",
        "z": [[cell.share for cell in line] for line in cells],
        "text": [
            ["" if c.share is None else f"<b>{100 * c.share:.1f}</b><br>{c.note}" for c in line] for line in cells
        ],
        "texttemplate": "%{text}",
        "hoverinfo": "none",
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "colorscale": [[0, "var(--low)"], [1, "var(--high)"]],
    }
    frame = {"type": "rect", "line": {"color": COLOURS[1], "width": 3}}
    frames = [
        {**frame, "x0": j - 0.5, "x1": j + 0.5, "y0": i - 0.5, "y1": i + 0.5} for i, j, cell in placed if cell.is_best
    ]
    gaps = [
        {"x": j, "y": i, "text": _text(cell.note), "showarrow": False} for i, j, cell in placed if cell.share is None
    ]
    x, y = (
        {"tickvals": list(range(len(names))), "ticktext": list(map(_text, names)), "title": {"text": title}}
        for names, title in ((columns, column_title), (rows, row_title))
    )
    told = [
        f"{row_title} {rows[i]}, {column_title} {columns[j]}: "
        + (cell.note if cell.share is None else f"{cell.share:.1%} {cell.note}")
        for i, j, cell in placed
    ]
    axes = {"xaxis": {**x, "showgrid": False}, "yaxis": {**y, "autorange": "reversed", "showgrid": False}}
    return _figure(
        [map_], {**axes, "shapes": frames, "annotations": gaps, "height": 50 * len(rows) + 90}, "; ".join(told)
    )


def pareto(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that no other beats: none is as good at less, in order of what they need."""
    front: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, -m.share)):
        if not front or mark.share > front[-1].share:
            front.append(mark)
    return front


def _at(marks: Sequence[Mark]) -> dict[str, Any]:
    return {"x": [mark.x for mark in marks], "y": [mark.share for mark in marks]}


def _figure(data: list[dict[str, Any]], layout: dict[str, Any], label: str) -> Figure:
    return {"data": data, "layout": layout, "label": label}


def _interval(marks: Sequence[Mark], colour: str, cap: int) -> dict[str, Any]:
    high, low = [mark.high - mark.share for mark in marks], [mark.share - mark.low for mark in marks]
    return {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "color": colour, "width": 2 * cap}


def _hover(told: Sequence[str]) -> dict[str, Any]:
    return {"hovertext": [_text(one, 200) for one in told], "hoverinfo": "text", "hovertemplate": None}


def _shares(marks: Sequence[Mark]) -> dict[str, Any]:
    """Return an axis of shares, which begins at 0 unless all are above a half."""
    low = min(mark.low for mark in marks)
    return {"range": [int(low * 10) / 10 if low > 0.5 else 0.0, 1.04], "tickformat": ".0%"}


def _told(mark: Mark, is_share: bool = True, name: str | None = None) -> str:
    value, low, high = (f"{x:.1%}" if is_share else _number(x) for x in (mark.share, mark.low, mark.high))
    name = mark.name if name is None else name
    return f"{name}: {value} ({low} to {high})" if name else f"{value} ({low} to {high})"


def _text(name: str, most: int = 34) -> str:
    """Return text as plotly shows it, which takes some tags for markup; what is long is cut."""
    return html.escape(name if len(name) <= most else name[: most - 1] + "…")


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.3g}"

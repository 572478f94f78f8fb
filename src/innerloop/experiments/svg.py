"""Pictures of shares as SVG: bars, points with a Pareto front, curves with bands, heat maps. Numbers in, text out.

The same numbers give the same bytes. Colours are classes of the page's style (`page.py`), so that pictures follow
light and dark; every mark has a title that a pointer or a screen reader finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from innerloop.experiments.html import COLOURS, escape

FONT = 13
LETTER = 0.56 * FONT  # the width of a letter, nearly
End = tuple[float, tuple[float, float], int, str]  # of a curve: its name's height, its last point, its number, its name
SAME_PLACE = 7.0  # marks closer than this, in pixels, share one label


@dataclass(frozen=True)
class Mark:
    """A share with its interval, and where it stands on the other axis."""

    name: str
    share: float
    low: float
    high: float
    x: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Shares along an axis, in its order."""

    name: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: None where nothing was measured, with ``note`` telling why."""

    share: float | None
    note: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Scale:
    """An axis: values from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1.0)

    def ticks(self) -> list[float]:
        """Return round values on the axis, about five of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 2, 5), range(1, 10)):  # the first that gives enough
                values = [step * 10.0**decade for decade in decades for step in steps]
                if sum(self.low <= value <= self.high for value in values) > 3:
                    break
        else:
            rough = (self.high - self.low) / 6 or 1.0
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            values = [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def bars(marks: Sequence[Mark]) -> str:
    """Draw a bar for each mark with its interval."""
    left, width, step = _label_room(marks), 560.0, 30
    height = step * len(marks) + 28
    x = Scale(0.0, 1.0, left, left + width)
    shapes = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        shapes.append(_line("grid", x(tick), 0, x(tick), height - 24))
        shapes.append(_text(x(tick), height - 7, f"{tick:.0%}", "middle", "soft"))
    for i, mark in enumerate(marks):
        y = i * step + 4
        shapes.append(_text(left - 8, y + 15, _short(mark.name), "end"))
        width_px = x(mark.share) - left
        shapes.append(
            f"<g>{_title(mark)}<rect class=f0 x={left:.1f} y={y} width={width_px:.1f} height=20 />"
            + _line("whisker", x(mark.low), y + 10, x(mark.high), y + 10)
            + "".join(_line("whisker", x(end), y + 5, x(end), y + 15) for end in (mark.low, mark.high))
            + "</g>"
        )
    return _svg(left + width + 24, height, shapes, "; ".join(f"{m.name} {m.share:.1%}" for m in marks))


def scatter(marks: Sequence[Mark], title: str, log: bool = False, best_is_low: bool = True) -> str:
    """Draw shares against ``x`` with intervals, names and, where less is better, the Pareto front."""
    width, height = 520.0, 380.0
    y = Scale(*_share_range(marks), height - 44, 14)
    values = [mark.x for mark in marks]
    log = log and min(values) > 0
    low, high = min(values), max(values)
    low, high = (low / 1.25, high * 1.25) if log else (max(low - 0.08 * (high - low), 0), high + 0.12 * (high - low))
    if low == high:
        low, high = low - 1, high + 1
    x = Scale(low, high, 54, width - 14, log)
    shapes = [*_axes(x, y, width, height, title)]
    front = pareto(marks) if best_is_low else []
    if len(front) > 1:
        steps = [f"M{x(front[0].x):.1f} {y(front[0].share):.1f}"]
        steps += [f"H{x(mark.x):.1f}V{y(mark.share):.1f}" for mark in front[1:]]
        shapes.append(f"<path class=front d='{''.join(steps)}' />")
    placed = [(x(mark.x), y(mark.share)) for mark in marks]
    best = {(mark.x, mark.share) for mark in front}
    for mark, (px, py) in sorted(zip(marks, placed), key=lambda pair: (pair[0].x, pair[0].share) in best):  # on top
        colour = "f0" if not best_is_low or (mark.x, mark.share) in best else "f7"
        shapes.append(
            f"<g>{_title(mark, f'{title} {_number(mark.x)}')}"
            f"{_line('spread', px, y(mark.low), px, y(mark.high), ' stroke-width=2')}"
            f"<circle class={colour} cx={px:.1f} cy={py:.1f} r=5 /></g>"
        )
    shapes += _labels([mark.name for mark in marks], placed, width - 4, height - 44)
    label = f"accuracy against {title}: " + "; ".join(f"{m.name} {m.share:.1%} at {_number(m.x)}" for m in marks)
    return _svg(width, height, shapes, label)


def curves(lines: Sequence[Curve], title: str, trained: Sequence[float | None] = (), are_shares: bool = True) -> str:
    """Draw a line with its band for each curve, the names at the right; a ring marks where it was trained."""
    right = 14 + max(len(_short(line.name)) for line in lines) * LETTER
    width, height = 560 + right, 380.0
    every = [mark for line in lines for mark in line.marks]
    span = _share_range(every) if are_shares else (0.0, max(m.high for m in every) * 1.05 or 1.0)
    y = Scale(*span, height - 44, 14)
    x = Scale(min(m.x for m in every), max(m.x for m in every), 54, 546)
    are_whole = all(float(m.x).is_integer() for m in every)
    ticks = [tick for tick in x.ticks() if float(tick).is_integer()] if are_whole else []
    shapes = [*_axes(x, y, 556, height, title, are_shares, ticks)]
    ends = []

    def told(mark: Mark) -> str:
        numbers = (mark.share, mark.low, mark.high)
        value, low, high = (f"{number:.1%}" if are_shares else _number(number) for number in numbers)
        return f"{value} ({low} to {high})"

    for i, line in enumerate(lines):
        colour = i % len(COLOURS)
        points = [(x(m.x), y(m.share)) for m in line.marks]
        band = [(x(m.x), y(m.high)) for m in line.marks] + [(x(m.x), y(m.low)) for m in reversed(line.marks)]
        dashes = ("", " stroke-dasharray='7 4'", " stroke-dasharray='2 4'")[i // len(COLOURS) % 3]
        shapes.append(f"<polygon class='band f{colour}' points='{_points(band)}' />")
        shapes.append(f"<polyline class='line s{colour}'{dashes} points='{_points(points)}' />")
        shapes += [
            f"<circle class=f{colour} cx={px:.1f} cy={py:.1f} r=3>"
            f"<title>{escape(f'{line.name}: {told(m)}, {title} {_number(m.x)}')}</title>"
            "</circle>"
            for m, (px, py) in zip(line.marks, points)
        ]
        at = trained[i] if i < len(trained) else None
        shapes += [
            f"<circle class='line s{colour}' cx={px:.1f} cy={py:.1f} r=7><title>{escape(line.name)}: trained here"
            "</title></circle>"
            for m, (px, py) in zip(line.marks, points)
            if m.x == at
        ]
        ends.append((points[-1][1], points[-1], i, _short(line.name)))
    for at, (px, py), i, name in _apart(ends, 15, 14, height - 44):
        shapes.append(_line("leader", px, py, 556, at))
        shapes.append(f"<text class=f{i % len(COLOURS)} x=560 y={at + 4:.1f} style='fill:var(--c{i % len(COLOURS)})'>")
        shapes.append(f"{escape(name)}</text>")
    label = "; ".join(
        f"{line.name}: " + ", ".join(f"{told(m)} at {_number(m.x)}" for m in line.marks) for line in lines
    )
    return _svg(width, height, shapes, f"against {title}: {label}")


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], row_title: str, column_title: str
) -> str:
    """Draw cells whose colour is their share; in each the share and its note, the best one framed."""
    left = max([len(name) for name in rows] + [4]) * LETTER + 34
    notes = [len(cell.note) for line in cells for cell in line] + [len(name) for name in columns]
    side, tall = max(max(notes) * 0.88 * LETTER + 14, 64.0), 46
    width, height = left + side * len(columns) + 8, tall * len(rows) + 50
    known = [cell.share for line in cells for cell in line if cell.share is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    shapes = [
        _text(left + side * len(columns) / 2, height - 8, column_title, "middle", "soft"),
        f"<text class=soft text-anchor=middle transform='translate(12 {tall * len(rows) / 2:.1f}) rotate(-90)'>"
        f"{escape(row_title)}</text>",
    ]
    for j, name in enumerate(columns):
        shapes.append(_text(left + side * (j + 0.5), tall * len(rows) + 20, name, "middle"))
    for i, name in enumerate(rows):
        shapes.append(_text(left - 8, tall * (i + 0.5) + 4, name, "end"))
        for j, cell in enumerate(cells[i]):
            px, py, middle = left + side * j + 1, tall * i + 1, left + side * (j + 0.5)
            where = ", ".join(part for part in (f"{row_title} {name}", f"{column_title} {columns[j]}") if part.strip())
            box = f"x={px:.1f} y={py} width={side - 2:.1f} height={tall - 2}"
            if cell.share is None:
                shapes.append(f"<g><title>{escape(f'{where}: {cell.note}')}</title><rect class=gap {box} />")
                shapes.append(_text(middle, py + 27, cell.note, "middle", "soft") + "</g>")
                continue
            strength = (cell.share - low) / (high - low) if high > low else 0.5
            fill = f"fill:color-mix(in oklab, var(--high) {100 * strength:.0f}%, var(--low))"
            ink = f"fill:{'var(--paper)' if strength > 0.55 else 'var(--ink)'}"
            shapes.append(
                f"<g><title>{escape(f'{where}: {cell.share:.1%} {cell.note}')}</title><rect {box} style='{fill}' />"
                + (f"<rect class=best {box} />" if cell.is_best else "")
                + f"<text class=cell x={middle:.1f} y={py + 20} text-anchor=middle style='{ink};font-weight:600'>"
                f"{100 * cell.share:.1f}</text><text class=cell x={middle:.1f} y={py + 36} text-anchor=middle "
                f"style='{ink};font-size:11px'>{escape(cell.note)}</text></g>"
            )
    label = f"accuracy by {row_title} and {column_title}".replace("by  and", "by")
    return _svg(width, height, shapes, label)


def pareto(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that no other beats: none is as good at less, in order of what they need."""
    front: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, -m.share)):
        if not front or mark.share > front[-1].share:
            front.append(mark)
    return front


def _share_range(marks: Sequence[Mark]) -> tuple[float, float]:
    """Return where an axis of shares begins and ends: at 0 unless all are above a half."""
    low = min(mark.low for mark in marks)
    return (math.floor(low * 10) / 10 if low > 0.5 else 0.0), 1.0


def _axes(
    x: Scale,
    y: Scale,
    width: float,
    height: float,
    title: str,
    are_shares: bool = True,
    ticks: Sequence[float] = (),
) -> list[str]:
    shapes = []
    for tick in y.ticks():
        shapes.append(_line("grid", x.start, y(tick), width - 10, y(tick)))
        shapes.append(_text(x.start - 7, y(tick) + 4, f"{tick:.0%}" if are_shares else _number(tick), "end", "soft"))
    for tick in ticks or x.ticks():
        shapes.append(_line("grid", x(tick), y.start, x(tick), y.start + 5))
        shapes.append(_text(x(tick), y.start + 19, _number(tick), "middle", "soft"))
    shapes.append(_text((x.start + width) / 2, height - 6, title, "middle", "soft"))
    return shapes


def _labels(names: Sequence[str], at: Sequence[tuple[float, float]], width: float, height: float) -> list[str]:
    """Place names beside their marks so that none covers another; marks in one place share one label."""
    groups: list[tuple[tuple[float, float], list[str]]] = []
    for name, place in zip(names, at):
        near = next((g for g in groups if math.dist(g[0], place) < SAME_PLACE), None)
        if near is None:
            groups.append((place, [name]))
        else:
            near[1].append(name)
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in at]
    shapes = []
    for (px, py), group in groups:
        text = _short(", ".join(group), 44)
        wide = len(text) * LETTER
        spots = [(9.0, 4.0), (-9 - wide, 4.0), (-wide / 2, -10.0), (-wide / 2, 20.0)]
        for step in range(1, 12):
            for dy in (-16.0 * step, 16.0 * step):
                spots += [(14.0, dy + 4), (-14 - wide, dy + 4)]
        boxes = [(px + dx, py + dy - 11, px + dx + wide, py + dy + 3) for dx, dy in spots]
        inside = [b for b in boxes if b[0] >= 50 and b[2] <= width and b[1] >= 0 and b[3] <= height]
        free = [b for b in inside if not any(_overlap(b, other) for other in taken)]
        box = (free or inside or boxes)[0]
        taken.append(box)
        if abs(box[1] + 7 - py) > 18:
            side = box[0] if box[0] > px else box[2]
            shapes.append(_line("leader", px, py, side, box[1] + 7))
        shapes.append(_text(box[0], box[3] - 3, text, "start"))
    return shapes


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _apart(ends: Sequence[End], gap: float, top: float, bottom: float) -> list[End]:
    """Move the first numbers, the heights of names, so that they lie at least ``gap`` apart."""
    moved: list[End] = []
    for at, was, i, name in sorted(ends):
        moved.append((max(at, moved[-1][0] + gap) if moved else max(at, top), was, i, name))
    shift = max(moved[-1][0] - bottom, 0.0) if moved else 0.0
    return [(at - shift, was, i, name) for at, was, i, name in moved]


def _label_room(marks: Sequence[Mark]) -> float:
    return max(len(_short(mark.name)) for mark in marks) * LETTER + 14


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.3g}"


def _title(mark: Mark, where: str = "") -> str:
    place = f", {where}" if where else ""
    text = f"{mark.name}: {mark.share:.1%} ({mark.low:.1%} to {mark.high:.1%}){place}"
    return f"<title>{escape(text)}</title>"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, more: str = "") -> str:
    return f"<line class={kind} x1={x1:.1f} y1={y1:.1f} x2={x2:.1f} y2={y2:.1f}{more} />"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = f" class={kind}" if kind else ""
    return f"<text{style} x={x:.1f} y={y:.1f} text-anchor={anchor}>{escape(text)}</text>"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)


def _svg(width: float, height: float, shapes: Sequence[str], label: str) -> str:
    size = f"viewBox='0 0 {width:.0f} {height:.0f}' style='max-width:{1.1 * width:.0f}px'"
    return f"<svg {size} role=img aria-label='{escape(label)}'>{''.join(shapes)}</svg>"

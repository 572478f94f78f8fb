"""report.html: results as one self-contained page that opens from disk, without scripts or network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --bar: #3b6fb6; --ink: #1c2430; --rule: #d5dae2; --soft: #5b6675; --paper: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --bar: #7fa9e6; --ink: #e6eaf0; --rule: #39424f; --soft: #9aa6b5; --paper: #14181f; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
caption, .note { color: var(--soft); text-align: left; padding: .4rem 0; }
pre { overflow-x: auto; font-size: .85rem; }
svg text { fill: var(--ink); font: 14px system-ui, sans-serif; }
svg .bar { fill: var(--bar); } svg .whisker { stroke: var(--ink); stroke-width: 2; } svg .grid { stroke: var(--rule); }
"""
COLUMNS = ("method", "accuracy", "95 % interval", "passes", "positions", "thought tokens", "GFLOPs", "ms")


def write_report(path: Path, title: str, results: Sequence[dict[str, Any]]) -> None:
    """Write results (each as in result.json) as a page: table, picture, settings."""
    first = results[0]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=note>{first['n']} examples of {html.escape(first['task']['name'])}/{first['split']}, seed "
        f"{first['seed']}, {html.escape(first['device'])}, "
        f"{html.escape(', '.join(f'{k} {v}' for k, v in first['versions'].items()))}.</p>",
        _table(results),
        "<h2>Accuracy</h2>",
        _bars(results),
        "<h2>Settings</h2>",
        *(
            f"<details><summary>{html.escape(r['method']['name'])}</summary>"
            f"<pre>{html.escape(json.dumps({'task': r['task'], 'method': r['method']}, indent=2))}</pre></details>"
            for r in results
        ),
    ]
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _table(results: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th scope=col>{column}</th>" for column in COLUMNS)
    rows = []
    for r in results:
        cost, (low, high) = r["cost"], r["ci95"]
        cells = [
            html.escape(r["method"]["name"]),
            f"{r['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{cost['passes']:.1f}",
            f"{cost['positions']:.1f}",
            f"{cost['thought_tokens']:.1f}",
            f"{cost['flops'] / 1e9:.3g}",
            f"{1000 * sum(cost['seconds'].values()):.2f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    caption = "Cost is per example; time is measured in batches of like length."
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _bars(results: Sequence[dict[str, Any]]) -> str:
    """Draw one bar per method with its interval, as SVG."""
    left, width, step = 110, 560, 34
    height = step * len(results) + 30
    shapes = []
    for percent in (0, 25, 50, 75, 100):
        x = left + width * percent / 100
        shapes.append(f"<line class=grid x1={x} x2={x} y1=0 y2={height - 24} />")
        shapes.append(f"<text x={x} y={height - 6} text-anchor=middle>{percent} %</text>")
    for i, r in enumerate(results):
        y, (low, high) = i * step + 6, r["ci95"]
        name = html.escape(r["method"]["name"])
        shapes.append(f"<text x={left - 8} y={y + 15} text-anchor=end>{name}</text>")
        shapes.append(f"<rect class=bar x={left} y={y} width={width * r['accuracy']:.1f} height=20 />")
        ends = f"x1={left + width * low:.1f} x2={left + width * high:.1f}"
        shapes.append(f"<line class=whisker {ends} y1={y + 10} y2={y + 10} />")
    label = "; ".join(f"{r['method']['name']} {r['accuracy']:.1%}" for r in results)
    view = f"viewBox='0 0 {left + width + 30} {height}' role=img aria-label='{html.escape(label)}'"
    return f"<svg {view}>{''.join(shapes)}</svg>"

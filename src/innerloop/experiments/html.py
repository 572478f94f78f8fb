"""The frame of a page that opens from disk: one file, no scripts, no network, light and dark, printable."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

COLOURS = ("#2f66b3", "#c4501b", "#2a8a57", "#8a4fb0", "#a8791a", "#b03a6b", "#1f8a96", "#5d6570")
DARK_COLOURS = ("#83aef0", "#f0935f", "#6ccb97", "#c79bea", "#e0b95c", "#ee86b0", "#63cbd6", "#b3bcc8")
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --rule: #d5dae2; --soft: #5b6675; --paper: #fff; --tint: #f4f6f9;
  --low: #eef3fa; --high: #14498f; %s }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --rule: #39424f; --soft: #9aa6b5; --paper: #14181f; --tint: #1c222b;
    --low: #1f2b3d; --high: #8fbaf5; %s }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
       margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .4rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } thead th { white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 400; } tr.baseline { background: var(--tint); }
caption, figcaption, .note { color: var(--soft); text-align: left; padding: .4rem 0; font-size: .92rem; }
caption { caption-side: bottom; }
ul.verdicts { padding-left: 1.1rem; } ul.verdicts li { margin: .25rem 0; }
figure { margin: .6rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
pre { overflow-x: auto; font-size: .85rem; background: var(--tint); padding: .7rem; }
details { border-bottom: 1px solid var(--rule); padding: .3rem 0; } summary { cursor: pointer; }
.failed { border-left: 4px solid var(--c1); padding: .1rem 1rem; background: var(--tint); }
svg { width: 100%%; height: auto; display: block; margin: 0 auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; stroke-linejoin: round; } svg text.cell { stroke: none; } svg text.soft { fill: var(--soft); }
svg .grid { stroke: var(--rule); } svg .spread { stroke: var(--soft); opacity: .45; }
svg .whisker { stroke: var(--ink); stroke-width: 2; }
svg .front { stroke: var(--soft); stroke-dasharray: 5 4; fill: none; } svg .leader { stroke: var(--soft); }
svg .band { opacity: .16; stroke: none; } svg .line { fill: none; stroke-width: 2; } svg .halo { stroke: var(--paper); }
svg .best { fill: none; stroke: var(--c1); stroke-width: 3; } svg .gap { fill: var(--tint); stroke: var(--rule); }
%s
@media print { body { margin: 0; max-width: none; } h2, figure, table { break-inside: avoid; } }
"""


def _style() -> str:
    variables = [
        " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours)) for colours in (COLOURS, DARK_COLOURS)
    ]
    classes = "".join(
        f"svg .f{i} {{ fill: var(--c{i}); }} svg .s{i} {{ stroke: var(--c{i}); }}\n" for i in range(len(COLOURS))
    )
    return STYLE % (*variables, classes)


def escape(text: object) -> str:
    """Return text as it may stand in HTML, in attributes too."""
    return html.escape(str(text), quote=True)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole page."""
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_style()}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", marked: Sequence[int] = ()) -> str:
    """Return a table; the first cell of a row names it, rows in ``marked`` are tinted. Cells are text, not HTML."""
    columns = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = []
    for number, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        tint = " class=baseline" if number in marked else ""
        body.append(f"<tr{tint}><th scope=row>{escape(first)}</th>{cells}</tr>")
    note = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<div class=wide><table>{note}<thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def figure(svg: str, caption: str) -> str:
    """Return a picture with what it shows."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def paragraph(text: str) -> str:
    """Return a soft line of text."""
    return f"<p class=note>{escape(text)}</p>"


def settings(title: str, value: Any) -> str:
    """Return settings that open on a click, as JSON."""
    shown = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(shown)}</pre></details>"

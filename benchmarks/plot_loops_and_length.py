"""Draw accuracy against loops and length as heat maps, one for each variant; a cell is the mean over seeds.

python benchmarks/plot_loops_and_length.py benchmarks/results/loops_and_length.json docs/evidence/loops_and_length.svg
"""

import json
import sys
from pathlib import Path

LEFT, TOP, CELL, HIGH, GAP = 70, 60, 44, 28, 70
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1c2430; } .in { font-size: 12px; }
.edge { fill: none; stroke: #c2453d; stroke-width: 2; }
@media (prefers-color-scheme: dark) { text.out { fill: #e6eaf0; } }
</style>"""


def main() -> None:
    results, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    names = list(dict.fromkeys(point["variant"] for point in results["points"]))
    maps = [cells(results, name) for name in names]
    width = max(len(one) for one in maps) * CELL
    height = max(len(rows) for one in maps for rows in one.values()) * HIGH
    parts = [heat_map(i, name, one, width, results["trained"]) for i, (name, one) in enumerate(zip(names, maps))]
    size = f"{LEFT + len(maps) * (width + GAP)} {TOP + height + 60}"
    body = "\n".join(parts)
    target.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" '
        f'aria-label="Accuracy against loops and length of the question">\n{STYLE}\n{body}\n</svg>\n'
    )


def cells(results: dict, name: str) -> dict[str, dict[str, float]]:
    """Return the mean accuracy over seeds, by loops and then by length."""
    own = [point["loops"] for point in results["points"] if point["variant"] == name]
    return {t: {n: sum(one[t][n] for one in own) / len(own) for n in own[0][t]} for t in own[0]}


def heat_map(index: int, name: str, accuracy: dict[str, dict[str, float]], width: int, trained: int) -> str:
    """Return one map: loops from left to right, lengths upwards; what was trained on is framed."""
    x0, loops = LEFT + index * (width + GAP), list(accuracy)
    lengths = list(next(iter(accuracy.values())))
    bottom = TOP + len(lengths) * HIGH
    shapes = [f'<text class="out" x="{x0}" y="{TOP - 30}">{name}: accuracy, %</text>']
    for i, t in enumerate(loops):
        x = x0 + i * CELL
        shapes.append(f'<text class="out" x="{x + CELL / 2}" y="{bottom + 20}" text-anchor="middle">{t}</text>')
        for j, n in enumerate(lengths):
            y, share = bottom - (j + 1) * HIGH, accuracy[t][n]
            light = 96 - 56 * share
            ink = "#ffffff" if light < 62 else "#1c2430"
            shapes.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{HIGH}" fill="hsl(212 60% {light:.0f}%)"/>')
            shapes.append(
                f'<text class="in" x="{x + CELL / 2}" y="{y + 18}" text-anchor="middle" style="fill:{ink}">'
                f"{100 * share:.0f}</text>"
            )
    for j, n in enumerate(lengths):
        y = bottom - j * HIGH - 9
        shapes.append(f'<text class="out" x="{x0 - 8}" y="{y}" text-anchor="end">{n}</text>')
    high = sum(int(n) <= trained for n in lengths) * HIGH
    shapes.append(f'<rect class="edge" x="{x0}" y="{bottom - high}" width="{len(loops) * CELL}" height="{high}"/>')
    shapes.append(
        f'<text class="out" x="{x0}" y="{bottom + 42}">loops; lengths from bottom to top, framed: trained</text>'
    )
    return "\n".join(shapes)


if __name__ == "__main__":
    main()

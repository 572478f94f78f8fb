"""Draw accuracy and change of the state against loops from the results of a suite; seeds as thin lines where they fit.

python benchmarks/plot_stability.py benchmarks/results/slr_stability.json docs/slr_stability.svg
python benchmarks/plot_stability.py benchmarks/results/stability.json docs/evidence/stability.svg 0.8   # axis from 80 %
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

LEFT, TOP, WIDTH, HEIGHT, GAP = 60, 40, 380, 260, 90
WITH_SEEDS = 4  # variants at most
COLOURS = ("#7a7a7a", "#d08a2e", "#2e8f5b", "#3b6fb6", "#8e4fb0", "#c2453d", "#2aa5a5", "#b04f7a")
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1c2430; } .grid { stroke: #d5dae2; }
.line { fill: none; stroke-width: 2.2; }
@media (prefers-color-scheme: dark) { text { fill: #e6eaf0; } .grid { stroke: #39424f; } }
</style>"""


def main() -> None:
    source, target, low = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    results = json.loads(source.read_text())
    names = list(dict.fromkeys(point["variant"] for point in results["points"]))
    accuracy = {name: mean_of(results, name, "accuracy") for name in names}
    change = {name: mean_of(results, name, "change") for name in names}
    trained = results["suite"]["method"]["max_loops"]
    seeds = [curve(point, "accuracy") for point in results["points"]] if len(names) <= WITH_SEEDS else []
    of = [COLOURS[names.index(point["variant"])] for point in results["points"]]
    parts = [
        panel(
            0, "accuracy against loops (mean over seeds)", accuracy, trained, low, 1.0, "{:.0%}", list(zip(of, seeds))
        ),
        panel(1, "relative change of the state, by loop", change, trained, 0.0, 1.5, "{:.1f}"),
    ]
    for i, name in enumerate(names):
        x, y = LEFT + 2 * (WIDTH + GAP) - 40, TOP + 14 + 22 * i
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{COLOURS[i]}" class="line"/>')
        parts.append(f'<text x="{x + 32}" y="{y}">{name}</text>')
    size = f"{LEFT + 2 * (WIDTH + GAP) + 110} {TOP + HEIGHT + 60}"
    label = "Accuracy and change of the state against the number of loops, for each stabiliser"
    body = "\n".join(parts)
    target.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{label}">\n'
        f"{STYLE}\n{body}\n</svg>\n"
    )


def curve(point: dict, key: str) -> dict[int, float]:
    """Return a curve of a job by loops, of which there is at least one."""
    if key == "change":
        return dict(enumerate(point["change"], 1))
    return {int(loops): at[key] for loops, at in point["loops"].items() if int(loops) > 0}


def mean_of(results: dict, name: str, key: str) -> list[tuple[int, float]]:
    """Return (loops, mean over seeds) of a curve of a variant."""
    curves = [curve(point, key) for point in results["points"] if point["variant"] == name]
    return [(loops, sum(one[loops] for one in curves) / len(curves)) for loops in curves[0]]


def panel(
    index: int, title: str, curves: dict, trained: int, low: float, high: float, form: str, thin: Sequence = ()
) -> str:
    """Return one set of axes with a line for each variant; loops are on a logarithmic scale."""
    x0 = LEFT + index * (WIDTH + GAP)
    most = max(loops for points in curves.values() for loops, _ in points)

    def at(loops: int, value: float) -> tuple[float, float]:
        share = (min(max(value, low), high) - low) / (high - low)
        return x0 + WIDTH * math.log2(loops) / math.log2(most), TOP + HEIGHT * (1 - share)

    shapes = [f'<text x="{x0}" y="{TOP - 16}">{title}</text>']
    for i in range(6):
        value = low + (high - low) * i / 5
        y = at(1, value)[1]
        shapes.append(f'<line class="grid" x1="{x0}" x2="{x0 + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{form.format(value)}</text>')
    for loops in (2**i for i in range(int(math.log2(most)) + 1)):
        x = at(loops, low)[0]
        shapes.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 20}" text-anchor="middle">{loops}</text>')
    x = at(trained, low)[0]
    shapes.append(
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}" stroke-dasharray="4 4"/>'
    )
    shapes.append(f'<text x="{x + 4:.1f}" y="{TOP + HEIGHT + 40}">loops trained for: {trained}</text>')
    for colour, one in thin:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in one.items()))
        shapes.append(f'<polyline class="line" stroke="{colour}" style="stroke-width:0.7" points="{path}"/>')
    for colour, points in zip(COLOURS, curves.values(), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        shapes.append(f'<polyline class="line" stroke="{colour}" points="{path}"/>')
    return "\n".join(shapes)


if __name__ == "__main__":
    main()

"""What twice the width and twice the depth do to the loss: a fit over the runs of the suite width_depth, and a picture.

The form is ParScale's (arXiv 2505.10475), L = E + (A / (N (k ln P + 1)))^alpha, with the factor m ln R + 1 for loops
beside that for streams. N is the same in all runs and E is taken as 0: with one size of decoder neither can be told
from A. Where alpha ends at its bound of 10, the form has become a power of P and R. Resampling seeds within each cell
gives the intervals.

    innerloop compare recipes/suites/width_depth.yaml --baseline "1 x 1"
    python benchmarks/width_depth.py runs/suites/width_depth --out benchmarks/results/width_depth_fit.json
        --picture docs/evidence/width_depth.svg
"""

import math
from itertools import product
from pathlib import Path

import numpy as np
import record
import torch
from scipy.optimize import least_squares

from innerloop.engine.latent_model import LatentModel
from innerloop.train.recipe import load_recipe

SIZES = (1, 2, 4)
N_RESAMPLED = 200
NAMES = ("k", "m", "alpha", "log_a", "rms", "loss_of_twice_the_streams", "loss_of_twice_the_loops")
LOWEST, HIGHEST = np.array([0.0, 0.0, 1e-3, -20.0]), np.array([50.0, 50.0, 10.0, 20.0])
LEFT, TOP, CELL = 80, 50, 120
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1c2430; } .line { fill: none; stroke: #c2453d; stroke-width: 1.5; }
.cost { fill: none; stroke: #1c2430; stroke-dasharray: 3 5; }
@media (prefers-color-scheme: dark) { text.out { fill: #e6eaf0; } }
</style>"""


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("suite", type=Path, help="the folder of the suite's runs")
    parser.add_argument("--picture", type=Path, help="the SVG file to draw")
    options = record.begin(parser)
    points = [
        {"streams": p, "loops": r, "seed": int(run.name), "loss": loss_of(run)}
        for p, r in product(SIZES, SIZES)
        for run in sorted((options.suite / f"{p} x {r}").glob("[0-9]*"))
    ]
    losses = {(p, r): [one["loss"] for one in points if (one["streams"], one["loops"]) == (p, r)] for p, r in cells()}
    fitted, spread = resampled(losses, options.seed)
    report = {
        "points": points,
        "fit": {name: {"value": value, "ci95": list(ci)} for name, value, ci in zip(NAMES, fitted, spread.T)},
    }
    record.write(options, "width_depth", report)
    if options.picture:
        options.picture.write_text(picture(losses, fitted))


def cells() -> list[tuple[int, int]]:
    """Return all pairs of streams and loops."""
    return list(product(SIZES, SIZES))


@torch.no_grad()
def loss_of(run: Path) -> float:
    """Return the loss of a run's answers to the test questions, per token."""
    examples = load_recipe(run / "config.yaml").task.examples("test")
    return float(LatentModel.from_pretrained(run).loss(examples).loss)


def log_loss(form: np.ndarray, streams: np.ndarray, loops: np.ndarray) -> np.ndarray:
    """Return ln L of the form at numbers of streams and loops."""
    k, m, alpha, log_a = form
    return alpha * (log_a - np.log(k * np.log(streams) + 1) - np.log(m * np.log(loops) + 1))


def fit(losses: dict[tuple[int, int], list[float]]) -> np.ndarray:
    """Fit by least squares, from several starts; return the values of NAMES (``rms``: of what is left in ln L)."""
    shapes = np.array([cell for cell, own in losses.items() for _ in own], dtype=float)
    logs = np.log([one for own in losses.values() for one in own])

    def left(form: np.ndarray) -> np.ndarray:
        return log_loss(form, shapes[:, 0], shapes[:, 1]) - logs

    starts = [np.array([k, m, alpha, 0.0]) for k, m, alpha in product((0.3, 3.0), (0.3, 3.0), (0.5, 2.0))]
    best = min((least_squares(left, start, bounds=(LOWEST, HIGHEST)) for start in starts), key=lambda one: one.cost)
    k, m, alpha, _ = best.x
    doubled = [(factor * math.log(2) + 1) ** -alpha for factor in (k, m)]
    return np.array([*best.x, math.sqrt(2 * best.cost / len(logs)), *doubled])


def resampled(losses: dict[tuple[int, int], list[float]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the fit, and the 2.5 and 97.5 percentiles of fits to seeds drawn with replacement in each cell."""
    draw = np.random.default_rng(seed)
    again = [fit({cell: list(draw.choice(own, len(own))) for cell, own in losses.items()}) for _ in range(N_RESAMPLED)]
    return fit(losses), np.percentile(again, [2.5, 97.5], axis=0)


def picture(losses: dict[tuple[int, int], list[float]], form: np.ndarray) -> str:
    """Draw measured losses as cells, the fit's lines of equal loss over them, and dashed lines of equal cost."""
    side = len(SIZES) * CELL
    means = {cell: float(np.exp(np.mean(np.log(own)))) for cell, own in losses.items()}
    low, high = math.log(min(means.values())), math.log(max(means.values()))
    parts = []
    for (p, r), loss in means.items():
        x, y = place(p, r)
        light = 45 + 50 * (math.log(loss) - low) / (high - low)
        ink = "#ffffff" if light < 62 else "#1c2430"
        corner = f'x="{x - CELL / 2}" y="{y - CELL / 2}" width="{CELL}" height="{CELL}"'
        parts.append(f'<rect {corner} fill="hsl(212 60% {light:.0f}%)"/>')
        parts.append(f'<text x="{x}" y="{y + 28}" text-anchor="middle" style="fill:{ink}">{loss:.3f}</text>')
    grid = 2.0 ** np.linspace(-0.5, 2.5, 121)
    for level in np.exp(np.linspace(low, high, 7)[1:-1]):
        # (k ln P + 1)(m ln R + 1) = A L^(-1/alpha): solved for R at each P
        k, m, alpha, log_a = form[:4]
        loops = np.exp((np.exp(log_a) * level ** (-1 / alpha) / (k * np.log(grid) + 1) - 1) / max(m, 1e-6))
        parts += lines(grid, loops, "line")
    for cost in (2, 4, 8):
        parts += lines(grid, cost / grid, "cost")
    for size in SIZES:
        x, y = place(size, size)
        parts.append(f'<text class="out" x="{x}" y="{TOP + side + 20}" text-anchor="middle">{size}</text>')
        parts.append(f'<text class="out" x="{LEFT - 10}" y="{y + 5}" text-anchor="end">{size}</text>')
    parts.append(f'<text class="out" x="{LEFT}" y="{TOP + side + 42}">streams; loops from bottom to top</text>')
    parts.append(f'<text class="out" x="{LEFT}" y="{TOP - 28}">loss of an answer, per token</text>')
    parts.append(f'<text class="out" x="{LEFT}" y="{TOP - 10}">red: equal loss, of the fit; dashed: equal cost</text>')
    size = f"{LEFT + side + 20} {TOP + side + 60}"
    body = "\n".join(parts)
    head = 'role="img" aria-label="Loss against streams and loops"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" {head}>\n{STYLE}\n{body}\n</svg>\n'


def place(streams: float, loops: float) -> tuple[float, float]:
    """Return where numbers of streams and loops lie in the picture, both on a scale of doublings."""
    side = len(SIZES) * CELL
    return LEFT + (math.log2(streams) + 0.5) * CELL, TOP + side - (math.log2(loops) + 0.5) * CELL


def lines(widths: np.ndarray, loops: np.ndarray, kind: str) -> list[str]:
    """Draw a curve where it lies inside the picture."""
    inside = [(p, r) for p, r in zip(widths, loops) if 2**-0.5 <= r <= 2**2.5]
    if len(inside) < 2:
        return []
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(p, r) for p, r in inside))
    return [f'<polyline class="{kind}" points="{path}"/>']


if __name__ == "__main__":
    main()

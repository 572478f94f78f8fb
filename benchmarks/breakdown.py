"""Where the time of answering goes: products of matrices, attention, copies, packing weights, other operators, Python.

Shares are those of one profiled run on one thread (torch.profiler; operators without what they call in turn), python is
what the profiled time has beyond them. The profiler itself slows Python down, so the run is also timed without it: both
times are in the file. On a GPU, shares are those of the device's time, and python is when it waits.

    python benchmarks/breakdown.py --out benchmarks/results/breakdown.json --svg docs/performance.svg
    python benchmarks/breakdown.py --smoke --out /tmp/breakdown.json --svg /tmp/breakdown.svg     # seconds
"""

from functools import partial
from pathlib import Path

import record
import subjects
from torch.profiler import ProfilerActivity, profile

from innerloop.bench.timing import clock_of, seconds_of, spread, take_turns
from innerloop.decoder.memory import profiling
from innerloop.methods import Coconut, Cot, Lotus, Method, Slr

METHODS: dict[str, tuple[Method, int]] = {  # and how many tokens are written
    "cot, 60 tokens": (Cot(), 68),
    "coconut, 6": (Coconut(), 8),
    "slr, 8 x 4": (Slr(n_slots=8, max_loops=4), 8),
    "lotus, 48 x 3": (Lotus(n_blocks=6, latents_per_block=8, max_loops=3), 8),
}
KINDS: dict[str, tuple[str, ...]] = {
    "packing": ("reorder",),
    "attention": ("attention", "softmax", "flash", "fmha"),
    "matmul": ("mm", "matmul", "linear", "gemm", "bmm", "cutlass", "cublas"),
    "copies": ("copy", "cat", "index", "clone", "contiguous", "gather", "embedding", "memcpy", "memset"),
}
REST, PYTHON = "other operators", "python"
PARTS = ("matmul", "attention", "copies", "packing", REST, PYTHON)
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#a463f2", "#6cc5b0", "#9498a0")
BAR, LEFT, ROW = 480, 190, 30


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--svg", type=Path, required=True, help="the picture to write")
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    options = record.begin(parser)
    length, repeats = 60, options.repeats or 3
    if options.smoke:
        options.shape, options.batch_sizes, length, repeats = "smoke", [2], 8, 2
    points = [measure(options, name, size, length, repeats) for size in options.batch_sizes for name in METHODS]
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    record.write(options, "breakdown", {"shape": shape, "question_tokens": length, "parts": PARTS, "points": points})
    options.svg.parent.mkdir(parents=True, exist_ok=True)
    options.svg.write_text(picture(points))


def measure(options, name: str, size: int, length: int, repeats: int) -> dict:
    """Return the shares of one method at one batch size."""
    method, n_tokens = METHODS[name]
    model = subjects.random_model(subjects.SHAPES[options.shape], method, options.seed, options.device, options.dtype)
    asked = subjects.questions(model, size, length, options.seed)
    run, clock = partial(subjects.answer, model, asked, n_tokens, size), clock_of(options.device)
    timed = take_turns({name: run}, repeats, clock)[name]
    on_gpu = options.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profiling(profile(activities=activities)) as profiler:
        started = clock()
        run()
        seconds = clock() - started
    taken = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        taken[kind_of(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    taken[PYTHON] = max(seconds - sum(taken.values()), 0.0)
    whole = sum(taken.values())
    point = {
        "method": name,
        "batch_size": size,
        "answer_tokens": n_tokens,
        "ms": spread([1000 * s for s in seconds_of(timed)]),
        "profiled_ms": 1000 * seconds,
        "shares": {part: spent / whole for part, spent in taken.items()},
    }
    print(point, flush=True)
    return point


def kind_of(operator: str) -> str:
    """Return the part that an operator or kernel belongs to."""
    name = operator.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def picture(points: list[dict]) -> str:
    """Return the shares as bars, an SVG that suits light and dark pages."""
    lines, x = [], float(LEFT)
    for part, colour in zip(PARTS, COLOURS):
        lines.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="22">{part}</text>')
        x += 34 + 7 * len(part)
    for i, point in enumerate(points):
        y, x = 44 + ROW * i, float(LEFT)
        name = f"{point['method']}, batch {point['batch_size']}"
        lines.append(f'<text x="{LEFT - 10}" y="{y + 14}" text-anchor="end">{name}</text>')
        for part, colour in zip(PARTS, COLOURS):
            share = point["shares"][part]
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{BAR * share:.1f}" height="20" fill="{colour}"/>')
            if share > 0.07:
                lines.append(f'<text class="in" x="{x + BAR * share / 2:.1f}" y="{y + 14}">{share:.0%}</text>')
            x += BAR * share
        lines.append(f'<text x="{LEFT + BAR + 8}" y="{y + 14}">{point["ms"]["median"]:.1f} ms</text>')
    size, label = f"{LEFT + BAR + 80} {54 + ROW * len(points)}", "Where the time of answering goes, by method"
    style = (
        "<style>text{font:12px sans-serif;fill:#555}.in{fill:#111;text-anchor:middle}"
        "@media(prefers-color-scheme:dark){text{fill:#bbb}.in{fill:#111}}</style>"
    )
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{label}">\n'
        f"{style}\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    main()

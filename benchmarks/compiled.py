"""Compiled passes against passes that are not: the same engine, the same tokens, in turns.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json
    python benchmarks/compiled.py --shape llama-1b --dtype bfloat16 --device cuda --out FILE   # CUDA graphs
    python benchmarks/compiled.py --smoke --out /tmp/compiled.json                             # about a minute

A thought pass alone (one row, ``--length`` columns read, the region's columns new) is set against its memory floor:
the bytes of weights and cache that it must read, by the copy bandwidth measured in the same run.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import record
import subjects
import torch

from innerloop import LatentModel
from innerloop.bench.roofline import COPY, Ceilings, layer_bytes, position_bytes
from innerloop.bench.timing import clock_of, ratio, seconds_of, spread, take_turns
from innerloop.methods import Coconut, Cot, Lotus, Method, Slr
from innerloop.passes.context import Context

METHODS: Mapping[str, tuple[Method, int]] = {  # and the tokens to write
    "cot, 40 tokens": (Cot(), 40),
    "coconut, 6": (Coconut(max_stage=3, latents_per_step=2), 8),
    "slr, 8 x 4": (Slr(n_slots=8, max_loops=4), 8),
    "lotus, 48 x 3": (Lotus(n_blocks=6, latents_per_block=8, max_loops=3), 8),
}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=60, help="tokens of a question")
    options = record.begin(parser)
    repeats = options.repeats or 5
    if options.smoke:
        options.shape, options.batch_sizes, options.length, repeats = "smoke", [2], 8, 2
    points = [
        measure(options, name, size, repeats)
        for name in METHODS
        if not options.smoke or name.startswith(("cot", "slr"))
        for size in options.batch_sizes
    ]
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    told = {"shape": shape, "length": options.length, "repeats": repeats}
    record.write(options, "compiled", told | {"points": points, "thought_pass": measure_pass(options, repeats)})


def measure(options, name: str, batch_size: int, repeats: int) -> dict:
    """Return how long answering takes with compiled passes and without."""
    torch._dynamo.reset()
    method, n_tokens = METHODS[name]
    model = make(options, method)
    asked = subjects.questions(model, batch_size, options.length, options.seed)
    ask = partial(subjects.answer, model, asked=asked, n_tokens=n_tokens, batch_size=batch_size)
    plain = [one.ids for one in ask()]
    model.backbone.compile_passes()
    passes = model.backbone.compiled
    begun = time.perf_counter()
    same = [one.ids for one in ask()] == plain
    if not same and options.dtype == torch.float32:
        raise SystemExit(f"{name}: compiled passes write other tokens")
    compiling = time.perf_counter() - begun

    def run(compiled: object) -> Callable[[], object]:
        def once() -> object:
            model.backbone.compiled = compiled
            return ask()

        return once

    turns = take_turns({"compiled": run(passes), "plain": run(None)}, repeats, clock_of(options.device))
    point = {
        "method": name,
        "batch_size": batch_size,
        "same_tokens": same,
        "first_call_s": compiling,
        "ms": {side: spread([1000 * s for s in seconds_of(turns[side])]) for side in turns},
        "faster": ratio(turns["plain"], turns["compiled"]),
    }
    print(point, flush=True)
    return point


def measure_pass(options, repeats: int) -> dict:
    """Return what one thought pass of a row takes, compiled and not, and the least that its bytes would take."""
    torch._dynamo.reset()
    method = METHODS["slr, 8 x 4"][0]
    model = make(options, method)
    backbone, n_new = model.backbone, 8
    draw = partial(torch.randn, device=options.device, dtype=options.dtype)
    prefix, region = draw(1, options.length, backbone.width), draw(1, n_new, backbone.width)
    backbone.compile_passes()
    passes = backbone.compiled
    with torch.no_grad():
        context = Context(backbone, 1)
        context.read(prefix)
        forks = {name: context.fork() for name in ("compiled", "plain")}

        def run(name: str) -> Callable[[], object]:
            def once() -> object:
                backbone.compiled = passes if name == "compiled" else None
                return [forks[name].peek(region) for _ in range(10)]

            return once

        ceilings = Ceilings(options.device, options.dtype)
        sides = {name: run(name) for name in forks}
        for once in sides.values():
            once()
        copies = {COPY: ceilings.jobs()[COPY]}
        turns = take_turns(sides | copies, repeats, clock_of(options.device))
    bandwidth = ceilings.n_bytes / min(seconds_of(turns[COPY]))
    n_bytes = layer_bytes(backbone) + (options.length + n_new) * position_bytes(backbone)
    ms = {name: [100 * s for s in seconds_of(turns[name])] for name in forks}  # of ten passes
    floor = 1000 * n_bytes / bandwidth
    return {
        "new_columns": n_new,
        "floor_ms": floor,
        "copy_gb_s": bandwidth / 1e9,
        "ms": {name: spread(values) for name, values in ms.items()},
        "against_floor": {name: spread([value / floor for value in values]) for name, values in ms.items()},
    }


def make(options, method: Method) -> LatentModel:
    """Return the model with a method."""
    shape = subjects.SHAPES[options.shape]
    return subjects.random_model(shape, method, seed=options.seed, device=options.device, dtype=options.dtype)


if __name__ == "__main__":
    main()

"""Answering with weights packed for the run, against the same with plain ones: same engine, same tokens, in turns.

    python benchmarks/packed.py --out benchmarks/results/packed.json
    python benchmarks/packed.py --smoke --out /tmp/packed.json                               # seconds

Weights are packed anew in each turn, as for a first run; a later one finds them. What packing takes is told too.
"""

from collections.abc import Callable
from functools import partial

import record
import subjects
import torch

from innerloop.bench.timing import clock_of, ratio, seconds_of, spread, take_turns
from innerloop.decoder import packed
from innerloop.decoder.packed import PackedWeights, release
from innerloop.methods import Cot, Lotus, Method, Slr

METHODS: dict[str, tuple[Method, int]] = {  # and how many tokens are written
    "cot, 40 tokens": (Cot(), 40),
    "slr, 8 x 4": (Slr(n_slots=8, max_loops=4), 8),
    "lotus, 48 x 3": (Lotus(n_blocks=6, latents_per_block=8, max_loops=3), 8),
}
PACKED, PLAIN, PACKING = "packed", "plain", "packing"


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["small", "gpt2"], choices=list(subjects.SHAPES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    options = record.begin(parser)
    length, repeats = 60, options.repeats or 3
    if options.smoke:
        options.shapes, options.batch_sizes, length, repeats = ["smoke"], [2], 8, 2
        packed.FEWEST_WEIGHTS = 1
    points = [
        measure(options, shape, name, size, length, repeats)
        for shape in options.shapes
        for name in METHODS
        for size in options.batch_sizes
    ]
    record.write(options, "packed", {"question_tokens": length, "repeats": repeats, "points": points})


def measure(options, shape: str, name: str, size: int, length: int, repeats: int) -> dict:
    """Return how long answering takes with packed weights and without."""
    method, n_tokens = METHODS[name]
    model = subjects.random_model(subjects.SHAPES[shape], method, options.seed, options.device, options.dtype)
    asked = subjects.questions(model, size, length, options.seed)
    most = packed.MOST_BYTES

    def run(side: str) -> Callable[[], list]:
        def once() -> list:
            release(model.modules())
            packed.MOST_BYTES = most if side == PACKED else 0
            try:
                return subjects.answer(model, asked, n_tokens, size)
            finally:
                packed.MOST_BYTES = most

        return once

    sides = {side: run(side) for side in (PACKED, PLAIN)}
    found = {side: [one.ids for one in once()] for side, once in sides.items()}
    same = found[PACKED] == found[PLAIN]
    if not same and options.dtype == torch.float32:
        raise SystemExit(f"{name}: packed weights write other tokens")
    jobs = {**sides, PACKING: partial(pack_anew, list(model.modules()))}
    turns = take_turns(jobs, repeats, clock_of(options.device))
    point = {
        "shape": shape,
        "method": name,
        "batch_size": size,
        "answer_tokens": n_tokens,
        "same_tokens": same,
        "n_packed": len(PackedWeights(model.modules()).products),
        "ms": {side: spread([1000 * s for s in seconds_of(turns[side])]) for side in jobs},
        "faster": ratio(turns[PLAIN], turns[PACKED]),
    }
    print(point, flush=True)
    return point


def pack_anew(modules: list[torch.nn.Module]) -> PackedWeights:
    """Pack weights as if they never had been."""
    release(modules)
    return PackedWeights(modules)


if __name__ == "__main__":
    main()

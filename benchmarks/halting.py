"""Rows that stop at unlike times, against rows that all stop at their mean: does time follow the mean or the maximum?

Stop times are given: SLR's rule `random` draws them from a histogram, and the runs of its rows say what was drawn. The
others run a fixed number of iterations; the time at the mean, which is no whole number, lies between those of the whole
numbers around it. Thinking is what a run takes on top of one with the same rows and no iterations. Runs take turns, and
all of them are told a number of iterations, so that they are asked alike.

    python benchmarks/halting.py --out benchmarks/results/halting.json
    python benchmarks/halting.py --smoke --out /tmp/halting.json                                  # seconds
"""

import math
from collections.abc import Sequence
from functools import partial

import record
import subjects

from innerloop.bench.timing import clock_of, seconds_of, spread, take_turns
from innerloop.engine.generation import Generation
from innerloop.methods import Slr

MOST = 16
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "1, 2, 4, 8, 16 alike": tuple(float(t in (1, 2, 4, 8, 16)) for t in range(1, MOST + 1)),
    "geometric, 1 to 16": tuple(0.85**t for t in range(MOST)),
}
SPREAD, NONE, LOW, HIGH, MAXIMUM = "spread", "none", "mean, below", "mean, above", "maximum"


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--length", type=int, default=60, help="tokens of a question")
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--n_tokens", type=int, default=1, help="tokens to write")
    options = record.begin(parser)
    repeats = options.repeats or 5
    if options.smoke:
        options.shape, options.batch_size, options.questions, options.length, repeats = "smoke", 8, 16, 8, 2
    points = [measure(options, name, shares, repeats) for name, shares in HISTOGRAMS.items()]
    names = ("batch_size", "questions", "length", "latents", "n_tokens")
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    work = {name: getattr(options, name) for name in names}
    record.write(options, "halting", {"shape": shape, **work, "repeats": repeats, "points": points})


def measure(options, name: str, shares: Sequence[float], repeats: int) -> dict:
    """Return how long rows take whose stop times are drawn from a histogram."""
    shape, n = subjects.SHAPES[options.shape], options.latents
    make = partial(subjects.random_model, shape, seed=options.seed, device=options.device, dtype=options.dtype)
    stopping = Slr(n_slots=n, max_loops=MOST, stop={"rule": "random", "histogram": tuple(shares)})
    drawn, fixed = make(method=stopping), make(method=Slr(n_slots=n, max_loops=MOST))
    asked = subjects.questions(fixed, options.questions, options.length, options.seed)
    ask = partial(subjects.answer, asked=asked, n_tokens=options.n_tokens, batch_size=options.batch_size)

    def ask_drawn() -> list[Generation]:
        drawn.loop.stop.n_drawn = 0  # rows are numbered anew: the same draws in each turn
        return ask(drawn, loops=MOST)

    draws = [one.cost.loops for one in ask_drawn()]
    mean = sum(draws) / len(draws)
    below, above = math.floor(mean), math.ceil(mean)
    runs = {
        SPREAD: ask_drawn,
        NONE: partial(ask, fixed, loops=0),
        LOW: partial(ask, fixed, loops=below),
        HIGH: partial(ask, fixed, loops=above),
        MAXIMUM: partial(ask, fixed, loops=MOST),
    }
    turns = take_turns(runs, repeats, clock_of(options.device))
    loops = {side: [[one.cost.loops for one in turn.result] for turn in turns[side]] for side in (SPREAD, LOW)}
    if any(set(run) != {below} for run in loops[LOW]):
        raise SystemExit("rows with a fixed number of iterations have run others")
    means = [sum(run) / len(run) for run in loops[SPREAD]]
    seconds = {side: seconds_of(turns[side]) for side in runs}
    at_mean = [
        low + (m - below) * (high - low) / max(above - below, 1)
        for m, low, high in zip(means, seconds[LOW], seconds[HIGH])
    ]
    thinking = {
        side: [a - b for a, b in zip(values, seconds[NONE])]
        for side, values in {SPREAD: seconds[SPREAD], "mean": at_mean, MAXIMUM: seconds[MAXIMUM]}.items()
    }
    point = {
        "stop_times": name,
        "mean_loops": spread(means),
        "least": min(draws),
        "most": max(draws),
        "ms": {side: spread([1000 * s for s in values]) for side, values in seconds.items()},
        "against_the_mean": spread([a / b for a, b in zip(seconds[SPREAD], at_mean)]),
        "against_the_mean_thinking": spread([a / b for a, b in zip(thinking[SPREAD], thinking["mean"])]),
        "maximum_against_the_mean": spread([a / b for a, b in zip(seconds[MAXIMUM], at_mean)]),
        "maximum_against_the_mean_thinking": spread([a / b for a, b in zip(thinking[MAXIMUM], thinking["mean"])]),
    }
    print(point, flush=True)
    return point


if __name__ == "__main__":
    main()

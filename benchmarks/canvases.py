"""Answers filled in from masks against answers written token by token: same shape, same number of tokens, in turns.

Weights are random, and nothing ends an answer; a pass over a canvas costs what it costs whatever it predicts. Told are
passes and positions of a question, and its time.

    python benchmarks/canvases.py --out benchmarks/results/canvases.json
    python benchmarks/canvases.py --shape llama-1b --dtype bfloat16 --device cuda --out FILE
    python benchmarks/canvases.py --smoke --out /tmp/canvases.json                                # seconds
"""

from functools import partial

import record
import subjects

from innerloop.bench.timing import clock_of, seconds_of, spread, take_turns
from innerloop.decoder.cost import mean_cost
from innerloop.methods import BlockDiffusion, Llada, Method, NoCot


def methods(n: int) -> dict[str, Method]:
    """Return what is timed, for answers of ``n`` tokens."""
    half, block = max(n // 2, 1), max(n // 8, 1)
    return {
        "text": NoCot(),
        f"llada, {n} passes": Llada(gen_length=n),
        f"llada, {half} passes": Llada(gen_length=n, sampler={"steps": half}),
        f"blocks of {block}, cached": BlockDiffusion(gen_length=n, block_length=block),
    }


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=60, help="tokens of a question")
    parser.add_argument("--n_tokens", type=int, default=64, help="tokens of an answer")
    options = record.begin(parser)
    repeats = options.repeats or 5
    if options.smoke:
        options.shape, options.batch_sizes, options.length, options.n_tokens, repeats = "smoke", [2], 8, 8, 2
    points = [point for size in options.batch_sizes for point in measure(options, size, repeats)]
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    told = {"shape": shape, "question_tokens": options.length, "answer_tokens": options.n_tokens, "repeats": repeats}
    record.write(options, "canvases", {**told, "points": points})


def measure(options, size: int, repeats: int) -> list[dict]:
    """Return passes, positions and milliseconds of a question by each way, in batches of one size."""
    shape, calls = subjects.SHAPES[options.shape], {}
    for name, method in methods(options.n_tokens).items():
        model = subjects.random_model(shape, method, options.seed, options.device, options.dtype)
        asked = subjects.questions(model, size, options.length, options.seed)
        calls[name] = partial(model.generate, asked, max_new_tokens=options.n_tokens, batch_size=size)
    turns = take_turns(calls, repeats, clock_of(options.device))
    points = []
    for name in calls:
        cost = mean_cost([one.cost for one in turns[name][0].result])
        seconds = [1000 * s / size for s in seconds_of(turns[name])]
        point = {"method": name, "batch_size": size, "passes": cost["passes"], "positions": cost["positions"]}
        points.append({**point, "ms": spread(seconds)})
        print(points[-1], flush=True)
    return points


if __name__ == "__main__":
    main()

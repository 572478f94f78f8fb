"""Rollouts of a batch against one by one: how much faster, and that the tokens are the same; and what a replay costs.

Eight questions have eight samples each. Written together, a question is read once for all of its samples.

    python benchmarks/rollouts.py --threads 1 --out benchmarks/results/rollouts.json              # two minutes on a CPU
    python benchmarks/rollouts.py --smoke --out /tmp/rollouts.json                                 # seconds
"""

from functools import partial

import record
import subjects

from innerloop.bench.timing import clock_of, ratio, seconds_of, spread, take_turns
from innerloop.engine.rollouts import Rollout, WritingPolicy
from innerloop.methods import Cot, Hrpo, Method, Slr

METHODS: dict[str, Method] = {
    "cot": Cot(),
    "hrpo": Hrpo(),
    "slr": Slr(n_slots=6, max_loops=3),
}
QUESTIONS, SAMPLES, ASKED, WRITTEN = 8, 8, 40, 32


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    options = record.begin(parser)
    options.repeats = options.repeats or 3
    if options.smoke:
        options.shape, options.repeats = "smoke", 1
    points = [measure(options, name, method) for name, method in METHODS.items()]
    work = {"questions": QUESTIONS, "samples": SAMPLES, "question_tokens": ASKED, "answer_tokens": WRITTEN}
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    record.write(options, "rollouts", {"shape": shape, **work, "repeats": options.repeats, "points": points})


def measure(options, name: str, method: Method) -> dict:
    """Return what writing together saves a method, and what going through it again costs."""
    shape = subjects.SHAPES[options.shape]
    model = subjects.random_model(shape, method, options.seed, options.device, options.dtype)
    asked = subjects.questions(model, QUESTIONS, ASKED, options.seed)
    runs = {batch: partial(roll_out, model, asked, batch) for batch in (64, 1)}
    clock = clock_of(options.device)
    turns = take_turns(runs, options.repeats, clock)
    together = turns[64][0].result
    rounded = same_rows(together, turns[1][0].result)
    model.double()  # of 8,192 words that are all about as likely, a draw meets an edge that rounding has moved
    same = same_rows(*(run() for run in runs.values()))
    model.to(options.dtype)
    policy = WritingPolicy(model)
    batch = policy.batch(together)
    replays = take_turns({"replay": lambda: policy.replay(model, batch).sum().backward()}, options.repeats, clock)
    seconds = seconds_of(turns[64])
    n_tokens = sum(len(one.ids) for one in together)
    return {
        "method": name,
        "same_rows": same,
        "same_rows_as_timed": rounded,
        "rows": len(together),
        "tokens_per_second": spread([n_tokens / one for one in seconds]),
        "alone_tokens_per_second": spread([n_tokens / one for one in seconds_of(turns[1])]),
        "speedup": ratio(turns[1], turns[64]),
        "replay_ms": spread([1000 * one for one in seconds_of(replays["replay"])]),
        "rollout_share": spread([one / (one + two) for one, two in zip(seconds, seconds_of(replays["replay"]))]),
    }


def same_rows(rows: list[Rollout], others: list[Rollout]) -> int:
    """Return how many samples have the same tokens."""
    return sum(a.ids == b.ids for a, b in zip(rows, others))


def roll_out(model, asked: list[str], batch_size: int) -> list[Rollout]:
    """Write the samples, so many at a time."""
    return WritingPolicy(model, batch_size=batch_size).roll_out(asked, SAMPLES, 0, WRITTEN)


if __name__ == "__main__":
    main()

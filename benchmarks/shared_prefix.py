"""What it saves to read once what all questions of a prefill batch begin with, against reading it for each.

Questions share their first ``shared`` tokens and have 20 of their own; both ways answer the same rows in turns, and
must write the same tokens.

    python benchmarks/shared_prefix.py --out benchmarks/results/shared_prefix.json                # a minute on a CPU
    python benchmarks/shared_prefix.py --smoke --out /tmp/shared_prefix.json                      # seconds
"""

from functools import partial

import record
import subjects

from innerloop.bench.timing import clock_of, ratio, seconds_of, spread, take_turns
from innerloop.engine import shared_prefix as prefix
from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Cot, Method, Slr

METHODS: dict[str, Method] = {"cot": Cot(), "slr": Slr(n_slots=6, max_loops=3)}
WAVES = ((16, 4), (64, 2), (64, 5), (128, 8), (256, 16))  # shared tokens, rows
OWN, WRITTEN = 20, 4
ONCE, EACH = 1, 10**9  # positions that sharing must spare


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    options = record.begin(parser)
    options.repeats = options.repeats or 5
    if options.smoke:
        options.shape, options.repeats = "smoke", 2
    points = [point for name, method in METHODS.items() for point in measure(options, name, method)]
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    work = {"own_tokens": OWN, "answer_tokens": WRITTEN, "repeats": options.repeats}
    record.write(options, "shared_prefix", {"shape": shape, **work, "points": points})


def measure(options, name: str, method: Method) -> list[dict]:
    """Return what sharing saves a method, one prefill batch after the other."""
    shape = subjects.SHAPES[options.shape]
    model = subjects.random_model(shape, method, options.seed, options.device, options.dtype)
    points = []
    for n_shared, n_rows in WAVES[:2] if options.smoke else WAVES:
        (head,) = subjects.questions(model, 1, n_shared + 1, options.seed + 1)
        asked = [f"{head} {own}" for own in subjects.questions(model, n_rows, OWN, options.seed)]
        runs = {spared: partial(answer, model, asked, spared) for spared in (ONCE, EACH)}
        turns = take_turns(runs, options.repeats, clock_of(options.device))
        ids = [[one.ids for one in turns[spared][0].result] for spared in (ONCE, EACH)]
        if ids[0] != ids[1]:
            raise SystemExit(f"{name}: rows that share {n_shared} tokens write others than rows that do not")
        point = {
            "method": name,
            "shared": n_shared,
            "rows": n_rows,
            "spared": n_shared * (n_rows - 1),
            "ms": spread([1000 * seconds for seconds in seconds_of(turns[ONCE])]),
            "each_ms": spread([1000 * seconds for seconds in seconds_of(turns[EACH])]),
            "speedup": ratio(turns[EACH], turns[ONCE]),
        }
        print(point, flush=True)
        points.append(point)
    return points


def answer(model: LatentModel, asked: list[str], spared: int) -> list[Generation]:
    """Answer in one prefill batch, sharing where it spares so many positions."""
    prefix.SPARED_FROM = spared
    return subjects.answer(model, asked, WRITTEN, len(asked))


if __name__ == "__main__":
    main()

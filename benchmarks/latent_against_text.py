"""Latent methods against explicit chains of thought of 60 and of 200 tokens: same engine, same model, same answer.

A model with random weights reads questions of one length, thinks, and writes an answer of a given number of tokens,
none of which ends it. Runs of all methods take turns. Phases are told apart by what a run does besides another one,
turn by turn: prefill is reading the question and writing one token without any thought; thought is what comes on top
until the first token of the answer, in latents or in written steps; answer is the rest.

    python benchmarks/latent_against_text.py --out benchmarks/results/latent_against_text.json
    python benchmarks/latent_against_text.py --shape llama-1b --device cuda --dtype bfloat16 --out FILE
    python benchmarks/latent_against_text.py --smoke --out /tmp/latent_against_text.json          # seconds
"""

from functools import partial

import record
import subjects

from innerloop.bench.timing import Turn, clock_of, seconds_of, spread, take_turns
from innerloop.decoder.cost import mean_cost
from innerloop.methods import Coconut, Codi, Cot, Lotus, Method, Pause, Pccot, Slr

METHODS: dict[str, Method] = {
    "pause, 6": Pause(n_pauses=6),
    "coconut, 6": Coconut(latents_per_step=2, max_stage=3),
    "codi, 6": Codi(n_latents_total=6),
    "pccot, 24 x 3": Pccot(n_slots=24, max_loops=3),
    "slr, 8 x 4": Slr(n_slots=8, max_loops=4),
    "slr, 48 x 16": Slr(n_slots=48, max_loops=16),
    "lotus, 48 x 3": Lotus(n_blocks=6, latents_per_block=8, max_loops=3),
    "lotus, 150 x 6": Lotus(n_blocks=6, latents_per_block=25),
}
BARE = "nothing"


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--texts", type=int, nargs="+", default=[60, 200], help="tokens of written chains of thought")
    options = record.begin(parser)
    length, n_answer, repeats = 60, 8, options.repeats or 5
    if options.smoke:
        options.shape, options.batch_sizes, options.texts = "smoke", [2], [6, 12]
        length, n_answer, repeats = 10, 3, 2
    points = []
    for size in options.batch_sizes:
        points += measure(options, size, length, n_answer, repeats)
    record.write(
        options,
        "latent_against_text",
        {
            "shape": {"name": options.shape, **subjects.SHAPES[options.shape]},
            "question_tokens": length,
            "answer_tokens": n_answer,
            "texts": options.texts,
            "repeats": repeats,
            "points": points,
        },
    )


def measure(options, size: int, length: int, n_answer: int, repeats: int) -> list[dict]:
    """Return a point for each method at one batch size."""
    texts = {f"text, {n}": n for n in options.texts}
    plain, *others = (
        subjects.random_model(subjects.SHAPES[options.shape], method, options.seed, options.device, options.dtype)
        for method in (Cot(), *METHODS.values())
    )
    asked = subjects.questions(plain, size, length, options.seed)
    models = dict(zip(METHODS, others)) | dict.fromkeys(texts, plain)
    ask = {name: partial(subjects.answer, model, asked, batch_size=size) for name, model in models.items()}
    runs = {(BARE, 1): partial(subjects.answer, plain, asked, n_tokens=1, batch_size=size)}
    for name in models:  # up to the first token of the answer, and to its last
        n_before = texts.get(name, 0)
        runs[name, 1] = partial(ask[name], n_tokens=n_before + 1)
        runs[name, n_answer] = partial(ask[name], n_tokens=n_before + n_answer)
    turns: dict[tuple[str, int], list[Turn]] = take_turns(runs, repeats, clock_of(options.device))
    prefill = seconds_of(turns[BARE, 1])
    points = []
    for name, model in models.items():
        first, whole = seconds_of(turns[name, 1]), seconds_of(turns[name, n_answer])
        thought = [max(a - b, 0.0) for a, b in zip(first, prefill)]
        loops = model.method.n_loops(model.method.curriculum.last_stage)
        thinks = loops > 0 or name in texts
        point = {
            "method": name,
            "batch_size": size,
            "written": name in texts,
            "cost": counts([one.cost for one in turns[name, n_answer][0].result]),
            "ms": {
                "total": milliseconds(whole),
                "prefill": milliseconds(prefill),
                "thought": milliseconds(thought),
                "answer": milliseconds([a - b for a, b in zip(whole, first)]),
            },
            "loops": loops,
        }
        for text in texts:
            told = [a - b for a, b in zip(seconds_of(turns[text, 1]), prefill)]
            point[f"faster than {text}"] = {
                # latents that are read together with the answer's first token take no time of their own
                "thought": spread([a / b for a, b in zip(told, thought)]) if thinks and min(thought) > 0 else None,
                "total": spread([a / b for a, b in zip(seconds_of(turns[text, n_answer]), whole)]),
            }
        points.append(point)
        print(name, size, {k: v for k, v in point.items() if k.startswith(("ms", "faster"))}, flush=True)
    return points


def counts(costs: list) -> dict:
    """Return the mean cost without its seconds, which were taken by the turns."""
    mean = mean_cost(costs)
    mean.pop("seconds")
    return mean


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Return the spread in milliseconds."""
    return spread([1000 * s for s in seconds])


if __name__ == "__main__":
    main()

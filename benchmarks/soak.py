"""Many requests of random lengths: each is answered once and in order, and memory stays where it was after warm-up.

A tiny model answers; what is tested is the engine. Requests come in calls of some hundreds each. A share of them is too
long for the model: each of these must fail, alone and with its reason. In order means that
what a request has cost beyond its own length is the same for all of them, and that some, drawn at random, have the very
text that they have when answered alone. Memory is the process's resident set, and on a GPU what torch has allocated;
``growth`` is the slope of a line through all samples after the first quarter. The tokens of the last 32,768 texts are
remembered, which would still fill up then; here it is the last 1,024.

    python benchmarks/soak.py --out benchmarks/results/soak.json                                  # minutes on a CPU
    python benchmarks/soak.py --smoke --out /tmp/soak.json                                        # seconds
"""

import gc
import random
import statistics
import time

import psutil
import record
import subjects
import torch

from innerloop.decoder.memory import MIB
from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Coconut, Cot, Method, Slr
from innerloop.text import encoder as prompt_encoder

METHODS: dict[str, Method] = {
    "slr": Slr(n_slots=4, max_loops=3, stop={"rule": "random", "histogram": (1.0, 1.0, 1.0)}),
    "coconut": Coconut(curriculum={"max_stage": 2}),
    "cot": Cot(),
}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--per_call", type=int, default=250)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--longest", type=int, default=96, help="tokens of the longest question")
    parser.add_argument("--n_tokens", type=int, default=6)
    parser.add_argument("--too_long", type=float, default=0.02, help="share of requests that are too long")
    parser.add_argument("--alone", type=int, default=100, help="requests that are also answered alone")
    options = record.begin(parser)
    prompt_encoder.N_REMEMBERED = 1024
    if options.smoke:
        options.requests, options.per_call, options.alone, options.longest = 64, 8, 4, 12
        options.too_long = 0.1
    names = ("requests", "per_call", "batch_size", "longest", "n_tokens", "too_long", "alone")
    work = {name: getattr(options, name) for name in names}
    points = [measure(options, name, method) for name, method in METHODS.items()]
    record.write(options, "soak", {"shape": subjects.SMOKE, **work, "points": points})


def measure(options, name: str, method: Method) -> dict:
    """Answer all requests of one method, and return what was seen."""
    model = subjects.random_model(subjects.SMOKE, method, options.seed, options.device, options.dtype)
    draw = random.Random(options.seed)
    lengths = [draw.randint(2, options.longest) for _ in range(options.requests)]
    room = model.backbone.context_length
    assert room is not None
    too_long = set(draw.sample(range(options.requests), round(options.too_long * options.requests)))
    for place in too_long:
        lengths[place] = room + draw.randint(0, options.longest)
    samples, texts, started, overheads = [], [], time.perf_counter(), set[int]()
    checked = set(draw.sample(sorted(set(range(options.requests)) - too_long), options.alone))
    for first in range(0, options.requests, options.per_call):
        places = range(first, min(first + options.per_call, options.requests))
        asked = [question(model, lengths[place], place) for place in places]
        answers = subjects.answer(model, asked, options.n_tokens, options.batch_size, strict=False)
        if len(answers) != len(asked):
            raise SystemExit(f"{name}: {len(asked)} requests, {len(answers)} answers")
        for place, one in zip(places, answers):
            check(name, place, lengths[place], room, place in too_long, one)
            if one.error is None and asked.count(asked[place - first]) == 1:  # of those asked twice one alone is read
                n_slots = method.n_slots * (one.cost.loops + 1) if isinstance(method, Slr) else 0
                overheads.add(one.cost.positions - lengths[place] - n_slots)
        texts += [(place, one.text, one.cost.loops) for place, one in zip(places, answers) if place in checked]
        del answers
        gc.collect()
        samples.append((places.stop, *held(options.device)))
    if len(overheads) != 1:
        raise SystemExit(f"{name}: answers are not in order: positions beyond the question are {sorted(overheads)}")
    for place, text, loops in texts:
        alone = {} if not isinstance(method, Slr) else {"loops": loops}
        asked = [question(model, lengths[place], place)]
        (one,) = subjects.answer(plain_of(model), asked, options.n_tokens, 1, **alone)
        if one.text != text:
            raise SystemExit(f"{name}: request {place} was answered {text!r}, alone {one.text!r}")
    point = {
        "method": name,
        "seconds": time.perf_counter() - started,
        "answered": options.requests - len(too_long),
        "failed": len(too_long),
        "checked_alone": len(texts),
        "memory": {part: grown([(n, *sizes) for n, *sizes in samples], i) for i, part in enumerate(("rss", "cuda"), 1)},
    }
    print(point, flush=True)
    return point


def check(name: str, place: int, length: int, room: int, is_too_long: bool, answer: Generation) -> None:
    """End if a request failed that should not have, or for another reason than its length."""
    if (answer.error is not None) != is_too_long:
        raise SystemExit(f"{name}: request {place} of {length} tokens: {answer.error or 'answered'}")
    if answer.error is not None and f"reads at most {room}" not in answer.error:
        raise SystemExit(f"{name}: request {place} failed for another reason: {answer.error}")


def plain_of(model: LatentModel) -> LatentModel:
    """Return the model with nothing that stops it: a row alone is told how often to iterate."""
    model.loop.stop = None
    return model


def question(model: LatentModel, length: int, place: int) -> str:
    """Return the question of the request at a place; always the same."""
    return subjects.questions(model, 1, length, seed=place)[0]


def held(device: torch.device) -> tuple[float, float]:
    """Return the resident set, and what torch holds on a GPU, in MiB."""
    on_gpu = torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else 0.0
    return psutil.Process().memory_info().rss / MIB, on_gpu


def grown(samples: list[tuple], column: int) -> dict[str, float]:
    """Return the memory after warm-up and at the end, and its growth, in MiB."""
    after = samples[len(samples) // 4 :]
    requests, sizes = [sample[0] for sample in after], [sample[column] for sample in after]
    slope = statistics.linear_regression(requests, sizes).slope if len(after) > 1 else 0.0
    return {"after_warm_up_mib": sizes[0], "at_end_mib": sizes[-1], "growth_mib_per_1000": 1000 * slope}


if __name__ == "__main__":
    main()

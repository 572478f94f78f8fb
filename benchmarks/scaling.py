"""How time and memory grow with latents, loops, batch, question length and model size: answering, and a training step.

One thing is changed at a time, the others stay at the base point; values of one axis take turns. Memory is the most
held beyond weights and what was there before, in a run of its own. ``slope`` is the exponent of the growth between the
last two values of an axis: 1 is linear.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json
    python benchmarks/scaling.py --device cuda --dtype bfloat16 --shape llama-1b --out FILE
    python benchmarks/scaling.py --smoke --out /tmp/scaling.json                                  # seconds
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import record
import subjects

from innerloop.bench.timing import clock_of, seconds_of, spread, take_turns
from innerloop.decoder.memory import MIB, peak_memory
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Slr
from innerloop.text.examples import Example


@dataclass(frozen=True)
class Base:
    """The base point. ``size`` is the number of layers, as a multiple of the shape's."""

    latents: int = 8
    loops: int = 4
    batch: int = 8
    question: int = 64
    size: float = 1.0


AXES: dict[str, tuple] = {
    "latents": (1, 4, 16, 64),
    "loops": (1, 2, 4, 8, 16),
    "batch": (1, 4, 16, 64),
    "question": (16, 64, 256, 512),
    "size": (0.5, 1.0, 2.0),
}
SMOKE_AXES: dict[str, tuple] = {
    "latents": (1, 2),
    "loops": (1, 2),
    "batch": (1, 2),
    "question": (4, 8),
    "size": (0.5, 1),
}
N_TOKENS = 8


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    options = record.begin(parser)
    base, axes, repeats = Base(), AXES, options.repeats or 5
    if options.smoke:
        base, axes, repeats, options.shape = Base(2, 2, 2, 6), SMOKE_AXES, 2, "smoke"
    found = {axis: measure(options, base, axis, values, repeats) for axis, values in axes.items()}
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    record.write(
        options,
        "scaling",
        {"shape": shape, "base": vars(base), "answer_tokens": N_TOKENS, "repeats": repeats, "axes": found},
    )


def measure(options, base: Base, axis: str, values: tuple, repeats: int) -> dict:
    """Return the points of one axis."""
    jobs: dict[tuple[str, float], Callable[[], object]] = {}
    weights = {}
    for value in values:
        at = replace(base, **{axis: value})
        shape = dict(subjects.SHAPES[options.shape])
        layers = "n_layer" if "n_layer" in shape else "num_hidden_layers"
        shape[layers] = max(round(shape[layers] * at.size), 1)
        method = Slr(n_slots=at.latents, max_loops=at.loops)
        model = subjects.random_model(shape, method, options.seed, options.device, options.dtype)
        asked = subjects.questions(model, at.batch, at.question, options.seed)
        told = subjects.questions(model, at.batch, N_TOKENS, options.seed + 1)
        examples = [Example(question, (), answer) for question, answer in zip(asked, told)]
        jobs["answering", value] = partial(subjects.answer, model, asked, N_TOKENS, at.batch)
        jobs["training", value] = partial(learn, model, examples)
        weights[value] = sum(p.numel() for p in model.parameters())
    turns = take_turns(jobs, repeats, clock_of(options.device))
    report = {}
    for what in ("answering", "training"):
        points = [
            {
                axis: value,
                "weights": weights[value],
                "ms": spread([1000 * s for s in seconds_of(turns[what, value])]),
                "peak_mib": peak_memory(jobs[what, value], options.device) / MIB,
            }
            for value in values
        ]
        report[what] = {
            "points": points,
            "slope": {"ms": slope(points, axis, "ms"), "peak_mib": slope(points, axis, "peak_mib")},
        }
        print(axis, what, report[what]["slope"], flush=True)
    return report


def learn(model: LatentModel, examples: list[Example]) -> None:
    """Run forward and backward, and leave no gradients behind."""
    model.train()
    model.loss(examples).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()


def slope(points: list[dict], axis: str, name: str) -> float:
    """Return the exponent with which a quantity grows between the last two values of an axis."""
    (x0, y0), (x1, y1) = ((p[axis], p[name]["median"] if name == "ms" else p[name]) for p in points[-2:])
    return math.log(y1 / y0) / math.log(x1 / x0)


if __name__ == "__main__":
    main()

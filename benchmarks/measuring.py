"""What measuring costs, against a plain evaluation of the same rows.

A small SLR model is trained on chains, then everything that `innerloop eval` and `innerloop lens` measure is measured,
part by part, in turns with the plain evaluation. Of each part: its seconds, passes and positions (padding counts) as
multiples of those of the evaluation. Whether the model is any good does not matter here, only that it ends its answers.

    python benchmarks/measuring.py --threads 1 --out benchmarks/results/measuring.json      # two minutes on a CPU
    python benchmarks/measuring.py --smoke --out /tmp/measuring.json                        # seconds
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import record
import torch

from innerloop.bench.timing import clock_of, spread
from innerloop.cli.demo import BACKBONE
from innerloop.engine.latent_model import LatentModel
from innerloop.lens import look
from innerloop.measure.accuracy import accuracy_of, evaluate
from innerloop.measure.controls import controls
from innerloop.measure.probes import probes
from innerloop.measure.readout import shown_steps
from innerloop.measure.result_cache import ResultCache
from innerloop.measure.stability import stability
from innerloop.measure.subject import Subject
from innerloop.measure.swap import swaps
from innerloop.train.recipe import parse_recipe
from innerloop.train.run import run_recipe

LATENTS = LOOPS = 4
KINDS = {  # of parts, by what their names begin with
    "accuracy with another number of loops": "control: loops",
    "accuracy with fewer latents": "control: kept",
    "recording what latents are fed": ("control: latents", "swap: latents", "recording"),
    "a control that edits latents": "control: ",
    "a swap": "swap: ",
    "the states that probes learn from, of two splits": "probes: states",
    "the probes of a target": "probes: ",
    "stability without spectral radii": "stability, no Jacobians",
    "stability": "stability",
    "read-outs of gold steps": "read-outs",
    "a page of the lens, against answers one at a time": "lens",
}
LOOKED_AT = 8  # examples of a page of the lens, which answers them one at a time
BASE, ALONE = "plain evaluation", "plain evaluation, one at a time"


class Work:
    """Seconds and work of parts; on a CPU the process's own seconds, and calls of the first layer are passes."""

    def __init__(self, model: LatentModel, device: torch.device):
        self.clock = time.process_time if device.type == "cpu" else clock_of(device)
        self.passes = self.positions = 0
        self.found: dict[str, list[tuple[float, int, int]]] = {}
        model.backbone.layers[0].register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, layer: torch.nn.Module, given: tuple, named: dict) -> None:
        states = given[0] if given else named["hidden_states"]
        self.passes, self.positions = self.passes + 1, self.positions + states.shape[0] * states.shape[1]

    def now(self) -> tuple[float, int, int]:
        """Return what has been spent until now."""
        return self.clock(), self.passes, self.positions

    def of(self, name: str, run: Callable[[], object]) -> None:
        """Run something and write down what it took."""
        start = self.now()
        run()
        self._write(name, start, self.now())

    def of_parts(self, title: str, run: Callable[[ResultCache], object], first: str = "") -> None:
        """Run something that has parts, and write down what each took, and ``first`` what comes before them."""
        parts, marks = ResultCache(), [(f"{title}: {first}", self.now())]
        parts.begins = lambda name: marks.append((f"{title}: {name.partition(',')[0]}", self.now()))
        run(parts)
        marks.append(("", self.now()))
        for (name, start), (_, end) in pairwise(marks if first else marks[1:]):
            self._write(name, start, end)

    def _write(self, name: str, start: tuple[float, int, int], end: tuple[float, int, int]) -> None:
        self.found.setdefault(name, []).append(tuple(b - a for a, b in zip(start, end)))  # type: ignore[arg-type]


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--batch_size", type=int, default=64)
    options = record.begin(parser)
    repeats = options.repeats or 3
    if options.smoke:
        options.rows, options.steps, repeats = 24, 3, 1
    task, model = trained(options)
    model.to(options.device)
    examples, learn = task.examples("test"), task.examples("train", options.rows)
    unedited = evaluate(model, task, examples, batch_size=options.batch_size)
    work = Work(model, options.device)
    answer = partial(evaluate, model, task, batch_size=options.batch_size)
    with_size = {"batch_size": options.batch_size}
    subject = partial(Subject, model, task, examples, unedited, **with_size)
    for _ in range(repeats):
        work.of(BASE, lambda: answer(examples))
        work.of_parts("control", lambda parts: controls(subject(cache=parts)))
        work.of_parts("swap", lambda parts: swaps(subject(cache=parts)))
        work.of("recording", lambda: subject().record(examples))
        work.of_parts("probes", lambda parts: probes(subject(cache=parts), learn), first="states")
        work.of("stability, no Jacobians", lambda: stability(model, examples, n_jacobians=0, **with_size))
        work.of("stability", lambda: stability(model, examples, **with_size))
        work.of("read-outs of gold steps", lambda: shown_steps(model, examples, **with_size))
        work.of(ALONE, lambda: evaluate(model, task, examples[:LOOKED_AT], batch_size=1))
        work.of("lens", lambda: look(model, task, examples[:LOOKED_AT]))
    report = {
        "shape": BACKBONE,
        "task": {"name": task.name, "n_ops": task.n_ops, "modulus": task.modulus},
        "latents": LATENTS,
        "loops": LOOPS,
        "steps": options.steps,
        "rows": len(examples),
        "batch_size": options.batch_size,
        "repeats": repeats,
        "accuracy": accuracy_of(unedited),
        "base": {"seconds": spread([one[0] for one in work.found[BASE]])},
        "points": [point(work, name) for name in work.found if name not in (BASE, ALONE)],
    }
    record.write(options, "measuring", report)


def point(work: Work, name: str) -> dict:
    """Return what a part took, as multiples of what it is set against."""
    base = ALONE if name == "lens" else BASE
    pairs = list(zip(work.found[name], work.found[base]))
    return {
        "part": name,
        "kind": next(kind for kind, begins in KINDS.items() if name.startswith(begins)),
        "against": base,
        "seconds": spread([ours[0] / theirs[0] for ours, theirs in pairs]),
        "passes": pairs[0][0][1] / pairs[0][1][1],
        "positions": pairs[0][0][2] / pairs[0][1][2],
    }


def trained(options) -> tuple:
    """Train the model; return its task and it."""
    raw = {
        "task": {"name": "chain", "n_ops": 4, "n_test": options.rows, "seed": options.seed},
        "backbone": {"scratch": BACKBONE},
        "method": {"name": "slr", "n_slots": LATENTS, "max_loops": LOOPS, "slots_per_step": 1, "step_weight": 1.0},
        "train": {"learning_rate": 3e-3, "batch_size": 64, "max_steps": options.steps, "seed": options.seed},
    }
    raw["train"] |= {"use_cpu": True, "save_strategy": "no"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse_recipe({**raw, "out": str(Path(folder) / "run")})
        run_recipe(recipe)
        model = LatentModel.from_pretrained(recipe.out).eval()
    print(f"trained in {time.perf_counter() - started:.0f} s")
    return recipe.task, model


if __name__ == "__main__":
    main()

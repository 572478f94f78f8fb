"""Why does a loop hold past its training? Gain, distance to where it ends, and other starts, for each run of a suite.

After 1, 4, 16 and 64 iterations, medians over test questions but for the share:

    change     ||z_t - z_{t-1}|| / ||z_t||            gain     spectral radius of dz_t / dz_{t-1} (measure/stability.py)
    moved      ||z_t - z_0|| / ||z_t||                distance ||z_t - z_256|| / ||z_256||
    at rest    share of questions with a change below 0.1 %
    alignment  cosine of z_t and what the loop makes, in as many iterations, of z_256 of another question

and accuracy after them from the model's own start, and from a random one as large as z_256 (normal, by seed 0). A loop
that did nothing would have moved nowhere, and answer alike with any number of iterations. Beside them stands the
accuracy of the suite's warm-ups, which write their steps.

    python benchmarks/loop_holding.py --suite runs/suites/evidence/stability --out benchmarks/results/loop_holding.json
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from innerloop.decoder.cost import mean_cost
from innerloop.engine.latent_model import LatentModel
from innerloop.loop.hooks import LoopHook, Step, hooked
from innerloop.measure import evaluate
from innerloop.measure.accuracy import accuracy_of, device_name, versions
from innerloop.measure.stability import stability
from innerloop.text.examples import Example
from innerloop.train.recipe import load_recipe

LOOPS, END = (1, 4, 16, 64), 256


class Followed(LoopHook):
    """Keeps the states z_0, z_1, .. of a loop, and may begin it elsewhere."""

    def __init__(self, start: Tensor | None = None):
        self.start, self.states = start, list[Tensor]()

    def on_input(self, state: Tensor, iteration: int, rows: list[int]) -> Tensor:
        """Begin at the start that is given."""
        if iteration == 1:
            state = state if self.start is None else self.start
            self.states = [state]
        return state

    def on_iteration(self, step: Step) -> None:
        """Keep a state."""
        self.states.append(step.moment.state)


class Anywhere(LoopHook):
    """Begins a loop at a random state of a size, drawn anew for each batch."""

    def __init__(self, rms: float):
        self.rms, self.drawn = rms, torch.Generator().manual_seed(0)

    def on_input(self, state: Tensor, iteration: int, rows: list[int]) -> Tensor:
        """Replace z_0."""
        return self.rms * torch.randn(state.shape, generator=self.drawn) if iteration == 1 else state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, required=True, help="the folder of a suite's runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100, help="questions whose states are followed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = sorted(path.parent for path in options.suite.glob("*/*/result.json"))
    report = {
        "kind": "loop_holding",
        "n_states": options.n,
        "text": [written(run) for run in sorted(options.suite.glob("warm_up/*"))],
        "points": [measured(run, options.n) for run in runs],
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def written(run: Path) -> dict:
    """Measure a run that writes its steps."""
    model, recipe = LatentModel.from_pretrained(run), load_recipe(run / "config.yaml")
    answered = evaluate(model, recipe.task, recipe.task.examples("test"))
    passes = mean_cost([prediction.cost for prediction in answered])["passes"]
    return {"seed": int(run.name), "accuracy": accuracy_of(answered), "passes": passes}


@torch.no_grad()
def measured(run: Path, n: int) -> dict:
    """Measure one run."""
    model, result = LatentModel.from_pretrained(run), json.loads((run / "result.json").read_text())
    task = load_recipe(run / "config.yaml").task
    examples = task.examples("test")
    own = states(model, examples[:n], END)
    other = states(model, examples[:n], max(LOOPS), own[END].roll(1, 0))
    random_start = Anywhere(own[END].square().mean().sqrt().item())
    trained, model.method = model.method, model.method.with_loops(max(LOOPS))
    behaves = {entry.loop: entry.measures for entry in stability(model, examples[:32]).loops}
    model.method = trained
    after = {}
    for t in LOOPS:
        with hooked(model.loop, random_start):
            anywhere = accuracy_of(evaluate(model, task, examples, loops=t))
        change, radius = behaves[t]["change"], behaves[t]["radius"]
        assert change is not None and radius is not None
        after[str(t)] = {
            "accuracy": accuracy_of(evaluate(model, task, examples, loops=t)),
            "accuracy_from_anywhere": anywhere,
            "change": change.median,
            "gain": radius.median,
            "at_rest": ((own[t] - own[t - 1]).flatten(1).norm(dim=1) < 1e-3 * own[t].flatten(1).norm(dim=1))
            .float()
            .mean()
            .item(),
            "moved": apart(own[t], own[0], own[t]),
            "distance": apart(own[t], own[END], own[END]),
            "alignment": cosine_similarity(own[t].flatten(1), other[t].flatten(1)).median().item(),
        }
    point = {"variant": result["variant"], "seed": result["seed"], "n": len(examples), "loops": after}
    print(json.dumps(point), flush=True)
    return point


def states(model: LatentModel, examples: list[Example], loops: int, start: Tensor | None = None) -> list[Tensor]:
    """Return z_0..z_T (B, N, D) of examples."""
    seen = Followed(start)
    with hooked(model.loop, seen):
        model.think(model.batch(model.prompts([example.question for example in examples], loops=loops)))
    return seen.states


def apart(a: Tensor, b: Tensor, unit: Tensor) -> float:
    """Return the median over rows of ||a - b|| / ||unit||."""
    return ((a - b).flatten(1).norm(dim=1) / unit.flatten(1).norm(dim=1)).median().item()


if __name__ == "__main__":
    main()

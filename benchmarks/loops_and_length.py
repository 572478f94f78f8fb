"""Do more loops answer longer questions? Accuracy for each number of loops and each length, for runs of a suite.

The runs were trained on short questions of the tracking task; each answers questions of every length (all of one
length) with every number of loops. A looped decoder also answers until it has converged: a token stops once what it
shows changes by a KL divergence below 0.001 in an iteration (the rule kl with its usual threshold), or after --most.

    python benchmarks/loops_and_length.py --suite runs/suites/evidence/depth --variants "looped, 1 x 6" --lengths 1 2 4
        --loops 1 2 4 --out benchmarks/results/loops_and_length.json
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.measure import evaluate
from innerloop.measure.accuracy import accuracy_of, device_name, versions
from innerloop.methods.depth.looped import Looped
from innerloop.tasks import Tracking
from innerloop.text.examples import Example
from innerloop.train.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, required=True, help="the folder of a suite's runs")
    parser.add_argument("--variants", nargs="+", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    parser.add_argument("--loops", type=int, nargs="+", required=True)
    parser.add_argument("--most", type=int, default=48, help="iterations of a token that does not converge")
    parser.add_argument("--n", type=int, default=200, help="questions of each length; of short ones there are fewer")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run for name in options.variants for run in sorted((options.suite / name).glob("*/"))]
    report = {
        "kind": "loops_and_length",
        "split": options.split,
        "trained": load_recipe(runs[0] / "config.yaml").task.n_swaps,
        "points": [measured(run, options) for run in runs],
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


@torch.no_grad()
def measured(run: Path, options: argparse.Namespace) -> dict:
    """Measure one run."""
    model, recipe = LatentModel.from_pretrained(run), load_recipe(run / "config.yaml")
    assert isinstance(recipe.task, Tracking)
    asked = {n: questions(recipe.task, n, options) for n in options.lengths}
    point = {
        "variant": run.parent.name,
        "seed": int(run.name),
        "n": {str(n): len(examples) for n, examples in asked.items()},
        "loops": {
            str(t): {str(n): accuracy_of(evaluate(model, recipe.task, of, loops=t)) for n, of in asked.items()}
            for t in options.loops
        },
    }
    if isinstance(model.method, Looped):
        stop = replace(model.method.stop, rule="kl")
        stopping = LatentModel.from_pretrained(run, replace(model.method, max_loops=options.most, stop=stop))
        point["converged"] = {str(n): until_converged(stopping, of) for n, of in asked.items()}
    print(json.dumps(point), flush=True)
    return point


def questions(task: Tracking, length: int, options: argparse.Namespace) -> list[Example]:
    """Return questions of one length; of short ones as many as there are."""
    share = task.n_places * (task.n_places * (task.n_places - 1) // 2) ** length // 20  # half of the split's questions
    n = max(1, min(options.n, share))
    own = replace(task, n_swaps=length, min_swaps=length, n_valid=n, n_test=n)
    return own.examples(options.split)


def until_converged(model: LatentModel, examples: list[Example]) -> dict[str, float]:
    """Answer until converged; return the accuracy, and the iterations of the token that chooses the answer."""
    given = model.generate([example.question for example in examples], max_new_tokens=8)
    right = sum(one.answer == example.answer for one, example in zip(given, examples))
    asked = [model.encoder.question(example.question).ids for example in examples]
    loops = [one.depths[len(ids)][1] for one, ids in zip(given, asked)]  # of "###", before the answer
    return {"accuracy": right / len(examples), "loops": sum(loops) / len(loops)}


if __name__ == "__main__":
    main()

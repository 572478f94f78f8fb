"""How many loops does a stop rule save at equal accuracy? An any-time SLR run, answered with many rules and thresholds.

innerloop train recipes/chain/slr_anytime.yaml
python benchmarks/slr_stopping.py runs/chain-slr_anytime --out benchmarks/results/slr_stopping.json    # a minute
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from innerloop.measure.accuracy import accuracy_of, device_name, evaluate, versions, wilson
from innerloop.model import LatentModel
from innerloop.recipe import load_recipe
from innerloop.run import CONFIG

MAX_LOOPS = 8
RULES = [
    {"stop": "none"},
    *({"stop": "delta", "stop_threshold": kappa} for kappa in (0.3, 0.5, 0.7, 1.0, 1.5)),
    *({"stop": "kl", "stop_threshold": kappa} for kappa in (0.5, 1.0, 2.0, 3.0)),
    *({"stop": "kl", "stop_site": "answer", "stop_threshold": kappa} for kappa in (2.0, 3.0, 4.0)),
    *({"stop": "kl", "stop_site": "answer", "stop_threshold": kappa, "patience": 2} for kappa in (2.0, 3.0, 4.0)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load_recipe(Path(options.run) / CONFIG).task
    examples = task.examples("test")
    trained = replace(LatentModel.from_pretrained(options.run).method, stop="none", stop_site="latents", patience=1)
    points = []
    for rule in RULES:
        model = LatentModel.from_pretrained(options.run, replace(trained, **rule))
        predictions = evaluate(model, task, examples, loops=MAX_LOOPS)
        n_correct = sum(p.correct for p in predictions)
        points.append(
            {
                **rule,
                "accuracy": accuracy_of(predictions),
                "ci95": wilson(n_correct, len(predictions)),
                "mean_loops": sum(p.cost.loops for p in predictions) / len(predictions),
            }
        )
        print(points[-1], flush=True)
    report = {
        "run": options.run,
        "max_loops": MAX_LOOPS,
        "n": len(examples),
        "points": points,
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

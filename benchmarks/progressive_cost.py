"""What a training step costs with progressive loss, against one without: processor time, in turns, step by step.

Both start from the same warm-up of the suite and see the same examples.

    python benchmarks/progressive_cost.py --suite runs/suites/evidence/stability --out FILE.json
"""

import argparse
import json
import time
from pathlib import Path

import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.experiments.suite import load_suite
from innerloop.measure.accuracy import device_name, versions

RECIPE = Path(__file__).parents[1] / "recipes/suites/evidence/stability.yaml"
VARIANTS = ("plain", "progressive")
SIZE, SETTLING = 64, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, required=True, help="the folder of the suite's runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite(RECIPE, out=str(options.suite))
    recipes = {name: suite.jobs[name, 0] for name in VARIANTS}
    start = sorted(options.suite.glob("warm_up/*/checkpoint"))[0]
    models = {name: LatentModel.from_pretrained(start, method=r.method).train() for name, r in recipes.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    examples = recipes["plain"].task.examples("train", 10 * SIZE)
    spent = dict.fromkeys(VARIANTS, 0.0)
    for step in range(SETTLING + options.steps):
        chosen = [examples[(step * SIZE + i) % len(examples)] for i in range(SIZE)]
        for name, model in models.items():
            began = time.process_time()
            optimizers[name].zero_grad()
            model(model.batch(model.rows(chosen, seed=f"0/{step}/0/0"))).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            spent[name] += time.process_time() - began if step >= SETTLING else 0.0
    report = {
        "kind": "progressive_cost",
        "steps": options.steps,
        "seconds": {name: seconds / options.steps for name, seconds in spent.items()},
        "ratio": spent["progressive"] / spent["plain"],
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(report["ratio"])


if __name__ == "__main__":
    main()

"""How many passes does an answer take that is filled in from masks? One run, its rules and numbers of passes swept.

Questions of the test split are answered by the same weights with each rule and each number of passes S; nothing is
trained in between.

    innerloop train recipes/latin/llada.yaml
    python benchmarks/denoise.py runs/latin-llada --out benchmarks/results/denoise_latin.json
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from innerloop.decoder.cost import mean_cost
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.measure import evaluate
from innerloop.measure.accuracy import accuracy_of, device_name, versions
from innerloop.measure.statistics import wilson
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.settings import SamplerSettings
from innerloop.train.recipe import load_recipe
from innerloop.train.run import CONFIG

STEPS = (1, 2, 4, 8, None)
RULES: dict[str, SamplerSettings] = {
    **{f"{rule}, S = {s or 'tokens'}": SamplerSettings(commit=rule, steps=s) for rule in ("confidence", "random")
       for s in STEPS},
    **{f"threshold {level}": SamplerSettings(commit="threshold", threshold=level) for level in (0.5, 0.9, 0.99)},
    **{f"blocks of 7, {cache} cache": SamplerSettings(block_length=7, cache=cache) for cache in
       ("none", "prompt", "block", "dual", "delayed")},
    "margin, S = 8": SamplerSettings(commit="margin", steps=8),
    "entropy, S = 8": SamplerSettings(commit="entropy", steps=8),
    **{f"{name}, S = 32": SamplerSettings(commit="remdm", steps=32, remask=remask) for name, remask in
       (("mdlm", {"cap": 0.0}), ("remdm, cap .04", {"cap": 0.04}),
        ("remdm, loop .05", {"cap": 0.05, "when": "loop", "confidence": "mean"}))},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run that denoises")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="answer only the first questions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe, model = load_recipe(options.run / CONFIG), LatentModel.from_pretrained(options.run, device="cpu")
    if not isinstance(model.method, DenoisingMethod):
        raise InputError(f"{options.run} does not denoise: train recipes/latin/llada.yaml")
    task, method = recipe.task, model.method
    examples, points = task.examples("test", options.limit), []
    for name, sampler in RULES.items():
        model.method = replace(method, sampler=sampler)  # type: ignore[call-arg]
        predictions = evaluate(model, task, examples)
        n_correct, cost = sum(p.correct for p in predictions), mean_cost([p.cost for p in predictions])
        points.append(
            {
                "rule": name,
                "accuracy": accuracy_of(predictions),
                "ci95": list(wilson(n_correct, len(predictions))),
                **{key: cost[key] for key in ("passes", "positions", "flops")},
            }
        )
        print(name, f"{points[-1]['accuracy']:.3f}", f"{cost['passes']:.2f}", flush=True)
    report = {
        "kind": "denoise",
        "points": points,
        "gen_length": method.gen_length,
        "n": len(examples),
        "seed": recipe.train.get("seed", 0),
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Do SLR's stabilisers do what they are for? Accuracy against the number of loops, for each alone and together.

Chains of one to three operations; three slots; iteration t must show step t, later ones nothing. A training batch loops
once to four times, drawn at random, so that a chain which is done must be held; tests loop 1 to 16 times. Every variant
continues from the same chain-of-thought checkpoint of its seed, with one budget.

    python benchmarks/slr_stability.py --out benchmarks/results/slr_stability.json        # an hour or more on 2 cores
"""

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from innerloop.measure.accuracy import accuracy_of, device_name, evaluate, versions, wilson
from innerloop.methods import Cot, Slr
from innerloop.model import LatentModel
from innerloop.recipe import BackboneChoice, Recipe
from innerloop.run import run_recipe
from innerloop.tasks import Chain

TASK = Chain(n_ops=3, min_ops=1, modulus=5, n_train=5000, n_valid=100, n_test=500)
BACKBONE = {
    "type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
BARE = {"residual": "none", "rescale": "none", "time": "none", "lora": "none"}
ALL = {"residual": "A", "rescale": "rms", "time": "lookup", "lora": "per_iter"}
VARIANTS = {
    "none": BARE,
    "timestep": {**BARE, "time": "lookup"},
    "LoRA": {**BARE, "lora": "per_iter"},
    "rescale": {**BARE, "rescale": "rms"},
    "residual A": {**BARE, "rescale": "rms", "residual": "A"},
    "residual B": {**BARE, "rescale": "rms", "residual": "B"},
    "all (A)": ALL,
}
TRAINED_LOOPS = 4
TESTED_LOOPS = (1, 2, 3, 4, 6, 8, 12, 16)
WARM_UP, STEPS = 300, 800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.workers, context) as pool:
        seeds = range(options.seeds)
        list(pool.map(warm_up, [folder] * options.seeds, seeds))
        jobs = [(folder, seed, name) for seed in seeds for name in VARIANTS]
        points = []
        for point in pool.map(train_and_test, *zip(*jobs, strict=True)):
            points.append(point)
            print(f"{len(points)}/{len(jobs)} {point['variant']} seed {point['seed']}: {point['accuracy']}", flush=True)
            options.out.write_text(json.dumps(report(points), indent=1) + "\n")


def report(points: list[dict]) -> dict:
    """Return what is written: settings, versions and every point."""
    return {
        "task": {"name": TASK.name, **asdict(TASK)},
        "backbone": BACKBONE,
        "warm_up_steps": WARM_UP,
        "steps": STEPS,
        "trained_loops": TRAINED_LOOPS,
        "n": TASK.n_test,
        "variants": VARIANTS,
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
        "points": points,
    }


def warm_up(folder: str, seed: int) -> None:
    """Train the chain-of-thought checkpoint of a seed."""
    quiet()
    run_recipe(Recipe(TASK, BackboneChoice(scratch=BACKBONE), Cot(), training(WARM_UP, seed), f"{folder}/warm-{seed}"))


def train_and_test(folder: str, seed: int, variant: str) -> dict:
    """Train one variant from its seed's checkpoint and test it at every number of loops."""
    quiet()
    method = Slr(
        n_slots=3,
        slots_per_step=1,
        max_loops=TRAINED_LOOPS,
        loop_sampling="uniform",
        step_weight=1.0,
        step_map="one2one",
        **VARIANTS[variant],
    )
    out = f"{folder}/{variant}-{seed}"
    run_recipe(Recipe(TASK, BackboneChoice(model=f"{folder}/warm-{seed}"), method, training(STEPS, seed), out))
    model, examples = LatentModel.from_pretrained(out), TASK.examples("test")
    accuracy, interval = {}, {}
    for loops in TESTED_LOOPS:
        predictions = evaluate(model, TASK, examples, loops=loops)
        accuracy[loops] = accuracy_of(predictions)
        interval[loops] = wilson(sum(p.correct for p in predictions), len(predictions))
    answers = model.generate([e.question for e in examples[:64]], loops=TESTED_LOOPS[-1], trace=True, max_new_tokens=4)
    deltas = [[entry.delta[0].item() for entry in a.trace.iterations] for a in answers if a.trace is not None]
    change = [sum(column) / len(column) for column in zip(*deltas, strict=True)]
    return {"variant": variant, "seed": seed, "accuracy": accuracy, "ci95": interval, "change": change}


def training(steps: int, seed: int) -> dict:
    """Return the training arguments that all runs share."""
    settings = {"learning_rate": 1e-3, "batch_size": 64, "save_strategy": "no", "use_cpu": True}
    return {**settings, "max_steps": steps, "seed": seed}


def quiet() -> None:
    """One thread for each worker, and no output of the libraries."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    main()

"""What latents beside written tokens are worth after reinforcement: runs answered with them, and with each control.

Runs are those of `innerloop compare recipes/suites/chain_rl.yaml`. The gate is shut (tokens alone are fed), the latent
is another row's, or it is the embedding of the likeliest token.

    python benchmarks/rl_controls.py --threads 1 --runs runs/suites/chain_rl --out benchmarks/results/rl_controls.json
"""

import json
from dataclasses import replace
from pathlib import Path

import record

from innerloop.engine.latent_model import LatentModel
from innerloop.measure.accuracy import accuracy_of, evaluate
from innerloop.measure.statistics import mcnemar
from innerloop.methods import Hrpo, SoftThinking
from innerloop.tasks import Chain
from innerloop.train.recipe import CONFIG, load_recipe

CONTROLS = ("none", "shut", "argmax", "swap")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the suite's runs")
    options = record.begin(parser)
    points = []
    for config in sorted(options.runs.glob(f"*/*/{CONFIG}")):
        recipe = load_recipe(config)
        if isinstance(recipe.method, Hrpo | SoftThinking):
            points += measure(config.parent, recipe.task, options.smoke)
        elif recipe.train.get("algorithm") == "grpo":
            points.append(
                {"variant": config.parent.parent.name, "seed": int(config.parent.name), **trained(config.parent)}
            )
    record.write(options, "rl_controls", {"points": points})


def measure(run: Path, task: Chain, is_smoke: bool) -> list[dict]:
    """Return the accuracy of a run as it was trained, and under each control."""
    examples, rights = task.examples("test", 8 if is_smoke else None), dict[str, list[bool]]()
    points = []
    for control in CONTROLS:
        model = LatentModel.from_pretrained(run / "checkpoint")
        assert model.hybrid is not None
        model.hybrid.hybrid = replace(model.hybrid.hybrid, control=control)
        found = evaluate(model, task, examples)
        rights[control] = [one.correct for one in found]
        points.append(
            {
                "variant": run.parent.name,
                "seed": int(run.name),
                "control": control,
                "accuracy": accuracy_of(found),
                "n": len(found),
                "p": mcnemar(*apart(rights["none"], rights[control])),
                **trained(run),
            }
        )
    return points


def apart(first: list[bool], second: list[bool]) -> tuple[int, int]:
    """Return how many examples the first alone answers rightly, and how many the second."""
    return sum(a and not b for a, b in zip(first, second)), sum(b and not a for a, b in zip(first, second))


def trained(run: Path) -> dict:
    """Return how long a run was trained, and which share of it went into rollouts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["rollout_share"] for line in lines if "rollout_share" in line]
    ratios = [line["hidden_ratio"] for line in lines if "hidden_ratio" in line]
    found: dict = {"seconds": next((line["train_runtime"] for line in lines if "train_runtime" in line), None)}
    if shares:
        found["rollout_share"] = sum(shares) / len(shares)
    return found | ({"hidden_ratio": [ratios[0], ratios[-1]]} if ratios else {})


if __name__ == "__main__":
    main()

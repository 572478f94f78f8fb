"""Do rows that are harder loop more? SLR that may stop at any loop, with a threshold chosen on validation questions.

For each seed: the recipe is trained, `calibrate` chooses the threshold of a rule for a loss of at most one point, and
test questions are answered with it and with fixed numbers of loops. What is reported is how many loops questions of
one, two, .. operations take, and what accuracy and FLOPs that comes to. Where a loop appends latents, the same is how
many latents a question takes. Runs that --runs holds already are not trained again.

    python benchmarks/adaptive_loops.py --out benchmarks/results/adaptive_loops.json     # a few minutes a seed on a CPU
    # latents: the same with --recipe recipes/chain/slr_adaptive_latents.yaml --rule top_prob --site answer
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from innerloop.calibrate.calibrate import calibrate
from innerloop.decoder.cost import mean_cost
from innerloop.engine.latent_model import LatentModel
from innerloop.measure import evaluate
from innerloop.measure.accuracy import Prediction, accuracy_of, device_name, versions
from innerloop.measure.statistics import over_seeds, verdict
from innerloop.model.run_folder import RUN_CHECKPOINT
from innerloop.model.stopping import ruled_by
from innerloop.text.examples import Example
from innerloop.train.recipe import load_recipe
from innerloop.train.run import run_recipe

ROOT = Path(__file__).parents[1]
FIXED = (1, 2, 3, 4, 5, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/chain/slr_anytime.yaml")
    parser.add_argument("--rule", default="kl", help="the stop score")
    parser.add_argument("--site", default="latents", help="where scores of words look: latents or answer")
    parser.add_argument("--runs", type=Path, help="where runs go, one a seed; by default nowhere")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--overrides", nargs=argparse.REMAINDER, default=[], help="of the recipe, such as --task.n_test 9"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as aside:
        runs = options.runs or Path(aside)
        points = [measure(options, runs / str(seed), seed) for seed in options.seeds]
    report = {
        "kind": "adaptive_loops",
        "recipe": str(options.recipe.resolve().relative_to(ROOT)),
        "rule": options.rule,
        "site": options.site,
        "overrides": options.overrides,
        "points": points,
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    for name in ("accuracy", "loops", "latents", "flops"):
        report[name] = over_seeds([point["stopped"][name] for point in points])
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(options: argparse.Namespace, run: Path, seed: int) -> dict:
    """Train, calibrate and test one seed."""
    settings = ["--task.n_valid", "500", "--train.seed", str(seed), "--train.use_cpu", "true", "--out", str(run)]
    recipe = load_recipe(options.recipe, [*settings, "--train.eval_strategy", "no", *options.overrides])
    if not (run / RUN_CHECKPOINT).is_dir():
        run_recipe(recipe)
    model, task = LatentModel.from_pretrained(run), recipe.task
    found = calibrate(model, task, task.examples("valid"), options.rule, site=options.site)
    examples = task.examples("test")
    stopped = evaluate(model, task, examples)
    with ruled_by(model, rule="none"):
        fixed = {loops: evaluate(model, task, examples, loops=loops) for loops in FIXED}
    full = fixed[max(FIXED)]
    compared = verdict([p.correct for p in stopped], [p.correct for p in full], ("stopped", "all loops"), seed)
    point = {
        "seed": seed,
        "threshold": found.report["threshold"],
        "stopped": told(stopped),
        "fixed": {str(loops): told(predictions) for loops, predictions in fixed.items()},
        "verdict": compared.sentence,
        "by_operations": by_operations(examples, stopped, full),
    }
    print(json.dumps(point), flush=True)
    return point


def told(predictions: list[Prediction]) -> dict:
    """Return accuracy, loops, latents and FLOPs."""
    cost = mean_cost([prediction.cost for prediction in predictions])
    told = {"loops": cost["loops"], "latents": cost["thought_tokens"], "flops": cost["flops"]}
    return {"accuracy": accuracy_of(predictions), **told}


def by_operations(examples: list[Example], stopped: list[Prediction], full: list[Prediction]) -> dict:
    """Return what questions of each number of operations take and reach."""
    groups = {}
    for n in sorted({len(example.steps) for example in examples}):
        mine = [i for i, example in enumerate(examples) if len(example.steps) == n]
        groups[str(n)] = {"n": len(mine), **told([stopped[i] for i in mine])}
        groups[str(n)]["accuracy_of_all_loops"] = accuracy_of([full[i] for i in mine])
    return groups


if __name__ == "__main__":
    main()

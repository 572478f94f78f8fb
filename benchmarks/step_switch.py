"""Which steps does a model think, and which does it write? The runs of a suite, looked at step by step.

Questions of the test split are answered by every run of `recipes/suites/chain_switch.yaml`; what is reported is
accuracy, thought tokens, passes, and for steps of one operation and of two the share that was latent, with the
accuracy of questions by how many of their steps have two.

    innerloop compare recipes/suites/chain_switch.yaml
    python benchmarks/step_switch.py runs/suites/chain_switch --out benchmarks/results/step_switch.json
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch

from innerloop.decoder.cost import mean_cost
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.measure import evaluate
from innerloop.measure.accuracy import accuracy_of, device_name, versions
from innerloop.measure.statistics import over_seeds
from innerloop.methods.latent.step_labels import LATENT, chosen_steps, label_steps
from innerloop.text.examples import Example
from innerloop.train.recipe import CONFIG, load_recipe
from innerloop.train.run import FINISHED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="the suite's folder, with VARIANT/SEED below")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="answer only the first questions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = sorted(path.parent for path in options.suite.glob(f"*/*/{FINISHED}") if path.parent.parent.name != "warm_up")
    if not runs:
        raise SystemExit(f"{options.suite} holds no finished run: train it by innerloop compare")
    points = [measure(run, options.limit) for run in runs]
    report = {
        "kind": "step_switch",
        "points": points,
        "variants": means(points),
        "n": points[0]["n"],
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(run: Path, limit: int | None) -> dict:
    """Answer the test questions with a run."""
    model, task = LatentModel.from_pretrained(run), load_recipe(run / CONFIG).task
    examples = task.examples("test", limit)
    predictions = evaluate(model, task, examples)
    answers = model.generate([e.question for e in examples], max_new_tokens=task.max_new_tokens, batch_size=64)
    cost = mean_cost([prediction.cost for prediction in predictions])
    chosen = [chosen_steps(model, answer.ids) for answer in answers]
    hard = [sum(n_operations(example)) - len(example.steps) for example in examples]
    point = {
        "variant": run.parent.name,
        "seed": int(run.name),
        "n": len(examples),
        "accuracy": accuracy_of(predictions),
        **{name: cost[name] for name in ("thought_tokens", "passes", "positions", "flops", "loops")},
        "latent": shares(examples, chosen),
        "accuracy_by_hard_steps": {
            str(n): accuracy_of([p for p, h in zip(predictions, hard) if h == n]) for n in sorted(set(hard))
        },
    }
    try:  # what this model could do without text
        labelled = label_steps(model, examples)
        point["could_be_latent"] = shares(examples, [e.meta[LATENT] for e in labelled])
    except InputError:
        pass  # it has not seen every step in both forms
    print(json.dumps(point), flush=True)
    return point


def n_operations(example: Example) -> list[int]:
    """Return the number of operations of each step."""
    return [len(clause.split()) // 2 for clause in example.question.split(" ; ")[1:]]


def shares(examples: list[Example], latent: list[list[bool]]) -> dict[str, float]:
    """Return the share of latent steps: of all, and by the number of operations of the step.

    Answers that took another number of steps than their question has are left out; ``counted`` is the share of others.
    """
    found, n_counted = defaultdict[str, list[bool]](list), 0
    for example, own in zip(examples, latent):
        if len(own) == len(example.steps):
            n_counted += 1
            for n, is_latent in zip(n_operations(example), own):
                found["all"].append(is_latent)
                found[str(n)].append(is_latent)
    return {
        **{name: sum(values) / len(values) for name, values in sorted(found.items())},
        "counted": n_counted / len(examples),
    }


def means(points: list[dict]) -> list[dict]:
    """Return for each variant the means over seeds, of accuracy with the half width of its 95 % interval."""
    rows = []
    for variant in dict.fromkeys(point["variant"] for point in points):
        own = [point for point in points if point["variant"] == variant]
        accuracy, half = over_seeds([point["accuracy"] for point in own])
        row = {"variant": variant, "seeds": len(own), "accuracy": accuracy, "half": half if len(own) > 1 else None}
        for name in ("thought_tokens", "passes", "flops"):
            row[name] = sum(point[name] for point in own) / len(own)
        for name in ("all", "1", "2", "counted"):
            values = [point["latent"][name] for point in own if name in point["latent"]]
            row[f"latent_{name}"] = sum(values) / len(values) if values else None
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

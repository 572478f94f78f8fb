"""What training did to the loss of a suite's runs: the first and last steps' means, and the largest, run by run.

innerloop compare recipes/suites/smollm2_methods.yaml --task.train TRAIN.jsonl --task.test TEST.jsonl
python benchmarks/losses.py runs/suites/smollm2_methods --out benchmarks/results/smollm2_methods_losses.json
"""

import argparse
import json
from pathlib import Path

from innerloop.measure.accuracy import versions

N = 4  # steps that are averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="the folder of a suite's runs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shared = json.loads((options.suite / "results.json").read_text())
    points = []
    for point in shared["points"]:
        folder = options.suite / point["variant"] / str(point["seed"])
        metrics = folder / "metrics.jsonl"  # of the last stage, where there are several
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        points.append(
            {
                "variant": point["variant"],
                "seed": point["seed"],
                "steps": len(losses),
                "first": sum(losses[:N]) / len(losses[:N]),
                "last": sum(losses[-N:]) / len(losses[-N:]),
                "largest": max(losses),
                "losses": [round(loss, 4) for loss in losses],
            }
        )
        print(f"{point['variant']}: {points[-1]['first']:.3f} to {points[-1]['last']:.3f} in {len(losses)} steps")
    train = shared["suite"].get("train", {})
    report = {"kind": "losses", "train": train, "device": shared["device"], "versions": versions(), "points": points}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

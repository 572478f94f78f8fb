"""How many layers can AdaInfer spare a frozen model on real text, and at what loss? (adainfer.md)

The text are the solutions of GSM8K, written by people. Classifiers are fitted on training problems, thresholds chosen
on validation problems for a stated loss of perplexity, and all is measured on test problems. Where a token leaves is
known from one survey of every exit; what the policies for missing keys and values cost and lose is measured by running.

    make pretrained
    python benchmarks/adainfer.py models/smollm2-135m DATA/gsm8k_nl --out benchmarks/results/adainfer_smollm2.json
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop.calibrate.fit import fit_classifier, fitted_thresholds
from innerloop.calibrate.loop_scan import LoopScan, scan_loop
from innerloop.calibrate.threshold_search import TARGETS
from innerloop.config.stopping import FEATURES
from innerloop.decoder.cost import CostMeter
from innerloop.engine.latent_model import LatentModel
from innerloop.halting.classifier import ExitClassifier
from innerloop.measure.accuracy import device_name, versions
from innerloop.measure.statistics import clopper_pearson
from innerloop.methods import AdaInfer
from innerloop.model.stopping import ruled_by, use_method, use_rule
from innerloop.passes.thought import think
from innerloop.tasks import Gsm8k
from innerloop.text.examples import Example

FILES = {"train": "train.jsonl.gz", "valid": "valid.jsonl", "test": "test.jsonl"}
LOSSES = (0.01, 0.05, 0.2)  # of perplexity, relative, on the validation problems
HARMLESS = 0.05  # nats by which a token that leaves may be less likely
AGREEMENT = 0.97  # of the tokens that leave, where policies are compared
POLICIES = ("lazy_backfill", "propagate", "full_compute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path, help=f"a folder with {', '.join(FILES.values())}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=40, help="problems of each split")
    parser.add_argument("--exits", type=int, nargs="+", default=[20, 22, 24, 26, 27, 28, 29])
    parser.add_argument("--batch-size", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = Gsm8k(**{split: str(options.data / name) for split, name in FILES.items()}, steps="text")
    model = LatentModel.from_pretrained(options.model, AdaInfer(layers=tuple(options.exits)), device="cpu", chat=False)
    seen, seconds = {}, {}
    for split in FILES:
        start = time.perf_counter()
        seen[split] = look(model, task.examples(split, options.examples), options.batch_size)
        seconds[split] = round(time.perf_counter() - start)
        print(f"{split}: {seen[split].scores_TM.shape[1]} tokens, {seconds[split]} s", flush=True)
    ends = torch.tensor([*options.exits, model.backbone.n_layers])
    test = seen["test"]
    report = {
        "model": options.model,
        "layers": options.exits,
        "examples": options.examples,
        "tokens": {split: one.scores_TM.shape[1] for split, one in seen.items()},
        "perplexity": perplexity(test, torch.full_like(test.written_M, len(ends))),
        "fixed": [told(test, torch.full_like(test.written_M, t), ends) for t in range(1, len(ends) + 1)],
        "oracle": told(test, 1 + test.agrees_TM.int().argmax(0), ends),
        "points": list(points(seen, ends)),
        "policies": [],
    }
    fit(model, seen)
    some = task.examples("test", max(options.examples // 4, 1))
    with ruled_by(model, rule="none"):
        report["policies"].append({"policy": "none", **run(model, some, options.batch_size)})
    for policy in POLICIES:
        use_method(model, replace(model.method, kv_missing=policy))  # type: ignore[call-arg]
        report["policies"].append({"policy": policy, **run(model, some, options.batch_size)})
    for point in [*report["fixed"], report["oracle"], *report["points"], *report["policies"]]:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in point.items() if k != "histogram"}, flush=True)
    report |= {"seconds": seconds, "versions": versions(), "device": device_name(torch.device("cpu"))}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def look(model: LatentModel, examples: list[Example], batch_size: int) -> LoopScan:
    """Scan every exit."""
    use_rule(model, rule="classifier", features=FEATURES)
    assert model.loop.stop is not None and model.loop.stop.classifier is not None
    model.loop.stop.classifier.clear()
    return scan_loop(model, examples, batch_size)


def points(seen: dict[str, LoopScan], ends: Tensor) -> Iterator[dict]:
    """Yield every rule with the loosest thresholds that lose no more than was said on the validation problems."""
    for label in ("agree", "harmless"):
        good = {split: labels(one, label) for split, one in seen.items()}
        for rule, scores in rules(seen, good["train"]):
            tried = [fitted_thresholds(scores["valid"], good["valid"], target) for target in TARGETS]
            whole = perplexity(seen["valid"], torch.full_like(seen["valid"].written_M, len(ends)))
            lost = [perplexity(seen["valid"], stops_of(scores["valid"], tau_T)) / whole - 1 for tau_T in tried]
            for loss in LOSSES:
                i = max((i for i, one in enumerate(lost) if one <= loss), default=0)
                about = {**rule, "label": label, "allowed_loss": loss, "target": TARGETS[i]}
                yield about | told(seen["test"], stops_of(scores["test"], tried[i]), ends)


def labels(seen: LoopScan, label: str) -> Tensor:
    """Return where a token may leave (T, M)."""
    assert seen.losses_TM is not None
    return seen.agrees_TM if label == "agree" else seen.losses_TM <= seen.losses_TM[-1] + HARMLESS


def rules(seen: dict[str, LoopScan], good_TM: Tensor) -> Iterator[tuple[dict, dict[str, Tensor]]]:
    """Yield every rule with its scores (T, M) on the validation and the test problems."""
    for features in (("gap", "top", "depth"), FEATURES):
        at = [FEATURES.index(feature) for feature in features]
        x = {split: one.features_TMF[..., at] for split, one in seen.items() if one.features_TMF is not None}
        for kind in ("logistic", "svm_linear", "svm_rbf"):
            for per_step in (False, True):
                classifier = ExitClassifier(features)
                classifier.fill(fit_classifier(x["train"], good_TM, kind, per_step))
                scores = {
                    split: torch.stack([classifier(z, t) for t, z in enumerate(x[split], 1)])
                    for split in ("valid", "test")
                }
                yield {"rule": kind, "features": list(features), "per_layer": per_step}, scores
    for feature in ("gap", "top"):
        at = FEATURES.index(feature)
        scores = {split: one.features_TMF[..., at] for split, one in seen.items() if one.features_TMF is not None}
        yield {"rule": "threshold", "features": [feature], "per_layer": True}, scores


def stops_of(scores_TM: Tensor, tau_T: Tensor) -> Tensor:
    """Return after how many sections tokens leave (M,)."""
    fires_TM = (scores_TM >= tau_T[:, None]).index_fill(0, torch.tensor([len(tau_T) - 1]), True)
    return 1 + fires_TM.int().argmax(0)


def perplexity(seen: LoopScan, stops_M: Tensor) -> float:
    """Return that of the right words where tokens leave after some sections."""
    assert seen.losses_TM is not None
    return math.exp(seen.losses_TM.gather(0, stops_M[None] - 1).double().mean().item())


def told(seen: LoopScan, stops_M: Tensor, ends: Tensor) -> dict:
    """Return layers spared, perplexity and agreement, and what leaving at random with the same histogram would lose."""
    n, n_T = len(stops_M), len(ends)
    n_same = int(seen.agrees_TM.gather(0, stops_M[None] - 1).sum())
    whole, own = (perplexity(seen, of) for of in (torch.full_like(stops_M, n_T), stops_M))
    shares_T = torch.bincount(stops_M, minlength=n_T + 1)[1:].double() / n
    assert seen.losses_TM is not None
    by_chance = math.exp(float(shares_T @ seen.losses_TM.double().mean(1)))
    return {
        "layers_spared": 1 - ends[stops_M - 1].double().mean().item() / ends[-1].item(),
        "perplexity": own,
        "perplexity_loss": own / whole - 1,
        "random_perplexity_loss": by_chance / whole - 1,
        "agreement": n_same / n,
        "agreement_ci95": list(clopper_pearson(n_same, n)),
        "histogram": shares_T.tolist(),
    }


def fit(model: LatentModel, seen: dict[str, LoopScan]) -> None:
    """Give the model the logistic classifier on the words, with thresholds for `AGREEMENT`."""
    features = ("gap", "top", "depth")
    use_rule(model, rule="classifier", features=features)
    assert model.loop.stop is not None and model.loop.stop.classifier is not None
    classifier, at = model.loop.stop.classifier, [FEATURES.index(feature) for feature in features]
    x = {split: one.features_TMF[..., at] for split, one in seen.items() if one.features_TMF is not None}
    numbers = fit_classifier(x["train"], seen["train"].agrees_TM)
    classifier.fill(numbers)
    scores_TM = torch.stack([classifier(z, t) for t, z in enumerate(x["valid"], 1)])
    classifier.fill(numbers | {"tau_T": fitted_thresholds(scores_TM, seen["valid"].agrees_TM, AGREEMENT)})


@torch.no_grad()
def run(model: LatentModel, examples: list[Example], batch_size: int) -> dict:
    """Read solutions; return perplexity, the share of layers run and the FLOPs, all as measured."""
    loss, n, flops, n_run, n_layers, start = 0.0, 0, 0.0, 0.0, 0, time.perf_counter()
    for first in range(0, len(examples), batch_size):
        batch = model.batch(model.rows(examples[first : first + batch_size]))
        meter = CostMeter(len(batch), model.device)
        thought = think(model.method.plan, model.loop, batch, model.new_context(batch, meter))
        logits = model.written_logits(batch, thought)
        loss += cross_entropy(logits.float(), batch.targets_U, reduction="sum").item()
        n += len(batch.targets_U)
        flops += sum(cost.flops for cost in meter.costs(model.backbone))
        assert meter.layer_positions is not None
        n_run += meter.layer_positions.sum().item()
        n_layers += int(batch.mask_BS.sum()) * model.backbone.n_layers
    return {
        "tokens": n,
        "perplexity": math.exp(loss / n),
        "layers_run": n_run / n_layers,  # of all tokens: the question's, and those that a later one needed, among them
        "flops": flops,  # with the probes, without the head of what is written
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()

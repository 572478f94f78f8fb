"""How early may a loop stop? Picks the threshold of a stop rule for a stated loss on validation data (halting.md, 5).

    model = LatentModel.from_pretrained("runs/chain-slr_anytime")
    found = calibrate(model, task, task.examples("valid"), rule="kl", max_drop=0.01)
    found.save("runs/chain-slr_anytime", adopt=True)         # calibration.json; from now on the run stops by this rule

A rule that is learned offline (classifier, mlp_probe) is first fitted, to examples of its own. Where whole rows stop,
all thresholds follow from an answer at every depth; where tokens stop one by one, thresholds are tried by bisection.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from innerloop.calibrate.loop_scan import use_rule
from innerloop.calibrate.threshold_search import Goal, Label, Tryout, told_of
from innerloop.config.stopping import StopKind
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError, refuse
from innerloop.halting.rule import GATES
from innerloop.measure.accuracy import device_name, versions
from innerloop.measure.parts import Parts
from innerloop.model import checkpoint
from innerloop.tasks import Task
from innerloop.text.examples import Example

REPORT = "calibration.json"
FEWEST = 2  # examples
CALIBRATION_PARTS = "calibration.parts.json"


@dataclass
class Calibration:
    """What was chosen, and what it does.

    Attributes:
        model: the model, which now stops by the chosen rule.
        report: the contents of calibration.json.
    """

    model: LatentModel
    report: dict[str, Any]

    def save(self, run: str | Path, adopt: bool = False) -> Path:
        """Write RUN/calibration.json; with ``adopt`` the saved run stops by the chosen rule from now on."""
        path = Path(run) / REPORT
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(self.report, indent=2) + "\n")
        if adopt:
            adopt_rule(self.model, run)
        return path


def calibrate(
    model: LatentModel,
    task: Task,
    examples: Sequence[Example],
    rule: StopKind = "kl",
    max_drop: float = 0.01,
    *,
    agreement: float | None = None,
    mean_loops: float | None = None,
    check: Sequence[Example] = (),
    fit_share: float = 0.5,
    label: Label = "agree",
    min_rows: int = 50,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda done: None,
    parts: Parts | None = None,
    **options: Any,
) -> Calibration:
    """Choose the loosest threshold that loses no more than was said, and leave the model with it.

    Args:
        model: the model; its weights stay, but for those of a rule that is fitted.
        task: checks answers.
        examples: validation data.
        rule: the stop score.
        max_drop: the most that accuracy may fall, as a share of all examples.
        agreement: instead, the least share of answers (of tokens, where the loop runs inside them) as at full depth.
        mean_loops: instead, the most iterations on average; layers, where tokens leave between them.
        check: further examples, on which what was chosen is measured once more.
        fit_share: the share of examples that a learned rule is fitted to; the others choose its thresholds.
        label: a classifier or probe learns whether an iteration agrees with the last, or whether it is correct.
        min_rows: fewer rows than that open no exit to a classifier.
        batch_size: rows per batch.
        max_new_tokens: the most tokens to write per example; None: as the task says.
        seed: of draws in fitting.
        progress: told what has been done.
        parts: where answers are kept as soon as they are known, and taken from if they are there.
        options: further settings of stopping, such as patience, min_loops, check_every or stop_features.
    """
    goal, start = Goal(max_drop, agreement, mean_loops), time.perf_counter()
    gate = None if model.loop.stop is None else model.loop.stop.gate
    refuse(
        (rule in ("none", "random"), f"stop={rule} has no threshold to choose: calibrate another score"),
        (rule in GATES and gate is None, f"stop={rule} is learned with the model: train it with stop={rule} first"),
        (len(examples) < FEWEST, f"calibrating needs at least {FEWEST} examples"),
        (not 0 < fit_share < 1, "fit_share is a share between 0 and 1"),
    )
    use_rule(model, stop=rule, stop_threshold=math.inf, **options)
    n_fit = 0
    if rule in ("classifier", "mlp_probe"):
        n_fit = min(max(round(fit_share * len(examples)), 1), len(examples) - 1)
    tryout = Tryout(model, task, batch_size, max_new_tokens, seed, progress, Parts() if parts is None else parts)
    if n_fit:
        tryout.fit(examples[:n_fit], label)
    search = tryout.search(examples[n_fit:], min_rows)
    best = search.best(goal)
    chosen = search.use(best)
    report = {"rule": rule, **told_of(chosen), "method": checkpoint.method_settings(model.method)}
    report["n"] = {"fit": n_fit, "choose": len(search.examples), "check": len(check)}
    report |= search.report(best, goal)
    if check:
        found = tryout.ask(check)
        full = tryout.ask_at_full_depth(check)
        report["check"] = {"full": full.told(), "chosen": found.compared(full)}
    report |= {"seconds": round(time.perf_counter() - start, 1), "versions": versions()}
    return Calibration(model, report | {"device": device_name(model.device)})


def adopt_rule(model: LatentModel, run: str | Path) -> None:
    """Let a saved run stop by the rule that a model, loaded from it, stops by now; nothing else of it changes."""
    folder, rule = Path(checkpoint.resolve(run)), "loop.stop."
    settings, parts = checkpoint.read_settings(folder), folder / checkpoint.PARTS
    if settings["method"]["name"] != model.method.name:
        raise InputError(f"{folder} is a run of '{settings['method']['name']}', not of '{model.method.name}'")
    own = {name: tensor for name, tensor in checkpoint.trained_parts(model).items() if name.startswith(rule)}
    kept = {name: tensor for name, tensor in load_file(parts).items() if not name.startswith(rule)}
    aside = parts.with_name(f".{parts.name}.writing")
    save_file({**kept, **{name: tensor.contiguous() for name, tensor in own.items()}}, aside)
    aside.replace(parts)
    settings["method"] = checkpoint.method_settings(model.method)
    checkpoint.write_text(folder / checkpoint.SETTINGS, json.dumps(settings, indent=2) + "\n")

"""How early may a loop stop? Picks the threshold of a stop rule for a stated loss on validation data (halting.md, 5).

    model = LatentModel.from_pretrained("runs/chain-slr_anytime")
    found = calibrate(model, task, task.examples("valid"), "kl", CalibrationSettings(max_drop=0.01))
    found.save("runs/chain-slr_anytime", adopt=True)         # calibration.json; from now on the run stops by this rule

A rule that is learned offline (classifier, mlp_probe) is first fitted, to examples of its own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from innerloop.calibrate.fit import check_sklearn
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.calibrate.threshold_search import Answers, ThresholdSearch, summary
from innerloop.config.stopping import StopKind
from innerloop.disk.files import write_text
from innerloop.disk.folders import link, own_files, replacing_folder
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError, refuse
from innerloop.halting.rule import GATES
from innerloop.measure.accuracy import device_name, versions
from innerloop.measure.result_cache import ResultCache
from innerloop.methods import name_of
from innerloop.model import checkpoint, run_folder
from innerloop.model.stopping import use_rule
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
        write_text(path, json.dumps(self.report, indent=2) + "\n")
        if adopt:
            adopt_rule(self.model, run)
        return path


def check_rule(rule: StopKind) -> None:
    """Refuse a rule that has no threshold, and one that cannot be fitted for want of a library."""
    refuse((rule in ("none", "random"), f"stop.rule={rule} has no threshold to choose: calibrate another score"))
    if rule == "classifier":
        check_sklearn()


def calibrate(
    model: LatentModel,
    task: Task,
    examples: Sequence[Example],
    rule: StopKind = "kl",
    settings: CalibrationSettings | None = None,
    check: Sequence[Example] = (),
    progress: Callable[[str], None] = lambda done: None,
    cache: ResultCache | None = None,
    elsewhere: Answers | None = None,
    **options: Any,
) -> Calibration:
    """Choose the loosest threshold that loses no more than was said, and leave the model with it.

    Args:
        model: the model; its weights stay, but for those of a rule that is fitted.
        task: checks answers.
        examples: validation data.
        rule: the stop score.
        settings: what may be lost, and how the threshold is found.
        check: further examples, on which what was chosen is measured once more.
        progress: told what has been done.
        cache: where answers are kept as soon as they are known, and taken from if they are there.
        elsewhere: answers examples in place of this process, as on a cluster.
        options: further settings of stopping, such as patience, min_loops, check_every or features; those not named are
            the model's own, if it stops by this rule already, or else the usual ones.
    """
    check_rule(rule)
    settings, start = settings or CalibrationSettings(), time.perf_counter()
    gate = None if model.loop.stop is None else model.loop.stop.gate
    refuse(
        (rule in GATES and gate is None, f"stop.rule={rule} is learned with the model: train it with that rule first"),
        (len(examples) < FEWEST, f"calibrating needs at least {FEWEST} examples"),
    )
    stop = getattr(model.method, "stop", None)
    own = asdict(stop) if stop is not None and stop.rule == rule else {}
    use_rule(model, **{**own, **options, "rule": rule, "threshold": math.inf})
    search, n_fit = ThresholdSearch(model, task, settings, progress, cache or ResultCache(), elsewhere), 0
    if rule in ("classifier", "mlp_probe"):
        n_fit = min(max(round(settings.fit_share * len(examples)), 1), len(examples) - 1)
        search.fit(examples[:n_fit])
    search.look(examples[n_fit:])
    best = search.best()
    search.use(best)
    report = {"rule": rule, **search.told(best), "method": checkpoint.method_settings(model.method)}
    report["n"] = {"fit": n_fit, "choose": len(examples) - n_fit, "check": len(check)}
    report |= search.report(best)
    if check:
        found, full = search.answers(check), search.answers(check, math.inf)
        report["check"] = {"full": summary(full), "chosen": summary(found, full)}
    report |= {"seconds": round(time.perf_counter() - start, 1), "versions": versions()}
    return Calibration(model, report | {"device": device_name(model.device)})


def adopt_rule(model: LatentModel, run: str | Path) -> None:
    """Let a saved run stop by the rule that a model, loaded from it, stops by now; nothing else of it changes."""
    folder, rule = Path(run_folder.resolve(run)), "loop.stop."
    settings, parts = run_folder.read_settings(folder), folder / run_folder.PARTS
    if settings["method"]["name"] != name_of(model.method):
        raise InputError(f"{folder} is a run of '{settings['method']['name']}', not of '{model.method.name}'")
    own = {name: tensor for name, tensor in checkpoint.trained_parts(model).items() if name.startswith(rule)}
    kept = {name: tensor for name, tensor in load_file(parts).items() if not name.startswith(rule)}
    settings["method"] = checkpoint.method_settings(model.method)
    with replacing_folder(folder) as aside:  # parts and settings in one step
        for name in own_files(folder):
            if name not in (run_folder.PARTS, run_folder.SETTINGS):
                link(folder / name, aside / name)
        save_file({**kept, **{name: tensor.contiguous() for name, tensor in own.items()}}, aside / run_folder.PARTS)
        (aside / run_folder.SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

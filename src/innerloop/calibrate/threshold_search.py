"""One scan over thresholds: where rows would stop at each, what that loses, and which is the loosest that will do.

Where whole rows stop, all follows from an answer at every depth; where tokens stop one by one, thresholds are tried by
bisection (halting.md, 5).

Shapes: `K` thresholds, `T` iterations, `M` rows or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from innerloop.calibrate.fit import fit_classifier, fit_probe, fitted_thresholds
from innerloop.calibrate.loop_scan import LoopScan, scan_loop
from innerloop.calibrate.oracles import first_showing
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import refuse
from innerloop.halting.rule import StopRule
from innerloop.measure.result_cache import ResultCache, digest, digest_of
from innerloop.measure.statistics import clopper_pearson, wilson
from innerloop.model import checkpoint
from innerloop.model.frozen import fingerprint
from innerloop.model.stopping import ruled_by, use_rule
from innerloop.tasks import Task
from innerloop.text.codec import to_json
from innerloop.text.examples import Example

TARGETS = (1.0, 0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3, 0.0)
"""Agreements that a classifier's thresholds are tried for, from strict to loose."""
MOST_TRIED = 64  # thresholds of a score
MOST_TOKENS = 20_000  # that are kept of a scan

Answers = Callable[["ThresholdSearch", Sequence[Example]], dict[str, Any]]
"""Answers examples by the rule that a search's model stops by now."""


@dataclass
class ThresholdSearch:
    """The thresholds that a model's rule may have, and what is known of each.

    Attributes:
        cache: keeps the answers to each set of questions under each rule.
        elsewhere: answers examples in place of this process; see `answers` for what it returns.
        full: the answers at full depth; set by `look`, as all that follow.
        seen: the scan of the examples' loops.
        depths: the answers after 1..T iterations, where whole rows stop.
        agrees_TM: whether an answer, or a token, is the same as at full depth.
        thresholds: from strict to loose, a number or a classifier's own for each iteration; the first stops nowhere.
        stops_KM: after how many iterations rows then stop.
    """

    model: LatentModel
    task: Task
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    progress: Callable[[str], None] = lambda done: None
    cache: ResultCache = field(default_factory=ResultCache)
    elsewhere: Answers | None = None
    tried: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def rule(self) -> StopRule:
        """The rule that the model stops by."""
        assert self.model.loop.stop is not None
        return self.model.loop.stop

    def answers(self, examples: Sequence[Example], depth: float | None = None) -> dict[str, Any]:
        """Answer examples, stopping as the model now does, or after so many iterations without looking at anything.

        Return lists by name, an entry for each example: whether it is ``correct``, and its ``texts``, ``loops`` and
        ``flops``. What was answered so before is taken as it is.
        """
        if depth is not None:
            with ruled_by(self.model, rule="fixed", threshold=float(depth)):
                return self.answers(examples)
        rule, method = self.model.loop.stop, checkpoint.method_settings(self.model.method)
        asked = [digest_of(examples), self.settings.batch_size, self.settings.max_new_tokens]
        known: dict[str, Any] = self.cache(
            f"answers {digest([method, None if rule is None else fingerprint(rule), *asked])}",
            lambda: self.answer(examples) if self.elsewhere is None else self.elsewhere(self, examples),
        )
        return known

    def answer(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Answer examples; see `answers`."""
        model, task, settings = self.model, self.task, self.settings
        n_new = task.max_new_tokens if settings.max_new_tokens is None else settings.max_new_tokens
        questions = [example.question for example in examples]
        found = model.generate(questions, max_new_tokens=n_new, batch_size=settings.batch_size)
        texts, correct, loops = [], [], []
        for example, row, one in zip(examples, model.prompts(questions), found):
            answer = task.extract(one.text)
            texts.append(one.text if answer is None else answer)
            correct.append(answer is not None and task.is_correct(answer, example.answer))
            inside = [n for _, n in one.depths[len(row) - 1 :]]  # of the tokens that write
            loops.append(sum(inside) / len(inside) if inside else one.cost.loops)
        return {"correct": correct, "texts": texts, "loops": loops, "flops": [one.cost.flops for one in found]}

    def at_depths(self, examples: Sequence[Example], n_T: int) -> list[dict[str, Any]]:
        """Answer examples after 1, 2, ..., T iterations."""
        found = []
        for depth in range(1, n_T + 1):
            found.append(self.answers(examples, depth))
            self.progress(f"answered {len(examples)} questions at depth {depth} of {n_T}")
        return found

    def scan(self, examples: Sequence[Example], wants_states: bool = False) -> LoopScan:
        """Scan the loop over examples."""
        most = None if self.model.depth is None else MOST_TOKENS // (8 if wants_states else 1)
        seen = scan_loop(self.model, examples, self.settings.batch_size, wants_states, most, self.settings.seed)
        refuse((len(seen.scores_TM) < 2, "the loop has a single iteration, so there is nothing that could stop early"))
        return seen

    def fit(self, examples: Sequence[Example]) -> None:
        """Fit the rule's classifier or its probe."""
        rule, options, seed = self.rule, self.model.method.stop, self.settings.seed
        if rule.classifier is not None:
            rule.classifier.clear()
        seen, wants_same = self.scan(examples, rule.probe is not None), self.settings.label == "agree"
        if seen.tops_TM is not None:
            wanted_M = seen.tops_TM[-1] if wants_same else seen.gold_M
            labels_TM = torch.as_tensor(seen.tops_TM == wanted_M)
        else:
            depths = self.at_depths(examples, len(seen.scores_TM))
            labels_TM = agreement(depths, depths[-1]) if wants_same else correctness(depths)
        if rule.classifier is not None and seen.features_TMF is not None:
            kind, per_step = options.classifier, options.per_step
            rule.classifier.fill(fit_classifier(seen.features_TMF, labels_TM, kind, per_step, seed))
        elif seen.states_TMD is not None:
            fit_probe(rule, seen.states_TMD, labels_TM, seed)
        self.progress(f"fitted the {rule.kind} to {labels_TM[:-1].numel()} iterations")

    def look(self, examples: Sequence[Example]) -> None:
        """Find the thresholds that tell examples apart, and where each would stop them."""
        self.examples, self.full = examples, self.answers(examples, math.inf)
        self.seen, self.depths = self.scan(examples), list[dict[str, Any]]()
        self.progress(f"answered {len(examples)} questions at full depth")
        self.agrees_TM = None if self.model.depth is None else self.seen.agrees_TM
        if self.model.depth is None and self.model.block() is None and self.rule.kind != "act":
            self.depths = [*self.at_depths(examples, len(self.seen.scores_TM) - 1), self.full]
            self.agrees_TM = agreement(self.depths, self.full)
        scores_TM, options = self.seen.scores_TM, self.model.method.stop
        self.thresholds: list[float] | list[Tensor]
        if self.rule.classifier is not None and self.agrees_TM is not None:
            never, rows = torch.full((len(scores_TM),), math.inf), self.settings.min_rows
            self.thresholds = [never]
            self.thresholds += [fitted_thresholds(scores_TM, self.agrees_TM, t, rows, options) for t in TARGETS]
        else:
            known = scores_TM[:-1][scores_TM[:-1].isfinite()]
            silent = f"stop.rule={self.rule.kind} says nothing before the last of {len(scores_TM)} iterations"
            refuse((len(known) == 0, f"{silent}: calibrate another score, or a loop of more iterations"))
            self.thresholds = thresholds_between(known)
        self.stops_KM = torch.stack([self.seen.stops_at(options, threshold) for threshold in self.thresholds])

    def use(self, i: int) -> None:
        """Let the model stop by the i-th threshold."""
        use_rule(self.model, **{**asdict(self.model.method.stop), "threshold": self.told(i)["threshold"]})  # type: ignore[call-overload]
        threshold, classifier = self.thresholds[i], self.rule.classifier
        if classifier is not None and isinstance(threshold, Tensor):
            classifier.tau_T = threshold.to(classifier.tau_T.device)

    def told(self, i: int) -> dict[str, Any]:
        """Return the i-th threshold as calibration.json has it; null for an iteration that is closed."""
        threshold = self.thresholds[i]
        if isinstance(threshold, Tensor):
            return {"threshold": None, "thresholds": to_json(threshold.tolist())}
        return {"threshold": threshold, "thresholds": None}

    def effect(self, i: int) -> dict[str, Any]:
        """Return what the i-th threshold does when the examples are answered with it."""
        if i not in self.tried:
            self.use(i)
            self.tried[i] = self.answers(self.examples)
            self.progress(f"tried {len(self.tried)} thresholds")
        return summary(self.tried[i], self.full)

    def foreseen(self) -> dict[str, Tensor]:
        """Return what each threshold does (K,), as far as answers at every depth, or what tokens show, tell."""
        assert self.agrees_TM is not None
        tables = {"accuracy": correctness(self.depths)} if self.depths else {}
        tables["agreement"] = self.agrees_TM
        found = {name: of_TM.gather(0, self.stops_KM - 1).double().mean(1) for name, of_TM in tables.items()}
        return found | {"mean_loops": self.stops_KM.double().mean(1)}

    def best(self) -> int:
        """Return the index of the threshold that meets the goal: the loosest; for mean_loops, the strictest."""
        settings, n, full = self.settings, len(self.thresholds), summary(self.full)
        wants_loops = settings.mean_loops is not None
        if self.depths or (settings.agreement is not None and self.agrees_TM is not None):
            known = self.foreseen()
            good = torch.nonzero(settings.is_met(known, full))[:, 0].tolist()
            if not self.depths:
                return max(good, default=0)
            pick, default = (max, n - 1) if wants_loops else (min, 0)
            return int(pick(good, default=default, key=lambda i: known["mean_loops"][i]))
        strict, loose = (-1, n - 1) if wants_loops else (0, n)
        while loose - strict > 1:  # the looser, the less is run and the more is lost
            middle = (strict + loose) // 2
            if settings.is_met(self.effect(middle), full) == wants_loops:
                loose = middle
            else:
                strict = middle
        return loose if wants_loops else strict

    def report(self, i: int) -> dict[str, Any]:
        """Return what the i-th threshold does, and what is known besides."""
        chosen, full, stops_M, settings = self.effect(i), summary(self.full), self.stops_KM[i], self.settings
        known = {} if self.agrees_TM is None else {name: of.tolist() for name, of in self.foreseen().items()}
        goal = {name: getattr(settings, name) for name in ("max_drop", "agreement", "mean_loops")}
        met = chosen if self.depths or not known else chosen | {"agreement": known["agreement"][i]}
        told: dict[str, Any] = {"goal": {**goal, "is_met": settings.is_met(met, full)}, "full": full, "chosen": chosen}
        if self.depths:
            shares = (torch.bincount(stops_M, minlength=len(self.depths) + 1)[1:] / len(stops_M)).tolist()
            fixed = [summary(at)["accuracy"] for at in self.depths]
            told |= {"fixed": fixed, "random": sum(share * one for share, one in zip(shares, fixed))}
            rows = zip(known["accuracy"], known["agreement"], known["mean_loops"])
            effects = [dict(zip(("accuracy", "agreement", "loops"), row)) for row in rows]
            told |= {"histogram": shares, "frontier": [self.told(k) | one for k, one in enumerate(effects)]}
        elif known:
            told["tokens"] = tokens_report(self.seen, stops_M)
        return told


def summary(found: dict[str, Any], full: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what calibration.json says of answers, next to those at full depth where these are others."""
    n, n_correct = len(found["texts"]), sum(found["correct"])
    loops, flops = (sum(found[name]) / n for name in ("loops", "flops"))
    told = {"accuracy": n_correct / n, "ci95": list(wilson(n_correct, n)), "mean_loops": loops, "flops": flops}
    if full is None:
        return told
    whole, n_same = summary(full), int(agreement([found], full).sum())
    return told | {
        "drop": whole["accuracy"] - told["accuracy"],
        "loops_saved": 1 - loops / whole["mean_loops"],
        "flops_saved": 1 - flops / whole["flops"],
        "agreement": n_same / n,
        "agreement_ci95": list(clopper_pearson(n_same, n)),
    }


def agreement(found: Sequence[dict[str, Any]], full: dict[str, Any]) -> Tensor:
    """Return which of some sets of answers (T, M) are the same as at full depth."""
    return torch.tensor([[one == two for one, two in zip(each["texts"], full["texts"])] for each in found])


def correctness(found: Sequence[dict[str, Any]]) -> Tensor:
    """Return which of some sets of answers (T, M) are right."""
    return torch.tensor([each["correct"] for each in found])


def tokens_report(seen: LoopScan, stops_M: Tensor) -> dict[str, Any]:
    """Return what a scan says of tokens that write and stop so, with the gold answers before them.

    ``oracle``: the mean iterations of tokens that stop as soon as they show what they will, or what is right;
    ``right`` is the share of tokens that show what is right at some iteration, ``right_at_last`` at the last.
    """
    tops_TM, gold_M, same_M = seen.tops_TM, seen.gold_M, seen.agrees_TM.gather(0, stops_M[None] - 1)[0]
    assert tops_TM is not None and gold_M is not None
    n, n_same, exits = len(same_M), int(same_M.sum()), []
    for t in range(1, len(tops_TM) + 1):
        n_here, n_right = int((stops_M == t).sum()), int(same_M[stops_M == t].sum())
        exits.append({"n": n_here, "agreement_ci95": list(clopper_pearson(n_right, n_here)) if n_here else None})
    oracle = {"agree": first_showing(tops_TM, tops_TM[-1]), "correct": first_showing(tops_TM, gold_M)}
    oracle |= {"right": (tops_TM == gold_M).any(0), "right_at_last": tops_TM[-1] == gold_M}
    return {
        "n": n,
        "agreement": n_same / n,
        "agreement_ci95": list(clopper_pearson(n_same, n)),
        "mean_iterations": stops_M.double().mean().item(),
        "iterations": exits,
        "oracle": {name: values_M.double().mean().item() for name, values_M in oracle.items()},
    }


def thresholds_between(scores: Tensor, most: int = MOST_TRIED) -> list[float]:
    """Return thresholds that tell scores apart, from one above all to one below all; of many, some spread evenly."""
    known = scores.double().unique().flip(0)
    if bool((known == known.round()).all()):  # counts
        return [known[0].item() + 1, *known.tolist()]
    if len(known) > most:
        known = known[torch.linspace(0, len(known) - 1, most).round().long()]
    between = ((known[1:] + known[:-1]) / 2).tolist()
    return [known[0].item() + 1, *between, known[-1].item() - 1]

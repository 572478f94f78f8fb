"""Trying ways to stop: what a model answers with each, and what its survey foretells (halting.md, 5).

What was answered is kept part by part (`measure/parts.py`): one part for each way to stop and set of questions.

Shapes: `T` iterations, `M` rows or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from innerloop.calibrate.fit import fit_judge, fit_probe, fitted_thresholds
from innerloop.calibrate.loop_scan import Survey, ruled_by, survey, use_rule
from innerloop.calibrate.oracles import first_agreeing, first_correct
from innerloop.config.stopping import StopSettings
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import refuse
from innerloop.measure.parts import Parts, digest, digest_of
from innerloop.measure.statistics import clopper_pearson, wilson
from innerloop.model import checkpoint
from innerloop.model.frozen import fingerprint
from innerloop.tasks import Task
from innerloop.text.examples import Example

Label = Literal["agree", "correct"]
TARGETS = (1.0, 0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3, 0.0)
"""Agreements that a classifier's thresholds are tried for, from strict to loose."""
MOST_TRIED = 64  # thresholds of a score
MOST_TOKENS = 20_000  # that are kept of a survey


@dataclass(frozen=True)
class Goal:
    """What may be lost: accuracy; or else how much must agree with full depth, or how many iterations there may be."""

    max_drop: float
    agreement: float | None = None
    mean_loops: float | None = None

    def __post_init__(self) -> None:
        refuse(
            (self.agreement is not None and self.mean_loops is not None, "give agreement or mean_loops, not both"),
            (self.max_drop < 0, "max_drop cannot be negative"),
            (not 0 <= (self.agreement or 0) <= 1, "agreement is a share between 0 and 1"),
        )

    def is_met(self, effect: Effect, full: float) -> bool:
        """Whether a way to stop is good enough; ``full`` is the accuracy without."""
        if self.agreement is not None:
            return effect.agreement >= self.agreement
        if self.mean_loops is not None:
            return effect.loops <= self.mean_loops
        return effect.accuracy >= full - self.max_drop - 1e-9


@dataclass(frozen=True)
class Effect:
    """What a way to stop does: the share of right answers, of answers as at full depth, and the mean iterations."""

    accuracy: float
    agreement: float
    loops: float


@dataclass
class Answers:
    """What a model answered: whether rightly, what, and at what cost each."""

    correct_M: Tensor
    texts: list[str]
    loops_M: Tensor
    flops_M: Tensor

    def kept(self) -> dict[str, Any]:
        """Return what JSON holds of them."""
        loops, flops = self.loops_M.tolist(), self.flops_M.tolist()
        return {"correct": self.correct_M.tolist(), "texts": self.texts, "loops": loops, "flops": flops}

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Answers:
        """Return the answers that JSON held."""
        loops_M, flops_M = (torch.tensor(kept[name], dtype=torch.float64) for name in ("loops", "flops"))
        return cls(torch.tensor(kept["correct"]), kept["texts"], loops_M, flops_M)

    def agrees_M(self, other: Answers) -> Tensor:
        """Return which answers are the same."""
        return torch.tensor([one == two for one, two in zip(self.texts, other.texts)])

    def effect(self, full: Answers) -> Effect:
        """Return what these are, next to those at full depth."""
        agreement = self.agrees_M(full).double().mean().item()
        return Effect(self.correct_M.double().mean().item(), agreement, self.loops_M.mean().item())

    def told(self) -> dict[str, Any]:
        """Return what goes into the report."""
        n, n_correct = len(self.texts), int(self.correct_M.sum())
        return {
            "accuracy": n_correct / n,
            "ci95": list(wilson(n_correct, n)),
            "mean_loops": self.loops_M.mean().item(),
            "flops": self.flops_M.mean().item(),
        }

    def compared(self, full: Answers) -> dict[str, Any]:
        """Return what goes into the report, next to the answers at full depth."""
        n, n_same, own, whole = len(self.texts), int(self.agrees_M(full).sum()), self.told(), full.told()
        return own | {
            "drop": whole["accuracy"] - own["accuracy"],
            "loops_saved": 1 - own["mean_loops"] / whole["mean_loops"],
            "flops_saved": 1 - own["flops"] / whole["flops"],
            "agreement": n_same / n,
            "agreement_ci95": list(clopper_pearson(n_same, n)),
        }


@dataclass
class Choice:
    """A way to stop: a threshold, or a classifier's own for each iteration; and where rows then stop (M,)."""

    threshold: float | None
    tau_T: Tensor | None
    stops_M: Tensor


@dataclass
class Tryout:
    """A model that is asked over and over."""

    model: LatentModel
    task: Task
    batch_size: int
    max_new_tokens: int | None
    seed: int
    progress: Callable[[str], None]
    parts: Parts = field(default_factory=Parts)

    @property
    def is_inside(self) -> bool:
        """Whether the loop runs inside the tokens, which stop one by one."""
        return self.model.depth is not None

    def ask(self, examples: Sequence[Example]) -> Answers:
        """Answer examples, stopping as the model now does; what was answered so before is taken as it is."""
        rule, settings = self.model.loop.stop, checkpoint.method_settings(self.model.method)
        weights = None if rule is None else fingerprint(rule)
        decides = [settings, weights, digest_of(examples), self.batch_size, self.max_new_tokens]
        return Answers.read(self.parts(f"answers {digest(decides)}", lambda: self._ask(examples).kept()))

    def _ask(self, examples: Sequence[Example]) -> Answers:
        model, task, questions = self.model, self.task, [example.question for example in examples]
        n_new = task.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        found = model.generate(questions, max_new_tokens=n_new, batch_size=self.batch_size)
        texts, correct, loops = [], [], []
        for example, row, one in zip(examples, model.prompts(questions), found):
            answer = task.extract(one.text)
            texts.append(one.text if answer is None else answer)
            correct.append(answer is not None and task.is_correct(answer, example.answer))
            inside = [n for _, n in one.depths[len(row) - 1 :]]  # of the tokens that write
            loops.append(sum(inside) / len(inside) if inside else one.cost.loops)
        flops = torch.tensor([one.cost.flops for one in found], dtype=torch.float64)
        return Answers(torch.tensor(correct), texts, torch.tensor(loops, dtype=torch.float64), flops)

    def ask_at_full_depth(self, examples: Sequence[Example]) -> Answers:
        """Answer examples with all iterations; nothing is looked at."""
        with ruled_by(self.model, stop="fixed", stop_threshold=math.inf):
            return self.ask(examples)

    def at_depths(self, examples: Sequence[Example], n_T: int) -> list[Answers]:
        """Answer examples after 1, 2, ..., T iterations."""
        found = []
        for loops in range(1, n_T + 1):
            with ruled_by(self.model, stop="fixed", stop_threshold=float(loops)):
                found.append(self.ask(examples))
            self.progress(f"answered {len(examples)} questions at depth {loops} of {n_T}")
        return found

    def look(self, examples: Sequence[Example], wants_states: bool = False) -> Survey:
        """Survey examples."""
        most = MOST_TOKENS // (8 if wants_states else 1) if self.is_inside else None
        seen = survey(self.model, examples, self.batch_size, wants_states, most, self.seed)
        refuse((len(seen.scores_TM) < 2, "the loop has a single iteration, so there is nothing that could stop early"))
        return seen

    def fit(self, examples: Sequence[Example], label: Label) -> None:
        """Fit a classifier or a probe."""
        rule, settings = self.model.loop.stop, self.model.method.loop
        assert rule is not None
        if rule.judge is not None:
            rule.judge.clear()
        seen = self.look(examples, wants_states=rule.probe is not None)
        if seen.tops_TM is not None and seen.gold_M is not None:
            labels_TM = seen.agrees_TM if label == "agree" else seen.tops_TM == seen.gold_M
        else:
            depths = self.at_depths(examples, len(seen.scores_TM))
            labels_TM = torch.stack([a.agrees_M(depths[-1]) if label == "agree" else a.correct_M for a in depths])
        if rule.judge is not None and seen.features_TMF is not None:
            kind, per_step = settings.stop_classifier, settings.stop_per_step
            rule.judge.fill(fit_judge(seen.features_TMF, labels_TM, kind, per_step, self.seed))
        elif seen.states_TMD is not None:
            fit_probe(rule, seen.states_TMD, labels_TM, self.seed)
        self.progress(f"fitted the {rule.kind} to {labels_TM[:-1].numel()} iterations")

    def search(self, examples: Sequence[Example], min_rows: int) -> Search:
        """Look where rows would stop, for every threshold."""
        full = self.ask_at_full_depth(examples)
        seen = self.look(examples)
        self.progress(f"answered {len(examples)} questions at full depth")
        depths: list[Answers] = []
        if self.is_inside:
            agrees_TM: Tensor | None = seen.agrees_TM
        elif self.model.block() is None and self.model.method.loop.stop != "act":
            depths = [*self.at_depths(examples, len(seen.scores_TM) - 1), full]
            agrees_TM = torch.stack([at.agrees_M(full) for at in depths])
        else:
            agrees_TM = None
        choices = self.choices(seen, agrees_TM, min_rows)
        return Search(self, examples, seen, choices, full, depths, agrees_TM)

    def choices(self, seen: Survey, agrees_TM: Tensor | None, min_rows: int) -> list[Choice]:
        """Return the ways to stop that may be chosen, from strict to loose; the first stops nowhere."""
        rule, settings = self.model.loop.stop, self.model.method.loop
        assert rule is not None
        if rule.judge is not None:
            assert agrees_TM is not None
            never = torch.full((len(seen.scores_TM),), math.inf)
            found = [Choice(None, never, seen.stops_at(settings, 0.0, never))]
            for target in TARGETS:
                tau_T = fitted_thresholds(
                    seen.scores_TM,
                    agrees_TM,
                    target,
                    settings.patience,
                    min_rows,
                    settings.min_loops,
                    settings.check_every,
                )
                found.append(Choice(None, tau_T, seen.stops_at(settings, 0.0, tau_T)))
            return found
        known = seen.scores_TM[:-1][seen.scores_TM[:-1].isfinite()]
        refuse(
            (
                len(known) == 0,
                f"stop={rule.kind} says nothing before the last of {len(seen.scores_TM)} iterations: calibrate another "
                "score, or a loop of more iterations",
            )
        )
        thresholds = thresholds_between(known)
        return [Choice(kappa, None, seen.stops_at(settings, kappa)) for kappa in thresholds]


def thresholds_between(scores: Tensor, most: int = MOST_TRIED) -> list[float]:
    """Return thresholds that tell scores apart, from one above all to one below all; of many, some spread evenly."""
    known = scores.double().unique().flip(0)
    if bool((known == known.round()).all()):  # counts
        return [known[0].item() + 1, *known.tolist()]
    if len(known) > most:
        known = known[torch.linspace(0, len(known) - 1, most).round().long()]
    between = ((known[1:] + known[:-1]) / 2).tolist()
    return [known[0].item() + 1, *between, known[-1].item() - 1]


@dataclass
class Search:
    """The ways to stop, and what is known of them.

    Attributes:
        tryout: the model that is asked.
        examples: the questions.
        seen: their survey.
        choices: the ways to stop, from strict to loose.
        full: the answers at full depth.
        depths: the answers after 1..T iterations, where whole rows stop.
        agrees_TM: whether an answer, or a token, is the same as at full depth.
    """

    tryout: Tryout
    examples: Sequence[Example]
    seen: Survey
    choices: list[Choice]
    full: Answers
    depths: list[Answers]
    agrees_TM: Tensor | None
    tried: dict[int, Answers] = field(default_factory=dict)

    def use(self, i: int) -> Choice:
        """Let the model stop in the i-th way; return it."""
        model, choice = self.tryout.model, self.choices[i]
        rule, judge = model.loop.stop, None if model.loop.stop is None else model.loop.stop.judge
        assert rule is not None and isinstance(model.method, StopSettings)
        use_rule(model, **{**model.method.rule, "stop_threshold": choice.threshold})
        if judge is not None and choice.tau_T is not None and model.loop.stop is not None:
            assert model.loop.stop.judge is not None
            model.loop.stop.judge.tau_T = choice.tau_T.to(judge.tau_T.device)
        return choice

    def answers(self, i: int) -> Answers:
        """Return the answers to the questions with the i-th way to stop."""
        if i not in self.tried:
            self.use(i)
            self.tried[i] = self.tryout.ask(self.examples)
            self.tryout.progress(f"tried {len(self.tried)} thresholds")
        return self.tried[i]

    def foreseen(self, choice: Choice) -> Effect:
        """Return what a way to stop does, from the answers at every depth."""
        correct_TM = torch.stack([at.correct_M for at in self.depths])
        assert self.agrees_TM is not None
        at_1M = choice.stops_M[None] - 1
        right, same = (of.gather(0, at_1M).double().mean().item() for of in (correct_TM, self.agrees_TM))
        return Effect(right, same, choice.stops_M.double().mean().item())

    def agreement(self, choice: Choice) -> float:
        """Return the share of tokens that show what they show at full depth."""
        assert self.agrees_TM is not None
        return self.agrees_TM.gather(0, choice.stops_M[None] - 1).double().mean().item()

    def best(self, goal: Goal) -> int:
        """Return the index of the way to stop that meets a goal: the loosest; for mean_loops, the strictest."""
        n, full = len(self.choices), self.full.effect(self.full).accuracy
        if self.depths:
            known = [self.foreseen(choice) for choice in self.choices]
            good = [i for i, effect in enumerate(known) if goal.is_met(effect, full)]
            if goal.mean_loops is not None:
                return max(good, default=n - 1, key=lambda i: known[i].loops)
            return min(good, default=0, key=lambda i: known[i].loops)
        if goal.agreement is not None and self.agrees_TM is not None:
            same = [self.agreement(choice) for choice in self.choices]
            return max((i for i, share in enumerate(same) if share >= goal.agreement), default=0)
        strict, loose = (-1, n - 1) if goal.mean_loops is not None else (0, n)
        while loose - strict > 1:  # the looser, the less is run and the more is lost
            middle = (strict + loose) // 2
            is_good = goal.is_met(self.answers(middle).effect(self.full), full)
            if is_good == (goal.mean_loops is None):
                strict = middle
            else:
                loose = middle
        return strict if goal.mean_loops is None else loose

    def report(self, i: int, goal: Goal) -> dict[str, Any]:
        """Return what the i-th way to stop does, and what is known besides."""
        found, choice = self.answers(i), self.choices[i]
        effect, full = found.effect(self.full), self.full.effect(self.full).accuracy
        if not self.depths and goal.agreement is not None and self.agrees_TM is not None:
            effect = replace(effect, agreement=self.agreement(choice))
        told: dict[str, Any] = {"goal": {**asdict(goal), "is_met": goal.is_met(effect, full)}}
        told |= {"full": self.full.told(), "chosen": found.compared(self.full)}
        if self.depths:
            told["fixed"] = [at.effect(self.full).accuracy for at in self.depths]
            shares_T = torch.bincount(choice.stops_M, minlength=len(self.depths) + 1)[1:] / len(choice.stops_M)
            told["random"] = sum(share * one for share, one in zip(shares_T.tolist(), told["fixed"]))
            told["histogram"] = shares_T.tolist()
            told["frontier"] = [{**told_of(c), **asdict(self.foreseen(c))} for c in self.choices]
        elif self.agrees_TM is not None:
            told["tokens"] = self.tokens(choice, self.agrees_TM) | {"oracle": self.oracles()}
        return told

    def oracles(self) -> dict[str, float]:
        """Return the mean iterations of tokens that stop as soon as they show what they will, or what is right.

        ``right`` is the share of tokens that show what is right at some iteration, ``right_at_last`` at the last.
        """
        tops_TM, gold_M = self.seen.tops_TM, self.seen.gold_M
        assert tops_TM is not None and gold_M is not None
        numbers = {
            "agree": first_agreeing(tops_TM),
            "correct": first_correct(tops_TM, gold_M),
            "right": (tops_TM == gold_M).any(0),
            "right_at_last": tops_TM[-1] == gold_M,
        }
        return {name: value_M.double().mean().item() for name, value_M in numbers.items()}

    def tokens(self, choice: Choice, agrees_TM: Tensor) -> dict[str, Any]:
        """Return what the survey says of the tokens that write, with the gold answers before them."""
        same_M, n_T = agrees_TM.gather(0, choice.stops_M[None] - 1)[0], len(agrees_TM)
        n, n_same = len(same_M), int(same_M.sum())
        exits = []
        for t in range(1, n_T + 1):
            here_M = choice.stops_M == t
            n_here, n_right = int(here_M.sum()), int((same_M & here_M).sum())
            exits.append({"n": n_here, "agreement_ci95": list(clopper_pearson(n_right, n_here)) if n_here else None})
        return {
            "n": n,
            "agreement": n_same / n,
            "agreement_ci95": list(clopper_pearson(n_same, n)),
            "mean_iterations": choice.stops_M.double().mean().item(),
            "iterations": exits,
        }


def told_of(choice: Choice) -> dict[str, Any]:
    """Return a way to stop as the report has it; null for an iteration that is closed."""
    tau_T = None if choice.tau_T is None else [t if math.isfinite(t) else None for t in choice.tau_T.tolist()]
    return {"threshold": choice.threshold, "thresholds": tau_T}

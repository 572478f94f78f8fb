"""Can step results be read off the latents? Linear probes of each latent after each loop (slr.md, "Metrics").

A probe is a logistic regression from z_t of one latent to the result of one step, or to the answer; it learns from some
examples and is tested on others. Beside it stands the same probe that learned from shuffled labels: what it scores is
what the size of the probe and the skew of the labels give away. Their difference is the selectivity. A probe shows what
a latent holds; whether the model uses it, shows a swap (`innerloop.measure.swap`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.measure.latents import Record, record, unseen
from innerloop.measure.parts import Parts, digest_of
from innerloop.measure.statistics import wilson
from innerloop.measure.swap import evenly
from innerloop.passes.thought import Thought, join
from innerloop.tasks import Task
from innerloop.text.examples import Example

Target = int | Literal["answer"]
Cells = dict[tuple[int, int], tuple[NDArray[Any], NDArray[Any]]]
"""By loop and latent: the states (n, D) of the examples to learn from, and of those to be tested on."""

FEWEST = 10  # examples to learn from, and to test on
TOO_FEW = f"a probe needs {FEWEST} examples with steps to learn from and {FEWEST} to be tested on"
ROUNDS = 1000


@dataclass(frozen=True)
class Probe:
    """How well one latent after one loop tells one thing.

    Attributes:
        loop: the iteration; 0: before the first.
        latent: 0-based.
        step: the 0-based step whose result is told, or the answer.
        accuracy: on the test examples.
        ci95: its Wilson interval.
        control: the accuracy after learning from shuffled labels.
        commonest: the share of the commonest label among the test examples.
        n: the test examples.
        answer_pass: the probe is of what the latents have become in the pass that the answer sees, which comes after
            the last iteration; there ``loop`` is T + 1.
    """

    loop: int
    latent: int
    step: Target
    accuracy: float
    ci95: tuple[float, float]
    control: float
    commonest: float
    n: int
    answer_pass: bool = False

    @property
    def selectivity(self) -> float:
        """How much better the probe is than one that learned from shuffled labels."""
        return self.accuracy - self.control

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self) | {"ci95": list(self.ci95), "selectivity": self.selectivity}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Probe:
        """Return the probe whose fields JSON has kept."""
        own = {name: value for name, value in fields.items() if name != "selectivity"}
        return cls(**{**own, "ci95": tuple(own["ci95"])})


def result_of_step(step: str) -> str:
    """Return what a step comes to: what stands after its last '=', or else its last word."""
    text = step.strip().removeprefix("<<").removesuffix(">>")
    if "=" in text:
        return text.rsplit("=", 1)[1].strip()
    words = re.findall(r"\w+", text)
    return words[-1] if words else ""


def probes(
    model: LatentModel,
    task: Task,
    train: Sequence[Example],
    test: Sequence[Example],
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    stage: int | None = None,
    seed: int = 0,
    planned: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
    parts: Parts | None = None,
) -> list[Probe]:
    """Fit and test the probes of every step result and of the answer.

    Args:
        model: a model that thinks in latents; of methods that open blocks while answering the first block is probed.
        task: the task of the examples.
        train: what probes learn from.
        test: what they are tested on.
        max_new_tokens: the most tokens to write, for methods that must answer to have latents.
        batch_size: rows per batch.
        stage: the curriculum's stage whose layout is used; None: the last.
        seed: of the shuffled labels.
        planned: told how many probes there will be.
        progress: called with the number of probes since the last call.
        parts: keeps the probes of each target as soon as they are known; those that it knows already are not fitted.
    """
    check(model, stage)
    parts = Parts() if parts is None else parts

    row = model.prompts(["?"], stage)[0]
    n_loops, n_last = row.n_loops, 1 if model.method.scope == "append" else sum(len(p.ids) for p in row.region)

    @cache
    def states() -> Cells:
        sides, read = list[Record](), list[list[NDArray[Any]]]()
        for side in (train, test):
            last: list[NDArray[Any]] = []
            then = (lambda thought, last=last: last.append(_read(thought, n_last))) if _answer_pass(model) else None
            sides.append(record(model, task, side, batch_size, max_new_tokens, stage, everything=True, then=then))
            read.append(last)
        cells = _cells(model, sides)
        return cells | _answer_cells(model, n_last, n_loops, read) if _answer_pass(model) else cells

    wanted = []
    for target in (*range(max((len(e.steps) for e in train), default=0)), "answer"):
        labels = [[_label(example, target) for example in side] for side in (train, test)]
        known = [[i for i, label in enumerate(side) if label] for side in labels]
        if min(map(len, known)) >= FEWEST and len({labels[0][i] for i in known[0]}) > 1:
            wanted.append((target, labels, known))
    if not wanted:
        raise InputError(TOO_FEW)
    learned_from = digest_of(train)[:8]
    names = [f"probe {target}, learned from {learned_from}" for target, _, _ in wanted]
    if planned is not None and (missing := parts.missing(names)):
        planned(len(states()) * len(missing))

    def fitted(target: Target, labels: Sequence[Sequence[str]], fit: list[int], held: list[int]) -> list[Probe]:
        found = []
        given = np.array([labels[0][i] for i in fit])
        gold = np.array([labels[1][i] for i in held])
        shuffled = np.random.default_rng(seed).permutation(given)
        for (loop, latent), (known_train, known_test) in states().items():
            seen, unseen_states = known_train[fit], known_test[held]
            told, by_chance = (float((_fit(seen, y, unseen_states) == gold).mean()) for y in (given, shuffled))
            n, share = len(gold), max(Counter(gold.tolist()).values()) / len(gold)
            interval = wilson(round(told * n), n)
            found.append(Probe(loop, latent, target, told, interval, by_chance, share, n, loop > n_loops))
            if progress is not None:
                progress(1)
        return found

    kept = [
        parts(name, lambda of=of: [probe.as_dict() for probe in fitted(of[0], of[1], *of[2])])  # type: ignore[misc]
        for name, of in zip(names, wanted)
    ]
    return [Probe.read(fields) for probed in kept for fields in probed]


def best(found: Sequence[Probe]) -> list[Probe]:
    """Return for each target the probe with the highest accuracy, the earliest of equals."""
    targets = dict.fromkeys(probe.step for probe in found)
    return [max((p for p in found if p.step == t), key=lambda p: (p.accuracy, -p.loop, -p.latent)) for t in targets]


def sentences(found: Sequence[Probe]) -> list[str]:
    """Say where each thing can be read best."""
    said = []
    for probe in best(found):
        what = "The answer" if probe.step == "answer" else f"The result of step {int(probe.step) + 1}"
        low, high = probe.ci95
        where = f"latent {probe.latent} " + (
            "in the answer's pass" if probe.answer_pass else f"after loop {probe.loop}"
        )
        if low <= max(probe.control, probe.commonest):
            said.append(
                f"{what} cannot be read off any latent (at best {probe.accuracy:.0%}, by chance {probe.control:.0%})."
            )
        else:
            said.append(
                f"{what} can be read best off {where}: {probe.accuracy:.0%} (95 % interval {low:.0%} to {high:.0%}; "
                f"{probe.control:.0%} with shuffled labels)."
            )
    return said


def _label(example: Example, target: Target) -> str:
    if target == "answer":
        return example.answer
    return result_of_step(example.steps[int(target)]) if int(target) < len(example.steps) else ""


def check(model: LatentModel, stage: int | None = None) -> None:
    """Refuse a model that has no latents to probe, and a library that is missing."""
    if (why := unseen(model, stage)) is not None:
        raise InputError(f"there are no latents to probe: {why}")
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError("probes need scikit-learn: pip install 'innerloop[fit]'") from None


def check_enough(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse examples that are too few to learn a probe from, or to test it on."""
    if min(len(train), len(test)) < FEWEST:
        raise InputError(f"{TOO_FEW}, but there are {len(train)} and {len(test)} that can be answered")


def _fit(states: NDArray[Any], labels: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """Return what a logistic regression that has learned the labels of some states says of others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if len(set(labels.tolist())) == 1:
        return np.repeat(labels[:1], len(others))
    scale = StandardScaler().fit(states)
    learned = LogisticRegression(max_iter=ROUNDS).fit(scale.transform(states), labels)
    return learned.predict(scale.transform(others))


def _cells(model: LatentModel, sides: Sequence[Record]) -> Cells:
    """Return for each (loop, latent) the states (n, D) of the examples to learn from and to test on.

    In append latent t is z_t, so that there is one latent for each loop.
    """
    method = model.method
    if n := sum(not side.blocks[key] for side in sides for key in side.keys):
        raise InputError(f"{n} examples open no block of latents while they are answered, so there is none to probe")
    path = [[[*side.blocks[key][0].fed, side.blocks[key][0].left] for key in side.keys] for side in sides]
    n_loops = min(len(states) for side in path for states in side) - 1
    appends = method.scope == "append"
    first = 0 if method.first_state == "forward" or n_loops == 0 else 1
    cells: Cells = {}
    for t in range(first, n_loops + 1):
        stacked = [np.stack([states[t].float().numpy() for states in side]) for side in path]  # type: ignore[union-attr]
        for j in evenly(stacked[0].shape[1]):
            cells[t, t if appends else j] = (stacked[0][:, j], stacked[1][:, j])
    return cells


def _answer_pass(model: LatentModel) -> bool:
    """Tell whether the final latents are read once more, in the pass that the answer sees."""
    method = model.method
    return model.block() is None and method.answer_context == "refeed" and method.answering.decoder == "lm_head"


@torch.no_grad()
def _read(thought: Thought, n: int) -> NDArray[Any]:
    """Return what the last ``n`` latents of each row (B, n, D) become in the pass that the answer sees."""
    states: NDArray[Any] = thought.context.fork().read(*join(thought.pending))[:, -n:].float().cpu().numpy()
    return states


def _answer_cells(model: LatentModel, n: int, n_loops: int, read: Sequence[Sequence[NDArray[Any]]]) -> Cells:
    """Return for each latent what it becomes in the answer's pass, from what was read of both sides."""
    train, test = (np.concatenate(side) for side in read)
    t = n_loops + 1
    latents = [(t, 0)] if model.method.scope == "append" else [(j, j) for j in evenly(n)]
    return {(t, name): (train[:, j], test[:, j]) for name, j in latents}

"""Can step results be read off the latents? Linear probes of each latent after each loop (slr.md, "Metrics").

A probe is a logistic regression from z_t of one latent to the result of one step, or to the answer; it learns from some
examples and is tested on others. Beside it stands the same probe that learned from shuffled labels: what it scores is
what the size of the probe and the skew of the labels give away. Their difference is the selectivity. A probe shows what
a latent holds; whether the model uses it, shows a swap (`innerloop.measure.swap`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError, check_installed
from innerloop.measure.latents import unseen
from innerloop.measure.result_cache import digest_of
from innerloop.measure.statistics import wilson
from innerloop.measure.subject import Subject
from innerloop.measure.swap import evenly
from innerloop.passes.region import join
from innerloop.passes.thought import Thought
from innerloop.text.codec import to_json
from innerloop.text.examples import Example

Target = int | Literal["answer"]
Cells = dict[tuple[int, int], tuple[NDArray[Any], NDArray[Any]]]
"""By loop and latent, counted from 1: the states (n, D) of the examples to learn from, and of those to be tested on."""

FEWEST = 10  # examples to learn from, and to test on
TOO_FEW = f"a probe needs {FEWEST} examples with steps to learn from and {FEWEST} to be tested on"
ROUNDS = 1000


@dataclass(frozen=True)
class Probe:
    """How well one latent after one loop tells one thing.

    Attributes:
        loop: the iteration; 0: before the first.
        latent: counted from 1.
        step: the step whose result is told, counted from 1, or the answer.
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
        """Return the fields as probes.json has them."""
        return to_json(self) | {"selectivity": self.selectivity}  # type: ignore[no-any-return]


def result_of_step(step: str) -> str:
    """Return what a step comes to: what stands after its last '=', or else its last word."""
    text = step.strip().removeprefix("<<").removesuffix(">>")
    if "=" in text:
        return text.rsplit("=", 1)[1].strip()
    words = re.findall(r"\w+", text)
    return words[-1] if words else ""


def probes(subject: Subject, train: Sequence[Example]) -> list[Probe]:
    """Fit the probes of every step result and of the answer to ``train``, and test them on a subject's examples.

    Of methods that open blocks while answering, the first block is probed.
    """
    check(subject.model, subject.stage)
    both = (train, subject.examples)
    states = cache(partial(_cells, subject, both))
    wanted = []
    for target in (*range(1, max((len(e.steps) for e in train), default=0) + 1), "answer"):
        labels = [[_label(example, target) for example in side] for side in both]
        known = [[i for i, label in enumerate(side) if label] for side in labels]
        if min(map(len, known)) >= FEWEST and len({labels[0][i] for i in known[0]}) > 1:
            wanted.append((target, labels, known))
    if not wanted:
        raise InputError(TOO_FEW)
    names = [f"probe of {target}, learned from {digest_of(train)[:8]}" for target, _, _ in wanted]
    if missing := subject.cache.missing(names):
        subject.planned(len(states()) * len(missing))
    n_loops = subject.model.prompts(["?"], subject.stage)[0].n_loops

    def fitted(target: Target, labels: Sequence[Sequence[str]], known: Sequence[Sequence[int]]) -> list[Probe]:
        found = []
        given, gold = (np.array([side[i] for i in at]) for side, at in zip(labels, known))
        shuffled = np.random.default_rng(subject.seed).permutation(given)
        n, share = len(gold), max(Counter(gold.tolist()).values()) / len(gold)
        for (loop, latent), (learn, test) in states().items():
            told, by_chance = (
                float((_fit(learn[known[0]], y, test[known[1]]) == gold).mean()) for y in (given, shuffled)
            )
            interval = wilson(round(told * n), n)
            found.append(Probe(loop, latent, target, told, interval, by_chance, share, n, loop > n_loops))
            subject.progress(1)
        return found

    kept = [subject.cache.value(list[Probe], name, partial(fitted, *of)) for name, of in zip(names, wanted)]
    return [probe for probed in kept for probe in probed]


def best(found: Sequence[Probe]) -> list[Probe]:
    """Return for each target the probe with the highest accuracy, the earliest of equals."""
    targets = dict.fromkeys(probe.step for probe in found)
    return [max((p for p in found if p.step == t), key=lambda p: (p.accuracy, -p.loop, -p.latent)) for t in targets]


def sentences(found: Sequence[Probe]) -> list[str]:
    """Say where each thing can be read best."""
    said = []
    for probe in best(found):
        what = "The answer" if probe.step == "answer" else f"The result of step {probe.step}"
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
    return result_of_step(example.steps[int(target) - 1]) if int(target) <= len(example.steps) else ""


def check(model: LatentModel, stage: int | None = None) -> None:
    """Refuse a model that has no latents to probe, and a library that is missing."""
    check_sklearn()
    if (why := unseen(model, stage)) is not None:
        raise InputError(f"there are no latents to probe: {why}")


def check_sklearn() -> None:
    """Refuse where scikit-learn is not installed."""
    check_installed("probes need scikit-learn", "fit", "sklearn")


def check_enough(train: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse examples that are too few to learn a probe from, or to test it on."""
    if min(len(train), len(test)) < FEWEST:
        raise InputError(f"{TOO_FEW}, but there are {len(train)} and {len(test)} that can be answered")


def _fit(states: NDArray[Any], labels: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """Return what a logistic regression that has learned the labels of some states says of others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(labels.tolist())) == 1:
        return np.repeat(labels[:1], len(others))
    machine = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ROUNDS))
    return machine.fit(states, labels).predict(others)


def _cells(subject: Subject, both: Sequence[Sequence[Example]]) -> Cells:
    """Return for each (loop, latent) the states (n, D) of the examples to learn from and to test on.

    In append each z_t is a latent of its own, so that there is one for each loop; where z_0 is a state, it is the
    first. Where the final latents are read once more, in the pass that the answer sees, what they become there stands
    beside them as loop T + 1.
    """
    method, row = subject.model.method, subject.model.prompts(["?"], subject.stage)[0]
    appends = method.plan.scope == "append"
    n_last = 1 if appends else sum(len(span.ids) for span in row.region)
    reads_again = subject.model.block() is None and method.plan.answer_context == "refeed"
    reads_again = reads_again and method.decoder.kind == "lm_head"
    path, last = [], list[NDArray[Any]]()
    for side in both:
        read = list[NDArray[Any]]()

        def keep(thought: Thought, read: list[NDArray[Any]] = read) -> None:
            if reads_again:
                read.append(_read(thought, n_last))

        found = subject.record(side, keep)
        if n := sum(not found.blocks[key] for key in found.keys):
            raise InputError(
                f"{n} examples open no block of latents while they are answered, so there is none to probe"
            )
        path.append([[*found.blocks[key][0].fed, found.blocks[key][0].left] for key in found.keys])
        last += [np.concatenate(read)] if reads_again else []
    n_loops = min(len(states) for side in path for states in side) - 1
    cells: Cells = {}
    begins = 0 if method.plan.first_state == "forward" or n_loops == 0 else 1
    for t in range(begins, n_loops + 1):
        stacked = [np.stack([states[t].float().numpy() for states in side]) for side in path]  # type: ignore[union-attr]
        for j in evenly(stacked[0].shape[1]):
            cells[t, t + 1 - begins if appends else j] = (stacked[0][:, j - 1], stacked[1][:, j - 1])
    if reads_again:
        t, final = row.n_loops + 1, n_loops + 1 - begins
        cells |= {(t, final if appends else j): (last[0][:, j - 1], last[1][:, j - 1]) for j in evenly(n_last)}
    return cells


@torch.no_grad()
def _read(thought: Thought, n: int) -> NDArray[Any]:
    """Return what the last ``n`` latents of each row (B, n, D) become in the pass that the answer sees."""
    states: NDArray[Any] = thought.context.fork().read(*join(thought.pending))[:, -n:].float().cpu().numpy()
    return states

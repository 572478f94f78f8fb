"""Are the latents used? A model answers again while its latents are replaced, hidden, or refined more or less often.

found = controls(model, task, examples)
print(found.sentence)

Every control is compared with the unedited run on the same rows (McNemar, paired bootstrap). What is replaced, and
where, says `innerloop.measure.latents`; how to read the outcome, docs/measuring.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.measure.accuracy import Prediction, answered, evaluate
from innerloop.measure.latents import (
    Fed,
    Key,
    Record,
    Replacement,
    answer,
    answer_of,
    donors_of,
    keys_of,
    record,
    same_answer,
    seen_in_words,
    unseen,
)
from innerloop.measure.parts import Parts
from innerloop.measure.statistics import Verdict, p_words, verdict, wilson
from innerloop.methods import Method
from innerloop.tasks import Task
from innerloop.text.examples import Example

Kind = Literal["carried", "partly", "room", "unused", "undecided", "none"]

TITLES = {
    "shuffled": "latents of another example",
    "zeroed": "latents zeroed",
    "mean": "latents replaced by their mean over examples",
    "noise": "latents replaced by noise of equal RMS",
    "frozen": "latents frozen at z_0",
    "hidden": "latents hidden from the answer",
    "question_hidden": "question hidden from the answer",
}
DONE = {
    "shuffled": "Shuffling the latents among examples",
    "zeroed": "Zeroing the latents",
    "mean": "Replacing the latents by their mean over examples",
    "noise": "Replacing the latents by noise of equal RMS",
    "frozen": "Freezing the latents at z_0",
    "hidden": "Hiding the latents from the answer",
    "question_hidden": "Hiding the question from the answer, which then sees the latents alone,",
}
ALIKE = 1e-5  # latents that differ less between examples, relative to their size, are the same
SHARES_KEPT = (0.25, 0.5, 0.75)
MOST_LOOPS = 13  # points of accuracy against T; beyond, every other one and so on
HALF = 0.5  # of the answers must become the donor's, or stay, to say that they come from the latents, or mostly not
SAME = (
    0.9  # of the answers stay, at least, where latents are said not to be used by a run that is right by chance alone
)
PERMUTATIONS = 2000  # of a test of whether answers follow the donor
NARROW = 0.1  # "unused" is said only where a loss of more than this is ruled out


@dataclass(frozen=True)
class Effect:
    """What an edit does to the answers.

    Attributes:
        compared: the edited run against the unedited one, on the same rows.
        same_answers: the share of examples that get the answer of the unedited run.
        donor_answers: of examples whose donor is answered otherwise, the share that is now answered as the donor is.
        donor_p: how often answers that have nothing to do with whose latents they were given are the donor's as often.
        agreement: ``same_answers`` beyond what answers as common as these share by chance (Cohen's kappa).
    """

    compared: Verdict
    same_answers: float
    donor_answers: float | None = None
    donor_p: float = 1.0
    agreement: float | None = None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Effect:
        """Return the effect whose fields JSON has kept."""
        return cls(**{**fields, "compared": Verdict.read(fields["compared"])})

    @property
    def costs(self) -> bool:
        """Whether the edit makes answers worse, beyond doubt."""
        return self.compared.told_apart and self.compared.difference < 0

    @property
    def gains(self) -> bool:
        """Whether the edit makes answers better, beyond doubt."""
        return self.compared.told_apart and self.compared.difference > 0

    @property
    def follows(self) -> bool:
        """Whether most answers become the donor's, and more than chance makes so."""
        return (self.donor_answers or 0.0) >= HALF and self.donor_p < 0.05

    @property
    def keeps(self) -> bool:
        """Whether most answers stay, beyond what chance makes so."""
        return (self.same_answers if self.agreement is None else self.agreement) >= HALF

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON has them."""
        accuracy, n = self.compared.accuracies[0], self.compared.n
        return {
            "accuracy": accuracy,
            "ci95": list(wilson(round(accuracy * n), n)),
            "difference": self.compared.difference,
            "difference_ci95": list(self.compared.ci95),
            "p": self.compared.p,
            "told_apart": self.compared.told_apart,
            "same_answers": self.same_answers,
            "agreement": self.agreement,
        }

    def sentence(self, done: str) -> str:
        """Say what ``done`` did."""
        found, points = self.compared, abs(100 * self.compared.difference)
        low, high = sorted(abs(100 * bound) for bound in found.ci95)
        if found.told_apart:
            verb = "costs" if found.difference < 0 else "gains"
            text = f"{done} {verb} {points:.1f} points (95 % interval {low:.1f} to {high:.1f}, {p_words(found.p)})"
        else:
            text = (
                f"{done} changes nothing that could be told from chance ({100 * found.difference:+.1f} points, "
                f"{found.interval}, {p_words(found.p)})"
            )
        text += f"; {self.same_answers:.0%} of the answers stay the same"
        if self.donor_answers is not None:
            text += f", and {self.donor_answers:.0%} become the donor's where that is another ({p_words(self.donor_p)})"
        return f"{text}."


@dataclass
class Controls:
    """What the controls found.

    Attributes:
        unedited: the answers without an edit.
        commonest: the share of the commonest gold answer.
        n_latents: how many latents the answer sees.
        seen: through what it sees them.
        spread: how much they differ between examples, relative to their size.
        effects: of each control that was run.
        loops: accuracy against the number of loops; None stands for the unedited run.
        trained_loops: the number of loops of the unedited run.
        kept: accuracy when only the first so many latents are visible.
        left_out: the controls that make no sense here, and why.
    """

    unedited: Sequence[Prediction]
    commonest: float
    n_latents: int = 0
    seen: str = ""
    spread: float = 0.0
    effects: dict[str, Effect] = field(default_factory=dict)
    loops: dict[int, Effect] = field(default_factory=dict)
    trained_loops: int | None = None
    kept: dict[int, Effect] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What the latents do: see docs/measuring.md."""
        return self._judge()[0]

    @property
    def sentence(self) -> str:
        """What the latents do, in words."""
        return self._judge()[1]

    def _judge(self) -> tuple[Kind, str]:
        if "latents" in self.left_out:
            return "none", self.left_out["latents"]
        shuffled, without = self.effects.get("shuffled"), self.effects.get("hidden") or self.effects.get("zeroed")
        n, n_right = len(self.unedited), sum(p.correct for p in self.unedited)
        if shuffled is None or without is None:
            return "undecided", "The controls that could tell whether the latents are used make no sense here."
        moved = f"{shuffled.sentence(DONE['shuffled'])} {without.sentence(DONE[self._without])}"
        if self.spread < ALIKE:
            moved = (
                "What the latents are fed is the same for every example, so that exchanging it changes nothing. "
                f"{without.sentence(DONE[self._without])}"
            )
        exchanged = shuffled.sentence(DONE["shuffled"])
        if shuffled.follows:
            right = "" if shuffled.costs else ", right or wrong"
            return "carried", f"{exchanged} The answers come from the latents{right}."
        if shuffled.costs and shuffled.keeps:
            return "partly", f"{exchanged} Some answers need what the latents hold, most do without."
        if shuffled.costs:
            return "carried", (
                f"{exchanged} The answers need what the latents hold, together with the question: given another "
                "example's latents, they are neither example's."
            )
        if shuffled.gains or without.gains:
            return "undecided", f"{moved} The latents are used, but answers are better without what they hold."
        if without.costs:
            return "room", (
                f"{moved} The answers need the latents' positions, but not what the loop has put into them: "
                "they are room to compute in."
            )
        if wilson(n_right, n)[0] <= self.commonest:
            guessing = (
                f"The unedited run is right in {n_right / max(n, 1):.1%} of {n} examples, no better than always "
                f"giving the commonest answer ({self.commonest:.1%}): there is no accuracy that the latents could "
                f"carry. {moved}"
            )
            if min(wilson(round(effect.same_answers * n), n)[0] for effect in (shuffled, without)) >= SAME:
                return "unused", f"{guessing} The latents are not used."
            return "undecided", guessing
        if min(shuffled.compared.ci95[0], without.compared.ci95[0]) < -NARROW:
            return "undecided", f"{moved} {n} examples are too few to say whether the latents are used."
        return "unused", f"{moved} The latents are not used."

    @property
    def _without(self) -> str:
        return "hidden" if "hidden" in self.effects else "zeroed"

    def as_dict(self) -> dict[str, Any]:
        """Return controls.json but for what was measured on what."""
        n, n_right = len(self.unedited), sum(p.correct for p in self.unedited)
        return {
            "unedited": {"accuracy": n_right / max(n, 1), "ci95": list(wilson(n_right, n))},
            "commonest": self.commonest,
            "latents": {"n": self.n_latents, "seen": self.seen, "spread": self.spread},
            "controls": [
                {
                    "control": name,
                    "title": TITLES[name],
                    **effect.as_dict(),
                    "donor_answers": effect.donor_answers,
                    "donor_p": effect.donor_p,
                    "sentence": effect.sentence(DONE[name]),
                }
                for name, effect in self.effects.items()
            ],
            "loops": [
                {"loops": loops, "trained": loops == self.trained_loops, **effect.as_dict()}
                for loops, effect in sorted(self.loops.items())
            ],
            "kept_latents": [
                {"kept": kept, "of": self.n_latents, **effect.as_dict()} for kept, effect in sorted(self.kept.items())
            ],
            "left_out": [{"control": name, "why": why} for name, why in self.left_out.items()],
            "verdict": {"kind": self.kind, "sentence": self.sentence},
        }


def controls(
    model: LatentModel,
    task: Task,
    examples: Sequence[Example],
    unedited: Sequence[Prediction] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    stage: int | None = None,
    seed: int = 0,
    planned: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
    parts: Parts | None = None,
) -> Controls:
    """Run all controls that make sense for a model's method, on the examples that it can answer.

    Args:
        model: the model.
        task: extracts and checks answers.
        examples: what to answer; the more, the narrower the intervals.
        unedited: their answers without an edit, where they are known already.
        max_new_tokens: the most tokens to write; None: as the task says.
        batch_size: rows per batch.
        stage: the curriculum's stage whose layout is used; None: the last.
        seed: of the exchange of latents, of the noise, and of the bootstrap.
        planned: told how many answers will be written.
        progress: called with the number of answers written since the last call.
        parts: keeps every control as soon as it is known; those that it knows already are not run again.
    """
    if not examples:
        raise InputError("controls need examples to answer")
    at = model.method.curriculum.last_stage if stage is None else stage
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stage": stage}
    left_out = _left_out(model, at)
    trained, loops = (None, []) if "loops" in left_out else _loops(model.method, at)
    if unedited is None:
        unedited = evaluate(model, task, examples, **options)
    examples, unedited = answered(examples, unedited)
    gold = Counter(example.answer for example in examples)
    found = Controls(unedited, max(gold.values()) / len(examples), trained_loops=trained, left_out=left_out)
    parts = Parts() if parts is None else parts
    names, donors = list[str](), dict[Key, Key]()
    keys = keys_of(model.prompts([example.question for example in examples], stage))

    @cache
    def recorded() -> Record:
        return record(model, task, examples, batch_size, max_new_tokens, stage, everything=True)

    @cache
    def edits() -> dict[str, Replacement]:
        return _edits(recorded().seen(model.method, at), recorded(), donors, seed)

    if "latents" not in left_out:
        donors = donors_of(keys, seed)
        names = [name for name in TITLES if name not in left_out]
        found.n_latents, found.spread = latents_of(lambda: recorded().seen(model.method, at), parts)
        found.seen = seen_in_words(model.method, at)
    kept = [] if "kept_latents" in left_out else sorted({round(s * found.n_latents) for s in SHARES_KEPT})
    kept = [k for k in kept if 0 < k < found.n_latents]
    others = [t for t in loops if t != trained]
    if planned is not None:
        every = [*names, *(f"loops {t}" for t in others), *(f"kept {k}" for k in kept)]
        planned(len(parts.missing(every)) * len(examples))

    def effect(name: str, edit: Callable[[], Replacement] | None, loops: int | None = None) -> Effect:
        def measure() -> dict[str, Any]:
            replaced = None if edit is None else edit()
            edited = answer(model, task, examples, replaced, loops=loops, progress=progress, **options)
            found = _effect(edited, unedited, seed)
            if name == "shuffled":
                plain = dict(zip(keys, unedited))
                share, p = _following(edited, unedited, [plain[donors[key]] for key in keys], seed)
                found = replace(found, donor_answers=share, donor_p=p)
            return asdict(found)

        return Effect.read(parts(name, measure))

    nothing = _effect(unedited, unedited, seed)
    for name in names:
        found.effects[name] = effect(name, lambda name=name: edits()[name])  # type: ignore[misc]
    for t in loops:
        found.loops[t] = nothing if t == trained else effect(f"loops {t}", None, t)
    for k in kept:
        found.kept[k] = effect(f"kept {k}", lambda k=k: Replacement(kept=k))  # type: ignore[misc]
    if "kept_latents" not in left_out and found.n_latents:
        found.kept |= {0: found.effects["hidden"], found.n_latents: nothing}
    return found


def latents_of(seen: Callable[[], Record], parts: Parts) -> tuple[int, float]:
    """Return how many latents the answer sees, and how much they differ between examples; a part."""
    found = parts("latents", lambda: {"n": seen().n_latents, "spread": seen().spread()})
    return found["n"], found["spread"]


def _effect(edited: Sequence[Prediction], unedited: Sequence[Prediction], seed: int) -> Effect:
    names, n = ("the edited run", "the unedited run"), max(len(edited), 1)
    compared = verdict([p.correct for p in edited], [p.correct for p in unedited], names, seed)
    same = sum(same_answer(a, b) for a, b in zip(edited, unedited, strict=True)) / n
    ours, theirs = (Counter(map(answer_of, side)) for side in (edited, unedited))
    by_chance = sum(count * theirs[given] for given, count in ours.items()) / n**2
    return Effect(compared, same, agreement=(same - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0)


def _following(
    edited: Sequence[Prediction], unedited: Sequence[Prediction], donors: Sequence[Prediction], seed: int
) -> tuple[float | None, float]:
    """Return how many answers become the donor's where that is another, and the p-value of a permutation test.

    The test deals the donors' answers out anew: answers that have nothing to do with whose latents they were given are
    the donor's just as often. A share alone tells little: with two answers to choose from, guessing makes half of them
    the donor's.
    """
    told = [same_answer(now, d) for now, own, d in zip(edited, unedited, donors) if not same_answer(own, d)]
    numbers: dict[str, int] = {}
    now, theirs = (
        np.array([numbers.setdefault(answer_of(p), len(numbers)) for p in side]) for side in (edited, donors)
    )
    draw, found = np.random.default_rng(seed), int((now == theirs).sum())
    as_many = sum(int((now == draw.permutation(theirs)).sum()) >= found for _ in range(PERMUTATIONS))
    return sum(told) / len(told) if told else None, (1 + as_many) / (1 + PERMUTATIONS)


def _edits(seen: Record, everything: Record, donors: dict[Key, Key], seed: int) -> dict[str, Replacement]:
    """Return the edits, in the order in which they are shown."""
    middle = seen.mean()

    def mapped(change: Callable[[Key, int, Tensor, int], Tensor]) -> Replacement:
        """Replace each state, told its prompt, block and place among the block's states."""

        def of_block(key: Key, i: int, block: Fed) -> Fed:
            fed = tuple(None if z is None else change(key, i, z, t) for t, z in enumerate(block.fed))
            return Fed(fed, None if block.left is None else change(key, i, block.left, len(fed)))

        return Replacement(seen.map(of_block))

    def noise(key: Key, i: int, z: Tensor, t: int) -> Tensor:
        name = hashlib.blake2b(repr((seed, key, i, t)).encode(), digest_size=7).digest()
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(int.from_bytes(name, "big")))
        return drawn * (z.float().square().mean(-1, keepdim=True) / drawn.square().mean(-1, keepdim=True)).sqrt()

    def start(key: Key, i: int, z: Tensor, t: int) -> Tensor:
        block = everything.blocks[key][i]
        first = block.fed[0] if block.fed else block.left
        assert first is not None
        return first

    return {
        "shuffled": Replacement({key: seen.blocks[donor] for key, donor in donors.items()}),
        "zeroed": mapped(lambda key, i, z, t: torch.zeros_like(z)),
        "mean": Replacement({key: middle for key in seen.blocks}),
        "noise": mapped(noise),
        "frozen": mapped(start),
        "hidden": Replacement(kept=0),
        "question_hidden": Replacement(hides_question=True),
    }


def _left_out(model: LatentModel, stage: int) -> dict[str, str]:
    """Return the controls that make no sense for a method at a stage, and why."""
    method, why = model.method, dict[str, str]()
    if (reason := unseen(model, stage)) is not None:
        why["latents"] = reason[0].upper() + reason[1:]
    try:
        if not _loops(method, stage)[1]:
            raise InputError(f"'{method.name}' has no loop")
    except InputError:
        why["loops"] = f"'{method.name}' has no number of loops that could be set."
    if "latents" in why:
        return why
    if method.n_loops(stage) == 0:
        why["frozen"] = "nothing refines the latents, so that they are at z_0 anyway"
    row, reason = model.prompts(["?"], stage)[0], None
    if model.block() is not None:
        reason = "latents are opened while answering, and the text between them has read them"
    elif method.answering.decoder != "lm_head":
        reason = "a decoder of its own answers, which attends to nothing that could be hidden"
    elif not row.suffix:
        reason = "the answer is predicted from the last latent itself"
    if reason is not None:
        why |= dict.fromkeys(("hidden", "question_hidden", "kept_latents"), reason)
    return why


def _loops(method: Method, stage: int) -> tuple[int | None, list[int]]:
    """Return the number of loops that a method was trained with, and those to try: 0 to twice as many."""
    wanted = method.depth() if hasattr(method, "depth") else method.n_loops(stage)
    if not wanted:
        return None, []
    trained = next((t for t in range(wanted + 2) if _with(method, t, stage) == wanted), None)
    if trained is None or trained == 0:
        return None, []
    possible = [t for t in range(2 * trained + 1) if _with(method, t, stage) is not None]
    stride = -(-len(possible) // MOST_LOOPS)
    return trained, sorted({*possible[::stride], trained, 2 * trained} & set(possible))


def _with(method: Method, loops: int, stage: int) -> int | None:
    """Return how often a method loops if told to loop so often; None where it cannot."""
    try:
        other = method.with_loops(loops)
        return other.depth() if hasattr(other, "depth") else other.n_loops(stage)
    except InputError:
        return None

"""What controls say of latents: the effect of each edit on the answers, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from innerloop.measure.accuracy import Prediction, accuracy_of
from innerloop.measure.statistics import Verdict, p_words, wilson

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
HALF = 0.5  # of the answers must become the donor's, or stay, to say that they come from the latents, or mostly not
SAME = 0.9  # of the answers stay, at least, where a run that is right by chance alone is said not to use its latents
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
        """Return the numbers as controls.json has them."""
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
        found, points = self.compared, 100 * self.compared.difference
        low, high = sorted(abs(100 * bound) for bound in found.ci95)
        if found.told_apart:
            text = f"{done} {'costs' if points < 0 else 'gains'} {abs(points):.1f} points "
            text += f"(95 % interval {low:.1f} to {high:.1f}, {p_words(found.p)})"
        else:
            text = f"{done} changes nothing that could be told from chance "
            text += f"({points:+.1f} points, {found.interval}, {p_words(found.p)})"
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
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What the latents do: see docs/measuring.md."""
        return self._verdict()[0]

    @property
    def sentence(self) -> str:
        """What the latents do, in words."""
        return self._verdict()[1]

    def _verdict(self) -> tuple[Kind, str]:
        if "latents" in self.left_out:
            return "none", self.left_out["latents"]
        removal = "hidden" if "hidden" in self.effects else "zeroed"
        shuffled, without = self.effects.get("shuffled"), self.effects.get(removal)
        if shuffled is None or without is None:
            return "undecided", "The controls that could tell whether the latents are used make no sense here."
        exchanged, removed = shuffled.sentence(DONE["shuffled"]), without.sentence(DONE[removal])
        if shuffled.follows or shuffled.costs:
            return _carried(shuffled, exchanged)
        if self.spread < ALIKE:
            exchanged = "What the latents are fed is the same for every example, so that exchanging it changes nothing."
        moved = f"{exchanged} {removed}"
        if shuffled.gains or without.gains:
            return "undecided", f"{moved} The latents are used, but answers are better without what they hold."
        if without.costs:
            return "room", (
                f"{moved} The answers need the latents' positions, but not what the loop has put into them: "
                "they are room to compute in."
            )
        return self._unused(shuffled, without, moved)

    def _unused(self, shuffled: Effect, without: Effect, moved: str) -> tuple[Kind, str]:
        """Say that latents are not used, where enough rules out that they are."""
        n, n_right = len(self.unedited), sum(p.correct for p in self.unedited)
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

    def as_dict(self) -> dict[str, Any]:
        """Return controls.json but for what was measured on what."""
        n, n_right = len(self.unedited), sum(p.correct for p in self.unedited)
        edits, trained, whole = self.effects.items(), self.trained_loops, self.n_latents
        return {
            "unedited": {"accuracy": accuracy_of(self.unedited), "ci95": list(wilson(n_right, n))},
            "commonest": self.commonest,
            "latents": {"n": self.n_latents, "seen": self.seen, "spread": self.spread},
            "controls": [
                {"control": name, "title": TITLES[name], **effect.as_dict()}
                | {"donor_answers": effect.donor_answers, "donor_p": effect.donor_p}
                | {"sentence": effect.sentence(DONE[name])}
                for name, effect in edits
            ],
            "loops": [{"loops": t, "trained": t == trained, **e.as_dict()} for t, e in sorted(self.loops.items())],
            "kept_latents": [{"kept": k, "of": whole, **e.as_dict()} for k, e in sorted(self.kept.items())],
            "left_out": [{"control": name, "why": why} for name, why in self.left_out.items()],
            "verdict": {"kind": self.kind, "sentence": self.sentence},
        }


def _carried(shuffled: Effect, exchanged: str) -> tuple[Kind, str]:
    """Say how far the answers come from the latents, where exchanging these moves them."""
    if shuffled.follows:
        right = "" if shuffled.costs else ", right or wrong"
        return "carried", f"{exchanged} The answers come from the latents{right}."
    if shuffled.keeps:
        return "partly", f"{exchanged} Some answers need what the latents hold, most do without."
    return "carried", (
        f"{exchanged} The answers need what the latents hold, together with the question: given another "
        "example's latents, they are neither example's."
    )

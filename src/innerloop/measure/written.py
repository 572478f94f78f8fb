"""Are written steps used? A model answers again after some of its own steps only, or after steps of another question.

found = written_steps(Subject(model, task, examples))
print(found.sentence)

Early answering and steps with a mistake are those of arXiv 2307.13702. The same questions about latents - the first of
them alone, or another example's - are asked by `innerloop.measure.controls`, in the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from innerloop.engine.requests import check_begun
from innerloop.errors import InputError
from innerloop.measure.control_verdict import Effect
from innerloop.measure.controls import effect_of, following
from innerloop.measure.subject import Subject
from innerloop.model.model import LatentCore

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of its own steps, how many are shown before the answer is asked for."""


@dataclass
class WrittenSteps:
    """What was found of written steps, on the questions whose answers have some.

    Attributes:
        n: the questions.
        n_steps: steps of their answers, on average.
        early: by the share of its own steps that an answer keeps, and after which it is asked for: what that changes.
        mistaken: one step is that of another question, and the model goes on from there.
        exchanged: all steps are those of another question, after which the answer is asked for.
    """

    n: int
    n_steps: float
    early: dict[float, Effect]
    mistaken: Effect
    exchanged: Effect

    @property
    def sentence(self) -> str:
        """Say whether answers come from the steps."""
        return " ".join(
            [
                self.early[0.0].sentence("Answering before the first step"),
                self.mistaken.sentence("Going on from one step of another question"),
                self.exchanged.sentence("Answering after all steps of another question"),
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as controls.json has them."""
        exchanged = asdict(self.exchanged)
        return {
            "n": self.n,
            "n_steps": self.n_steps,
            "early": {str(share): effect.as_dict() for share, effect in self.early.items()},
            "mistaken": self.mistaken.as_dict(),
            "exchanged": self.exchanged.as_dict() | {k: exchanged[k] for k in ("donor_answers", "donor_p")},
            "sentence": self.sentence,
        }


def writes_steps(model: LatentCore) -> bool:
    """Tell whether a model writes steps that it could be shown again."""
    try:
        check_begun(model, *model.prompts(["?"]))
    except InputError:
        return False
    return model.method.needs_steps and model.method.family == "text"


def written_steps(subject: Subject) -> WrittenSteps | None:
    """Measure what the steps of a model's own answers do; None where fewer than two questions have any.

    Args:
        subject: a model that writes steps, and what it is asked.
    """
    mark = subject.model.encoder.wording.mark
    examples, plain = subject.rows
    own = [_steps_of(prediction.text, mark) for prediction in plain]
    told = [i for i, steps in enumerate(own) if steps]
    if len({examples[i].question for i in told}) < 2:
        return None
    subject = replace(subject, examples=[examples[i] for i in told], known=[plain[i] for i in told])
    own, unedited = [own[i] for i in told], [plain[i] for i in told]
    place = {key: i for i, key in enumerate(subject.keys)}
    donors = [place[subject.donors[key]] for key in subject.keys]
    subject.plan([*(f"early {share}" for share in SHARES), "mistaken", "exchanged"])

    def effect(name: str, begun: Sequence[Sequence[str]]) -> Effect:
        def measure() -> Effect:
            edited = subject.answer(begun=begun)
            found = effect_of(edited, unedited, subject.seed)
            if name != "exchanged":
                return found
            share, p = following(edited, unedited, [unedited[d] for d in donors], subject.seed)
            return replace(found, donor_answers=share, donor_p=p)

        return subject.cache.value(Effect, f"written, {name}", measure)

    kept = {share: [[*steps[: round(share * len(steps))], mark] for steps in own] for share in SHARES}
    mistake = partial(_mistaken, random.Random(f"mistake-{subject.seed}"))
    return WrittenSteps(
        len(own),
        sum(map(len, own)) / len(own),
        {share: effect(f"early {share}", begun) for share, begun in kept.items()},
        effect("mistaken", [mistake(steps, own[d]) for steps, d in zip(own, donors)]),
        effect("exchanged", [[*own[d], mark] for d in donors]),
    )


def _steps_of(text: str, mark: str) -> list[str]:
    """Return the steps of an answer: its lines before the mark; none where it has no mark."""
    steps, found, _ = text.partition(mark)
    return [line.strip() for line in steps.split("\n") if line.strip()] if found else []


def _mistaken(draw: random.Random, steps: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return an answer's steps up to one that is drawn, in whose place the other's is."""
    place = draw.randrange(len(steps))
    return [*steps[:place], others[min(place, len(others) - 1)]]

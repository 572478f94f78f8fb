"""How questions are answered: `EngineOptions`, which refuses what makes no sense before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from innerloop.checks.settings import Checked
from innerloop.checks.values import Bounds, Count, Loops, Seed, Weight
from innerloop.errors import refuse

Many = Annotated[int, Bounds(1, 100_000)]
Few = Annotated[int, Bounds(0, 20)]


class Answering(TypedDict, total=False):
    """The options of answering by keyword, as `EngineOptions` explains them."""

    max_new_tokens: Count
    batch_size: Many
    temperature: Weight
    seed: Seed
    trace: bool
    stage: int | None
    loops: Loops | None
    max_positions: Count | None
    samples: Many
    starts: Many
    beams: Many
    likelihoods: bool
    replayable: bool
    stop: Mapping[str, Any] | None
    alternatives: Few


@dataclass(frozen=True)
class EngineOptions(Checked):
    """How questions are answered.

    Args:
        max_new_tokens: the most tokens to write per question.
        batch_size: how many rows write, or think, together.
        temperature: 0 writes the likeliest token, above it tokens are drawn.
        seed: of the draws; what is drawn depends on it, the question's index and the sample's number alone.
        trace: record what the loop did, with read-outs.
        stage: the curriculum's stage whose layout is used; None: the last.
        loops: another number of loops than the model was trained with.
        max_positions: the most positions that rows in the engine may come to occupy together; None: no limit but
            ``batch_size``. A question that may come to take more by itself cannot be answered.
        samples: how many answers are drawn for each question. The first are those that fewer samples would give; what
            they share is billed to one of them.
        starts: breadth: how many states the latents begin at, for each question. The first is the method's own, the
            others are random (`innerloop.loop.starts`); each has an answer of its own.
        beams: how many texts a search for the likeliest one follows (`innerloop.engine.beams`); 1 searches for nothing.
        likelihoods: also tell the log-likelihood of what is written.
        replayable: also keep what `innerloop.engine.rollouts` needs to go through it again: the log-probability of each
            token in the distribution that it was drawn from, and what was fed where that was not its embedding.
        stop: other settings of the method's ``stop``, such as ``{"rule": "delta", "threshold": 2}``; None: its own.
        alternatives: with likelihoods, also tell so many of the likeliest tokens in place of each that is written.
    """

    max_new_tokens: Count = 64
    batch_size: Many = 32
    temperature: Weight = 0.0
    seed: Seed = 0
    trace: bool = False
    stage: int | None = None
    loops: Loops | None = None
    max_positions: Count | None = None
    samples: Many = 1
    starts: Many = 1
    beams: Many = 1
    likelihoods: bool = False
    replayable: bool = False
    stop: Mapping[str, Any] | None = None
    alternatives: Few = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.samples > 1 and self.temperature == 0,
                f"{self.samples} samples at temperature 0 are all the same: give one above 0 for several to differ",
            ),
            (
                self.starts > 1 and max(self.samples, self.beams) > 1,
                "each start has one answer: give either starts, or samples or beams",
            ),
            (
                self.beams > 1 and self.temperature > 0,
                "a beam search draws nothing: give either beams, or samples with a temperature",
            ),
            (
                self.replayable and (self.likelihoods or self.temperature == 0 or max(self.starts, self.beams) > 1),
                "what is replayable is drawn, at a temperature above 0: leave likelihoods, starts and beams out",
            ),
            (
                self.alternatives > 0 and not self.likelihoods,
                "alternatives come with likelihoods: give likelihoods=True too",
            ),
            (self.beams > 1 and self.trace, "a beam search records no trace: leave trace out, or take one beam"),
        )

    @property
    def n_answers(self) -> int:
        """How many answers each question gets."""
        return self.samples * self.starts

    @property
    def likely_at(self) -> float | None:
        """The temperature of the log-probabilities that are asked for; None: none are."""
        return self.temperature if self.replayable else 1.0 if self.likelihoods else None

"""How questions are answered: `EngineOptions`, which refuses what makes no sense before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from innerloop.errors import InputError, nearest, refuse


@dataclass(frozen=True)
class EngineOptions:
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
        beams: how many texts a search for the likeliest one follows (`innerloop.engine.beams`); 1 searches for nothing.
        likelihoods: also tell the log-likelihood of what is written.
    """

    max_new_tokens: int = 64
    batch_size: int = 32
    temperature: float = 0.0
    seed: int = 0
    trace: bool = False
    stage: int | None = None
    loops: int | None = None
    max_positions: int | None = None
    samples: int = 1
    beams: int = 1
    likelihoods: bool = False

    def __post_init__(self) -> None:
        refuse(
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}, but must be at least 1"),
            (self.batch_size < 1, f"batch_size is {self.batch_size}, but must be at least 1"),
            (self.temperature < 0, f"temperature is {self.temperature}, but must be 0 or more"),
            (self.temperature > 0 and self.seed < 0, f"seed is {self.seed}, but draws need a seed of 0 or more"),
            ((self.max_positions or 1) < 1, "max_positions must be at least 1, or left out"),
            (self.samples < 1, f"samples is {self.samples}, but must be at least 1"),
            (
                self.samples > 1 and self.temperature == 0,
                f"{self.samples} samples at temperature 0 are all the same: give one above 0 for several to differ",
            ),
            (self.beams < 1, f"beams is {self.beams}, but a search needs beams >= 1"),
            (
                self.beams > 1 and self.temperature > 0,
                "a beam search draws nothing: give either beams, or samples with a temperature",
            ),
            (self.beams > 1 and self.trace, "a beam search records no trace: leave trace out, or take one beam"),
        )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineOptions:
        """Return options that are given by name."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                others = ", ".join(known)
                raise InputError(f"there is no option '{name}' of answering{nearest(name, known)}; there are {others}")
        return cls(**options)

"""What a calibration may lose, and how thresholds are looked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Chance, Count, Natural, Seed, Share, Weight
from innerloop.errors import refuse


@dataclass(frozen=True)
class CalibrationSettings(Checked):
    """What may be lost by stopping early, and how the threshold that loses no more is found.

    Args:
        max_drop: the most that accuracy may fall, as a share of all examples.
        agreement: instead, the least share of answers (of tokens, where the loop runs inside them) as at full depth.
        mean_loops: instead, the most iterations on average; layers, where tokens leave between them.
        fit_share: the share of examples that a learned rule is fitted to; the others choose its thresholds.
        label: a classifier or probe learns whether an iteration agrees with the last, or whether it is correct.
        min_rows: fewer rows than that open no exit to a classifier.
        batch_size: rows per batch.
        max_new_tokens: the most tokens to write per example; None: as the task says.
        seed: of draws in fitting.
    """

    max_drop: Share = 0.01
    agreement: Share | None = None
    mean_loops: Weight | None = None
    fit_share: Chance = 0.5
    label: Literal["agree", "correct"] = "agree"
    min_rows: Natural = 50
    batch_size: Count = 64
    max_new_tokens: Count | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (self.agreement is not None and self.mean_loops is not None, "give agreement or mean_loops, not both"),
        )

    def is_met(self, found: Mapping[str, Any], full: Mapping[str, Any]) -> Any:
        """Whether what was found is good enough, of numbers or of tensors; ``full`` is what full depth gives."""
        if self.agreement is not None:
            return found["agreement"] >= self.agreement
        if self.mean_loops is not None:
            return found["mean_loops"] <= self.mean_loops
        return found["accuracy"] >= full["accuracy"] - self.max_drop - 1e-9

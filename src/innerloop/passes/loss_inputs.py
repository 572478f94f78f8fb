"""What the terms of a loss are made of, once a row's segment has been thought about and written.

Shapes: `B` rows, `D` width, `U` supervised tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.token_losses import AtOnce, LogitsFn
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch

PassTerms = dict[str, tuple[Tensor, str]]
"""Terms by name: their sums over the items of a batch, and which of the batch's counts each is divided by."""


class Reference(Protocol):
    """A frozen model that reads the same rows along."""

    def logits(self, batch: Batch) -> Tensor:
        """Return its logits (U, V) of the supervised tokens of a batch."""

    def fingerprint(self) -> str:
        """Return a hash of its weights."""


@dataclass
class LossInputs:
    """One segment of a batch, as its loss sees it.

    Attributes:
        batch: the segment.
        thought: what was thought about it, and what the pass of the answer gave.
        backbone: what read it.
        head_input: turns what an iteration gave into the input of the head.
        chunk: how many rows of logits may exist together.
        write: reads the supervised tokens again on another final state (B, N, D) and returns what shows their logits.
        reference: the frozen model that the method asks for.
    """

    batch: Batch
    thought: Thought
    backbone: Backbone
    head_input: Callable[[Tensor], Tensor]
    chunk: AtOnce
    write: Callable[[Tensor], LogitsFn]
    reference: Reference | None = None

"""A model while an engine answers with it: in evaluation mode and with packed weights, in steps of the engine alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from innerloop.decoder.packed import PackedWeights, release
from innerloop.model.model import LatentCore
from innerloop.model.stopping import ruled_by


class AtWork:
    """A model from when an engine begins to answer until nothing waits any more.

    Between two steps the model is in the mode that it was in, and others may use it.

    Args:
        model: the model.
        stop: the settings of its stop rule meanwhile; None: its own.
    """

    def __init__(self, model: LatentCore, stop: Mapping[str, Any] | None = None):
        self.model, self.stop, self.parts = model, stop, list(model.modules())
        self.packed = PackedWeights(self.parts if model.backbone.compiled is None else [])

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let the model answer in a block."""
        ruled = nullcontext() if self.stop is None else ruled_by(self.model, **self.stop)
        with evaluating(self.parts), self.packed.used(), ruled:
            yield

    def end(self) -> None:
        """Let go of packed weights where the weights are about to change."""
        if self.model.training:
            release(self.parts)


@contextmanager
def evaluating(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Have modules in evaluation mode in the block; each goes back to the mode it was in."""
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

"""Models that are looked at while another is trained: loaded once, frozen, and no part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from innerloop.config.method import Method
from innerloop.passes.thought import Thought
from innerloop.phases.phase import phase
from innerloop.text.batch import Batch
from innerloop.text.encoder import PromptEncoder


class Reader(Protocol):
    """A model that reads rows which another has laid out."""

    method: Method
    encoder: PromptEncoder

    def think(self, batch: Batch) -> Thought:
        """Read the prefix of a batch and run the loop."""

    def written_logits(self, batch: Batch, thought: Thought) -> Tensor:
        """Return the logits (U, V) of the supervised tokens."""


class FrozenReference:
    """A frozen model that reads the same rows along; it is loaded when first asked.

    Args:
        load: loads it.
    """

    def __init__(self, load: Callable[[], Reader]):
        self._load, self._model = load, None

    _model: Reader | None

    @property
    def model(self) -> Reader:
        """The model."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return its logits (U, V) of the supervised tokens of a batch."""
        model = self.model
        batch = replace(batch, depth=model.method.prompt("", model.encoder, 0).depth)
        return model.written_logits(batch, model.think(batch))

    def fingerprint(self) -> str:
        """Return a hash of its weights."""
        assert isinstance(self.model, nn.Module)
        return fingerprint(self.model)


@phase("hashing weights")
def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights, or of a part's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

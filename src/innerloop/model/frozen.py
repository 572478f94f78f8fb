"""Models that are looked at while another is trained: loaded once, frozen, and no part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from innerloop.config.method import Method
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError, refuse
from innerloop.methods import method_named, name_of
from innerloop.methods.depth.method import DepthMethod
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


class Read(Protocol):
    """A model whose decoder is read."""

    backbone: Backbone
    method: Method


def check_bare(name: str, path: str | Path) -> None:
    """Refuse a run whose decoder is no model without its method.

    Args:
        name: of the method; one's own is not looked at, as that would import it.
        path: where the run lies.
    """
    method = None if "." in name else method_named(name)
    does = "fills canvases with it" if method is not None and method.family == "denoise" else ""
    if method is not None and issubclass(method, DepthMethod):
        does = method.passes_do
    refuse(
        (
            does != "",
            f"the decoder of {path} is no model by itself, as '{name}' {does}: choose one that writes text",
        )
    )


def check_reader(method: Method, path: str | Path) -> None:
    """Refuse a reference that does not read text as it is written."""
    does = {"thought": "thinks in latents first", "denoise": "fills canvases"}.get(method.family)
    way = "choose a run that writes text, or a plain model"
    refuse((does is not None, f"{path} cannot read along what was written, as '{method.name}' {does}: {way}"))


def check_states(student: Read, teacher: Read, path: str | Path) -> None:
    """Refuse a teacher whose states are of another shape than the student's, or no model's."""
    theirs, ours, hid = teacher.backbone, student.backbone, student.method.hid
    check_bare(name_of(teacher.method), path)
    width = hid.width or ours.width
    if theirs.width != width or (theirs.n_layers != ours.n_layers and hid.layers != "last"):
        raise InputError(
            f"the teacher in {path} has {theirs.n_layers} layers of width {theirs.width}, this model "
            f"{ours.n_layers} of width {ours.width}: set teacher to a run of the same model, or for one of "
            "another width hid.width to it, of another depth hid.layers to last"
        )

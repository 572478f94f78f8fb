"""Folders on disk: an ordinary Hugging Face checkpoint plus what the method trained.

    config.json, model.safetensors, tokenizer.json ...   plain `transformers` loads these
    innerloop.json                                        method, settings, versions
    innerloop.safetensors                                 the method's parts, and LoRA weights if any
    custom_generate/                                      how plain transformers answers with the thought

    manifest.json                                         what was written, with sizes and checksums

LoRA weights are merged into model.safetensors, so that the folder is complete in itself. Folders are written aside and
renamed (`disk/folders.py`): a write that fails leaves the old folder as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from innerloop.decoder.adapters import ADAPTER, adapted, merged_state
from innerloop.disk.folders import replacing_folder
from innerloop.errors import InputError, few
from innerloop.methods import Method, name_of
from innerloop.model.exported import Answering, export
from innerloop.model.run_folder import FORMAT, PARTS, SETTINGS
from innerloop.phases.phase import phase
from innerloop.text.wording import OURS


class Stored(Answering, Protocol):
    """A model that can be written to a folder and read back."""

    tokenizer: PreTrainedTokenizerBase

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return what the method trains besides the backbone, by name."""


def save(model: Stored, path: str | Path, record: Mapping[str, Any] | None = None) -> None:
    """Write a complete folder aside, then put it in place of the model that was there.

    Files that no save of ours has written stay, whatever folder it is. ``record`` goes into innerloop.json.
    """
    with replacing_folder(path) as aside:
        write(model, aside, record)


@phase("saving")
def write(model: Stored, folder: Path, record: Mapping[str, Any] | None = None) -> None:
    """Write the files of a checkpoint into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lm = model.backbone.lm
    with without_bars():
        lm.save_pretrained(folder, state_dict=merged_state(lm))
    model.tokenizer.save_pretrained(folder)
    save_file(_apart(trained_parts(model)), folder / PARTS)
    settings = {"innerloop": version("innerloop"), "format": FORMAT, "method": method_settings(model.method)}
    settings |= record or {}
    if model.encoder.running_text:
        settings["running_text"] = True
    if model.encoder.wording != OURS:
        settings["wording"] = asdict(model.encoder.wording)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    export(model, folder)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as safetensors wants them; a tied head is written twice."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return apart


def method_settings(method: Method) -> dict[str, Any]:
    """Return a method as a recipe writes it: its name and fields."""
    return {"name": name_of(method), **asdict(method)}


def trained_parts(model: Stored) -> dict[str, Tensor]:
    """Return what belongs to innerloop alone: the weights of the method's parts and of LoRA before merging."""
    parts = {name: tensor.detach() for name, (tensor, first) in _tensors(model).items() if name == first}
    if adapted(model.backbone.lm):
        parameters = model.backbone.lm.named_parameters()  # a tied table's once, where the state dict has them twice
        parts |= {f"lm.{name}": p.detach() for name, p in parameters if f".{ADAPTER}" in name}
    return parts


def _tensors(model: Stored) -> dict[str, tuple[Tensor, str]]:
    """Return the tensors of the method's parts by name, each with the first of its names: a tied head has two."""
    first: dict[int, str] = {}
    state = torch.nn.ModuleDict(model.trained_modules()).state_dict(keep_vars=True)
    return {name: (tensor, first.setdefault(id(tensor), name)) for name, tensor in state.items()}


def load_parts(model: Stored, folder: Path, strict: bool = True) -> None:
    """Load the method's parts, and LoRA weights where the model has LoRA, from a checkpoint folder.

    With ``strict`` off, for another setting of the same method, what fits is taken: of a table indexed by iteration or
    slot, the rows that both have.
    """
    try:
        stored = load_file(folder / PARTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {folder / PARTS}: {first_line(error)}") from None
    if adapted(model.backbone.lm):
        _load_adapters(model, {n.removeprefix("lm."): t for n, t in stored.items() if n.startswith("lm.")}, folder)
    put_parts(model, {n: t for n, t in stored.items() if not n.startswith("lm.")}, folder / PARTS, strict)


def put_parts(model: Stored, parts: Mapping[str, Tensor], source: str | Path, strict: bool = True) -> None:
    """Put stored weights into the method's parts; ``strict`` as in `load_parts`."""
    modules = torch.nn.ModuleDict(model.trained_modules())
    check_finite(parts, source, unbounded=[name for name, _ in modules.named_buffers()])
    own = dict(parts)
    own |= {name: own[first] for name, (_, first) in _tensors(model).items() if first in own}
    if not strict:
        own = {name: _fitted(tensor, own.get(name)) for name, tensor in modules.state_dict().items()}
    try:
        modules.load_state_dict(own)
    except RuntimeError as error:  # missing, unexpected or of another shape
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source} does not fit the method '{model.method.name}' with these settings: {reason}"
        ) from None


def _load_adapters(model: Stored, weights: dict[str, Tensor], folder: Path) -> None:
    """Load LoRA weights, all of which must be there and have their place."""
    lm = model.backbone.lm
    wanted = {name for name, _ in lm.named_parameters() if f".{ADAPTER}" in name}
    if differ := sorted(wanted ^ weights.keys()):
        raise InputError(f"{folder / PARTS} has other LoRA layers than backbone.lora: they differ in {few(differ)}")
    try:
        lm.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # of another rank
        raise InputError(f"{folder / PARTS} does not fit backbone.lora: {' '.join(str(error).split())}") from None


def check_finite(tensors: Mapping[str, Tensor], source: str | Path, unbounded: Sequence[str] = ()) -> None:
    """Refuse weights that are no numbers, as what is computed with them is none either; thresholds may be infinite."""
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor, name in unbounded)]
    if bad:
        raise InputError(f"{source} holds numbers that are not finite, in {few(bad)}: take an earlier checkpoint")


def _is_finite(tensor: Tensor, may_be_infinite: bool) -> bool:
    has_range = tensor.is_floating_point() and torch.finfo(tensor.dtype).bits >= 16
    if not has_range or tensor.is_meta or tensor.numel() == 0:
        return True
    least, most = tensor.detach().aminmax()  # needs no memory, unlike isfinite; what is no number is both
    return not bool(least.isnan() if may_be_infinite else (least.isinf() | most.isinf() | least.isnan()))


def _fitted(own: Tensor, stored: Tensor | None) -> Tensor:
    """Return ``own`` with as much of ``stored`` as has its place there."""
    if stored is not None and own.numel() == 0:  # as large as what it was fitted to
        return stored
    if stored is None or stored.shape[1:] != own.shape[1:]:
        return own
    if own.ndim == 0:
        return stored
    n = min(len(own), len(stored))
    return torch.cat([stored[:n].to(own), own[n:]])


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' bars for writing and reading shards: they would tear a live display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_words() -> Iterator[None]:
    """Hide what transformers logs of weights that are missing, unexpected or misshapen: whoever loads them tells it."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]

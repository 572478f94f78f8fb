"""Released weights put together: the stock decoder that a format names, filled with what it found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from innerloop.errors import InputError, InputNote, few
from innerloop.formats.opened import Opened
from innerloop.formats.recognise import released
from innerloop.model.checkpoint import Stored, check_finite, load_parts, put_parts, without_bars, without_words

SIZED = ("revision", "token", "cache_dir", "local_files_only")  # what finding a Hub model is told


@dataclass(frozen=True)
class Found:
    """What lies at a path: a decoder with its tokenizer, and of a run or a released model what innerloop.json says."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saved: Mapping[str, Any] | None
    parts: Mapping[str, Tensor] | None = None  # None: they lie in innerloop.safetensors

    def put_parts(self, model: Stored, path: str | Path, strict: bool) -> None:
        """Give a model the parts of its method."""
        if self.parts is None:
            load_parts(model, Path(path), strict)
        else:  # what the loop measures of the embeddings is ours; a gate that nobody asks for is left out
            modules = nn.ModuleDict(model.trained_modules())
            known = {**dict(modules.named_buffers()), **self.parts}
            put_parts(model, {name: known[name] for name in modules.state_dict() if name in known}, path, strict)


def open_released(path: str | Path, hub: dict[str, Any]) -> Opened | None:
    """Open a folder or a Hub model of a known format, and say in one line what it is; None: it is of none."""
    found = released(path, **{name: value for name, value in hub.items() if name in SIZED})
    if found is None:
        return None
    known, source = found
    if missing := known.missing(source):
        raise InputError(f"{path} is {known.name}, and lacks {few(missing)}: copy the model's files again")
    try:
        opened = known.open(source)
    except InputError:
        raise
    except Exception as error:  # settings of another type or size than any such model's end in any error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{path} is {known.name}, and its settings do not fit ({reason}): restore them") from error
    read = f"; {', '.join(source.pickles)} is a pickle, of which tensors alone were read" if source.pickles else ""
    kind = type(opened.config).__name__.removesuffix("Config")
    warnings.warn(
        f"{path} is {known.name}: opened as {kind} with method '{opened.method.name}'{read}", InputNote, stacklevel=2
    )
    return opened


def fill(opened: Opened, path: str | Path, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """Make the stock decoder of a format and fill it; "auto" keeps the type that most of the weights have."""
    for role in ("bos", "eos", "pad"):  # a base's own are not those of a tokenizer with markers
        setattr(opened.config, f"{role}_token_id", getattr(opened.tokenizer, f"{role}_token_id"))
    if dtype == "auto":
        dtype = _dtype_of(opened.weights)
    with without_bars(), without_words():
        lm, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(opened.config)].from_pretrained(
            None,
            config=opened.config,
            state_dict=opened.weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"the weights do not have the shapes that config.json says ({name} is {tuple(stored)}, and would have to "
            f"be {tuple(wanted)}): restore config.json"
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"the weights lack {few(missing)}")
    check_finite(lm.state_dict(), path)
    opened.weights = {}
    return lm


def _dtype_of(weights: dict[str, Tensor]) -> torch.dtype:
    """Return the type of the largest weight."""
    return max((one for one in weights.values() if one.is_floating_point()), key=Tensor.numel).dtype

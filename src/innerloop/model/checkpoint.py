"""Folders on disk: an ordinary Hugging Face checkpoint plus what the method trained.

    config.json, model.safetensors, tokenizer.json ...   plain `transformers` loads these
    innerloop.json                                        method, settings, versions
    innerloop.safetensors                                 the method's parts, and LoRA weights if any

LoRA weights are merged into model.safetensors, so that the folder is complete in itself. Folders are written aside and
renamed: a write that fails leaves the old folder as it was.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import innerloop
from innerloop.decoder.adapters import ADAPTER, MarkerInit, adapted, add_lora, add_markers, merged_state
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError, nearest
from innerloop.methods import Method, method_named

if TYPE_CHECKING:
    from innerloop.model.model import LatentModel

SETTINGS, PARTS = "innerloop.json", "innerloop.safetensors"
RUN_CHECKPOINT = "checkpoint"  # the folder of the best model inside a run
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def save(model: LatentModel, path: str | Path, record: Mapping[str, Any] | None = None) -> None:
    """Write a complete folder aside, then put it in place of the model that was there.

    Other files in a folder that is no saved model of ours stay. ``record`` goes into innerloop.json.
    """
    path = Path(path).resolve()
    aside, replaced = path.with_name(f".{path.name}.writing"), path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(model, aside, record)
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists() and not (path / SETTINGS).exists() and any(path.iterdir()):
            for file in aside.iterdir():
                file.replace(path / file.name)
            aside.rmdir()
            return
        if path.exists():
            path.rename(replaced)
        aside.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"could not save to {path}: {error}; what was there before is untouched") from error


def write(model: LatentModel, folder: Path, record: Mapping[str, Any] | None = None) -> None:
    """Write the files of a checkpoint into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lm = model.backbone.lm
    with _without_bars():
        lm.save_pretrained(folder, state_dict=merged_state(lm))
    model.tokenizer.save_pretrained(folder)
    save_file(_apart(trained_parts(model)), folder / PARTS)
    settings = {"innerloop": innerloop.__version__, "method": method_settings(model.method), **(record or {})}
    if model.spell.running_text:
        settings["running_text"] = True
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


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
    return {"name": method.name, **asdict(method)}


def trained_parts(model: LatentModel) -> dict[str, Tensor]:
    """Return what belongs to innerloop alone: the weights of the method's parts and of LoRA before merging."""
    parts = {name: tensor.detach() for name, (tensor, first) in _tensors(model).items() if name == first}
    if adapted(model.backbone.lm):
        parameters = model.backbone.lm.named_parameters()  # a tied table's once, where the state dict has them twice
        parts |= {f"lm.{name}": p.detach() for name, p in parameters if f".{ADAPTER}" in name}
    return parts


def _tensors(model: LatentModel) -> dict[str, tuple[Tensor, str]]:
    """Return the tensors of the method's parts by name, each with the first of its names: a tied head has two."""
    first: dict[int, str] = {}
    state = torch.nn.ModuleDict(model.parts()).state_dict(keep_vars=True)
    return {name: (tensor, first.setdefault(id(tensor), name)) for name, tensor in state.items()}


def load_parts(model: LatentModel, folder: Path, strict: bool = True) -> None:
    """Load the method's parts, and LoRA weights where the model has LoRA, from a checkpoint folder.

    With ``strict`` off, for another setting of the same method, what fits is taken: of a table indexed by iteration or
    slot, the rows that both have.
    """
    try:
        stored = load_file(folder / PARTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {folder / PARTS}: {_first_line(error)}") from None
    if adapted(model.backbone.lm):
        weights = {name.removeprefix("lm."): tensor for name, tensor in stored.items() if name.startswith("lm.")}
        model.backbone.lm.load_state_dict(weights, strict=False)
    own = {name: tensor for name, tensor in stored.items() if not name.startswith("lm.")}
    own |= {name: own[first] for name, (_, first) in _tensors(model).items() if first in own}
    parts = torch.nn.ModuleDict(model.parts())
    if not strict:
        own = {name: _fitted(tensor, own.get(name)) for name, tensor in parts.state_dict().items()}
    try:
        parts.load_state_dict(own)
    except RuntimeError as error:  # missing, unexpected or of another shape
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder / PARTS} does not fit the method '{model.method.name}' with these settings: {reason}"
        ) from None


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


def load(
    path: str | Path,
    method: Method | None = None,
    *,
    lora: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    marker_init: MarkerInit = "token",
    trust_remote_code: bool = False,
    **options: Any,
) -> LatentModel:
    """Load a saved run, or put a method on any Hugging Face model.

    Args:
        path: a folder or a Hub name.
        method: how to reason. None: as the folder says. With a saved folder, another method starts from its weights.
        lora: fields of peft's LoraConfig; trains low-rank updates instead of the backbone.
        dtype: the backbone's type, as torch names it or fp32, bf16 or fp16; "auto" keeps the file's. What the method
            adds stays in fp32, as do losses, scores of stop rules and drawing tokens.
        device: where to put the model; None chooses a GPU if there is one.
        marker_init: what new rows of the embeddings start from; see `add_markers`.
        trust_remote_code: let the model's own code run; off unless you say so.
        options: further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        InputError: the folder or model does not exist, or is no innerloop run and no method is given.
    """
    from innerloop.model.model import LatentModel

    path, dtype = resolve(path), dtype_named(dtype)
    folder = Path(path)
    saved = read_settings(folder) if (folder / SETTINGS).exists() else None
    if folder.is_dir() and saved is None and method is None:
        raise InputError(f"{folder} has no {SETTINGS}, so it is not a saved innerloop run; give a method to put on it")
    source = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = _tokenizer_of(path, **source)
        lm = _lm_of(path, dtype=dtype, **source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load a model from '{path}': {_first_line(error)}") from error
    backbone = Backbone(lm)
    backbone.check()
    stored = None
    if saved and (method is None or method.name == saved["method"]["name"]):
        stored = _method_of(saved, folder)
    chosen = method or stored
    if chosen is None:
        raise InputError(f"'{path}' is not a saved innerloop run; give a method to put on it")
    if stored is not None and stored.answering.classes not in ((), chosen.answering.classes):
        raise InputError(
            f"{folder} chooses among the classes {', '.join(stored.answering.classes)}; give the same, in this order"
        )
    start = chosen.convert(backbone) if stored is None else None
    add_markers(backbone, tokenizer, chosen.markers, marker_init)
    model = LatentModel(backbone, tokenizer, chosen)
    if stored is not None:
        load_parts(model, folder, strict=chosen == stored)
    elif start:
        parts = torch.nn.ModuleDict(model.parts())
        parts.load_state_dict({**parts.state_dict(), **start})
    if lora is not None:
        add_lora(model.backbone, model.tokenizer, model.method.markers, lora)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def dtype_named(name: torch.dtype | str) -> torch.dtype | str:
    """Return the type of weights of a name, or "auto"."""
    if not isinstance(name, str) or name == "auto":
        return name
    found = getattr(torch, SHORT_DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype is '{name}'; choose one of auto, {', '.join(SHORT_DTYPES)}")
    return found


def load_decoder(path: str | Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Load a bare model that shares a vocabulary, such as another size of the same family.

    Raises:
        InputError: it cannot be loaded, or its tokens have other ids.
    """
    path = resolve(path)
    try:
        theirs = _tokenizer_of(path).get_vocab()
        lm = _lm_of(path, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load a decoder from '{path}': {_first_line(error)}") from error
    ours = tokenizer.get_vocab()
    is_known = ours.keys() - tokenizer.get_added_vocab().keys() <= theirs.keys()
    if not is_known or any(ours.get(token, i) != i for token, i in theirs.items()):
        raise InputError(f"the tokens of '{path}' have other ids than those of the model: choose one of its family")
    return lm


def from_scratch(
    settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, method: Method, seed: int = 0
) -> LatentModel:
    """Make a backbone with fresh weights.

    Args:
        settings: ``type`` (a transformers model type such as llama or gpt2) and fields of its configuration.
        tokenizer: sets the vocabulary; it stays as it is, the model gets a copy with the markers.
        method: how to reason.
        seed: of the initial weights.
    """
    from innerloop.model.model import LatentModel

    settings, tokenizer = dict(settings), copy.deepcopy(tokenizer)
    model_type = settings.pop("type", "llama")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        raise InputError(
            f"transformers has no model type '{model_type}'{nearest(model_type, CONFIG_MAPPING_NAMES)}"
        ) from None
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name in settings:
        if name == "vocab_size" or name in ids:
            raise InputError(f"backbone.scratch: the tokenizer sets {name}; leave it out")
        if not hasattr(known, name):
            names = {*vars(known), *known.attribute_map}
            raise InputError(f"backbone.scratch: a {model_type} has no '{name}'{nearest(name, names)}")
    new = [marker for marker in method.markers if marker not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **settings)
            lm = AutoModelForCausalLM.from_config(config)
        except (ValueError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"backbone.scratch: cannot make a {model_type}: {reason}") from None
        backbone = Backbone(lm)
        method.begin(backbone)
        return LatentModel(backbone, tokenizer, method)  # whose parts are drawn, too


def read_settings(folder: Path) -> dict[str, Any]:
    """Read innerloop.json."""
    if not (folder / SETTINGS).exists():
        raise InputError(f"{folder} has no {SETTINGS}, so it is not a saved innerloop run")
    try:
        settings = json.loads((folder / SETTINGS).read_text())
    except ValueError as error:
        raise InputError(f"{folder / SETTINGS} is not valid JSON ({error}); restore it or save the run again") from None
    if not isinstance(settings, dict) or "name" not in (settings.get("method") or ()):
        raise InputError(f"{folder / SETTINGS} names no method; restore it or save the run again")
    return settings


def _method_of(saved: Mapping[str, Any], folder: Path) -> Method:
    """Return the method that innerloop.json says, its fields checked as those of a recipe are."""
    from innerloop.train.recipe import typed

    settings = dict(saved["method"])
    cls = method_named(settings.pop("name"))
    unknown = sorted(settings.keys() - {field.name for field in fields(cls)})
    if unknown:
        names = ", ".join(unknown)
        raise InputError(
            f"{folder / SETTINGS} was written by another version of innerloop: '{cls.name}' has no {names}"
        )
    try:
        return typed(cls, settings, "method")
    except InputError as error:
        raise InputError(f"{folder / SETTINGS}: {error}") from None


def resolve(path: str | Path) -> str | Path:
    """Return the checkpoint folder of a run, a model folder as it is, or a Hub name.

    Raises:
        InputError: it can only be a folder, and that does not exist or holds no model.
    """
    folder = Path(path)
    if (folder / RUN_CHECKPOINT / SETTINGS).exists():
        return folder / RUN_CHECKPOINT
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(
                f"{folder} holds no model and no finished run: it has neither config.json nor {RUN_CHECKPOINT}/"
            )
        return folder
    names = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, names)
    is_path = folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith((".", "runs/", "models/"))
    if is_path or (hint and folder.parts[1:]):
        raise InputError(f"there is no folder {folder}{hint}")
    return str(path)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' bars for writing and reading shards: they would tear a live display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _lm_of(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a bare model, all of whose weights must be there and have the shapes that its configuration says.

    Transformers fills a hole with random numbers and only logs it.
    """
    with _without_bars():
        lm, report = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if report["missing_keys"]:
        raise InputError(f"the weights lack {', '.join(sorted(report['missing_keys']))}")
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"the weights do not have the shapes that config.json says ({name} is {tuple(stored)}, and would have to "
            f"be {tuple(wanted)}): restore config.json"
        )
    return lm


def _tokenizer_of(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer as the class that its own file names: AutoTokenizer prefers the model's for some (Qwen2)."""
    generic = Path(path) / "tokenizer_config.json"
    try:
        if generic.exists() and json.loads(generic.read_text()).get("tokenizer_class") == "TokenizersBackend":
            return PreTrainedTokenizerFast.from_pretrained(path, **options)
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # a file with other contents than a tokenizer's: a KeyError, a bare Exception, ...
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise InputError(f"the tokenizer's files cannot be read ({reason}); restore them") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_run(path: str | Path) -> bool:
    """Tell whether a folder was saved by innerloop, itself or as a run."""
    return (Path(resolve(path)) / SETTINGS).exists()


def recorded(path: str | Path, name: str, default: Any = None) -> Any:
    """Return what a run's innerloop.json says of its training, such as ``seed`` and ``stage``."""
    folder = Path(resolve(path))
    return read_settings(folder).get(name, default) if (folder / SETTINGS).exists() else default


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that a full disk leaves the old one as it was."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"could not write {path}: {error}; what was there before is untouched") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run, folder or Hub model."""
    try:
        return _tokenizer_of(resolve(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from '{path}': {_first_line(error)}") from error

"""Models made from folders, Hub names or configurations: a decoder, its tokenizer and a method put together."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar, Unpack

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from innerloop.checks.values import Bounds, fitted
from innerloop.config.method import Method
from innerloop.config.typed import typed
from innerloop.decoder.adapters import MarkerInit, add_lora, add_markers
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.check import check_passes
from innerloop.errors import InputError, few, nearest
from innerloop.methods import method_named, name_of
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.depth.method import DepthMethod
from innerloop.model.checkpoint import (
    Stored,
    check_finite,
    first_line,
    load_parts,
    method_settings,
    without_bars,
    without_words,
)
from innerloop.model.frozen import check_bare
from innerloop.model.released import Found, fill, open_released
from innerloop.model.run_folder import FORMAT, SETTINGS, check_own_code, read_settings, resolve
from innerloop.model.unloadable import why
from innerloop.model.unread import tell_chat, tell_unread
from innerloop.phases.phase import phase, says
from innerloop.text.encoder import PromptEncoder
from innerloop.text.wording import Chat, Wording, wording_of

KERNELS = "attn_implementation"
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("n_embd", "n_layer", "n_head", "n_positions", "num_key_value_heads", "head_dim"),
)
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
M = TypeVar("M", bound=Stored)
_CHECKED: set[str] = set()  # shapes of fresh models that have been tried


class Hub(TypedDict, total=False):
    """What transformers is told of a model, by keyword, as `load` explains it."""

    attn_implementation: str
    revision: str
    token: str | bool
    cache_dir: str | Path
    local_files_only: bool


class Loading(Hub, total=False):
    """The options of loading by keyword, as `load` explains them."""

    lora: Mapping[str, Any] | None
    dtype: torch.dtype | str
    device: str | torch.device | None
    marker_init: MarkerInit
    trust_remote_code: bool
    chat: Chat


@says(lambda make, path, *_, **__: f"loading {path}")
def load(
    make: Callable[[Backbone, PreTrainedTokenizerBase, Method], M],
    path: str | Path,
    method: Method | None = None,
    *,
    lora: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    marker_init: MarkerInit = "token",
    trust_remote_code: bool = False,
    chat: Chat = "auto",
    **hub: Unpack[Hub],
) -> M:
    """Load a saved run, open released weights of a known format, or put a method on any Hugging Face model.

    Args:
        make: puts a decoder, a tokenizer and a method together: the class of the model.
        path: a folder or a Hub name.
        method: how to reason. None: as the folder says. With a saved folder, another method starts from its weights.
            Released weights say it themselves, in values that they or their paper fix.
        lora: fields of peft's LoraConfig; trains low-rank updates instead of the backbone.
        dtype: the backbone's type, as torch names it or fp32, bf16 or fp16; "auto" keeps the file's. What the method
            adds stays in fp32, as do losses, scores of stop rules and drawing tokens.
        device: where to put the model; None chooses a GPU if there is one.
        marker_init: what new rows of the embeddings start from; see `add_markers`.
        trust_remote_code: let the model's own code run; off unless you say so. Then no format is recognised.
        chat: ask a model that is no run yet through its chat template (True), with bare questions (False), or as a chat
            if it has a template (auto). A run is asked as it was trained.
        hub: attn_implementation: which kernels compute attention, such as sdpa or eager. Of models on the Hub:
            revision (a branch, tag or commit), token, cache_dir, local_files_only (download nothing).

    Raises:
        InputError: the folder or model does not exist, or is no innerloop run and no method is given.
    """
    place, asked, path, dtype = device_named(device), path, resolve(path, **hub), dtype_named(dtype)
    folder, found = Path(path), _find(path, method is None, dtype, trust_remote_code, hub)
    backbone, tokenizer, saved = Backbone(found.lm), found.tokenizer, found.saved
    if method is None and saved is not None and not trust_remote_code:
        check_own_code(asked, saved["method"]["name"])
    is_same = saved is not None and (method is None or name_of(method) == saved["method"]["name"])
    stored = _method_of(saved, folder) if saved is not None and is_same else None
    chosen = method or stored
    if chosen is None:
        raise InputError(f"'{path}' is not a saved innerloop run; give a method to put on it")
    check_passes(backbone, sections=isinstance(chosen, DepthMethod), sees_all=chosen.plan.sees != "past")
    if saved is not None and isinstance(chosen, DenoisingMethod):
        chosen.check_start(saved["method"], folder)
    if stored is not None and stored.decoder.classes not in ((), chosen.decoder.classes):
        raise InputError(
            f"{folder} chooses among the classes {', '.join(stored.decoder.classes)}; give the same, in this order"
        )
    is_new = stored is None
    start = chosen.convert(backbone, tokenizer) if is_new and isinstance(chosen, DepthMethod) else None
    add_markers(backbone, tokenizer, chosen.markers, marker_init)
    model = make(backbone, tokenizer, chosen)
    model.encoder = PromptEncoder(tokenizer, wording=_wording(path, found, chat))
    if stored is not None:
        found.put_parts(model, path, strict=chosen == stored)
    elif start:
        parts = torch.nn.ModuleDict(model.trained_modules())
        parts.load_state_dict({**parts.state_dict(), **start})
    if lora is not None:
        add_lora(backbone, tokenizer.convert_tokens_to_ids([*chosen.markers]), lora)
    assert isinstance(model, nn.Module)
    model.to(place).eval()
    return model


def _wording(path: str | Path, found: Found, chat: Chat) -> Wording:
    """Return what is written around questions: as a run was trained or a release says, or as a fresh model is asked."""
    is_run, saved = (Path(path) / SETTINGS).exists(), found.saved or {}
    kept = Wording(**saved.get("wording", {}))
    if is_run and chat != "auto" and chat != kept.chat:
        raise InputError(f"{path} was trained {'in' if kept.chat else 'without'} a chat: leave chat out")
    if is_run or ("wording" in saved and chat is not True):
        return kept
    chosen = wording_of(found.tokenizer, chat)
    if chosen.chat:
        tell_chat(path)
    return chosen


def _find(path: str | Path, needs_method: bool, dtype: torch.dtype | str, trust_remote_code: bool, hub: Hub) -> Found:
    """Load what lies at a path: released weights of a known format, a saved run, or any model."""
    folder, kernels = Path(path), {name: value for name, value in hub.items() if name == KERNELS}
    saved = read_settings(folder) if (folder / SETTINGS).exists() else None
    opened = None if saved is not None or trust_remote_code else open_released(path, {**hub})
    if opened is not None:
        settings: dict[str, Any] = {"format": FORMAT, "method": method_settings(opened.method)}
        settings |= {} if opened.wording is None else {"wording": asdict(opened.wording)}
        return Found(fill(opened, path, dtype, **kernels), opened.tokenizer, settings, opened.parts)
    if folder.is_dir() and saved is None and needs_method:
        raise InputError(f"{folder} has no {SETTINGS}, so it is not a saved innerloop run; give a method to put on it")
    source = {**hub, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = _tokenizer_of(path, **{name: value for name, value in source.items() if name != KERNELS})
        return Found(load_lm(path, dtype=dtype, is_own=saved is not None, **source), tokenizer, saved)
    except Exception as error:
        if (reason := why(error, path, trust_remote_code)) is None:
            raise
        raise InputError(f"cannot load a model from '{path}': {reason}") from error


def load_beside(model: M, path: str | Path) -> M:
    """Load a run on the weights of a model whose decoder it shares, such as one trained with ``backbone.freeze``.

    Nothing of the decoder is held twice, so that runs of unlike width or depth are at hand together.

    Raises:
        InputError: it is no saved run, or its decoder has other weights or tokens.
    """
    folder = Path(resolve(path))
    method, backbone = _method_of(read_settings(folder), folder), model.backbone
    check_tokens(load_tokenizer(folder), model.tokenizer, folder)
    theirs, ours = load_lm(folder, is_own=True, dtype=backbone.lm.dtype).state_dict(), backbone.lm.state_dict()
    if theirs.keys() != ours.keys() or not all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours):
        raise InputError(
            f"the decoder of {folder} has other weights than this model's: train it from this model with "
            "backbone.freeze, or load it by itself"
        )
    twin = type(model)(backbone, model.tokenizer, method)  # type: ignore[call-arg]
    load_parts(twin, folder)
    assert isinstance(twin, nn.Module)
    twin.eval()
    return twin


def dtype_named(name: torch.dtype | str) -> torch.dtype | str:
    """Return the type of weights of a name, or "auto"."""
    if not isinstance(name, str) or name == "auto":
        return name
    found = getattr(torch, SHORT_DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype is '{name}'; choose one of auto, {', '.join(SHORT_DTYPES)}")
    return found


def device_named(name: str | torch.device | None) -> torch.device:
    """Return the device of a name; None: a GPU if there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"device is '{name}', but must be cpu, cuda or cuda:N") from None


@phase("making a model")
def from_scratch(
    make: Callable[[Backbone, PreTrainedTokenizerBase, Method], M],
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    seed: int = 0,
) -> M:
    """Make a backbone with fresh weights.

    Args:
        make: puts a decoder, a tokenizer and a method together: the class of the model.
        settings: ``type`` (a transformers model type such as llama or gpt2) and fields of its configuration.
        tokenizer: sets the vocabulary; it stays as it is, the model gets a copy with the markers.
        method: how to reason.
        seed: of the initial weights.
    """
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
        fitted(f"backbone.scratch.{name}", settings[name], _kind_of(name, settings[name]))
    new = [marker for marker in method.markers if marker not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **settings)
            lm = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # what makes no sense together ends in any error, deep inside transformers
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"backbone.scratch: cannot make a {model_type}: {reason}") from None
        backbone, is_deep = Backbone(lm), isinstance(method, DepthMethod)
        sees_all = method.plan.sees != "past"
        if (shape := repr((model_type, settings, is_deep, sees_all))) not in _CHECKED:
            check_passes(backbone, sections=is_deep, sees_all=sees_all)
            _CHECKED.add(shape)
        if isinstance(method, DepthMethod):
            method.begin(backbone)
        return make(backbone, tokenizer, method)  # whose parts are drawn, too


def _kind_of(name: str, value: Any) -> Any:
    """Return what a field of a configuration may be, as far as it is known here: sizes, and finite numbers."""
    if name in SIZES and value is not None:
        return Annotated[int, Bounds(1, 1_000_000)]
    return float if isinstance(value, float) else Any


def _method_of(saved: Mapping[str, Any], folder: Path) -> Method:
    """Return the method that innerloop.json says, its fields checked as those of a recipe are."""
    if saved.get("format") != FORMAT:
        raise InputError(
            f"{folder} was saved by an earlier version of innerloop, whose settings were spelled otherwise: train it "
            "again"
        )
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


def load_decoder(path: str | Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Load a bare model that shares a vocabulary, such as another size of the same family; a run's, or a released one.

    Raises:
        InputError: it cannot be loaded or used, is no model without its method, or its tokens have other ids.
    """
    path = resolve(path)
    with phase(f"loading {path}"):
        found = _find(path, False, dtype, False, {})
    if found.saved is not None:
        check_bare(str(found.saved["method"]["name"]), path)
    check_tokens(found.tokenizer, tokenizer, path)
    check_passes(Backbone(found.lm))
    return found.lm


def check_tokens(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Refuse another model whose tokens have other ids than those of this one."""
    known, own = theirs.get_vocab(), ours.get_vocab()
    is_known = own.keys() - ours.get_added_vocab().keys() <= known.keys()
    if not is_known or any(own.get(token, i) != i for token, i in known.items()):
        raise InputError(f"the tokens of '{path}' have other ids than those of the model: choose one of its family")


def load_lm(path: str | Path, is_own: bool, **options: Any) -> PreTrainedModel:
    """Load a bare model, all of whose weights must be there, finite, and of the shapes that its configuration says.

    Transformers fills a hole with random numbers and only logs it. Where innerloop has written the folder (``is_own``),
    there may be no other weights either.
    """
    with without_bars(), without_words():
        lm, report = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"the weights lack {few(missing)}")
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"the weights do not have the shapes that config.json says ({name} is {tuple(stored)}, and would have to "
            f"be {tuple(wanted)}): restore config.json"
        )
    unexpected = sorted(report["unexpected_keys"])
    if unexpected and is_own:
        raise InputError(f"config.json has no place for the weights {few(unexpected)}: restore config.json")
    tell_unread(path, unexpected)
    check_finite(lm.state_dict(), path)
    return lm


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run, folder or Hub model."""
    try:
        return _tokenizer_of(resolve(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a tokenizer from '{path}': {first_line(error)}") from error


def _tokenizer_of(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer as the class that its own file names: AutoTokenizer prefers the model's for some (Qwen2)."""
    generic = Path(path) / "tokenizer_config.json"
    try:
        if generic.exists() and json.loads(generic.read_text()).get("tokenizer_class") == "TokenizersBackend":
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # a file with other contents than a tokenizer's: a KeyError, a bare Exception, ...
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the tokenizer's files cannot be read ({reason}); restore them") from error
    return tokenizer

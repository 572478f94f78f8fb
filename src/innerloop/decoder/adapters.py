"""What is added to a backbone: markers in the vocabulary, low-rank updates, and what it means to freeze one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from innerloop.checks.settings import check_names
from innerloop.checks.values import Bounds, Dropout, Positive, fitted
from innerloop.errors import InputError

if TYPE_CHECKING:  # slow to import
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from innerloop.decoder.backbone import Backbone

MarkerInit = Literal["token", "mean", "normal"]
MARKER_COPIES = "<<"  # new rows start as copies of this token's row (cot.md, section 0)
ADAPTER = "lora"
LORA_TARGETS = "all-linear"
LORA_KINDS: dict[str, Any] = {
    "r": Annotated[int, Bounds(1, 100_000)],
    "lora_alpha": Positive,
    "lora_dropout": Dropout,
    "bias": Literal["none", "all", "lora_only"],
    "target_modules": str | list[str],
}


def add_markers(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str], init: MarkerInit = "token"
) -> None:
    """Add marker tokens to the tokenizer and their rows to the embeddings (cot.md, section 0).

    Args:
        backbone: its embeddings grow, where they have no room.
        tokenizer: gains the tokens.
        markers: the tokens; those it has already keep their rows.
        init: a new row is the row of ``<<`` (token), the mean row (mean), or drawn around it with the table's spread
            (normal). Where ``<<`` is not one known token, ``token`` does as ``normal``.
    """
    import torch

    known = tokenizer.get_vocab()
    new = [marker for marker in markers if marker not in known]
    if not new:
        return
    source = tokenizer.encode(MARKER_COPIES, add_special_tokens=False)
    tokenizer.add_tokens(new, special_tokens=True)
    lm = backbone.lm
    if len(tokenizer) > lm.get_input_embeddings().weight.shape[0]:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(new)
    tables = {id(t.weight): t.weight for t in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    with torch.no_grad():
        for weight in tables.values():
            old = weight[: min(ids)].float()
            if init == "token" and len(source) == 1 and source[0] != tokenizer.unk_token_id:
                weight[ids] = weight[source[0]].clone()
            elif init == "mean":
                weight[ids] = old.mean(0).to(weight.dtype)
            else:
                noise = torch.randn(len(ids), weight.shape[1], generator=torch.Generator().manual_seed(0))
                weight[ids] = (old.mean(0) + old.std(0) * noise.to(old.device)).to(weight.dtype)


def add_lora(backbone: Backbone, marker_ids: Sequence[int], settings: Mapping[str, Any]) -> None:
    """Freeze the backbone and train low-rank updates of its linear layers instead, plus the rows of the markers.

    Args:
        backbone: the decoder.
        marker_ids: the ids of the method's markers.
        settings: fields of peft's LoraConfig, such as r, lora_alpha, lora_dropout, target_modules.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_names("backbone.lora", settings, [field.name for field in fields(LoraConfig)])
    for name, kind in LORA_KINDS.items():
        if name in settings:
            fitted(f"backbone.lora.{name}", settings[name], kind)
    try:
        config = LoraConfig(
            **{"target_modules": LORA_TARGETS, "trainable_token_indices": [*marker_ids] or None, **settings},
            task_type="CAUSAL_LM",
        )
        inject_adapter_in_model(config, backbone.lm, adapter_name=ADAPTER)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"backbone.lora: {error}; its fields are those of peft.LoraConfig") from None


def freeze(backbone: Backbone, marker_ids: Sequence[int]) -> None:
    """Train nothing of the backbone but the embeddings of the method's markers, whose ids these are."""
    backbone.requires_grad_(False)
    if marker_ids:
        from peft import TrainableTokensConfig, inject_adapter_in_model

        table = backbone.lm.get_input_embeddings()
        name = next(name for name, module in backbone.lm.named_modules() if module is table)
        config = TrainableTokensConfig(token_indices=[*marker_ids], target_modules=[name.rsplit(".", 1)[-1]])
        inject_adapter_in_model(config, backbone.lm, adapter_name=ADAPTER)


def adapted(lm: torch.nn.Module) -> bool:
    """Tell whether LoRA has been added."""
    return bool(_tuned(lm))


def _tuned(lm: torch.nn.Module) -> list[Any]:
    """Return the layers that LoRA has been added to; there are none where nobody has imported peft, which is slow."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return [] if tuners is None else [module for module in lm.modules() if isinstance(module, tuners.BaseTunerLayer)]


def merged_state(lm: torch.nn.Module) -> dict[str, Tensor]:
    """Return the state dict under the base model's own names, with LoRA merged in."""
    if not (layers := _tuned(lm)):
        return lm.state_dict()
    kept = {name: p.detach().clone() for name, p in lm.named_parameters() if ".base_layer." in name}
    for layer in layers:
        layer.merge()
    state = {
        name.replace(".token_adapter", "").replace(".base_layer", ""): tensor.clone()
        for name, tensor in lm.state_dict().items()
        if f".{ADAPTER}" not in name
    }
    for layer in layers:
        layer.unmerge()
    for name, p in lm.named_parameters():  # unmerging subtracts and so rounds; put the exact weights back
        if name in kept:
            p.data.copy_(kept[name])
    return state

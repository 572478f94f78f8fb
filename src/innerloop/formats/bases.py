"""The models that others trained on: their configurations, where a release has none or one of something else.

What the shapes of weights do not tell, such as the number of heads, is known of GPT-2 and of the Llamas that were used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from innerloop.errors import InputError
from innerloop.formats.source import Source

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedConfig

TABLES = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}
HUB = {"gpt2": "openai-community/gpt2", "llama": "meta-llama/Llama-3.2-1B-Instruct"}  # all Llamas here share its words
HEAD = 64  # GPT-2's heads are so wide, in all its sizes
LLAMAS = {(2048, 16): (32, 32.0), (3072, 28): (24, 32.0), (4096, 32): (32, 8.0)}
"""Heads and the factor of the rotations of Llama-3.2-1B and -3B and Llama-3.1-8B, by width and layers."""
NOT_FIELDS = ("model_type", "architectures", "auto_map", "vocab_size", "transformers_version")


def kind_of(source: Source, weights: dict[str, Tensor]) -> str:
    """Return the stock type that has the names of some weights."""
    kind = next((kind for kind, name in TABLES.items() if name in weights), None)
    if kind is None:
        raise InputError(f"the weights in {source.folder} lack {' or '.join(TABLES.values())}")
    return kind


def config_of(source: Source, weights: dict[str, Tensor]) -> PreTrainedConfig:
    """Return the configuration of weights under stock names: config.json's where it is theirs, or the base's."""
    from transformers import AutoConfig

    kind = kind_of(source, weights)
    n_rows, width = weights[TABLES[kind]].shape
    marker, place = (".h.", 2) if kind == "gpt2" else (".layers.", 2)
    n_layers = 1 + max((int(name.split(".")[place]) for name in weights if marker in name), default=-1)
    own = source.config
    names = ("n_embd", "n_layer") if kind == "gpt2" else ("hidden_size", "num_hidden_layers")
    fields: dict[str, Any] = {name: value for name, value in own.items() if name not in NOT_FIELDS}
    if source.model_type != kind or [own.get(name) for name in names] != [width, n_layers]:
        fields = _gpt2(weights, width, n_layers) if kind == "gpt2" else _llama(source, weights, width, n_layers)
    return AutoConfig.for_model(kind, **{**fields, "vocab_size": n_rows})


def _gpt2(weights: dict[str, Tensor], width: int, n_layers: int) -> dict[str, Any]:
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"))  # the tokenizer says them
    n_positions = len(weights["transformer.wpe.weight"]) if "transformer.wpe.weight" in weights else 1024
    return {"n_embd": width, "n_layer": n_layers, "n_head": max(width // HEAD, 1), "n_positions": n_positions, **ids}


def _llama(source: Source, weights: dict[str, Tensor], width: int, n_layers: int) -> dict[str, Any]:
    if (width, n_layers) not in LLAMAS:
        raise InputError(
            f"{source.folder / 'config.json'} is not that of a Llama of {n_layers} layers of width {width}, which the "
            "weights are: copy the config.json of the model that it was trained on"
        )
    n_heads, factor = LLAMAS[width, n_layers]
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    gate = weights.get("model.layers.0.mlp.gate_proj.weight")
    return {
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": 8,
        "head_dim": width // n_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "intermediate_size": 0 if gate is None else len(gate),
        "max_position_embeddings": 131072,
        "tie_word_embeddings": width < 4096,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }

"""Where families of Hugging Face decoders keep their parts, and the weight matrices of their layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Anatomy:
    """Where a family of decoders keeps its parts: attribute names inside the inner model."""

    layers: str
    norm: str
    positions: str | None = None  # a table of learned absolute positions, added to the input embeddings
    dropout: str | None = None  # applied to the input embeddings


LLAMA_LIKE = Anatomy(layers="layers", norm="norm")  # Llama, Qwen2/3, Mistral, Gemma 2/3, SmolLM3, Phi-3, OLMo 2, ...
GPT2_LIKE = Anatomy(layers="h", norm="ln_f", positions="wpe", dropout="drop")

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # fields of configurations that list the layers
FUSED = {"c_attn": ("q", "k", "v"), "qkv_proj": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a layer; of a fused one, the outputs that are the queries, keys, values, gate or up.

    Attributes:
        module: the linear that holds it.
        rows: which of its outputs these are.
    """

    module: nn.Linear | Conv1D
    rows: slice

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in)."""
        weight = self.module.weight
        return (weight.T if isinstance(self.module, Conv1D) else weight)[self.rows]


def decoder_of(lm: PreTrainedModel) -> nn.Module:
    """Return the inner model: embeddings, layers and final norm, without the head."""
    return lm.get_decoder() if hasattr(lm, "get_decoder") else lm.base_model


def text_config(lm: PreTrainedModel) -> Any:
    """Return the text part of the Hugging Face configuration."""
    return lm.config.get_text_config(decoder=True)


def head_dim_of(config: Any) -> int:
    """Return the width of a head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def n_outputs(module: nn.Linear | Conv1D) -> int:
    """Return how many outputs a linear map has."""
    return module.weight.shape[1 if isinstance(module, Conv1D) else 0]


def matrices_of(layer: nn.Module, config: Any) -> dict[str, Matrix]:
    """Return the weight matrices of a layer by name; a fused ``attn.c_attn`` is ``attn.c_attn.q``, k and v."""
    n_heads = config.num_attention_heads
    n_shared = getattr(config, "num_key_value_heads", None) or n_heads
    found = {}
    for name, module in layer.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        n, parts = n_outputs(module), FUSED.get(name.rsplit(".", 1)[-1], ())
        sizes = [head_dim_of(config) * heads for heads in (n_heads, n_shared, n_shared)]
        if len(parts) == 2:
            sizes = [n // 2] * 2
        if not parts or sum(sizes) != n:
            found[name] = Matrix(module, slice(0, n))
            continue
        for i, part in enumerate(parts):
            found[f"{name}.{part}"] = Matrix(module, slice(sum(sizes[:i]), sum(sizes[: i + 1])))
    return found

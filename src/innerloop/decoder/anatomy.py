"""Where families of Hugging Face decoders keep their parts, and the weight matrices of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from innerloop.errors import InputError

LAYERS = ("layers", "h", "blocks")
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "layernorm", "embedding_norm")
ATTENTIONS = ("attn", "self_attn", "attention", "self_attention")  # of a layer
MLPS = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "moe")
POSITIONS = ("wpe", "embed_positions")
DROPOUTS = ("drop", "dropout", "emb_dropout", "embed_dropout")


@dataclass(frozen=True)
class Anatomy:
    """Where a family of decoders keeps its parts: attribute names inside the inner model."""

    layers: str
    norm: str
    positions: str | None = None  # a table of absolute positions, added to the input embeddings
    dropout: str | None = None  # applied to the input embeddings

    @classmethod
    def of(cls, decoder: nn.Module, family: str) -> Anatomy:
        """Find the parts of a decoder by the names that families give them.

        Raises:
            InputError: it has no list of layers or no final norm, or none that is known; ``family`` is its name.
        """
        layers = _named(decoder, LAYERS, nn.ModuleList)
        norm = _named(decoder, NORMS, nn.Module)
        for found, what, names in ((layers, "list of layers", LAYERS), (norm, "final norm", NORMS)):
            if found is None:
                raise InputError(
                    f"{family} cannot be used: its {type(decoder).__name__} has no {what} under a name that innerloop "
                    f"knows ({', '.join(names)}); docs/models.md lists what can"
                )
        assert layers is not None and norm is not None
        return cls(layers, norm, _named(decoder, POSITIONS, nn.Module), _named(decoder, DROPOUTS, nn.Dropout))


def _named(decoder: nn.Module, names: Sequence[str], kind: type[nn.Module]) -> str | None:
    """Return the first of some names that a part of a kind has."""
    return next((name for name in names if isinstance(getattr(decoder, name, None), kind)), None)


def place_in(table: nn.Module, positions_BL: Tensor) -> Tensor:
    """Return the rows (B, L, D) of a table of positions; some tables want their positions by name."""
    if isinstance(table, nn.Embedding):
        return embedding(positions_BL + getattr(table, "offset", 0), table.weight)
    return table(positions_BL)


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
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else lm.base_model
    return getattr(decoder, "model", decoder) if decoder is lm else decoder  # Llama 4 names no decoder


def text_config(lm: PreTrainedModel) -> Any:
    """Return the text part of the Hugging Face configuration."""
    return lm.config.get_text_config(decoder=True)


def head_dim_of(config: Any) -> int:
    """Return the width of a head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def longrope_starts(config: Any) -> list[int]:
    """Return the lengths of rows past which LongRoPE turns positions otherwise; none for other models."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(kind for kind in found.values() if isinstance(kind, dict))]  # some have them for kinds of layers
    starts = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return [start for start in starts if start]


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

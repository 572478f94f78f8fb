"""huginn-0125 (tomg-group-umd, arXiv 2502.05171): prelude, core and coda of sandwich layers.

    transformer.wte, prelude.N, adapter (D, 2 D), core_block.N, coda.N, ln_f (used twice), lm_head (the table)
    of a layer: norm_1 .. norm_4, attn.{Wqkv, qk_bias (2, 1, H, E), proj}, mlp.{fc (gate and up), proj}, without biases

Rotations turn neighbours (2 i, 2 i + 1) where the stock class turns halves: rows of queries and keys are put in its
order. The table is multiplied by sqrt(D) where it is read, and not where it is the head: here there are two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from innerloop.formats.opened import Format, Opened, check_names, expect, needed
from innerloop.formats.source import Source
from innerloop.formats.tokens import tokenizer_of
from innerloop.methods import RecurrentDepth

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

MODEL_TYPE = "huginn_raven"
ONCE = ("wte.weight", "adapter.weight", "ln_f.weight")
LAYER = (
    *("norm_1.weight", "norm_2.weight", "norm_3.weight", "norm_4.weight"),
    *("attn.Wqkv.weight", "attn.qk_bias", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight"),
)
HEAD, ROTATIONS = "lm_head.weight", "freqs_cis"
AS_OPENED = {
    "bias": False,
    "qk_bias": True,
    "tie_embeddings": True,
    "injection_type": "linear",
    "block_class_name": "SandwichBlock",
    "nonlin_name": "SiLU",
    "test_time_noise": 0.0,
}


def recognises(source: Source) -> bool:
    """Tell it by the architecture's name, which retrofits have too, and by its third norm, which they have not."""
    return source.model_type == MODEL_TYPE and source.mentions(".norm_3.")


def folders_of(source: Source) -> list[str]:
    """Return where layers lie, from the first to the last."""
    counts = [needed(source, f"n_layers_in_{part}") for part in ("prelude", "recurrent_block", "coda")]
    return [f"{part}.{i}" for part, n in zip(("prelude", "core_block", "coda"), counts) for i in range(n)]


def scales_of(source: Source, usual: float) -> tuple[float, float]:
    """Return what embeddings are multiplied by, and the deviation of the first state, itself multiplied by that."""
    values = source.config.get("init_values") or {}
    scale = float(values.get("embed_scale", usual))
    return scale, scale * float(values.get("std", math.sqrt(2 / (5 * needed(source, "n_embd")))))


def method_of(source: Source, state_std: float, **changes: bool) -> RecurrentDepth:
    """Return the method, with the sizes of config.json."""
    return RecurrentDepth(
        n_prelude=needed(source, "n_layers_in_prelude"),
        n_coda=needed(source, "n_layers_in_coda"),
        max_loops=needed(source, "mean_recurrence"),
        bptt=source.config.get("mean_backprop_depth", 8),
        adapter_init="default",
        state_std=state_std,
        **changes,  # type: ignore[arg-type]
    )


def opened(source: Source) -> Opened:
    """Open it as a Qwen2, which has biases of queries and keys, with recurrent depth."""
    import torch
    from transformers import Qwen2Config

    expect(source, AS_OPENED)
    config, width, n_heads = source.config, needed(source, "n_embd"), needed(source, "n_heads")
    folders, found = folders_of(source), source.tensors()
    wanted = [f"transformer.{name}" for name in (*ONCE, *(f"{at}.{name}" for at in folders for name in LAYER))]
    check_names(source, found, [*wanted, HEAD, ROTATIONS], [HEAD, ROTATIONS])
    own = {name.removeprefix("transformer."): one for name, one in found.items()}
    table, (scale, std) = own["wte.weight"], scales_of(source, math.sqrt(width))
    weights = {
        "model.embed_tokens.weight": (table.float() * scale).to(table.dtype),
        "lm_head.weight": table,
        "model.norm.weight": own["ln_f.weight"],
    }
    for i, at in enumerate(folders):
        layer = {name: own[f"{at}.{name}"] for name in LAYER}
        weights |= {f"model.layers.{i}.{name}": one for name, one in _layer(layer, n_heads).items()}
    norms = [torch.stack([own[f"{at}.norm_{k}.weight"].float() for at in folders]) for k in (2, 4)]
    parts = {"depth.adapter.weight": own["adapter.weight"].float()}
    parts |= dict(zip(("depth.norms.after_attention", "depth.norms.after_mlp"), norms))
    qwen = Qwen2Config(
        vocab_size=len(table),
        hidden_size=width,
        intermediate_size=needed(source, "intermediate_size"),
        num_hidden_layers=len(folders),
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        max_position_embeddings=needed(source, "block_size"),
        rms_norm_eps=config.get("norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_base", 50000.0)},
        tie_word_embeddings=False,
    )
    method = method_of(source, std, sandwich=True, double_norm=True)
    return Opened(qwen, weights, tokenizer_of(source), method, parts)


def _layer(own: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """Return a layer's weights under the stock class's names; its values have biases, which are zero."""
    import torch

    q, k, v = own["attn.Wqkv.weight"].chunk(3)
    gate, up = own["mlp.fc.weight"].chunk(2)
    q_bias, k_bias = own["attn.qk_bias"].flatten(1)
    return {
        "self_attn.q_proj.weight": _halved(q, n_heads),
        "self_attn.k_proj.weight": _halved(k, n_heads),
        "self_attn.v_proj.weight": v,
        "self_attn.q_proj.bias": _halved(q_bias, n_heads),
        "self_attn.k_proj.bias": _halved(k_bias, n_heads),
        "self_attn.v_proj.bias": torch.zeros_like(q_bias),
        "self_attn.o_proj.weight": own["attn.proj.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": own["mlp.proj.weight"],
        "input_layernorm.weight": own["norm_1.weight"],
        "post_attention_layernorm.weight": own["norm_3.weight"],
    }


def _halved(rows: Tensor, n_heads: int) -> Tensor:
    """Return each head's rows with the even ones first: what were neighbours is in both halves."""
    heads = rows.unflatten(0, (n_heads, -1, 2))
    return heads.transpose(1, 2).flatten(0, 2)


FORMAT = Format("Huginn (tomg-group-umd)", recognises, opened)

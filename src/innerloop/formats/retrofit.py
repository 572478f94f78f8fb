"""Llama, TinyLlama and OLMo 2 with recurrent depth (smcleish, arXiv 2511.07384): Huginn's parts, layers of the base.

    of a layer: norm_1, norm_2, attn.{Wqkv, proj}, mlp.{fc, proj}; of OLMo 2 attn.{q_norm, k_norm} besides

Norms stand where the base has them: before attention and MLP in a Llama, behind them in OLMo 2. The table is read as it
is, the head has its own, and the final norm comes once. The first state has the deviation of Huginn's, whatever the
width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from innerloop.errors import refuse
from innerloop.formats.huginn import HEAD, MODEL_TYPE, ONCE, folders_of, method_of, scales_of
from innerloop.formats.opened import Format, Opened, check_names, expect, needed
from innerloop.formats.source import Source
from innerloop.formats.tokens import tokenizer_of

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

LAYER = tuple(f"{name}.weight" for name in ("norm_1", "norm_2", "attn.Wqkv", "attn.proj", "mlp.fc", "mlp.proj"))
OF_OLMO = ("attn.q_norm.weight", "attn.k_norm.weight")
NORMS = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
AS_OPENED = {
    "bias": False,
    "qk_bias": False,
    "tie_embeddings": False,
    "injection_type": "linear",
    "nonlin_name": "SiLU",
}


def recognises(source: Source) -> bool:
    """Tell it by the architecture's name, which is Huginn's, and by norms that it has not."""
    return source.model_type == MODEL_TYPE and not source.mentions(".norm_3.")


def opened(source: Source) -> Opened:
    """Open it as its base with recurrent depth."""
    from transformers import AutoConfig

    expect(source, {**AS_OPENED, "test_time_noise": 0})
    config, n_heads = source.config, needed(source, "n_heads")
    kind = "olmo2" if source.mentions(".q_norm.") else "llama"
    names = (*LAYER, *(OF_OLMO if kind == "olmo2" else ()))
    folders, found = folders_of(source), source.tensors()
    check_names(source, found, [f"transformer.{n}" for n in ONCE] + [HEAD] + _all(folders, names))
    own = {name.removeprefix("transformer."): one for name, one in found.items()}
    weights = {
        "model.embed_tokens.weight": own["wte.weight"],
        "lm_head.weight": own[HEAD],
        "model.norm.weight": own["ln_f.weight"],
    }
    n_shared = config.get("num_key_value_heads") or n_heads
    for i, at in enumerate(folders):
        layer = _layer({name: own[f"{at}.{name}"] for name in names}, kind, n_heads, n_shared)
        weights |= {f"model.layers.{i}.{name}": one for name, one in layer.items()}
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {})}
    base = AutoConfig.for_model(
        kind,
        vocab_size=len(own["wte.weight"]),
        hidden_size=needed(source, "n_embd"),
        intermediate_size=needed(source, "intermediate_size"),
        num_hidden_layers=len(folders),
        num_attention_heads=n_heads,
        num_key_value_heads=n_shared,
        max_position_embeddings=config.get("max_position_embeddings") or needed(source, "block_size"),
        rms_norm_eps=needed(source, "norm_eps"),
        rope_parameters={**rope, "rope_theta": config.get("rope_theta") or needed(source, "rope_base")},
        tie_word_embeddings=False,
    )
    scale, std = scales_of(source, 1.0)
    refuse((scale != 1, f"{source.folder / 'config.json'} has embed_scale={scale}, and retrofits are opened with 1"))
    parts = {"depth.adapter.weight": own["adapter.weight"].float()}
    return Opened(base, weights, tokenizer_of(source), method_of(source, std), parts)


def _all(folders: list[str], names: tuple[str, ...]) -> list[str]:
    return [f"transformer.{at}.{name}" for at in folders for name in names]


def _layer(own: dict[str, Tensor], kind: str, n_heads: int, n_shared: int) -> dict[str, Tensor]:
    """Return a layer's weights under the stock class's names."""
    size = len(own["attn.Wqkv.weight"]) // (n_heads + 2 * n_shared)
    q, k, v = own["attn.Wqkv.weight"].split([n_heads * size, n_shared * size, n_shared * size])
    gate, up = own["mlp.fc.weight"].chunk(2)
    found = {f"self_attn.{name}_proj.weight": one for name, one in (("q", q), ("k", k), ("v", v))}
    found |= {
        "self_attn.o_proj.weight": own["attn.proj.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }
    found |= {f"{name}.weight": own[f"norm_{i}.weight"] for i, name in enumerate(NORMS[kind], 1)}
    found |= {name.replace("attn.", "self_attn."): own[name] for name in OF_OLMO if name in own}
    return {**found, "mlp.down_proj.weight": own["mlp.proj.weight"]}


FORMAT = Format("a retrofit with recurrent depth (smcleish)", recognises, opened)

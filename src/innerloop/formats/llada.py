"""LLaDA-8B and 1.5 (ML-GSAI): a Llama under the names of OLMo, whose attention sees all of a row.

    model.transformer.wte, blocks.N.{q_proj, k_proj, v_proj, attn_out, ff_proj, up_proj, ff_out}, ln_f, ff_out

``ff_proj`` is the gate, ``up_proj`` what it gates; the ``ff_out`` beside the blocks is the head.
"""

from __future__ import annotations

from innerloop.formats.opened import Format, Opened, by_layer, expect, needed, renamed
from innerloop.formats.source import Source
from innerloop.formats.tokens import token_of, tokenizer_of
from innerloop.methods.denoise.llada import Llada
from innerloop.methods.denoise.settings import SamplerSettings

ONCE = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
}
HEAD = "model.transformer.ff_out.weight"
PARTS = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
AS_LLAMA = {  # what such a configuration may choose otherwise, and no released one does
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
GEN_LENGTH, BLOCK = 256, 32  # as GSM8K was measured (llada.md, 7)


def recognises(source: Source) -> bool:
    """Tell it by the architecture's name, which is LLaDA-MoE's too, and by that of a tensor or a size."""
    return source.model_type == "llada" and "d_model" in source.config


def opened(source: Source) -> Opened:
    """Open it as a Llama that denoises, with the mask that config.json names."""
    from transformers import LlamaConfig

    expect(source, AS_LLAMA)
    config, n = source.config, needed(source, "n_layers")
    is_tied = bool(config.get("weight_tying", False))
    tokenizer = tokenizer_of(source)
    layers = {f"model.transformer.blocks.N.{a}.weight": f"model.layers.N.{b}.weight" for a, b in PARTS.items()}
    names = by_layer({**ONCE, HEAD: "lm_head.weight"}, layers, n)
    weights = renamed(source, source.tensors(), names, spare=[HEAD] if is_tied else [])
    llama = LlamaConfig(
        vocab_size=config.get("embedding_size") or needed(source, "vocab_size"),
        hidden_size=needed(source, "d_model"),
        intermediate_size=config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * config["d_model"],
        num_hidden_layers=n,
        num_attention_heads=needed(source, "n_heads"),
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=needed(source, "max_sequence_length"),
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
        tie_word_embeddings=is_tied,
    )
    mask = token_of(tokenizer, needed(source, "mask_token_id"), "mask_token_id")
    method = Llada(gen_length=GEN_LENGTH, mask_token=mask, sampler=SamplerSettings(block_length=BLOCK))
    return Opened(llama, weights, tokenizer, method)


FORMAT = Format("LLaDA (ML-GSAI)", recognises, opened)

"""Ouro-1.4B, -2.6B and their Thinking models (ByteDance, arXiv 2510.25741): a Llama that runs several times.

    model.layers.N.input_layernorm_2           norm of what attention adds
    model.layers.N.post_attention_layernorm_2  norm of what the MLP adds
    model.early_exit_gate                      lambda_t of each iteration's state, after the final norm that ends it

Below a threshold of 1 tokens stop by the gate: all iterations are run all the same, and an earlier one is shown, as the
authors' code does.
"""

from __future__ import annotations

from typing import Any

from innerloop.formats.opened import Format, Opened, expect, needed, renamed, stock_names
from innerloop.formats.source import Source
from innerloop.formats.tokens import tokenizer_of
from innerloop.methods import Looped

GATE = {"model.early_exit_gate.weight": "loop.stop.gate.weight", "model.early_exit_gate.bias": "loop.stop.gate.bias"}
NORMS = {"input_layernorm_2": "depth.norms.after_attention", "post_attention_layernorm_2": "depth.norms.after_mlp"}
NOT_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "layer_types", "sliding_window")


def recognises(source: Source) -> bool:
    """Tell it by the architecture's name."""
    return source.model_type == "ouro"


def opened(source: Source) -> Opened:
    """Open it as a looped Llama with norms around its sublayers; its gate is kept for who asks for it."""
    import torch
    from transformers import LlamaConfig

    expect(source, {"hidden_act": "silu", "use_sliding_window": False, "early_exit_step": None})
    fields = {name: value for name, value in source.config.items() if name not in NOT_FIELDS}
    config, n = LlamaConfig(**fields), needed(source, "num_hidden_layers")
    norms = [f"model.layers.{i}.{name}.weight" for name in NORMS for i in range(n)]
    own = stock_names(config)
    spare = ["lm_head.weight"] if config.tie_word_embeddings else []
    weights = renamed(source, source.tensors(), {name: name for name in (*own, *norms, *GATE)}, spare)
    parts = {GATE[name]: weights.pop(name).float() for name in GATE}
    for name, ours in NORMS.items():
        parts[ours] = torch.stack([weights.pop(f"model.layers.{i}.{name}.weight").float() for i in range(n)])
    changes: dict[str, Any] = {"loop": {"site": "post_norm"}, "sandwich": True, "write_steps": True}
    threshold = source.config.get("early_exit_threshold", 1.0)
    if threshold is not None and threshold < 1:
        changes |= {"stop": {"rule": "halt", "threshold": threshold}, "kv_missing": "full_compute"}
    method = Looped(max_loops=needed(source, "total_ut_steps"), **changes)
    return Opened(config, weights, tokenizer_of(source), method, parts)


FORMAT = Format("Ouro (ByteDance)", recognises, opened)

"""ParScale (Qwen, arXiv 2505.10475): a Qwen2 with prefixes of keys and values, and what mixes the streams.

    model.layers.N.self_attn.prefix_k, prefix_v   (P, kv heads, 48, head width)
    model.aggregate_layer.0, .2                   Linear (P D, D), SiLU, Linear (D, P); streams are interleaved

A model of one stream has neither, and is a Qwen2.
"""

from __future__ import annotations

from innerloop.formats.opened import Format, Opened, needed, renamed, stock_names
from innerloop.formats.source import Source
from innerloop.formats.tokens import tokenizer_of
from innerloop.methods import ParScale

MIX = {f"model.aggregate_layer.{i}.{end}": (i, end) for i in (0, 2) for end in ("weight", "bias")}
SMOOTHING = 0.01  # of the released class, where config.json says nothing
NOT_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version")


def recognises(source: Source) -> bool:
    """Tell it by the architecture's name."""
    return source.model_type == "qwen2_parscale"


def opened(source: Source) -> Opened:
    """Open it as a Qwen2 whose streams are rows of a pass."""
    from transformers import Qwen2Config

    fields = {name: value for name, value in source.config.items() if name not in NOT_FIELDS}
    config, streams = Qwen2Config(**fields), needed(source, "parscale_n")
    parts = {}
    if streams > 1:
        for i in range(config.num_hidden_layers):
            for theirs, ours in (("prefix_k", "keys"), ("prefix_v", "values")):
                parts[f"model.layers.{i}.self_attn.{theirs}"] = f"depth.prefixes.{ours}.{i}"
        parts |= {name: f"depth.mix.{('inner', '', 'outer')[i]}.{end}" for name, (i, end) in MIX.items()}
    spare = ["lm_head.weight"] if config.tie_word_embeddings else []
    own = {name: name for name in stock_names(config)}
    weights = renamed(source, source.tensors(), {**own, **parts}, spare)
    method = ParScale(
        streams=streams,
        n_prefix=source.config.get("parscale_n_tokens", 48),
        smoothing=source.config.get("parscale_attn_smooth", SMOOTHING),
    )
    mixed = {name: weights.pop(name).float() for name in parts.values()}
    return Opened(config, weights, tokenizer_of(source), method, mixed)


FORMAT = Format("ParScale (Qwen)", recognises, opened)

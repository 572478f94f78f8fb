"""Tiny random checkpoints of looped, recurrent and parallel decoders, in their authors' layouts."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.authors import (
    FF,
    HEADS,
    KV_HEADS,
    LAYERS,
    LETTERS,
    QWEN,
    WIDTH,
    Weights,
    add_qwen,
    write_json,
    write_tokenizer,
)

END = "<|endoftext|>"
ROWS = len(LETTERS) + 4


def save(folder: Path, w: Weights) -> dict[str, Tensor]:
    save_file(w.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return w.tensors


def ouro(folder: Path, **changes: object) -> dict[str, Tensor]:
    """ByteDance's: Llama's names, two more norms a layer, a gate."""
    write_tokenizer(folder, END, kind="GPT2Tokenizer", bos_token=END, eos_token=END)
    w = Weights()
    add_qwen(w, ROWS, bias=False)
    for i in range(LAYERS):
        for name in ("input_layernorm_2", "post_attention_layernorm_2"):
            w.norm(f"model.layers.{i}.{name}.weight")
    w.add("model.early_exit_gate.weight", 1, WIDTH)
    w.add("model.early_exit_gate.bias", 1)
    auto = {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"}
    own = {"architectures": ["OuroForCausalLM"], "model_type": "ouro", "auto_map": auto, "vocab_size": ROWS}
    own |= {"total_ut_steps": 4, "early_exit_threshold": 1.0, "layer_types": ["full_attention"] * LAYERS}
    own |= {
        "head_dim": WIDTH // HEADS,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": LAYERS,
    }
    write_json(folder, "config.json", **{**QWEN, **own, "tie_word_embeddings": False, **changes})
    return save(folder, w)


def huginn(folder: Path, **changes: object) -> dict[str, Tensor]:
    """tomg-group-umd's: prelude, adapter, core, coda; the head is the table, rotations are saved too."""
    write_tokenizer(folder, END, bos_token=END, eos_token=END)
    w, sizes = Weights(), {"prelude": 1, "core_block": 2, "coda": 1}
    w.add("transformer.wte.weight", ROWS, WIDTH, scale=0.1)
    for at in (f"transformer.{part}.{i}" for part, n in sizes.items() for i in range(n)):
        for k in (1, 2, 3, 4):
            w.norm(f"{at}.norm_{k}.weight")
        w.add(f"{at}.attn.Wqkv.weight", 3 * WIDTH, WIDTH)
        w.add(f"{at}.attn.qk_bias", 2, 1, HEADS, WIDTH // HEADS)
        w.add(f"{at}.attn.proj.weight", WIDTH, WIDTH)
        w.add(f"{at}.mlp.fc.weight", 2 * FF, WIDTH)
        w.add(f"{at}.mlp.proj.weight", WIDTH, FF)
    w.add("transformer.adapter.weight", WIDTH, 2 * WIDTH)
    w.norm("transformer.ln_f.weight")
    w.tensors["lm_head.weight"] = w.tensors["transformer.wte.weight"].clone()
    w.add("freqs_cis", 1, 512, 1, WIDTH // HEADS // 2, 2)
    config = {
        "architectures": ["RavenForCausalLM"],
        "model_type": "huginn_raven",
        "n_embd": WIDTH,
        "n_heads": HEADS,
        "n_layers": 4,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1,
        "block_size": 512,
        "vocab_size": ROWS,
        "padded_vocab_size": ROWS,
        "intermediate_size": FF,
        "bias": False,
        "qk_bias": True,
        "tie_embeddings": True,
        "norm_eps": 1e-6,
        "rope_base": 700.0,
        "mean_recurrence": 4,
        "mean_backprop_depth": 8,
        "injection_type": "linear",
        "block_class_name": "SandwichBlock",
        "nonlin_name": "SiLU",
        "test_time_noise": 0.0,
        "state_init": "like-init",
        "torch_dtype": "float32",
        "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
    }
    write_json(folder, "config.json", **{**config, **changes})
    return save(folder, w)


def parscale(folder: Path, streams: int = 2, **changes: object) -> dict[str, Tensor]:
    """Qwen's: Qwen2's names, prefixes of every layer, an aggregator."""
    write_tokenizer(folder, END, kind="Qwen2Tokenizer", eos_token=END, pad_token=END)
    w, size = Weights(), WIDTH // HEADS
    add_qwen(w, ROWS, bias=True, head=False)
    if streams > 1:
        for i in range(LAYERS):
            for name in ("prefix_k", "prefix_v"):
                w.add(f"model.layers.{i}.self_attn.{name}", streams, KV_HEADS, 6, size)
        w.add("model.aggregate_layer.0.weight", WIDTH, streams * WIDTH)
        w.add("model.aggregate_layer.0.bias", WIDTH)
        w.add("model.aggregate_layer.2.weight", streams, WIDTH)
        w.add("model.aggregate_layer.2.bias", streams)
    own = {"architectures": ["Qwen2ParScaleForCausalLM"], "model_type": "qwen2_parscale", "vocab_size": ROWS}
    own |= {"parscale_n": streams, "parscale_n_tokens": 6, "parscale_attn_smooth": 0.02, "tie_word_embeddings": True}
    own |= {"auto_map": {"AutoModelForCausalLM": "modeling_qwen2_parscale.Qwen2ParScaleForCausalLM"}}
    write_json(folder, "config.json", **{**QWEN, **own, "use_sliding_window": False, **changes})
    return save(folder, w)


def tah(folder: Path, threshold: float = 0.5) -> dict[str, Tensor]:
    """thu-nics': a stock Qwen3, a peft adapter beside it, and a decider in a pickle with its settings.

    The adapter's tensors are returned with ``lora/`` before their names, the decider's with ``decider/``.
    """
    write_tokenizer(folder, END, kind="Qwen2Tokenizer", eos_token=END, pad_token=END)
    w, lora, decider, size, wide = Weights(), Weights(1), Weights(2), WIDTH // HEADS, 16
    add_qwen(w, ROWS, bias=False, head_norms=True, head=False)
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": ROWS, "head_dim": size}
    write_json(folder, "config.json", **{**QWEN, **own, "tie_word_embeddings": True, "attention_bias": False})
    for name, one in w.tensors.items():
        if name.endswith("_proj.weight"):
            at = f"base_model.model.{name.removesuffix('.weight')}"
            lora.add(f"{at}.lora_A.weight", 4, one.shape[1])
            lora.add(f"{at}.lora_B.weight", one.shape[0], 4)
    shapes = {"logits_projection": (WIDTH, 20), "combined_projection": (wide, 3 * WIDTH)}
    shapes |= {"backbone.input_projection": (wide, wide), "backbone.output_layer.1": (1, wide)}
    for i in range(2):
        shapes |= {f"backbone.blocks.{i}.mlp.0": (4 * wide, wide), f"backbone.blocks.{i}.mlp.3": (wide, 4 * wide)}
        decider.norm(f"backbone.blocks.{i}.layer_norm.weight", wide)
        decider.add(f"backbone.blocks.{i}.layer_norm.bias", wide)
    decider.norm("backbone.output_layer.0.weight", wide)
    decider.add("backbone.output_layer.0.bias", wide)
    for name, shape in shapes.items():
        decider.add(f"{name}.weight", *shape)
        decider.add(f"{name}.bias", shape[0])
    decider.tensors["threshold"] = torch.tensor(threshold)
    init = {"topk": 20, "hidden_states_size": WIDTH, "hidden_states_layer_nums": [0, 1], "hidden_dims": [wide, wide]}
    init |= {"expansion_factor": 4, "dropout_rate": 0.1, "normalize_input": False, "dtype": torch.bfloat16}
    saved = {"class": "MLPIterDecider", "state_dict": decider.tensors, "init_args": init}
    torch.save(saved, folder / "iter_decider.bin")
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none"}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    write_json(folder / "lora", "adapter_config.json", **adapter, target_modules=targets)
    save_file(lora.tensors, folder / "lora/adapter_model.safetensors")
    kinds = {"iter_decider": "MLPIterDecider", "eval_iter_decider": "iter_decider", "adapter": "lora"}
    write_json(
        folder, "tah_config.json", max_iter=2, **kinds, input_updater_kwargs={"topk": 20}, adapter_kwargs=adapter
    )
    save(folder, w)
    beside = {f"lora/{name}": one for name, one in lora.tensors.items()}
    return w.tensors | beside | {f"decider/{name}": one for name, one in decider.tensors.items()}


def retrofit(folder: Path, norms: bool = False, **changes: object) -> dict[str, Tensor]:
    """smcleish's: Huginn's parts with a Llama's layers, or with those of OLMo 2, which norm queries and keys."""
    write_tokenizer(folder, END, bos_token=END, eos_token=END)
    w, sizes, size = Weights(), {"prelude": 1, "core_block": 2, "coda": 1}, WIDTH // HEADS
    w.add("transformer.wte.weight", ROWS, WIDTH)
    w.add("lm_head.weight", ROWS, WIDTH)
    for at in (f"transformer.{part}.{i}" for part, n in sizes.items() for i in range(n)):
        for k in (1, 2):
            w.norm(f"{at}.norm_{k}.weight")
        w.add(f"{at}.attn.Wqkv.weight", WIDTH + 2 * KV_HEADS * size, WIDTH)
        if norms:
            w.norm(f"{at}.attn.q_norm.weight")
            w.norm(f"{at}.attn.k_norm.weight", KV_HEADS * size)
        w.add(f"{at}.attn.proj.weight", WIDTH, WIDTH)
        w.add(f"{at}.mlp.fc.weight", 2 * FF, WIDTH)
        w.add(f"{at}.mlp.proj.weight", WIDTH, FF)
    w.add("transformer.adapter.weight", WIDTH, 2 * WIDTH)
    w.norm("transformer.ln_f.weight")
    std = 0.0087  # of Huginn's width, which was copied
    config = {
        "architectures": ["RavenForCausalLM"],
        "model_type": "huginn_raven",
        "n_embd": WIDTH,
        "n_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": size,
        "n_layers": 4,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1,
        "block_size": 512,
        "vocab_size": ROWS,
        "intermediate_size": FF,
        "bias": False,
        "qk_bias": False,
        "tie_embeddings": False,
        "norm_eps": 1e-6,
        "rope_base": 500000.0,
        "rope_theta": 700.0,
        "mean_recurrence": 4,
        "mean_backprop_depth": 8,
        "injection_type": "linear",
        "block_class_name": "SandwichBlock",
        "nonlin_name": "SiLU",
        "test_time_noise": 0,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
        "init_values": {"std": std, "out_proj": std, "embedding": std, "embed_scale": 1.0},
    }
    write_json(folder, "config.json", **{**config, **changes})
    return save(folder, w)


def retrofit_olmo(folder: Path) -> dict[str, Tensor]:
    return retrofit(folder, norms=True)

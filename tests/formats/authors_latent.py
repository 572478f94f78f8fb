"""Tiny random checkpoints of models that think in latents, in their authors' layouts: GPT-2 and Llama underneath."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.authors import HEADS, LAYERS, LETTERS, QWEN, Weights, add_qwen, write_json, write_tokenizer

GPT2_WIDTH, GPT2_HEADS, PLACES, RANK = 128, 2, 256, 4
END = "<|endoftext|>"
LATENT_TOKENS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
ROWS = len(LETTERS) + 1 + 3


def add_gpt2(w: Weights, prefix: str = "", n_rows: int = ROWS) -> None:
    """GPT-2's names; its matrices are (in, out), its head is its table."""
    w.add(f"{prefix}transformer.wte.weight", n_rows, GPT2_WIDTH)
    w.add(f"{prefix}transformer.wpe.weight", PLACES, GPT2_WIDTH)
    for i in range(LAYERS):
        at = f"{prefix}transformer.h.{i}"
        for name, n_in, n_out in (
            ("attn.c_attn", 1, 3),
            ("attn.c_proj", 1, 1),
            ("mlp.c_fc", 1, 4),
            ("mlp.c_proj", 4, 1),
        ):
            w.add(f"{at}.{name}.weight", n_in * GPT2_WIDTH, n_out * GPT2_WIDTH, scale=0.1)
            w.add(f"{at}.{name}.bias", n_out * GPT2_WIDTH)
        for norm in ("ln_1", "ln_2"):
            w.norm(f"{at}.{norm}.weight", GPT2_WIDTH)
            w.add(f"{at}.{norm}.bias", GPT2_WIDTH)
    w.norm(f"{prefix}transformer.ln_f.weight", GPT2_WIDTH)
    w.add(f"{prefix}transformer.ln_f.bias", GPT2_WIDTH)
    w.tensors[f"{prefix}lm_head.weight"] = w.tensors[f"{prefix}transformer.wte.weight"].clone()


def add_projection(w: Weights, names: tuple[str, str, str], width: int) -> None:
    for name in names[:2]:
        w.add(f"{name}.weight", width, width, scale=0.1)
        w.add(f"{name}.bias", width)
    w.norm(f"{names[2]}.weight", width)
    w.add(f"{names[2]}.bias", width)


def wrap(w: Weights, updated: tuple[str, ...]) -> None:
    """Wrap matrices as peft does, with an update of each."""
    for name in [name for name in w.tensors if name.endswith(updated)]:
        module, one = name.removesuffix(".weight"), w.tensors.pop(name)
        n_out, n_in = one.shape[::-1] if "transformer." in name else one.shape
        w.tensors[f"{module}.base_layer.weight"] = one
        if f"{module}.bias" in w.tensors:
            w.tensors[f"{module}.base_layer.bias"] = w.tensors.pop(f"{module}.bias")
        w.add(f"{module}.lora_A.default.weight", RANK, n_in, scale=0.1)
        w.add(f"{module}.lora_B.default.weight", n_out, RANK, scale=0.1)


def latent_tts(folder: Path, projector: bool = False, **changes: object) -> dict[str, Tensor]:
    """ModalityDance's: GPT-2 by its own names; CODI's has a projector."""
    w, first = Weights(), len(LETTERS) + 1
    write_tokenizer(folder, END, *LATENT_TOKENS, kind="GPT2Tokenizer", eos_token=END, bos_token=END, pad_token=END)
    add_gpt2(w)
    config = {
        "architectures": ["CODIGPT2" if projector else "COCONUTGPT2"],
        "model_type": "gpt2",
        "vocab_size": ROWS,
        "n_embd": GPT2_WIDTH,
        "n_layer": LAYERS,
        "n_head": GPT2_HEADS,
        "n_positions": PLACES,
        "n_ctx": PLACES,
        "latent_start_id": first,
        "latent_end_id": first + 1,
        "latent_id": first + 2,
        "target_id": 9,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": first - 1,
        "eos_token_id": first - 1,
    }
    if projector:
        add_projection(w, ("projector.1", "projector.3", "projector.4"), GPT2_WIDTH)
        config |= {"projector": True, "projector_dropout": 0.0, "projector_hidden_size": GPT2_WIDTH}
    write_json(folder, "config.json", **{**config, **changes})
    save_file(w.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return w.tensors


def latent_tts_codi(folder: Path, **changes: object) -> dict[str, Tensor]:
    return latent_tts(folder, projector=True, **changes)


def codi(folder: Path) -> dict[str, Tensor]:
    """zen-E's: one pickle of a GPT-2 wrapped by peft; no config.json, and a tokenizer without the markers."""
    write_tokenizer(folder, END, kind="GPT2Tokenizer", eos_token=END, bos_token=END)
    w, prefix = Weights(), "codi.base_model.model."
    add_gpt2(w, prefix)
    wrap(w, ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    add_projection(w, ("prj.1", "prj.3", "prj.ln"), GPT2_WIDTH)
    torch.save(w.tensors, folder / "pytorch_model.bin")
    return w.tensors


def codi_llama(folder: Path) -> dict[str, Tensor]:
    """zen-E's Llama, with the config.json of the model underneath."""
    write_tokenizer(folder, END, eos_token=END)
    w, prefix = Weights(), "codi.base_model.model."
    add_qwen(w, ROWS, bias=False, head=False)
    w.tensors = {f"{prefix}{name}": one for name, one in w.tensors.items()}
    wrap(w, tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")))
    add_projection(w, ("prj.1", "prj.3", "prj.ln"), QWEN["hidden_size"])
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS - 3}
    write_json(folder, "config.json", **{**QWEN, **own, "tie_word_embeddings": True})
    torch.save(w.tensors, folder / "pytorch_model.bin")
    return w.tensors


def simcot_codi(folder: Path) -> dict[str, Tensor]:
    """InternLM's CODI: a shard without an index, an empty config.json, padding in the tokenizer, what told steps."""
    write_tokenizer(folder, END, "[PAD]", kind="GPT2Tokenizer", eos_token=END, pad_token="[PAD]")
    w, prefix = Weights(), "codi.base_model.model."
    add_gpt2(w, prefix)
    wrap(w, ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    add_projection(w, ("prj.1", "prj.3", "prj.ln"), GPT2_WIDTH)
    add_gpt2(w, "decoder.", ROWS - 3)
    write_json(folder, "config.json")
    save_file(w.tensors, folder / "model-00001-of-00001.safetensors")
    return w.tensors


def simcot_coconut(folder: Path) -> dict[str, Tensor]:
    """InternLM's Coconut: one pickle without an ending, an empty config.json; GPT-2's tokenizer lies beside it here."""
    write_tokenizer(folder, END, kind="GPT2Tokenizer", eos_token=END, bos_token=END)
    w = Weights()
    add_gpt2(w, "base_causallm.")
    add_gpt2(w, "expainable_llm.", ROWS - 3)
    w.tensors["embedding.weight"] = w.tensors["base_causallm.transformer.wte.weight"]
    write_json(folder, "config.json")
    torch.save(w.tensors, folder / "checkpoint_28")
    return w.tensors


def lotus(folder: Path) -> dict[str, Tensor]:
    """yingfanbot's: what save_pretrained writes of a Llama, in shards with an index, and its tokenizer with markers."""
    write_tokenizer(folder, END, *LATENT_TOKENS, eos_token=END, pad_token=END)
    w = Weights()
    add_qwen(w, ROWS, bias=False, head=False)
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS, "head_dim": 8}
    write_json(folder, "config.json", **{**QWEN, **own, "tie_word_embeddings": True, "num_attention_heads": HEADS})
    parts = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in w.tensors}
    for part in set(parts.values()):
        save_file({name: one for name, one in w.tensors.items() if parts[name] == part}, folder / part)
    index = {"metadata": {}, "weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return w.tensors

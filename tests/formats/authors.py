"""Tiny random checkpoints in exactly the layout in which authors released theirs.

Each function writes a folder and returns the tensors under the authors' names, in fp32.

    tensors = authors.llada(tmp_path / "llada")
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

WIDTH, HEADS, KV_HEADS, LAYERS, FF = 32, 4, 2, 2, 48
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte is a token


class Weights:
    """Random tensors by name; norms are near one."""

    def __init__(self, seed: int = 0):
        self.generator, self.tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()

    def add(self, name: str, *shape: int, scale: float = 0.2, mean: float = 0.0) -> None:
        self.tensors[name] = mean + scale * torch.randn(shape, generator=self.generator)

    def norm(self, name: str, size: int = WIDTH) -> None:
        self.add(name, size, mean=1.0)


def byte_tokenizer(*added: str) -> Tokenizer:
    """A tokenizer by bytes, without merges; ``added`` are special tokens, whose ids follow."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*added])
    return tokenizer


def write_json(folder: Path, name: str, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values, indent=2))


def write_tokenizer(folder: Path, *added: str, kind: str = "PreTrainedTokenizerFast", **roles: str) -> None:
    """Write tokenizer.json and its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(*added)
    tokenizer.save(str(folder / "tokenizer.json"))
    listed = {tokenizer.token_to_id(one): {"content": one, "special": True} for one in added}
    write_json(folder, "tokenizer_config.json", tokenizer_class=kind, added_tokens_decoder=listed, **roles)


def llada(folder: Path, **changes: object) -> dict[str, Tensor]:
    """ML-GSAI's: OLMo's names; the table has more rows than there are tokens."""
    added = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>")
    write_tokenizer(folder, *added, bos_token=added[0], eos_token=added[1], pad_token=added[1])
    n_rows, w, block = len(LETTERS) + 8, Weights(), "model.transformer.blocks"
    w.add("model.transformer.wte.weight", n_rows, WIDTH)
    for i in range(LAYERS):
        w.norm(f"{block}.{i}.attn_norm.weight")
        w.norm(f"{block}.{i}.ff_norm.weight")
        kv = WIDTH // HEADS * KV_HEADS
        shapes = {"q_proj": (WIDTH, WIDTH), "k_proj": (kv, WIDTH), "v_proj": (kv, WIDTH), "attn_out": (WIDTH, WIDTH)}
        shapes |= {"ff_proj": (FF, WIDTH), "up_proj": (FF, WIDTH), "ff_out": (WIDTH, FF)}
        for name, shape in shapes.items():
            w.add(f"{block}.{i}.{name}.weight", *shape)
    w.norm("model.transformer.ln_f.weight")
    w.add("model.transformer.ff_out.weight", n_rows, WIDTH)
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": WIDTH,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "n_layers": LAYERS,
        "mlp_hidden_size": FF,
        "mlp_ratio": 4,
        "block_type": "llama",
        "embedding_size": n_rows,
        "vocab_size": n_rows,
        "max_sequence_length": 512,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 500.0,
        "alibi": False,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "scale_logits": False,
        "mask_token_id": len(LETTERS) + 2,
        "eos_token_id": len(LETTERS) + 1,
        "pad_token_id": len(LETTERS) + 1,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    }
    write_json(folder, "config.json", **{**config, **changes})
    save_file(w.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return w.tensors


def add_qwen(w: Weights, n_rows: int, bias: bool, head_norms: bool = False, head: bool = True) -> None:
    """Qwen2's or Qwen3's names, which Llama has too: biases of queries, keys and values, or norms of their heads."""
    size = WIDTH // HEADS
    w.add("model.embed_tokens.weight", n_rows, WIDTH)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for name, n in (("q", WIDTH), ("k", size * KV_HEADS), ("v", size * KV_HEADS)):
            w.add(f"{at}.self_attn.{name}_proj.weight", n, WIDTH)
            if bias:
                w.add(f"{at}.self_attn.{name}_proj.bias", n)
            if head_norms and name != "v":
                w.norm(f"{at}.self_attn.{name}_norm.weight", size)
        w.add(f"{at}.self_attn.o_proj.weight", WIDTH, WIDTH)
        for name, shape in (("gate", (FF, WIDTH)), ("up", (FF, WIDTH)), ("down", (WIDTH, FF))):
            w.add(f"{at}.mlp.{name}_proj.weight", *shape)
        w.norm(f"{at}.input_layernorm.weight")
        w.norm(f"{at}.post_attention_layernorm.weight")
    w.norm("model.norm.weight")
    if head:
        w.add("lm_head.weight", n_rows, WIDTH)


QWEN = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": LAYERS,
    "intermediate_size": FF,
    "hidden_act": "silu",
    "rope_theta": 700.0,
    "max_position_embeddings": 512,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "torch_dtype": "float32",
}


def dream(folder: Path, **changes: object) -> dict[str, Tensor]:
    """DreamLM's: Qwen2's names, a tokenizer with code of its own over words and merges."""
    added, n, w = ("<|endoftext|>", "<|beginoftext|>", "<|mask|>"), len(LETTERS), Weights()
    write_json(folder, "vocab.json", **{letter: i for i, letter in enumerate(LETTERS)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    listed = {n + i: {"content": one, "special": True, "normalized": False} for i, one in enumerate(added)}
    auto = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    roles = {"bos_token": added[1], "eos_token": added[0], "pad_token": added[0], "mask_token": added[2]}
    own = {"tokenizer_class": "DreamTokenizer", "auto_map": auto, "added_tokens_decoder": listed, **roles}
    write_json(folder, "tokenizer_config.json", **own)
    add_qwen(w, n + 8, bias=True)
    code = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    own = {"architectures": ["DreamModel"], "model_type": "Dream", "auto_map": code, "vocab_size": n + 8}
    own |= {"mask_token_id": n + 2, "pad_token_id": n, "use_sliding_window": False, "tie_word_embeddings": False}
    write_json(folder, "config.json", **{**QWEN, **own, **changes})
    save_file(w.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return w.tensors


def a2d(folder: Path, **changes: object) -> dict[str, Tensor]:
    """dllm's: a stock Qwen3 under a name of its own, with a mask among the tokens and a tied head."""
    added, w = ("<|endoftext|>", "<|im_end|>", "<|mask|>"), Weights()
    roles = {"eos_token": added[1], "pad_token": added[0], "mask_token": added[2]}
    write_tokenizer(folder, *added, kind="Qwen2Tokenizer", **roles)
    add_qwen(w, len(LETTERS) + 8, bias=False, head_norms=True, head=False)
    own = {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "vocab_size": len(LETTERS) + 8}
    own |= {"head_dim": WIDTH // HEADS, "tie_word_embeddings": True, "attention_bias": False}
    own |= {"layer_types": ["full_attention"] * LAYERS, "eos_token_id": len(LETTERS) + 1}
    write_json(folder, "config.json", **{**QWEN, **own, **changes})
    save_file(w.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return w.tensors

"""What is measured: models with random weights that never end an answer, and questions of a given length.

Speed depends on shapes, not on what weights have learned, as long as every row writes the same number of tokens. So the
rows of <eos> and ### in the output embeddings are zero: other words are likelier, and nothing ends or is an answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from innerloop.decoder.backbone import Backbone
from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Method
from innerloop.text.examples import ANSWER_PREFIX

SPECIAL = ("<pad>", "<unk>", "<eos>", "\n", "###")
ROOM = 8  # of the vocabulary, for markers
GPT2 = {"type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
LLAMA_1B = {  # the shape of Llama 3.2 1B
    "type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
SMALL = {  # of 17 million weights, a size at which a CPU still takes milliseconds a pass
    "type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 2048,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
SMOKE = {
    "type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {"gpt2": GPT2, "llama-1b": LLAMA_1B, "small": SMALL, "smoke": SMOKE}
WORDS = ("one", "two", "red", "blue", "time", "day", "man", "house", "hand", "work")  # a token each, mostly everywhere


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose words are w0, w1, ... with room for markers."""
    words = [*SPECIAL, *(f"w{i}" for i in range(vocab_size - len(SPECIAL) - ROOM))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def random_model(
    shape: Mapping[str, Any],
    method: Method,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    gain: float = 1.5,
) -> LatentModel:
    """Return a model with random weights, whose matrices make states ``gain`` times as large: every layer matters."""
    spread = gain / (shape.get("hidden_size") or shape["n_embd"]) ** 0.5
    settings = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": spread, **shape}
    tokenizer = word_tokenizer(settings["vocab_size"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("type"), **settings))
        model = LatentModel(Backbone(lm.to(dtype)), tokenizer, method)
        if model.loop.time is not None and getattr(model.loop.time, "table", None) is not None:
            torch.nn.init.normal_(model.loop.time.table, std=spread)  # it starts at zero, and would go unnoticed
    return never_ending(model.to(device).eval())


@torch.no_grad()
def never_ending(model: LatentModel) -> LatentModel:
    """Make <eos> and ### unlikely, in place."""
    weight = model.backbone.lm.get_output_embeddings().weight
    weight[[model.encoder.eos_id, model.encoder.answer_prefix_ids()[0]]] = 0
    return model


def questions(model: LatentModel, n: int, length: int, seed: int = 0) -> list[str]:
    """Return questions of ``length`` tokens, the line break included."""
    generator = torch.Generator().manual_seed(seed)
    numbered = [word for word in model.tokenizer.get_vocab() if word[0] == "w" and word[1:].isdigit()]
    words: Sequence[str] = sorted(numbered) or WORDS  # a vocabulary comes in any order
    asked = []
    for _ in range(n):
        few = torch.randint(len(words), (length - 1,), generator=generator).tolist()
        asked.append(" ".join(words[i] for i in few))
        found = len(model.encoder.question(asked[-1]).ids)
        if found != length:
            raise SystemExit(f"a question has {found} tokens instead of {length}: this tokenizer needs other words")
    return asked


def answer(
    model: LatentModel, asked: Sequence[str], n_tokens: int, batch_size: int, **options: Any
) -> list[Generation]:
    """Answer with exactly ``n_tokens`` tokens each."""
    found = model.generate(asked, max_new_tokens=n_tokens, batch_size=batch_size, **options)
    if any(one.ended or ANSWER_PREFIX.strip() in one.text for one in found):
        raise SystemExit("a row has ended, so that times could not be compared: choose another seed")
    return found

"""Tiny random models for the tests: one backbone per architecture, and whole `LatentModel`s on the chain task.

from tests.models import ARCHS, chain_examples, tiny_backbone, tiny_model
"""

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from innerloop.decoder.backbone import Backbone
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Method
from innerloop.model import loading
from innerloop.tasks import Chain
from innerloop.text.examples import Example
from innerloop.text.tokenizer import train_tokenizer

from_scratch = functools.partial(loading.from_scratch, LatentModel)
"""A model (settings, tokenizer, method, seed) with fresh weights and a tokenizer that is there already."""

WIDTH = 32
VOCAB = 64
WINDOW = 5  # of the sliding-window architectures; short, so that small rows reach past it
SLIDING = ("mistral", "gemma3", "gemma2")

_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # ten times the usual, so that attention and every layer matter
}
_GROUPED: dict[str, Any] = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
_OWN_HEAD: dict[str, Any] = {**_GROUPED, "head_dim": 16}  # all heads together are wider than the model
_WINDOWED: dict[str, Any] = {**_OWN_HEAD, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"type": "gpt2", **_SHAPE},
    "llama": {"type": "llama", **_GROUPED},
    "qwen2": {"type": "qwen2", **_GROUPED},
    "qwen3": {"type": "qwen3", **_OWN_HEAD, "tie_word_embeddings": True},
    "mistral": {"type": "mistral", **_GROUPED, "sliding_window": WINDOW},
    "gemma2": {"type": "gemma2", **_WINDOWED, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3": {"type": "gemma3_text", **_WINDOWED, "layer_types": [f"{kind}_attention" for kind in
                                                                   ("sliding", "full", "sliding")]},
}  # fmt: skip
ARCHS = tuple(SETTINGS)


def tiny_lm(arch: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Make a random 3-layer model of width 32 in evaluation mode; ``changes`` go to its configuration."""
    settings = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    settings |= copy.deepcopy(SETTINGS[arch]) | changes
    config = AutoConfig.for_model(settings.pop("type"), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms and biases start at constants; move them, so that leaving one out is noticed
            for parameter in lm.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn(parameter.shape)
    return lm.eval()


def tiny_backbone(arch: str = "llama", seed: int = 0, **changes: Any) -> Backbone:
    """Make a `Backbone` on a tiny random model."""
    return Backbone(tiny_lm(arch, seed, **changes))


@functools.cache
def chain_examples(n: int = 8, n_ops: int = 3) -> tuple[Example, ...]:
    """Return the first training examples of a small chain task; each has ``n_ops`` steps."""
    return tuple(Chain(n_ops=n_ops, n_train=64, n_valid=8, n_test=8).examples("train", n))


@functools.cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(chain_examples(64, 3))


def chain_tokenizer() -> PreTrainedTokenizerBase:
    """Return a fresh word tokenizer that knows every piece of the chain task."""
    return copy.deepcopy(_tokenizer())


SPELLED = (
    *("<pad>", "<unk>", "<eos>", "<s>", "\n", "###", "q", "r"),
    *("s1", "s2", "s3", "a", "<<", "<bot>", "<lat>", "<eot>"),
)


def spelled_tokenizer(template: str = "$A", n_known: int = len(SPELLED), **special: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose ids are the places of words in `SPELLED`, for rows spelled out by hand.

    ``template`` says what it adds to a text, such as ``<s> $A``; ``special`` may change eos_token and add pad_token.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPELLED[:n_known])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    added = [(word, SPELLED.index(word)) for word in ("<s>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<eos>", "unk_token": "<unk>", **special}
    )


def tiny_model(method: Method, arch: str = "llama", seed: int = 0, **changes: Any) -> LatentModel:
    """Make a `LatentModel` for the chain task in evaluation mode; ``changes`` go to the backbone's configuration."""
    settings = copy.deepcopy(SETTINGS[arch]) | changes
    return from_scratch(settings, chain_tokenizer(), method, seed).eval()


def random_ids(n_rows: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids (n_rows, length) below ``VOCAB``."""
    return torch.randint(3, VOCAB, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def left_pad(rows: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Pad 1-D ids on the left into ids and mask (B, L)."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((width - len(row),), pad), row]) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def moved(model: LatentModel, seed: int = 0) -> LatentModel:
    """Move every weight a little, the timestep table too, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(model: LatentModel, folder: Path) -> Path:
    """Save a model and return where."""
    model.save_pretrained(folder)
    return folder


def answers_of(model: LatentModel, n: int = 3) -> Tensor:
    """Return the logits of all written tokens of a few chain examples, below each other."""
    return torch.cat(model.answer_logits(chain_examples(n)))


@torch.no_grad()
def text_logits(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the logits of a short text, read by the model itself."""
    return lm(input_ids=torch.tensor([tokenizer.encode("3 + 4 = 2\n")])).logits


def trained_on(run: Path) -> None:
    """Change the model of a run, with a clock that says it was long ago."""
    settings = run / "checkpoint" / "innerloop.json"
    settings.write_text(settings.read_text() + "\n")
    os.utime(settings, (0, 0))

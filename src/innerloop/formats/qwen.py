"""Decoders that others made denoise, under the names of the stock class: Dream-v0 (DreamLM), and dllm's A2D models.

Dream is a Qwen2 that predicts the token after each place. A2D models, ``a2d-llama``, ``a2d-qwen2`` and ``a2d-qwen3``,
predict at the place itself; of their two kinds, by masks of the whole answer (mdlm) or of blocks (bd3lm), nothing but
the name of the release tells.
"""

from __future__ import annotations

from typing import Any

from innerloop.errors import InputError
from innerloop.formats.opened import Format, Opened, checked, needed
from innerloop.formats.source import Source
from innerloop.formats.tokens import token_of, tokenizer_of
from innerloop.methods import BlockDiffusion, Dream, Llada, Method
from innerloop.methods.denoise.dream import DreamSampler
from innerloop.text.row import MASK

A2D = "a2d-"
STOCK = ("llama", "qwen2", "qwen3")
GEN_LENGTH, BLOCK = 256, 32  # as GSM8K was measured (the README of dllm's examples/a2d)
NOT_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version")


def stock(source: Source, model_type: str) -> tuple[Any, dict[str, Any]]:
    """Return the stock configuration of a type, and the weights, whose names are its class's own."""
    from transformers import AutoConfig

    fields = {name: value for name, value in source.config.items() if name not in NOT_FIELDS}
    config = AutoConfig.for_model(model_type, **fields)
    return config, checked(source, config, source.tensors())


def is_dream(source: Source) -> bool:
    """Tell it by the architecture's name."""
    return source.model_type == "Dream"


def dream(source: Source) -> Opened:
    """Open it as a Qwen2 whose places predict what comes after them; the README's sampler ranks by entropy."""
    config, weights = stock(source, "qwen2")
    tokenizer = tokenizer_of(source)
    mask = token_of(tokenizer, needed(source, "mask_token_id"), "mask_token_id")
    method = Dream(gen_length=GEN_LENGTH, mask_token=mask, sampler=DreamSampler(commit="entropy"))
    return Opened(config, weights, tokenizer, method)


def is_a2d(source: Source) -> bool:
    """Tell it by the beginning of the architecture's name."""
    return source.model_type.startswith(A2D)


def a2d(source: Source) -> Opened:
    """Open it as the stock class that was converted."""
    base = source.model_type.removeprefix(A2D)
    if base not in STOCK:
        raise InputError(f"{source.folder} is a {source.model_type}, and only {', '.join(STOCK)} are known of these")
    config, weights = stock(source, base)
    tokenizer = tokenizer_of(source)
    mask = str(tokenizer.mask_token or MASK)
    if mask not in tokenizer.get_vocab():
        raise InputError(f"the tokenizer in {source.folder} has no mask ({MASK}): restore its files")
    method: Method = Llada(gen_length=GEN_LENGTH, mask_token=mask)
    if "bd3lm" in source.name:
        method = BlockDiffusion(gen_length=GEN_LENGTH, block_length=BLOCK, mask_token=mask)
    return Opened(config, weights, tokenizer, method)


DREAM = Format("Dream (DreamLM)", is_dream, dream)
A2D_MODELS = Format("A2D (dllm)", is_a2d, a2d)

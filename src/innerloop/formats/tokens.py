"""Tokenizers as they were released: read by the class that their files need, with markers under our names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from innerloop.errors import InputError
from innerloop.formats.source import Source

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

WORDS = ("vocab.json", "merges.txt")  # of tokenizers by bytes, as GPT-2's and Qwen's
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_of(source: Source, pattern: str = "qwen2", base: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer, whatever class its settings name: those that come with code are ordinary ones underneath.

    Args:
        source: where it lies.
        pattern: whose pattern cuts text into pieces, where there are words and merges alone: gpt2 or qwen2.
        base: whose tokenizer on the Hub it is, where none was released with the weights.
    """
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    kind: Any = None
    if (source.folder / "tokenizer.json").exists():
        kind = PreTrainedTokenizerFast
    elif all((source.folder / name).exists() for name in WORDS):
        kind = {"gpt2": GPT2Tokenizer, "qwen2": Qwen2Tokenizer}[pattern]
    if kind is None and base is None:
        raise InputError(
            f"{source.folder} has no tokenizer.json, and no {' and '.join(WORDS)}: copy the tokenizer's files there"
        )
    if kind is None:
        return _of_hub(source, str(base))
    try:
        return kind.from_pretrained(source.folder)
    except Exception as error:  # a file with other contents than a tokenizer's
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer's files in {source.folder} cannot be read ({reason}); restore them") from error


def _of_hub(source: Source, base: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model that was trained on, which the authors left out."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except Exception as error:  # no network, or no leave to read it
        raise InputError(
            f"{source.folder} has no tokenizer, and that of {base} cannot be loaded: copy its files there"
        ) from error


def added(tokenizer: PreTrainedTokenizerBase, first: int, *names: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with markers at the ids from ``first`` on: under our names where it has them, else new.

    Raises:
        InputError: its tokens end elsewhere.
    """
    n_known = min(max(len(tokenizer) - first, 0), len(names))
    tokenizer = with_names(tokenizer, {first + i: names[i] for i in range(n_known)})
    if len(tokenizer) < first + n_known:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model's markers begin after {first}: copy the "
            "tokenizer of the model that it was trained on"
        )
    tokenizer.add_tokens([*names[n_known:]], special_tokens=True)
    return tokenizer


def token_of(tokenizer: PreTrainedTokenizerBase, i: Any, what: str) -> str:
    """Return the token of an id that config.json names.

    Raises:
        InputError: the tokenizer has no such token.
    """
    token = tokenizer.convert_ids_to_tokens(i) if isinstance(i, int) and 0 <= i < len(tokenizer) else None
    if not isinstance(token, str):
        raise InputError(f"config.json says {what}={i}, and the tokenizer has no such token: restore its files")
    return token


def with_names(tokenizer: PreTrainedTokenizerBase, names: Mapping[int, str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer in which some tokens, by id, are called otherwise: special ones, which no text spells."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    whole = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    words = whole["model"]["vocab"]
    own = {one["id"]: one for one in whole["added_tokens"]}
    for i, name in names.items():
        old = token_of(tokenizer, i, name)
        if isinstance(words, dict) and words.get(old) == i:
            words[name] = words.pop(old)
        own[i] = {"id": i, "content": name, "special": True, "normalized": False} | dict.fromkeys(
            ("single_word", "lstrip", "rstrip"), False
        )
    whole["added_tokens"] = [own[i] for i in sorted(own)]
    roles = {role: str(token) for role in ROLES if (token := getattr(tokenizer, role, None)) is not None}
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(whole)), clean_up_tokenization_spaces=False, **roles
    )
    renamed.chat_template = getattr(tokenizer, "chat_template", None)  # for who asks in a chat all the same
    return renamed

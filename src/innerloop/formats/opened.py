"""What opening a format gives: a stock decoder's configuration and weights, its tokenizer, the method and its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from innerloop.config.method import Method
from innerloop.errors import InputError, few
from innerloop.formats.source import Source
from innerloop.text.wording import Wording

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # that earlier transformers saved with weights


@dataclass
class Opened:
    """Released weights, as the library holds them.

    Attributes:
        config: of the stock class of transformers that computes the same.
        weights: under that class's names.
        tokenizer: with the method's markers in it, where the authors have such.
        method: with the values that the weights or their paper fix.
        parts: the weights of the method's own parts, under the names of innerloop.safetensors.
        wording: the signs between questions and answers that it was trained with, which no chat template changes;
            None: any, so that a model with such a template is asked through it.
    """

    config: PreTrainedConfig
    weights: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase
    method: Method
    parts: dict[str, Tensor] = field(default_factory=dict)
    wording: Wording | None = None


@dataclass(frozen=True)
class Format:
    """A form in which weights were released.

    Attributes:
        name: whose, and of what.
        recognises: tells from settings, files and names of tensors alone whether a source has this form.
        open: reads one.
        is_mended: config.json and tokenizer may be missing or another model's, as those of its base are known.
        beside: what has to lie beside config.json, weights and tokenizer.
    """

    name: str
    recognises: Callable[[Source], bool]
    open: Callable[[Source], Opened]
    is_mended: bool = False
    beside: tuple[str, ...] = ()

    def missing(self, source: Source) -> list[str]:
        """Return which of the files beside the weights are not there."""
        return [name for name in self.beside if not (source.folder / name).is_file()]


def by_layer(once: Mapping[str, str], each: Mapping[str, str], n_layers: int) -> dict[str, str]:
    """Return the names of a stock class by the authors': some that stand once, and some for each layer ``N``."""
    layers = {a.replace("N", str(i)): b.replace("N", str(i)) for i in range(n_layers) for a, b in each.items()}
    return {**once, **layers}


def renamed(
    source: Source, tensors: Mapping[str, Tensor], names: Mapping[str, str], spare: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return tensors under other names.

    Args:
        source: where they lie, for messages.
        tensors: by the authors' names.
        names: the new name of each.
        spare: the authors' names that may be missing, such as a head that is tied.

    Raises:
        InputError: some are missing, or there are others.
    """
    check_names(source, tensors, names, spare)
    return {new: tensors[old] for old, new in names.items() if old in tensors}


def check_names(source: Source, found: Iterable[str], wanted: Iterable[str], spare: Iterable[str] = ()) -> None:
    """Refuse weights of which some are missing, or that are more than their configuration has a place for."""
    found, wanted = {name for name in found if not name.endswith(BUFFERS)}, set(wanted)
    if missing := sorted(wanted - found - set(spare)):
        raise InputError(f"the weights in {source.folder} lack {few(missing)}: copy the model's files again")
    if extra := sorted(found - wanted):
        raise InputError(
            f"the weights in {source.folder} hold {few(extra)}, for which config.json has no place: restore config.json"
        )


def stock_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of the weights of a stock model."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(config).state_dict())


def checked(source: Source, config: PreTrainedConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that have a stock model's own names, all of which must be there; a tied head may be left out."""
    is_tied = config.tie_word_embeddings
    check_names(source, weights, stock_names(config), ["lm_head.weight"] if is_tied else [])
    return weights


def expect(source: Source, wanted: Mapping[str, Any]) -> None:
    """Refuse a configuration with other values than those that a format can be opened with; absent ones are these."""
    for name, value in wanted.items():
        if (found := source.config.get(name, value)) != value:
            raise InputError(
                f"{source.folder / 'config.json'} has {name}={found}, and such models can only be opened with {value}"
            )


def needed(source: Source, name: str) -> Any:
    """Return a value of config.json that must be there."""
    if (found := source.config.get(name)) is None:
        raise InputError(f"{source.folder / 'config.json'} has no {name}: restore it")
    return found

"""Weights that peft has wrapped: low-rank updates are added to what they update, under the model's own names again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from innerloop.errors import InputError, few

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
TRANSPOSED = ("c_attn", "c_proj", "c_fc")  # GPT-2's, whose matrices are (in, out)


def merged(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return W + (alpha / r) B A, added in fp32, for every matrix that has an update, and all others as they are.

    Raises:
        InputError: half of an update is missing.
    """
    weights = {name.replace(BASE, "."): one for name, one in tensors.items() if DOWN not in name and UP not in name}
    halves = {name.replace(end, "") for name in tensors for end in (DOWN, UP) if name.endswith(end)}
    wanted = [name + end for name in sorted(halves) for end in (DOWN, UP)] + [
        f"{n}{BASE}weight" for n in sorted(halves)
    ]
    if missing := [name for name in wanted if name not in tensors]:
        raise InputError(f"the weights lack {few(missing)}: copy the model's files again")
    for name in halves:
        down, up, weight = tensors[name + DOWN], tensors[name + UP], weights[f"{name}.weight"]
        update = up.float() @ down.float() * (alpha / len(down))
        update = update.T if name.endswith(TRANSPOSED) else update
        weights[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
    return weights


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}

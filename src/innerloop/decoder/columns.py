"""Models whose attention counts columns to know how far back a key lies, and so would count padding."""

from __future__ import annotations

import sys

from torch import nn
from transformers import PreTrainedModel

FAMILIES = ("transformers.models.gpt_neo.modeling_gpt_neo", "transformers.models.mpt.modeling_mpt")


def count_real_columns(lm: PreTrainedModel) -> None:
    """Let a model's attention count real columns alone, where it is of a family that counts all."""
    if not sys.modules.keys().isdisjoint(FAMILIES):  # else it is of none, and they are slow to import
        from innerloop.decoder.real_columns import mend

        mend(lm)


def has_alibi(decoder: nn.Module) -> bool:
    """Tell whether a decoder counts in the mask of columns how far back a key lies (BLOOM, some Falcons)."""
    return hasattr(decoder, "build_alibi_tensor") or bool(getattr(decoder, "use_alibi", False))


def counts_columns(decoder: nn.Module) -> bool:
    """Tell whether attention counts columns to know how far back a key lies, whatever positions it is given."""
    return has_alibi(decoder) or any(getattr(part, "counts_columns", False) for part in decoder.modules())

"""Attention masks as a decoder's layers want them: which keys each query sees, where some layers look back a window.

Shapes: `B` rows, `Q` queries, `K` keys.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
Sees = Literal["past", "all", "blocks"]
"""What a position of a pass sees: what comes before it and itself, every position that has been read, or the blocks
before its own and all of that one."""


@contextmanager
def grouped_queries(device: torch.device) -> Iterator[None]:
    """Let queries that share a key read it where it lies, in the block.

    Where there is a mask, transformers copies keys and values for each of them, as kernels of GPUs want; those of a CPU
    do not, and are several times faster without. The switch is transformers' own.
    """
    if device.type != "cpu" or GROUPED in os.environ:
        yield
        return
    os.environ[GROUPED] = "1"
    try:
        yield
    finally:
        os.environ.pop(GROUPED, None)


def kinds_of(config: Any) -> set[str]:
    """Return the kinds of attention of a decoder's layers; none where its configuration does not tell."""
    return set(getattr(config, "layer_types", None) or ())


def window_of(config: Any) -> int | None:
    """Return how many positions some layers look back, their own among them; None: all look at all."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return None if kinds_of(config) == {"full_attention"} else window


def block_causal(halves_BP: Tensor, real_BP: Tensor, n_new: int) -> Tensor:
    """Return which columns each of the last ``n_new`` sees (B, Q, P), where those of a block see each other.

    A column has the number 2b where block b stands as it was written, and 2b + 1 where some of its tokens are hidden.
    It sees those of its own number, and blocks before its own as they were written (block_diffusion.md, section 2);
    padding sees itself, as every query must see something.

    Args:
        halves_BP: the number of each column that has been read, the new ones included.
        real_BP: 1 where a column is real.
        n_new: how many are new.
    """
    own_BQ1, other_B1P = halves_BP[:, -n_new:, None], halves_BP[:, None, :]
    columns_P = torch.arange(halves_BP.shape[1], device=halves_BP.device)
    is_before_BQP = (other_B1P % 2 == 0) & (other_B1P // 2 < own_BQ1 // 2)
    is_own_QP = columns_P == columns_P[-n_new:, None]
    return (real_BP.bool()[:, None, :] & (is_before_BQP | (other_B1P == own_BQ1))) | is_own_QP


def visible(config: Any, seen_BQK: Tensor, behind_BQK: Tensor, dtype: torch.dtype) -> Any:
    """Return the mask of which keys each query sees; ``behind_BQK`` is how far back they lie. Additive, or bool.

    A decoder with layers of both kinds gets a mask for each.
    """

    def additive(seen: Tensor) -> Tensor:
        if dtype == torch.bool:
            return seen[:, None]
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # softmax may be taken in fp32
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, least)[:, None]

    window = window_of(config)
    if window is None:
        return additive(seen_BQK)
    sliding = additive(seen_BQK & (behind_BQK < window))
    if not kinds_of(config):
        return sliding
    return {"full_attention": additive(seen_BQK), "sliding_attention": sliding}

"""Head and cross-entropy in one kernel, which never makes the logits of all tokens: liger-kernel's, for GPUs.

The kernel goes over the tokens in chunks, and has the gradient as soon as it has the loss.

Shapes: `U` tokens, `V` vocabulary, `D` width.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from innerloop.errors import InputError, check_installed


def check_fused(device: torch.device) -> None:
    """Refuse where the kernel is not installed, or does not run (Triton's interpreter runs it on a CPU, slowly)."""
    check_installed("train.loss_chunk=fused needs liger-kernel, a number of rows does not", "liger", "liger_kernel")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("train.loss_chunk=fused runs on a GPU; on a CPU give a number of rows, such as 256")


def fused_loss(states_UD: Tensor, targets_U: Tensor, head: nn.Linear, cap: float | None = None) -> Tensor:
    """Return the summed cross-entropy of what states show through a head whose logits may be capped, in fp32."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    settings = (head.bias, None, -100, 0.0, 0.0, "sum", cap)  # no weights of words, no smoothing, no z-loss
    found: Any = LigerFusedLinearCrossEntropyFunction.apply(states_UD, head.weight, targets_U, *settings)
    return (found[0] if isinstance(found, tuple) else found).float()

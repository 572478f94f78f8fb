"""Weights as a CPU's kernels read them, laid out once for a run of the engine instead of in every product.

A product of few rows with a large matrix spends much of its time on bringing the matrix into the order in which the
kernel goes through it. oneDNN, which comes with torch, can do so beforehand, and multiplies the faster the fewer rows
there are: a written token of each row, a few latents. The price is a second copy of the weights while a run lasts.

    packed = PackedWeights(model.modules())
    with packed.used():
        model.backbone(embeds_BLD)

Packed are linears as torch and Hugging Face make them, in precisions that the CPU multiplies in. Those of another class
(quantized, sharded), small ones, those on a GPU, and any in a pass that something learns from stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FEWEST_WEIGHTS = 2**18
"""Smaller matrices stay as they are: what a call of oneDNN costs is more than the order of a few weights."""
MOST_BYTES = 4 * 2**30
"""Larger models stay as they are, and those of which a copy would take more than half of the memory that is left."""


class PackedWeights:
    """The packed weights of some modules; none where packing does not pay, does not fit or is not there.

    They are as they were when this was made.

    Args:
        modules: any, of which the linears count.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        linears = [m for m in modules if isinstance(m, (nn.Linear, Conv1D)) and _can_be_packed(m)]
        n_bytes = sum({m.weight.data_ptr(): m.weight.nbytes for m in linears}.values())
        self.forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        if n_bytes > min(MOST_BYTES, psutil.virtual_memory().available // 2):
            return
        packed = dict[tuple[int, torch.Size, type], Tensor]()  # modules may share a weight
        for module in linears:
            key = (module.weight.data_ptr(), module.weight.shape, type(module))
            if key not in packed:
                weight = module.weight.detach()
                weight = weight.T if isinstance(module, Conv1D) else weight
                packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            self.forwards.append((module, _forward(module, packed[key])))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Multiply by the packed weights in the block."""
        for module, forward in self.forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self.forwards:
                del module.__dict__["forward"]


def _can_be_packed(module: nn.Linear | Conv1D) -> bool:
    weight = module.weight
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__:
        return False
    if weight.device.type != "cpu" or weight.numel() < FEWEST_WEIGHTS:
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _forward(module: nn.Linear | Conv1D, packed: Tensor) -> Callable[[Tensor], Tensor]:
    bias, plain, dtype = module.bias, module.forward, packed.dtype

    def forward(states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or states.dtype != dtype:
            return plain(states)
        return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")

    return forward

"""Weights as a CPU's kernels read them, laid out once for a run of the engine instead of in every product.

A product of few rows with a large matrix spends much of its time on bringing the matrix into the order in which the
kernel goes through it. oneDNN, which comes with torch, can do so beforehand, and multiplies the faster the fewer rows
there are: a written token of each row, a few latents. The price is a second copy of the weights while a run lasts.

    packed = PackedWeights(model.modules())
    with packed.used():
        model.backbone(embeds_BLD)

Packed are linears as torch and Hugging Face make them, in precisions that the CPU multiplies in. Those of another class
(quantized, sharded), those whose weight is made anew in each call, small ones and those on a GPU stay as they are. In a
pass that something learns from, under autocast, or once its weight is another, a packed linear multiplies by its own
weight; only a change that torch does not count, through `.data`, goes unnoticed until the next run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from innerloop.decoder.memory import free_bytes, is_out_of_memory

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
        self.products: list[tuple[nn.Module, Product]] = []
        if not linears or n_bytes > min(MOST_BYTES, free_bytes() // 2):
            return
        packed = dict[tuple[int, torch.Size, type], Tensor]()  # modules may share a weight
        try:
            for module in linears:
                key = (module.weight.data_ptr(), module.weight.shape, type(module))
                if key not in packed:
                    weight = module.weight.detach()
                    weight = weight.T if isinstance(module, Conv1D) else weight
                    packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
                self.products.append((module, Product(module, packed[key])))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.products = []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Multiply by the packed weights in the block.

        Others may end a block of their own in the meantime; then modules multiply by their own weights.
        """
        try:
            for module, product in self.products:
                module.__dict__["forward"] = product
            yield
        finally:
            for module, _ in self.products:
                module.__dict__.pop("forward", None)


class Product:
    """What a linear computes, by its packed weight as long as that is its weight; the bias is the one of the moment."""

    def __init__(self, module: nn.Linear | Conv1D, packed: Tensor):
        self.module, self.packed, self.weight = module, packed, module.weight
        self.version = _version(self.weight)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the outputs (..., out) for inputs (..., in)."""
        module, now = self.module, self.module.weight
        if (
            len(args) == 1
            and not kwargs
            and not torch.is_grad_enabled()
            and now is self.weight
            and _version(now) == self.version
            and args[0].dtype == self.packed.dtype
            and not torch.is_autocast_enabled("cpu")
        ):
            return torch.ops.mkldnn._linear_pointwise(args[0], self.packed, module.bias, "none", [], "")
        return type(module).forward(module, *args, **kwargs)


def _version(weight: Tensor) -> int:
    """Return how often a tensor has been written to, as far as torch counts that."""
    return -1 if weight.is_inference() else weight._version


def _can_be_packed(module: nn.Linear | Conv1D) -> bool:
    weight, patched = module._parameters.get("weight"), module.__dict__.get("forward")
    if type(module) not in (nn.Linear, Conv1D) or not (patched is None or isinstance(patched, Product)):
        return False
    if weight is None or module.weight is not weight:  # made anew in each call
        return False
    if weight.device.type != "cpu" or weight.numel() < FEWEST_WEIGHTS:
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )

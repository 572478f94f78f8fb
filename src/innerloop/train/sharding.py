"""Weights that several processes hold in parts (FSDP2), whole for a while: to be written, or read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from innerloop.errors import InputError


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which each process may hold a part; all processes ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


@contextmanager
def gathered(model: nn.Module, changes: bool = False) -> Iterator[None]:
    """Have whole weights in a block, which all processes enter and leave; they need the memory of the model once more.

    Args:
        model: what is trained; nothing happens where no weight of it is held in parts.
        changes: whether the block, alike in all processes, changes weights.
    """
    found = [
        (module, name, part)
        for module in model.modules()
        for name, part in module._parameters.items()
        if isinstance(part, nn.Parameter) and isinstance(part, DTensor)
    ]
    full = {id(part): nn.Parameter(whole(part.detach()), part.requires_grad) for _, _, part in found}  # tied ones once
    hooks = {module: module._load_state_dict_post_hooks for module, _, _ in found}
    for module, name, part in found:
        module._parameters[name] = full[id(part)]
        module._load_state_dict_post_hooks = OrderedDict()  # FSDP's know weights in parts alone
    try:
        yield
    finally:
        for module, name, part in found:
            module._parameters[name], module._load_state_dict_post_hooks = part, hooks[module]
    if changes:
        with torch.no_grad():
            for part in {id(part): part for _, _, part in found}.values():
                part.copy_(distribute_tensor(full[id(part)].detach(), part.device_mesh, part.placements))


@contextmanager
def kept_whole(model: nn.Module, is_checkpointed: bool) -> Iterator[None]:
    """Keep weights that were gathered until a block ends, which reads and goes back through what it has read.

    FSDP lets a layer's weights go after each of its passes, and gathers them again when a gradient reaches what that
    pass has given. Here a gradient may come by another way first: through keys and values that later passes have read.
    Where passes are run again for their gradients (activation checkpointing), that gathers what they need.
    """
    parts = [] if is_checkpointed else [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
    yield
    for part in parts:
        part.reshard()


def check_sharded(is_asked: bool, is_enabled: bool) -> None:
    """Refuse to train with whole weights where they were to be held in parts."""
    if (is_asked or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true") and not is_enabled:
        raise InputError(
            "FSDP was asked for, but accelerate shards weights over several GPUs alone, and here it would not: leave "
            "train.fsdp (or --use_fsdp) out"
        )

"""Weights as a CPU's kernels read them, laid out once and kept beside the model instead of anew in every product.

A product of few rows with a large matrix spends much of its time on bringing the matrix into the order in which the
kernel goes through it. oneDNN, which comes with torch, can do so beforehand, and multiplies the faster the fewer rows
there are: a written token of each row, a few latents. Matrices that read the same input (queries, keys and values; gate
and up) are one product. The price is a second copy of the weights.

    packed = PackedWeights(model.modules())
    with packed.used():
        model.backbone(embeds_BLD)

Packed are linears as torch and Hugging Face make them, in precisions that the CPU multiplies in. Those of another class
(quantized, sharded), those whose weight is made anew in each call, small ones and those on a GPU stay as they are. In a
pass that something learns from, under autocast, or once its weight is another, a packed linear multiplies by its own
weight. Packed weights are kept as long as their modules live, and used again where no weight has changed since: torch
counts changes, but for those through `.data`, which a sample of every row and column shows (`_sampled`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from innerloop.decoder.memory import free_bytes, is_out_of_memory
from innerloop.phases.phase import phase

FEWEST_WEIGHTS = 2**18
"""Smaller matrices stay as they are: what a call of oneDNN costs is more than the order of a few weights."""
MOST_BYTES = 4 * 2**30
"""Larger models stay as they are, and those of which a copy would take more than half of the memory that is left."""
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears of one module that read the same input, in the order in which they are called."""

_kept: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()  # by the first module of each


class PackedWeights:
    """The packed weights of some modules; none where packing does not pay, does not fit or is not there.

    Args:
        modules: any, of which the linears count.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.products: list[tuple[nn.Module, Product]] = []
        groups = _groups(modules)
        new = [group for group in groups if group[0] not in _kept or not _kept[group[0]].fits(group)]
        for group in new:  # what has gone stale makes room first
            _kept.pop(group[0], None)
        if _n_bytes(groups) > MOST_BYTES or _n_bytes(new) > free_bytes() // 2:
            return
        made = dict[tuple[int, ...], Tensor]()  # modules may share a weight
        try:
            with phase("packing weights"):
                for group in new:
                    key = (*(module.weight.data_ptr() for module in group), isinstance(group[0], Conv1D))
                    if key not in made:
                        made[key] = torch.ops.mkldnn._reorder_linear_weight(_joined(group))
                    _kept[group[0]] = Packed(group, made[key])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            release(module for group in groups for module in group)
            return
        for group in groups:
            packed = _kept[group[0]]
            self.products += [(module, Product(module, packed, i)) for i, module in enumerate(group)]

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


def release(modules: Iterable[nn.Module]) -> None:
    """Forget the packed weights of some modules."""
    for module in modules:
        _kept.pop(module, None)


class Packed:
    """One packed matrix, of the weights of one module or of several that read the same input.

    What several read is multiplied when the first of them asks; the others find their parts, once, if they ask with the
    same input. It holds no module, so that it goes when they do.
    """

    def __init__(self, group: Sequence[Any], packed: Tensor):
        self.packed = packed
        self.weights = [module.weight for module in group]
        self.versions = [_version(weight) for weight in self.weights]
        self.samples = [_sampled(weight) for weight in self.weights]
        self.sizes = [weight.shape[1 if isinstance(group[0], Conv1D) else 0] for weight in self.weights]
        self.takes_one = _pays_for_one_row(packed.dtype, torch.get_num_threads())
        self.rest: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def fits(self, group: Sequence[Any]) -> bool:
        """Tell whether this is what packing some modules would give now."""
        weights = [module.weight for module in group]
        return (
            len(weights) == len(self.weights)
            and all(map(self.is_current, range(len(weights)), weights))
            and all(torch.equal(_sampled(weight), sample) for weight, sample in zip(weights, self.samples))
        )

    def is_current(self, i: int, weight: Tensor) -> bool:
        """Tell whether a weight is, as far as torch counts changes, the one that was packed."""
        return weight is self.weights[i] and _version(weight) == self.versions[i]

    def part(self, i: int, states: Tensor) -> Tensor | None:
        """Return the outputs (..., out) of the i-th module without its bias; None: its own weight must make them."""
        if i == 0:
            out = torch.ops.mkldnn._linear_pointwise(states, self.packed, None, "none", [], "")
            if len(self.sizes) == 1:
                return out
            first, *others = out.split(self.sizes, dim=-1)
            self.rest = states, _version(states), dict(enumerate(others, start=1))
            return first.contiguous()
        if self.rest is None or self.rest[0] is not states or _version(states) != self.rest[1]:
            return None
        found = self.rest[2].pop(i, None)
        if not self.rest[2]:
            self.rest = None
        return None if found is None else found.contiguous()


class Product:
    """What a linear computes, by its packed weight as long as that is its weight; the bias is the one of the moment."""

    def __init__(self, module: nn.Linear | Conv1D, packed: Packed, i: int):
        self.module, self.packed, self.i = module, packed, i

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the outputs (..., out) for inputs (..., in)."""
        module, packed = self.module, self.packed
        if (
            len(args) == 1
            and not kwargs
            and not torch.is_grad_enabled()
            and packed.is_current(self.i, module.weight)
            and args[0].dtype == packed.packed.dtype
            and (packed.takes_one or args[0].numel() > args[0].shape[-1])
            and not torch.is_autocast_enabled("cpu")
        ):
            out = packed.part(self.i, args[0])
            if out is not None:
                return out if module.bias is None else out.add_(module.bias)
        return type(module).forward(module, *args, **kwargs)


@cache
def _pays_for_one_row(dtype: torch.dtype, n_threads: int) -> bool:
    """Measure whether one row is multiplied by packed weights at least about as fast as by plain ones on this machine.

    Which it is depends on the processor and its libraries. The weights, 64 MiB, are more than most caches hold, as
    those of a model are. So that it comes out alike each time, plain weights must be clearly faster to be preferred.
    """
    with torch.inference_mode():
        row, plain = torch.ones(1, 1024, dtype=dtype), [torch.zeros(1024, 1024, dtype=dtype) for _ in range(16)]
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in plain]

        def by_plain() -> None:
            for weight in plain:
                linear(row, weight)

        def by_packed() -> None:
            for weight in packed:
                torch.ops.mkldnn._linear_pointwise(row, weight, None, "none", [], "")

        return min(map(_seconds, 4 * [by_packed])) < 1.15 * min(map(_seconds, 4 * [by_plain]))


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been written to, as far as torch counts that."""
    return -1 if tensor.is_inference() else tensor._version


def _sampled(weight: Tensor) -> Tensor:
    """Return as many entries of a matrix as it has rows or columns: at least one of each."""
    n_rows, n_columns = weight.shape
    i = torch.arange(max(n_rows, n_columns))
    return weight.detach()[i % n_rows, i % n_columns]


def _groups(modules: Iterable[nn.Module]) -> list[list[Any]]:
    """Return the linears that can be packed, those that read the same input together."""
    listed, groups, taken = list(modules), list[list[Any]](), set[nn.Module]()
    for parent in listed:
        for names in SAME_INPUT:
            group: list[Any] = [getattr(parent, name, None) for name in names]
            if all(type(m) is nn.Linear and _is_plain(m) for m in group) and _share_input(group):
                groups.append(group)
                taken.update(group)
    known = set(listed)
    groups = [group for group in groups if known.issuperset(group)]
    groups += [[m] for m in listed if m not in taken and isinstance(m, (nn.Linear, Conv1D)) and _is_plain(m)]
    return [group for group in groups if sum(module.weight.numel() for module in group) >= FEWEST_WEIGHTS]


def _share_input(group: Sequence[Any]) -> bool:
    return len({(module.weight.shape[1], module.weight.dtype) for module in group}) == 1


def _n_bytes(groups: Iterable[Sequence[Any]]) -> int:
    """Return how much memory the packed weights of some groups take."""
    weights = [module.weight for group in groups for module in group]
    return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())


def _joined(group: Sequence[Any]) -> Tensor:
    """Return the weights (out, in) of modules that read the same input as one."""
    first = group[0].weight.detach()
    if isinstance(group[0], Conv1D):
        return first.T.contiguous()
    return first.contiguous() if len(group) == 1 else torch.cat([module.weight.detach() for module in group])


def _is_plain(module: nn.Linear | Conv1D) -> bool:
    """Tell whether a linear multiplies by a weight of its own that oneDNN can pack."""
    weight, patched = module._parameters.get("weight"), module.__dict__.get("forward")
    if type(module) not in (nn.Linear, Conv1D) or not (patched is None or isinstance(patched, Product)):
        return False
    if weight is None or module.weight is not weight:  # made anew in each call
        return False
    if weight.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )

"""Loop-wise LoRA: a bank of low-rank updates indexed by the loop (slr.md, 3.3; idea of arXiv 2410.20672).

    W_t = W + (gamma / r) B_t A_t,   A_t (r, in) Kaiming, B_t (out, r) zero

The bank hooks the target linears once. Which entry is active is one number, set around a pass (`with bank.at(t):`), so
nothing walks the modules in a loop, and a pass that is recomputed in the backward pass sets it again. The number is a
tensor, so that a compiled pass is compiled once for all iterations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from innerloop.config.loop import BankKind, Beyond
from innerloop.decoder.backbone import Backbone
from innerloop.disk.folders import replacing_folder
from innerloop.errors import InputError, nearest


class LoraBank(nn.Module):
    """Low-rank updates indexed by the loop, each by its key.

    Args:
        n_loops: the number of iterations trained for.
        n_banks: the number of updates of a key.
        scale: what they are multiplied by.
        beyond: past ``n_loops`` use the last update (clamp), start over (cycle), or none (off).
        device: where they are.
    """

    def __init__(self, n_loops: int, n_banks: int, scale: float, beyond: Beyond, device: torch.device):
        super().__init__()
        self.n_loops, self.scale, self.beyond = n_loops, scale, beyond
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.entry: Tensor | None = None
        self.numbers = nn.Buffer(torch.arange(n_banks, device=device), persistent=False)

    def add(self, key: str, n_in: int, n_out: int, rank: int) -> None:
        """Make the updates of a key; they change nothing yet."""
        down = torch.empty(len(self.numbers), rank, n_in)
        for matrix in down:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.down[key] = nn.Parameter(down)
        self.up[key] = nn.Parameter(torch.zeros(len(self.numbers), n_out, rank))

    @property
    def flops(self) -> float:
        """FLOPs of an iteration's updates per token."""
        return 2.0 * sum(bank[0].numel() for side in (self.down, self.up) for bank in side.values())

    def index(self, iteration: int) -> int | None:
        """Return the entry of the 1-based ``iteration``, or None where none applies."""
        n_banks = len(self.numbers)
        if iteration <= self.n_loops:
            return min(iteration, n_banks) - 1
        if self.beyond == "off":
            return None
        return n_banks - 1 if self.beyond == "clamp" else (iteration - 1) % self.n_loops % n_banks

    @contextmanager
    def at(self, iteration: int) -> Iterator[None]:
        """Use ``iteration``'s weights in the block."""
        index = self.index(iteration)
        before, self.entry = self.entry, None if index is None else self.numbers[index : index + 1]
        try:
            yield
        finally:
            self.entry = before

    def update(self, key: str, inputs: Tensor) -> Tensor:
        """Return what the active iteration adds to the outputs of a key (..., out) for inputs (..., in)."""
        assert self.entry is not None
        down, up = (bank.index_select(0, self.entry)[0] for bank in (self.down[key], self.up[key]))
        return self.scale * ((inputs.to(down.dtype) @ down.T) @ up.T)


class LoopLora(LoraBank):
    """One low-rank update per iteration for every target linear of a backbone.

    Args:
        backbone: whose linears are updated.
        n_loops: the number of iterations trained for.
        rank: r.
        gamma: the scale is gamma / r.
        kind: per_iter: an update for each iteration; shared: one for all.
        targets: patterns of the target modules' names, of their last part (q_proj, *_proj) or of all that comes after
            the layers' own (1.mlp.*); empty: all attention and MLP linears.
        beyond: past ``n_loops`` use the last update (clamp), start over (cycle), or none (off).
    """

    def __init__(
        self,
        backbone: Backbone,
        n_loops: int,
        rank: int,
        gamma: float,
        kind: BankKind = "per_iter",
        targets: Sequence[str] = (),
        beyond: Beyond = "clamp",
    ):
        super().__init__(n_loops, 1 if kind == "shared" else n_loops, gamma / rank, beyond, backbone.device)
        self.rank, self.prefix = rank, _layers_prefix(backbone)
        self.dropout = 0.0  # of the inputs, in training
        self.rows_by_entry: list[tuple[int, Tensor]] = []  # rows of a pass that have an update of their own
        linears = {n: m for n, m in backbone.layers.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        chosen = {n: m for n, m in linears.items() if not targets or any(_is_target(n, target) for target in targets)}
        self.modules_by_name = {self.prefix + name: module for name, module in chosen.items()}
        if unknown := [target for target in targets if not any(_is_target(name, target) for name in linears)]:
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise InputError(
                f"lora_targets: the model has no linear '{unknown[0]}'{nearest(unknown[0], known)}; "
                f"its linears are {', '.join(known)}"
            )
        for name, module in self.modules_by_name.items():
            key = name.replace(".", "/")
            self.add(key, *_shape(module), rank)
            module.register_forward_hook(partial(self._add_update, key))  # no closure: a copy must hook its own bank

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "modules_by_name":  # the backbone's modules are looked at, not owned
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def keep_layers(self, layers: range) -> None:
        """Update no other layers than these."""
        kept = tuple(f"{self.prefix}{layer}." for layer in layers)
        for name in [name for name in self.modules_by_name if not name.startswith(kept)]:
            del self.modules_by_name[name]
            for side in (self.down, self.up):
                del side[name.replace(".", "/")]

    @contextmanager
    def of_rows(self, rows_by_loop: Mapping[int, Tensor]) -> Iterator[None]:
        """Use iterations' weights in the block for some rows (R,) of a pass each; the others keep the base weights."""
        entries = [(self.index(loop), rows) for loop, rows in rows_by_loop.items()]
        before, self.rows_by_entry = self.rows_by_entry, [(i, rows) for i, rows in entries if i is not None]
        try:
            yield
        finally:
            self.rows_by_entry = before

    def _add_update(self, key: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if key not in self.down or (self.entry is None and not self.rows_by_entry):
            return None
        inputs = dropout(args[0], self.dropout) if self.dropout and self.training else args[0]
        if self.entry is not None:
            return output + self.update(key, inputs).to(output.dtype)
        for entry, rows in self.rows_by_entry:
            down, up = self.down[key][entry], self.up[key][entry]
            update = linear(linear(inputs.index_select(0, rows).to(down.dtype), down), up)
            output.index_add_(0, rows, update.to(output.dtype), alpha=self.scale)
        return output

    def delta(self, name: str, iteration: int) -> Tensor:
        """Return the update (out, in) of a module at an iteration."""
        key, entry = name.replace(".", "/"), self.index(iteration)
        if entry is None:
            return torch.zeros(self.up[key].shape[1], self.down[key].shape[2], device=self.up[key].device)
        return self.scale * self.up[key][entry] @ self.down[key][entry]

    @contextmanager
    @torch.no_grad()
    def merged(self, iteration: int) -> Iterator[None]:
        """Put ``iteration``'s update into the weights for the block; they return exactly as they were."""
        kept = {name: module.weight.detach().clone() for name, module in self.modules_by_name.items()}
        for name, module in self.modules_by_name.items():
            delta = self.delta(name, iteration).to(module.weight.dtype)
            module.weight += delta.T if isinstance(module, Conv1D) else delta
        try:
            yield
        finally:
            for name, module in self.modules_by_name.items():
                module.weight.copy_(kept[name])

    def export(self, folder: str | Path, iteration: int, base_model: str) -> None:
        """Write ``iteration``'s weights as an ordinary PEFT adapter of ``base_model``."""
        entry = self.index(iteration)
        if entry is None:
            raise InputError(
                f"iteration {iteration} has no LoRA weights: loop.lora_beyond is off and max_loops is {self.n_loops}"
            )
        tensors = {}
        for name in self.modules_by_name:
            key = name.replace(".", "/")
            tensors[f"base_model.model.{name}.lora_A.weight"] = self.down[key][entry].detach().contiguous().cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = self.up[key][entry].detach().contiguous().cpu()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": self.scale * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(isinstance(m, Conv1D) for m in self.modules_by_name.values()),
            "target_modules": sorted(self.modules_by_name),
            "inference_mode": True,
        }
        with replacing_folder(folder) as aside:
            save_file(tensors, aside / "adapter_model.safetensors")
            (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _layers_prefix(backbone: Backbone) -> str:
    for name, module in backbone.lm.named_modules():
        if module is backbone.layers:
            return f"{name}."
    raise AssertionError("the layers are modules of the model")


def _is_target(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[-1], pattern)


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return (in, out)."""
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else tuple(module.weight.shape[::-1])  # type: ignore[return-value]

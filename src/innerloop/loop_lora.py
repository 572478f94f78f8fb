"""Loop-wise LoRA: a bank of low-rank updates indexed by the loop (slr.md, 3.3; idea of arXiv 2410.20672).

    W_t = W + (gamma / r) B_t A_t,   A_t (r, in) Kaiming, B_t (out, r) zero

The bank hooks the target linears once. Which entry is active is one number, set around a pass (`with bank.at(t):`), so
nothing walks the modules in a loop, and a pass that is recomputed in the backward pass sets it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from innerloop.backbone import Backbone
from innerloop.errors import InputError, nearest

BankKind = Literal["none", "per_iter", "shared"]
Beyond = Literal["clamp", "cycle", "off"]


class LoopLora(nn.Module):
    """One low-rank update per iteration for every target linear of a backbone.

    Args:
        backbone: whose linears are updated.
        n_loops: the number of iterations trained for.
        rank: r.
        gamma: the scale is gamma / r.
        kind: per_iter: an update for each iteration; shared: one for all.
        targets: last parts of the names of the target modules, such as q_proj; empty: all attention and MLP linears.
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
        super().__init__()
        self.n_loops, self.rank, self.scale, self.beyond = n_loops, rank, gamma / rank, beyond
        n_banks = 1 if kind == "shared" else n_loops
        self.modules_by_name = {
            name: module
            for name, module in backbone.lm.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and name.startswith(_layers_prefix(backbone))
            and (not targets or name.rsplit(".", 1)[-1] in targets)
        }
        found = {name.rsplit(".", 1)[-1] for name in self.modules_by_name}
        if unknown := sorted(set(targets) - found):
            linears = (n for n, m in backbone.layers.named_modules() if isinstance(m, (nn.Linear, Conv1D)))
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise InputError(
                f"lora_targets: the model has no linear '{unknown[0]}'{nearest(unknown[0], known)}; "
                f"its linears are {', '.join(known)}"
            )
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.entry: int | None = None
        for name, module in self.modules_by_name.items():
            n_in, n_out = _shape(module)
            key = name.replace(".", "/")
            down = torch.empty(n_banks, rank, n_in)
            for matrix in down:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            self.down[key] = nn.Parameter(down)
            self.up[key] = nn.Parameter(torch.zeros(n_banks, n_out, rank))
            module.register_forward_hook(partial(self._add_update, key))  # no closure: a copy must hook its own bank

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "modules_by_name":  # the backbone's modules are looked at, not owned
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def index(self, loop: int) -> int | None:
        """Return the entry of the 1-based iteration ``loop``, or None where none applies."""
        n_banks = next(iter(self.up.values())).shape[0]
        if loop <= self.n_loops:
            return min(loop, n_banks) - 1
        if self.beyond == "off":
            return None
        return n_banks - 1 if self.beyond == "clamp" else (loop - 1) % self.n_loops % n_banks

    @contextmanager
    def at(self, loop: int) -> Iterator[None]:
        """Use iteration ``loop``'s weights in the block."""
        before, self.entry = self.entry, self.index(loop)
        try:
            yield
        finally:
            self.entry = before

    def _add_update(self, key: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.entry is None:
            return None
        down, up = self.down[key][self.entry], self.up[key][self.entry]
        return output + self.scale * ((args[0].to(down.dtype) @ down.T) @ up.T).to(output.dtype)

    def delta(self, name: str, loop: int) -> Tensor:
        """Return the update (out, in) of a module at an iteration."""
        key, entry = name.replace(".", "/"), self.index(loop)
        if entry is None:
            return torch.zeros(self.up[key].shape[1], self.down[key].shape[2], device=self.up[key].device)
        return self.scale * self.up[key][entry] @ self.down[key][entry]

    @contextmanager
    @torch.no_grad()
    def merged(self, loop: int) -> Iterator[None]:
        """Put iteration ``loop``'s update into the weights for the block; they return exactly as they were."""
        kept = {name: module.weight.detach().clone() for name, module in self.modules_by_name.items()}
        for name, module in self.modules_by_name.items():
            delta = self.delta(name, loop).to(module.weight.dtype)
            module.weight += delta.T if isinstance(module, Conv1D) else delta
        try:
            yield
        finally:
            for name, module in self.modules_by_name.items():
                module.weight.copy_(kept[name])

    def export(self, folder: str | Path, loop: int, base_model: str) -> None:
        """Write iteration ``loop``'s weights as an ordinary PEFT adapter of ``base_model``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        entry = self.index(loop)
        if entry is None:
            raise InputError(
                f"iteration {loop} has no LoRA weights: lora_beyond is off and max_loops is {self.n_loops}"
            )
        tensors = {}
        for name in self.modules_by_name:
            key = name.replace(".", "/")
            tensors[f"base_model.model.{name}.lora_A.weight"] = self.down[key][entry].detach().contiguous().cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = self.up[key][entry].detach().contiguous().cpu()
        save_file(tensors, folder / "adapter_model.safetensors")
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
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _layers_prefix(backbone: Backbone) -> str:
    for name, module in backbone.lm.named_modules():
        if module is backbone.layers:
            return f"{name}."
    raise AssertionError("the layers are modules of the model")


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return (in, out)."""
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else tuple(module.weight.shape[::-1])  # type: ignore[return-value]

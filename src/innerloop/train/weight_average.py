"""A moving average of the weights that are trained, by which a model is validated and kept.

Training goes on with the weights themselves. Huginn's authors report one of theirs (arXiv 2502.05171), and tiny
recursive models rest on it (arXiv 2510.04871).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from innerloop.errors import InputError
from innerloop.train.sharding import whole

FILE = "weight_average.safetensors"  # in a checkpoint that training may go on from
UPDATES = "updates"  # how many steps it is the average of


class WeightAverage(TrainerCallback):
    """Averages weights: after step n, average += (1 - d) (weight - average), with d = min(decay, (1 + n) / (10 + n)).

    Args:
        model: what is trained; weights that begin to be trained later are averaged from then on.
        decay: what stays of the average in a step, once the first steps, which say little, have lost their weight.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.n = model, decay, 0
        self.average: dict[str, Tensor] = {}

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def on_step_end(self, *given: Any, **named: Any) -> None:
        """Move the average towards the weights of a step."""
        trained = self._trained()
        self.average |= {name: weight.clone() for name, weight in trained.items() if name not in self.average}
        self.n += 1
        decay = min(self.decay, (1 + self.n) / (10 + self.n))
        torch._foreach_lerp_([self.average[name] for name in trained], list(trained.values()), 1 - decay)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Have the average in place of the weights in a block."""
        trained = {name: weight for name, weight in self._trained().items() if name in self.average}
        before = {name: weight.clone() for name, weight in trained.items()}
        self._put(trained, self.average)
        try:
            yield
        finally:
            self._put(trained, before)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            weight.copy_(values[name])

    def save(self, folder: Path, writes: bool) -> None:
        """Write the average into a checkpoint; all processes ask for it, and one of them writes."""
        found = {name: whole(value).contiguous().cpu() for name, value in self.average.items()}
        if writes:
            save_file({**found, UPDATES: torch.tensor(self.n)}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's average.

        Raises:
            InputError: the checkpoint has none.
        """
        if not (folder / FILE).exists():
            raise InputError(
                f"{folder} has no {FILE}, as it was trained without ema_decay: leave that out to go on from it"
            )
        found = load_file(folder / FILE)
        self.n = int(found.pop(UPDATES))
        weights = dict(self.model.named_parameters())
        self.average = {name: _held_as(weights[name], value) for name, value in found.items()}


def _held_as(weight: Tensor, value: Tensor) -> Tensor:
    """Return a value on the device of a weight, in parts where the weight is."""
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else value

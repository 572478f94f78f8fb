"""Norms behind attention and MLP, which stock layers have only before them; they are hooked onto the layers.

    of outputs:  x = x + n2(Attn(n1 x));   x = x + n4(MLP(n3 x))            (Ouro, arXiv 2510.25741)
    of sums:     x = n2(x + Attn(n1 x));   x = n4(x + MLP(n3 x))            (Huginn, arXiv 2502.05171)

n1 and n3 are the layer's own. The hooks are there for good, and do something while a pass of their method runs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from innerloop.decoder.backbone import Backbone

Norms = Literal["outputs", "sums"]


class SandwichNorms(nn.Module):
    """The gains of n2 and n4 of every layer, one at the start, and the hooks that apply them.

    Args:
        backbone: whose layers get them.
        of: what is normed.
    """

    def __init__(self, backbone: Backbone, of: Norms):
        super().__init__()
        device = backbone.device
        self.after_attention = nn.Parameter(torch.ones(backbone.n_layers, backbone.width, device=device))
        self.after_mlp = nn.Parameter(torch.ones(backbone.n_layers, backbone.width, device=device))
        self.eps = getattr(backbone.config, "rms_norm_eps", 1e-6)
        self.is_on = False
        self.entered: Tensor | None = None
        for i, layer in enumerate(backbone.layers):
            attention, mlp = backbone.taps(i)
            if of == "outputs":
                attention.register_forward_hook(partial(self._norm_output, "after_attention", i))
                mlp.register_forward_hook(partial(self._norm_output, "after_mlp", i))
            else:
                layer.register_forward_pre_hook(self._enter)
                attention.register_forward_hook(partial(self._norm_sum, i))
                layer.register_forward_hook(partial(self._norm_output, "after_mlp", i))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Apply the norms within a block."""
        was_on, self.is_on = self.is_on, True
        try:
            yield
        finally:
            self.is_on = was_on
            self.entered = None

    def norm(self, place: str, layer: int, states: Tensor) -> Tensor:
        """Return normed states (..., D), computed in fp32."""
        gain = getattr(self, place)[layer]
        normed = states.float() * (states.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (gain * normed).to(states.dtype)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember what a layer is given."""
        if self.is_on:
            self.entered = args[0]

    def _norm_output(self, place: str, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.is_on:
            return output
        if isinstance(output, tuple):
            return self.norm(place, layer, output[0]), *output[1:]
        return self.norm(place, layer, output)

    def _norm_sum(self, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        """Give what makes n2(x + Attn) of the x that the layer adds to it."""
        if not self.is_on:
            return output
        assert self.entered is not None
        added = output[0] if isinstance(output, tuple) else output
        change = self.norm("after_attention", layer, self.entered + added) - self.entered
        return (change, *output[1:]) if isinstance(output, tuple) else change

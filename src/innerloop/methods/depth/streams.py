"""Streams: one decoder run several times side by side, told apart by learnt prefixes and mixed before the head.

    K = [prefix_k(p) ; W_k h],  V = [prefix_v(p) ; W_v h]     in every layer: columns that count for no position
    w = softmax(W2 silu(W1 z + b1) + b2),  w <- (1 - eps) w + eps / P,  h = sum_p w_p H_p           (parscale.md, 3)

z has the streams' states interleaved: z[d P + p] = H_p[d]. Inside a pass the P streams of a row are P rows that follow
each other; what looks at the cache from outside sees the row alone.

Shapes: `B` rows, `P` streams, `L` tokens of a pass, `N` columns of a prefix, `H` heads of keys, `D` width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, silu

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.kv_buffer import FullLayer
from innerloop.decoder.ragged_cache import DepthCache, Slot

PREFIX_STD = 0.02
NOWHERE = -1
"""The position of a column that counts for none: every token sees it."""


@dataclass
class BiasedSlot(Slot):
    """A slot that knows what is added to what every query makes of a column's key: nothing but for prefixes."""

    added_BP: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    @property
    def bias_BP(self) -> Tensor:
        """What is added, column by column."""
        return self.added_BP

    def extend(self, positions_RN: Tensor, real_RN: Tensor | None, rows_R: Tensor | None) -> None:
        """Note the tokens of a reading."""
        super().extend(positions_RN, real_RN, rows_R)
        self.added_BP = pad(self.added_BP, (0, positions_RN.shape[1]))


class Prefixes(nn.Module):
    """The keys and values that each layer begins with, in each stream.

    Args:
        backbone: whose layers these are; it is asked for the shape of its keys and values.
        n_streams: P.
        n_prefix: N.
        bias: what is added to what queries make of a prefix's keys, at first; one number is learnt for each stream. 0:
            nothing is.
    """

    def __init__(self, backbone: Backbone, n_streams: int, n_prefix: int, bias: float):
        super().__init__()
        self.keys, self.values = (
            nn.ParameterList(PREFIX_STD * torch.randn(n_streams, one.shape[1], n_prefix, one.shape[3]) for one in side)
            for side in _like(backbone)
        )
        self.bias = nn.Parameter(torch.full((n_streams,), bias)) if bias else None

    def slot(self, layers: range, like_BL: Tensor, dtype: torch.dtype) -> Slot:
        """Return a slot of some layers in which nothing but the prefixes is; ``like_BL`` has a row for each stream."""
        n_streams, _, n, _ = self.keys[0].shape
        n_rows = len(like_BL) // n_streams
        kept = [
            FullLayer.holding(*(side[i].to(dtype).repeat(n_rows, 1, 1, 1) for side in (self.keys, self.values)))
            for i in layers
        ]
        positions = like_BL.new_full((len(like_BL), n), NOWHERE)
        real = torch.ones_like(positions, dtype=torch.bool)
        if self.bias is None:
            return Slot(layers, positions, real, is_dense=False, kept=kept)
        bias = self.bias.repeat(n_rows)[:, None].expand(-1, n)
        return BiasedSlot(layers, positions, real, is_dense=False, kept=kept, added_BP=bias)


@torch.no_grad()
def _like(backbone: Backbone) -> tuple[list[Tensor], list[Tensor]]:
    """Return the keys and the values (1, H, 1, d) that each layer makes of one token."""
    was_training, cache = backbone.lm.training, backbone.empty_cache()
    backbone.lm.eval()
    backbone(backbone.embed(torch.zeros(1, 1, dtype=torch.long, device=backbone.device)), cache=cache)
    backbone.lm.train(was_training)
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


class Aggregator(nn.Module):
    """Mixes the streams; at its start each counts alike.

    Args:
        width: D.
        n_streams: P.
        smoothing: eps; no stream ever counts for less than eps / P.
    """

    def __init__(self, width: int, n_streams: int, smoothing: float):
        super().__init__()
        self.smoothing = smoothing
        self.inner = nn.Linear(n_streams * width, width)
        self.outer = nn.Linear(width, n_streams)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    @property
    def flops(self) -> float:
        """What weighing and mixing cost per token."""
        return 2.0 * (self.inner.weight.numel() + 2 * self.outer.weight.numel())

    def forward(self, states_BPLD: Tensor) -> Tensor:
        """Return the weights (B, L, P) of the streams' states after the final norm."""
        interleaved = states_BPLD.permute(0, 2, 3, 1).flatten(2).to(self.inner.weight.dtype)
        weights_BLP = self.outer(silu(self.inner(interleaved))).softmax(-1)
        return (1 - self.smoothing) * weights_BLP + self.smoothing / weights_BLP.shape[-1]

    def measure(self, states_BPLD: Tensor, weights_BLP: Tensor, real_BL: Tensor) -> dict[str, Tensor]:
        """Return how even the weights are (1: all alike), and how alike the streams' states are, over real tokens."""
        weights, n = weights_BLP.detach()[real_BL], weights_BLP.shape[-1]
        entropy = -(weights * weights.log()).sum(-1).mean() / torch.tensor(float(n)).log()
        sums_BL = normalize(states_BPLD.detach().float(), dim=-1).sum(1).square().sum(-1)  # n and all pairs twice
        cosine = (sums_BL[real_BL].mean() - n) / (n * (n - 1))
        return {"stream_entropy": entropy, "stream_cosine": cosine}


@dataclass
class StreamCache(DepthCache):
    """A cache whose rows are P lines each, one for each stream; every slot begins with the prefixes.

    Attributes:
        n_streams: P.
        prefixes: None: slots begin empty.
        dtype: of keys and values.
    """

    n_streams: int = 1
    prefixes: Prefixes | None = None
    dtype: torch.dtype = torch.float32

    def keep_rows(self, rows: Tensor) -> DepthCache:
        """Return the cache of some rows."""
        return super().keep_rows(self.lines(rows))

    def joined(self, caches: Sequence[DepthCache], gaps: Sequence[int], order: Tensor) -> DepthCache:
        """Return caches, of which this is the first, as one."""
        return super().joined(caches, gaps, self.lines(order))

    def slot(self, key: Hashable, layers: range, like_BL: Tensor) -> Slot:
        """Return the slot ``key`` of some layers; ``like_BL`` has a row for each line."""
        if key not in self.slots and self.prefixes is not None:
            self.slots[key] = self.prefixes.slot(layers, like_BL, self.dtype)
        return super().slot(key, layers, like_BL)

    def lines(self, rows: Tensor) -> Tensor:
        """Return which lines rows are."""
        streams = torch.arange(self.n_streams, device=rows.device)
        return (rows[:, None] * self.n_streams + streams).flatten()

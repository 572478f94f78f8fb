"""What a stop score may look at after an iteration, and how positions are reduced to rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from innerloop.config.stopping import Agg

TINY = 1e-30


@dataclass
class StopInputs:
    """What a score may look at after an iteration.

    Attributes:
        state: h_t (B, N, D).
        previous: h_{t-1} (B, N, D).
        rescaled: h'_t, the output before the residual (B, N, D).
        logits: the read-out of u_t (B, N, V), for scores that look at words.
        mask_BN: 1 where a position of the states is real; None when all are.
        logits_mask: 1 where a position of the logits is real; None when all are.
        iteration: t, from 1.
        limit: T.
        features: what else is known of the rows (B,), by name; see `FEATURES`.
    """

    state: Tensor
    previous: Tensor
    rescaled: Tensor
    logits: Tensor | None = None
    mask_BN: Tensor | None = None
    logits_mask: Tensor | None = None
    iteration: int = 1
    limit: int = 1
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class RowInfo:
    """What a pass knows of its rows besides their states.

    Attributes:
        places_B: a number for each row that is its own whatever the batch, such as a token's position.
        written_B: how many tokens have been written before the one that the row writes.
        features: statistics of the last iteration (B,), by name; see `FEATURES`.
    """

    places_B: Tensor | None = None
    written_B: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)

    def keep_rows(self, rows: Tensor) -> RowInfo:
        """Return what is known of some rows."""
        places, written = (None if t is None else t[rows] for t in (self.places_B, self.written_B))
        return RowInfo(places, written, {name: value[rows] for name, value in self.features.items()})


def neglog(distance: Tensor) -> Tensor:
    """Turn a distance into a score that grows as it shrinks: -log10(d)."""
    return -torch.log10(distance.float().clamp(min=TINY))


def aggregate(distance_BN: Tensor, agg: Agg, mask_BN: Tensor | None = None) -> Tensor:
    """Reduce a distance per real position to one per row: the mean, the last position's, or the largest."""
    mask_BN = torch.ones_like(distance_BN) if mask_BN is None else mask_BN.to(distance_BN.dtype)
    if agg == "last":  # regions are padded on the right
        last_B = mask_BN.sum(1).long().clamp(min=1) - 1
        return distance_BN.gather(1, last_B[:, None])[:, 0]
    if agg == "max":
        return distance_BN.masked_fill(mask_BN == 0, 0.0).amax(1)
    return distance_BN.masked_fill(mask_BN == 0, 0.0).sum(1) / mask_BN.sum(1).clamp(min=1)


def masked_mean(states_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Return the mean over real positions (B, D)."""
    if mask_BN is None:
        return states_BND.mean(1)
    weights = mask_BN[..., None].to(states_BND.dtype)
    return (states_BND * weights).sum(1) / weights.sum(1).clamp(min=1)

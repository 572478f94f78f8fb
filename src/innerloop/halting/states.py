"""Scores of states: how far the last iteration moved them (halting.md, 3a)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from innerloop.config.stopping import Agg
from innerloop.halting.evidence import StopInputs, aggregate, neglog


def change(new: Tensor, now: StopInputs, agg: Agg) -> Tensor:
    """Return -log10 of ||h_t - h_{t-1}|| / ||h_t||; ``new`` is what counts as h_t."""
    moved = (new.float() - now.previous.float()).norm(dim=-1)
    return neglog(aggregate(moved / (new.float().norm(dim=-1) + 1e-8), agg, now.mask_BN))


def distance(now: StopInputs, agg: Agg) -> Tensor:
    """Return -log10 of ||h_t - h_{t-1}||."""
    return neglog(aggregate((now.state.float() - now.previous.float()).norm(dim=-1), agg, now.mask_BN))


def angle(now: StopInputs, agg: Agg) -> Tensor:
    """Return -log10 of 1 - cos(h_t, h_{t-1})."""
    return neglog(aggregate((1 - cosine(now)).clamp(min=0), agg, now.mask_BN))


def cosine(now: StopInputs) -> Tensor:
    """Return cos(h_t, h_{t-1}) at each position (B, N)."""
    return cosine_similarity(now.state.float(), now.previous.float(), dim=-1)


def acceleration(step_BND: Tensor, before_BND: Tensor, now: StopInputs, agg: Agg) -> Tensor:
    """Return -log10 of ||Delta_t - Delta_{t-1}|| / ||h_t||, Delta_t = h_t - h_{t-1} (arXiv 2509.23314)."""
    bend = (step_BND - before_BND).norm(dim=-1) / (now.state.float().norm(dim=-1) + 1e-8)
    return neglog(aggregate(bend, agg, now.mask_BN))

"""Oracles: the earliest iteration that would have done. They look ahead, or at the answer: for evaluation alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from innerloop.loop.trace import Trace


def first_agreeing(tops_TB: Tensor) -> Tensor:
    """Return the first t, from 1, whose likeliest token is that of the last iteration (B,)."""
    return 1 + (tops_TB == tops_TB[-1]).int().argmax(0)


def first_correct(tops_TB: Tensor, gold_B: Tensor) -> Tensor:
    """Return the first t, from 1, whose likeliest token is the right one (B,); T where none is."""
    hit_TB = tops_TB == gold_B
    return torch.where(hit_TB.any(0), 1 + hit_TB.int().argmax(0), len(tops_TB))


def oracle_agree(trace: Trace) -> list[int]:
    """Return for each row of a trace the first iteration whose positions all show what they show at the row's last."""
    return [_first(tops_TN, tops_TN[-1]) for tops_TN in _tops(trace)]


def oracle_correct(trace: Trace) -> list[int]:
    """Return for each row of a trace the first iteration that shows all tokens known; its last where none does."""
    if trace.gold is None:
        raise ValueError("the trace knows no right tokens")
    rows = []
    for tops_TN, gold_N in zip(_tops(trace), trace.gold[:, 1:]):
        known = gold_N >= 0
        rows.append(_first(tops_TN[:, known], gold_N[known]))
    return rows


def _first(tops_TN: Tensor, wanted_N: Tensor) -> int:
    hit_T = (tops_TN == wanted_N).all(1)
    return 1 + int(hit_T.int().argmax()) if bool(hit_T.any()) else len(tops_TN)


def _tops(trace: Trace) -> Sequence[Tensor]:
    """Return the likeliest tokens (T, N) of every row, as far as it went."""
    found: dict[int, list[Tensor]] = {}
    for entry in trace.iterations:
        if entry.top_ids is None:
            raise ValueError("the trace has no read-outs")
        for i, row in enumerate(entry.rows):
            found.setdefault(row, []).append(entry.top_ids[i, :, 0])
    return [torch.stack(found[row]) for row in sorted(found)]

"""Oracles: the earliest iteration that would have done. They look ahead, or at the answer: for evaluation alone."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.loop.trace import Trace


def first_showing(tops_TB: Tensor, wanted_B: Tensor) -> Tensor:
    """Return the first t, from 1, whose likeliest token is the wanted one (B,); T where none is."""
    hit_TB = tops_TB == wanted_B
    return torch.where(hit_TB.any(0), 1 + hit_TB.int().argmax(0), len(tops_TB))


def oracle_agree(trace: Trace) -> list[int]:
    """Return for each row of a trace the first iteration whose positions all show what they show at the row's last."""
    return [_first(tops_TN, tops_TN[-1]) for tops_TN in _tops(trace)]


def oracle_correct(trace: Trace) -> list[int]:
    """Return for each row of a trace the first iteration that shows all tokens known; its last where none does."""
    if trace.gold is None:
        raise ValueError("the trace knows no right tokens")
    rows = zip(_tops(trace), trace.gold[:, 1:])
    return [_first(tops_TN[:, gold_N >= 0], gold_N[gold_N >= 0]) for tops_TN, gold_N in rows]


def _first(tops_TN: Tensor, wanted_N: Tensor) -> int:
    return int(first_showing((tops_TN == wanted_N).all(1), torch.tensor(True)))


def _tops(trace: Trace) -> list[Tensor]:
    """Return the likeliest tokens (T, N) of every row, as far as it went."""
    found: dict[int, list[Tensor]] = {}
    for entry in trace.iterations:
        if entry.top_ids is None:
            raise ValueError("the trace has no read-outs")
        for row, ids_Nk in zip(entry.rows, entry.top_ids):
            found.setdefault(row, []).append(ids_Nk[:, 0])
    return [torch.stack(found[row]) for row in sorted(found)]

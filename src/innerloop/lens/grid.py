"""The map of a trace: cells with what is shown and how far it moved, lines of cells, and a loop's statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from innerloop.loop.trace import Iteration, TopTokens, Trace
from innerloop.terminal.views import visible

Spot = tuple[int, int]
"""A pass (0: the one that the answer sees) and a position, counted from the first that loops."""


@dataclass(frozen=True)
class Cell:
    """One position in one pass.

    Attributes:
        top: its likeliest tokens with their probabilities.
        change: how far its state moved, ||z_t - z_{t-1}|| / ||z_t||; None in the pass of the answer.
        gold: the token expected here; None where none is.
        rank: how many tokens are likelier than that.
        state: of a token of a canvas, what it is after the pass.
    """

    top: tuple[tuple[str, float], ...]
    change: float | None = None
    gold: str | None = None
    rank: int | None = None
    state: Literal["hidden", "committed", "kept", "masked again"] | None = None


@dataclass(frozen=True)
class Column:
    """A position.

    Attributes:
        name: the latent's number, or the token.
        kind: what it is.
        depth: the token's number of iterations inside the model.
        group: the block that it belongs to, where there are blocks.
    """

    name: str
    kind: Literal["latent", "text", "before", "asked", "written", "place"]
    depth: int | None = None
    group: int | None = None


@dataclass(frozen=True)
class Line:
    """One pass over all columns; ``loop`` is its number, None where the columns are of different passes."""

    name: str
    loop: int | None
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Loop:
    """The statistics of an iteration, over all its positions (see `Iteration`).

    ``series`` says which passes these are of, where there is more than one.
    """

    loop: int
    change: float
    cosine: float
    rms: float
    score: float | None = None
    series: str = ""


def words_of(tokenizer: PreTrainedTokenizerBase, ids_k: Tensor, probs_k: Tensor) -> tuple[tuple[str, float], ...]:
    """Return tokens, as they can be seen, with their probabilities."""
    return tuple((visible(tokenizer, token), prob) for token, prob in zip(ids_k.tolist(), probs_k.tolist()))


def cells_of(
    tokenizer: PreTrainedTokenizerBase,
    entry: Iteration | TopTokens,
    gold: Mapping[Spot, tuple[str, int]] | None = None,
    loop: int = 0,
    first: int = 0,
) -> tuple[Cell, ...]:
    """Return the cells of one pass in the trace of one row; its first position is ``first``."""
    assert entry.top_ids is not None and entry.top_probs is not None
    changes = entry.changes[0].tolist() if isinstance(entry, Iteration) and entry.changes is not None else None
    cells = []
    for at, (ids_k, probs_k) in enumerate(zip(entry.top_ids[0], entry.top_probs[0])):
        token, rank = (gold or {}).get((loop, first + at), (None, None))
        change = None if changes is None else changes[at]
        cells.append(Cell(words_of(tokenizer, ids_k, probs_k), change, token, rank))
    return tuple(cells)


def loop_of(entry: Iteration, series: str = "") -> Loop:
    """Return the statistics of an iteration of one row; a score that is not finite says nothing yet."""
    score = None if entry.score is None else entry.score[0].item()
    known = score if score is not None and math.isfinite(score) else None
    return Loop(entry.loop, entry.delta[0].item(), entry.cosine[0].item(), entry.rms[0].item(), known, series)


def loops_of(trace: Trace, series: str = "") -> tuple[Loop, ...]:
    """Return the statistics of the iterations of one row."""
    return tuple(loop_of(entry, series) for entry in trace.iterations)

"""`Commit`: what one pass over a canvas has changed, kept so that the pass can be made again.

Shapes: `G` tokens of the canvas, `A` of them that a pass could fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Commit:
    """What a pass has changed.

    Attributes:
        asked: the places (A,) that it predicted.
        places: those that were written, in the order of their choice.
        tokens: what was written there.
        again: places that were masked again after it.
        bounds: the first place of the active block, and the one behind its last.
        log_prob: of the choice of places and tokens, where a policy that is learned makes it; otherwise 0.
        seen: what the policy saw of each place that was asked for, where that is all it saw.
        is_fallback: whether a policy chose nothing, and one place was filled all the same.
    """

    asked: tuple[int, ...]
    places: tuple[int, ...]
    tokens: tuple[int, ...]
    again: tuple[int, ...] = ()
    bounds: tuple[int, int] = (0, 0)
    log_prob: float = 0.0
    seen: tuple[float, ...] = ()
    is_fallback: bool = False


def commit_between(
    before_G: Ints, after_G: Ints, asked: Ints, order_A: Ints, mask_id: int, bounds: tuple[int, int]
) -> Commit:
    """Return what has changed in a pass; ``order_A`` are the places asked for in the order of their scores."""
    changed = before_G != after_G
    written = changed & (after_G != mask_id)
    places = [*order_A[written[order_A]]]
    again = np.flatnonzero(changed & (after_G == mask_id))
    return Commit(ints(asked), ints(places), ints(after_G[places]), ints(again), bounds)


def canvases_of(commits: Sequence[Commit], gen_length: int, mask_id: int) -> Iterator[Ints]:
    """Yield what a canvas held before each pass (G,), and at last what it held in the end."""
    tokens_G: Ints = np.full(gen_length, mask_id, dtype=np.int64)
    for one in commits:
        yield tokens_G.copy()
        tokens_G[list(one.places)] = one.tokens
        tokens_G[list(one.again)] = mask_id
    yield tokens_G


def ints(values: Sequence[int] | Ints) -> tuple[int, ...]:
    """Return numbers as plain ones."""
    return tuple(int(value) for value in values)

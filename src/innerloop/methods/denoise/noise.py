"""What is hidden of a row while training, and what each hidden token counts (llada.md, sections 2 to 4; dream.md, 3).

t ~ U(0, 1) for each row, spread evenly over a batch; a token that may be hidden is hidden with p = (1 - least) t +
least. Draws depend on the batch's seed and the row's place alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from innerloop.methods.denoise.settings import NoiseSettings
from innerloop.text.row import IGNORE, Noise, Row

if TYPE_CHECKING:  # slow to import
    import numpy as np


def times(n: int, seed: str) -> list[float]:
    """Return t of each of ``n`` rows: (u + b / n) mod 1, u drawn for the batch."""
    u = random.Random(f"time/{seed}").random()
    return [(u + b / n) % 1 for b in range(n)]


def of_step(seed: str) -> str:
    """Return the part of a seed that all micro-batches and processes of a training step share.

    The trainer's seeds are RUN/STEP/PROCESS/MICRO-BATCH.
    """
    return "/".join(seed.split("/")[:2])


def coin(what: str, seed: str) -> float:
    """Return a number in [0, 1) that is drawn for something from a seed."""
    return random.Random(f"{what}/{seed}").random()


def ahead(anneal_steps: int, seed: str) -> tuple[float, str] | None:
    """Return the chance that a later position is seen in a training step, and the seed of its draw; None: all are."""
    step = of_step(seed).partition("/")[2]
    if not anneal_steps or not step.isdigit() or int(step) + 1 >= anneal_steps:
        return None
    return (int(step) + 1) / anneal_steps, of_step(seed)


def fillers(n: int, n_words: int, mask_id: int, seed: str) -> tuple[int, ...]:
    """Return ``n`` tokens drawn evenly from all but the mask."""
    rng = random.Random(f"filler/{seed}")
    return tuple(i + (i >= mask_id) for i in (rng.randrange(n_words - 1) for _ in range(n)))


def cut(row: Row, n: int) -> Row:
    """Return the first ``n`` tokens of a row of running text."""
    parts = []
    for part in (row.prefix, row.region, row.suffix):
        kept = []
        for span in part:
            kept.append(replace(span, ids=span.ids[: max(n, 0)]))
            n -= len(span.ids)
        parts.append([span for span in kept if span.ids])
    return replace(row, prefix=parts[0], region=parts[1], suffix=parts[2])


def hide(
    row: Row,
    t: float | Mapping[int, float],
    settings: NoiseSettings,
    mask_id: int,
    shift: bool,
    seed: str,
    blocks: Sequence[int] = (),
) -> Row:
    """Return a row of which tokens are hidden: each supervised one with the probability of time ``t``.

    Where each position is of one of some ``blocks``, ``t`` may be of each of them; what a token counts is that of its
    block's time, and of the clean tokens that it sees.
    """
    may = by_block(row, blocks)
    rng, hidden, weights = random.Random(f"hide/{seed}"), list[int](), list[float]()
    n = sum(map(len, may.values()))
    scale = 1 / max(n, 1) if settings.norm == "sequence" else 1.0
    for block, places in may.items():
        time = t[block] if isinstance(t, Mapping) else t
        p = (1 - settings.least) * time + settings.least
        own = [k for k in places if rng.random() < p]
        end = places[-1] + 1 if blocks else len(row)
        hidden += own
        weights += [scale * weight for weight in weights_of(own, end, time, p, settings)]
    n_counted = {"sequence": 1, "token": n, "batch": 1, "masked": len(hidden)}[settings.norm]
    return replace(row, noise=Noise(tuple(hidden), tuple(weights), mask_id, shift, n_counted, tuple(blocks)))


def by_block(row: Row, blocks: Sequence[int] = ()) -> dict[int, list[int]]:
    """Return the positions of a row that may be hidden, block by block; all are of one where there are none."""
    found: dict[int, list[int]] = {} if blocks else {0: []}
    for k, label in enumerate(row.labels()):
        if label != IGNORE:
            found.setdefault(blocks[k] if blocks else 0, []).append(k)
    return found


def weights_of(hidden: Sequence[int], length: int, t: float, p: float, settings: NoiseSettings) -> list[float]:
    """Return what each hidden token of a row counts, before normalising."""
    match settings.weight:
        case "1/t":
            return [1 / max(p, 1e-12)] * len(hidden)
        case "linear":
            return [1 - t] * len(hidden)
        case "uniform":
            return [1.0] * len(hidden)
    import numpy as np

    clean = np.ones(length)
    clean[list(hidden)] = 0.0
    return (_nearness(length, settings.cart_q) @ clean)[list(hidden)].tolist()


@cache
def _nearness(length: int, q: float) -> np.ndarray:
    """Return how much a clean token counts for another (L, L): q (1 - q)^(|n - i| - 1) / 2, 0 for itself."""
    import numpy as np

    apart = np.abs(np.arange(length)[:, None] - np.arange(length))
    near = 0.5 * q * (1.0 - q) ** np.maximum(apart - 1, 0)
    np.fill_diagonal(near, 0.0)
    return near

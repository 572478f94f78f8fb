"""How many iterations a training batch has: always the same number, or one drawn around it (arXiv 2502.05171)."""

import math
import random

from innerloop.config.curriculum import shared_seed
from innerloop.config.loop import LoopSampling


def draw_loops(kind: LoopSampling, n_loops: int, seed: str) -> int:
    """Draw a number of iterations: T, U{1..T}, or Poisson(e^n) + 1 with n ~ N(ln T - 1/8, 1/4); T is ``n_loops``.

    ``seed`` is a batch's, ``SEED/STEP/PROCESS/BATCH``; all processes draw alike, so that none waits for a longer loop.
    """
    if kind == "fixed":
        return n_loops
    rng = random.Random(f"loops/{shared_seed(seed)}")
    if kind == "uniform":
        return rng.randint(1, max(n_loops, 1))
    return 1 + _poisson(math.exp(rng.gauss(math.log(n_loops) - 0.125, 0.5)), rng)


def _poisson(rate: float, rng: random.Random) -> int:
    """Draw from a Poisson distribution (Knuth's product of uniforms)."""
    bound, product, n = math.exp(-rate), rng.random(), 0
    while product > bound:
        product *= rng.random()
        n += 1
    return n

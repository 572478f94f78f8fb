"""How likely an answer is to a denoising method: a bound by Monte Carlo (llada.md, section 4).

    - log p(answer | question) <= E[ L / l sum over l hidden tokens of CE ],  l uniform in 1..L

Where a canvas falls into blocks that see those before alone, each has a number of its own, and the bounds add up.

The numbers of hidden tokens are spread over 1..L, each exactly as often as any other; which tokens they are is drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import refuse
from innerloop.measure.statistics import Z95
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.noise import by_block
from innerloop.text.examples import Example
from innerloop.text.row import Noise, Row

Rounding = Literal["uniform", "authors"]


@dataclass(frozen=True)
class Bound:
    """What draws of a bound gave, in nats for all tokens of an answer.

    ``error`` is the standard error of the mean as if draws were independent; their numbers of hidden tokens are spread
    evenly, so it is rather too large. It is NaN for a single draw.
    """

    draws: tuple[float, ...]
    n_tokens: int

    @property
    def nll(self) -> float:
        """The mean."""
        return sum(self.draws) / len(self.draws)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        n = len(self.draws)
        if n == 1:
            return math.nan
        return math.sqrt(sum((draw - self.nll) ** 2 for draw in self.draws) / (n - 1) / n)


def summary(found: Sequence[Bound]) -> dict[str, Any]:
    """Return what result.json says of the bounds of answers: nats an answer, and their spread.

    ``mc_error`` is the standard error of the mean that comes of the draws alone; ``ci95`` is of the answers too.
    """
    n, each = len(found), [bound.nll for bound in found]
    mean = sum(each) / n
    spread = math.sqrt(sum((nll - mean) ** 2 for nll in each) / max(n - 1, 1) / n)
    error = math.sqrt(sum(bound.error**2 for bound in found)) / n
    return {
        "nll": mean,
        "nll_per_token": sum(each) / sum(bound.n_tokens for bound in found),
        "mc_error": None if math.isnan(error) else error,
        "ci95": [mean - Z95 * spread, mean + Z95 * spread] if n > 1 else None,
        "draws": len(found[0].draws),
        "n": n,
    }


def hidden_counts(n_tokens: int, n_draws: int, first: int, rounding: Rounding = "uniform") -> list[int]:
    """Return how many tokens each draw hides, from ``first`` on; ``authors`` rounds halves to even, and is biased."""
    if rounding == "authors":
        return [(round(first + i * n_tokens / n_draws) - 1) % n_tokens + 1 for i in range(n_draws)]
    return [1 + (first - 1 + i * n_tokens // n_draws) % n_tokens for i in range(n_draws)]


def bounds(
    model: LatentModel,
    examples: Sequence[Example],
    n_draws: int = 128,
    seed: int = 0,
    batch_size: int = 64,
    rounding: Rounding = "uniform",
    progress: Callable[[int], None] = lambda n: None,
) -> list[Bound]:
    """Return the bound of each example's answer, ends of sequence that fill it up among its tokens.

    Args:
        model: a model that denoises.
        examples: questions with answers.
        n_draws: draws of each; one is exact for an answer of one token.
        seed: of the draws, which depend on it and the example's place alone.
        batch_size: draws in one pass.
        rounding: ``authors`` gives the numbers that LLaDA's published code gives.
        progress: called with the number of examples whose draws have been read since the last call.

    Raises:
        InputError: the method does not denoise, or n_draws or batch_size is below 1.
    """
    rows = check_bound(model, examples)
    at_once, found = max(batch_size // max(n_draws, 1), 1), list[Bound]()
    for first in range(0, len(rows), at_once):
        part = rows[first : first + at_once]
        found += row_bounds(model, part, n_draws, seed, batch_size, rounding, first)
        progress(len(part))
    return found


def check_bound(model: LatentModel, examples: Sequence[Example]) -> list[Row]:
    """Return examples laid out; refuse a model whose likelihood is exact, and answers longer than its canvas."""
    method = model.method
    refuse((not isinstance(method, DenoisingMethod), f"'{method.name}' does not denoise, so its likelihood is exact"))
    assert isinstance(method, DenoisingMethod)
    return [method.fitting(example, model.encoder) for example in examples]


def row_bounds(
    model: LatentModel,
    rows: Sequence[Row],
    n_draws: int = 128,
    seed: int = 0,
    batch_size: int = 64,
    rounding: Rounding = "uniform",
    first: int = 0,
) -> list[Bound]:
    """Return the bound of what is supervised in each laid-out row, the first of which is number ``first``."""
    method = model.method
    assert isinstance(method, DenoisingMethod)
    refuse(
        (n_draws < 1, f"n_draws is {n_draws}, but must be at least 1"),
        (batch_size < 1, f"batch_size is {batch_size}, but must be at least 1"),
    )
    mask_id, drawn, n_tokens = method.mask_id(model.encoder), list[Row](), list[int]()
    for i, row in enumerate(rows):
        own_seed, blocks = f"bound/{seed}/{first + i}", method.blocks(row)
        rng, may = random.Random(own_seed), list(by_block(row, blocks).values())
        counts = [hidden_counts(len(own), n_draws, rng.randint(1, len(own)), rounding) for own in may]
        for draw in range(n_draws):
            hidden = [tuple(sorted(rng.sample(own, n[draw]))) for own, n in zip(may, counts)]
            weights = [(len(own) / len(chosen),) * len(chosen) for own, chosen in zip(may, hidden)]
            noise = Noise(sum(hidden, ()), sum(weights, ()), mask_id, method.shift, 1, blocks)
            drawn.append(method.shown(replace(row, noise=noise), model.encoder, f"{own_seed}/{draw}"))
        n_tokens.append(sum(map(len, may)))
    found: list[float] = []
    for start in range(0, len(drawn), batch_size):
        part = drawn[start : start + batch_size]
        for row, logits_UV in zip(part, model.row_logits(part)):
            assert row.noise is not None
            ids = row.ids()
            wanted = torch.tensor([ids[k] for k in row.noise.hidden], device=logits_UV.device)
            losses_U = cross_entropy(logits_UV.double(), wanted, reduction="none")
            found.append((losses_U * losses_U.new_tensor(row.noise.weights)).sum().item())
    return [Bound(tuple(found[i * n_draws : (i + 1) * n_draws]), n) for i, n in enumerate(n_tokens)]

"""How well running text is predicted: the negative log-likelihood of what it goes on with, token by token.

A method that denoises gives a bound by Monte Carlo (`bound.py`), which is not below the true value.

    nll = - 1/U sum_u log p(x_u | the text before it, and the thought)           perplexity = exp(nll)

The thought is that of answering. Only what comes after it counts, so the same tokens are compared whatever the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError, refuse
from innerloop.measure.accuracy import told_of
from innerloop.measure.bound import row_bounds
from innerloop.measure.statistics import Z95
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.tasks import Task
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import Kind, Row

DRAWS = 16  # of each chunk, where its likelihood is a bound
MOST_NLL = 700.0  # exp of more is no float


@dataclass(frozen=True)
class Likelihood:
    """What was found: for each chunk, the summed loss of what it goes on with and its number of tokens.

    ``n_unknown`` of the tokens stand for words that the tokenizer does not know; ``n_left_out`` chunks were longer than
    the model reads.
    """

    losses: tuple[float, ...]
    n_tokens: tuple[int, ...]
    n_unknown: int = 0
    n_left_out: int = 0

    @property
    def nll(self) -> float:
        """The mean over all tokens, in nats."""
        return sum(self.losses) / sum(self.n_tokens)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean, from how chunks differ; those of one text are taken as independent."""
        n, nll = len(self.losses), self.nll
        squares = sum((loss - nll * count) ** 2 for loss, count in zip(self.losses, self.n_tokens))
        half = Z95 * math.sqrt(squares * n / max(n - 1, 1)) / sum(self.n_tokens)
        return nll - half, nll + half


def likelihood(
    model: LatentModel,
    examples: Sequence[Example],
    batch_size: int = 64,
    loops: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Likelihood:
    """Read chunks of text and return how likely what they go on with is.

    Args:
        model: the model.
        examples: chunks, as task ``text`` makes them.
        batch_size: rows per batch.
        loops: another number of loops than the model was trained with.
        progress: called with the number of chunks read since the last call.

    Raises:
        InputError: there is no chunk, every one is longer than the model reads, batch_size is below 1, or the loss is
            no number or above 700 nats a token.
    """
    refuse(
        (batch_size < 1, f"batch_size is {batch_size}, but must be at least 1"),
        (not examples, "there is no chunk of text to read"),
    )
    method = model.method if loops is None else model.method.with_loops(loops)
    encoder = PromptEncoder(model.tokenizer, running_text=True)
    losses: list[float] = []
    counts: list[int] = []
    n_unknown, n_left_out, unknown = 0, 0, model.tokenizer.unk_token_id
    limit = model.backbone.context_length or math.inf
    for start in range(0, len(examples), batch_size):
        chosen, denoises = examples[start : start + batch_size], isinstance(method, DenoisingMethod)
        found = [
            _continued(row)
            for row in ([method.lay_out(e, encoder, 0) for e in chosen] if denoises else method.rows(chosen, encoder))
        ]
        rows = [row for row in found if method.n_positions(row) <= limit]
        n_left_out += len(found) - len(rows)
        for row, loss in zip(rows, _losses_of(model, rows, start, batch_size)):
            targets = [i for span in row.spans if span.supervised for i in span.ids]
            losses.append(loss)
            counts.append(len(targets))
            n_unknown += 0 if unknown is None else targets.count(unknown)
        progress(len(found))
    if not losses:
        raise InputError(f"every chunk has more than the {limit} positions that the model reads: lower task.n_words")
    measured = Likelihood(tuple(losses), tuple(counts), n_unknown, n_left_out)
    if not measured.nll < MOST_NLL:  # NaN is not below it either
        raise InputError(
            f"the text's loss is {measured.nll:.4g} nats a token, so the weights are no use, as after a training that "
            "diverged: train again with a lower train.learning_rate"
        )
    return measured


def _losses_of(model: LatentModel, rows: Sequence[Row], first: int, batch_size: int) -> list[float]:
    """Return the summed loss of what each row goes on with; the first of them is number ``first``."""
    if not rows:
        return []
    if isinstance(model.method, DenoisingMethod):
        return [bound.nll for bound in row_bounds(model, rows, DRAWS, 0, batch_size, first=first)]
    found = []
    for row, logits_UV in zip(rows, model.row_logits(rows)):
        wanted = torch.tensor([i for span in row.spans if span.supervised for i in span.ids], device=logits_UV.device)
        found.append(cross_entropy(logits_UV.double(), wanted, reduction="sum").item())
    return found


def _continued(row: Row) -> Row:
    """Return a row of which only what it goes on with counts."""
    prefix, region = (
        [replace(span, supervised=False) if span.kind is Kind.QUESTION else span for span in part]
        for part in (row.prefix, row.region)
    )
    return replace(row, prefix=prefix, region=region)


def text_result(
    model: LatentModel, task: Task, split: str, found: Likelihood, seed: int | None, name: str
) -> dict[str, Any]:
    """Return result.json of running text: how well it is predicted, and what predicted it."""
    numbers = {
        "n": len(found.losses),
        "n_tokens": sum(found.n_tokens),
        "n_unknown": found.n_unknown,
        "n_left_out": found.n_left_out,
        "nll": found.nll,
        "ci95": list(found.interval),
        "perplexity": math.exp(found.nll),
    }
    return told_of(model, task, split, numbers, seed, name)

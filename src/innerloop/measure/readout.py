"""Do latents show their steps? The gold tokens' rank, probability and loss in what each latent shows (lotus.md, 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.model.losses import site_logits
from innerloop.text.examples import Example
from innerloop.text.tokenizer import token_names


@dataclass(frozen=True)
class Shown:
    """What one latent shows where a token of a step is expected.

    Attributes:
        example: index of the example.
        loop: the pass; 0 for the one that the answer sees.
        position: of the latent, counted from the first of the region; -1 is the position before it.
        gold: the token expected.
        rank: how many tokens are likelier; 0 if it is the likeliest.
        nll: minus its log-probability, in nats.
        alternatives: the likeliest tokens, with their probabilities.
    """

    example: int
    loop: int
    position: int
    gold: str
    rank: int
    nll: float
    alternatives: tuple[tuple[str, float], ...]


@torch.no_grad()
def shown_steps(
    model: LatentModel, examples: Sequence[Example], top_k: int = 5, batch_size: int = 32
) -> list[list[Shown]]:
    """Return for each example what its latents show where the method's layout expects the gold steps.

    The method must supervise read-outs (``step_weight`` above 0), so that it says which latent shows what.
    """
    if model.method.step_weight == 0:
        raise InputError(f"'{model.method.name}' expects no steps of its latents here: set step_weight above 0")
    was_training = model.training
    model.eval()
    found: list[list[Shown]] = [[] for _ in examples]
    for begin in range(0, len(examples), batch_size):
        rows = model.rows(examples[begin : begin + batch_size])
        batch = model.batch(rows)
        thought = model.think(batch)
        model.written_logits(batch, thought)
        for sites in batch.token_targets:
            log_p = site_logits(model.loss_inputs(batch, thought), sites).float().log_softmax(-1)
            own = log_p.gather(1, sites.targets_F[:, None])
            ranks = (log_p > own).sum(1).tolist()
            top = log_p.topk(min(top_k, log_p.shape[1]), dim=-1)
            decode = partial(token_names, model.tokenizer)
            columns = zip(
                sites.rows_F.tolist(),
                (sites.columns_F - batch.bounds[0]).tolist(),
                decode(sites.targets_F.tolist()),
                ranks,
                (-own[:, 0]).tolist(),
                top.indices.tolist(),
                top.values.exp().tolist(),
            )
            for row, position, gold, rank, nll, ids, probs in columns:
                alternatives = tuple(zip(decode(ids), probs, strict=True))
                found[begin + row].append(Shown(begin + row, sites.iteration, position, gold, rank, nll, alternatives))
    model.train(was_training)
    return found


def summary(shown: Sequence[Sequence[Shown]]) -> dict[str, float]:
    """Return the mean loss, and the shares of gold tokens that are the likeliest and among the five likeliest."""
    entries = [entry for row in shown for entry in row]
    n = max(len(entries), 1)
    return {
        "n": len(entries),
        "nll": sum(entry.nll for entry in entries) / n,
        "top1": sum(entry.rank == 0 for entry in entries) / n,
        "top5": sum(entry.rank < 5 for entry in entries) / n,
    }

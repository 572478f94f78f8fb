"""What prompts that are read together begin with alike - a system text, worked examples - is read once, by one row.

    n = n_shared(model, rows)                     # 0: nothing is shared, or it would not pay
    batch, context = begin(model, rows, n, meter, slots)

The others go on from a copy of what that row has read, so a causal decoder gives them the states that it would give
each alone. It pays with one pass more, so it must spare enough positions.

What is shared is billed to the row that reads it, as where whole questions are the same; its time is that of all.
Nothing is shared where the prompt is not read once and for all, position by position:

* depth methods, whose passes look at which tokens there are: routers choose among the columns of a prompt, deciders
  and exits ask for its last token;
* ``prefix_kv=per_iter``, which reads the prompt again in every iteration;
* decoders of their own, which attend to the states of the whole prompt;
* while a measurement edits what latents are fed, which knows examples by their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from innerloop.decoder.cost import CostMeter
from innerloop.model.model import LatentCore
from innerloop.passes.context import Context
from innerloop.text.batch import Batch
from innerloop.text.row import Kind, Row, Span

SPARED_FROM = 256
"""Positions that sharing must spare for the pass that it costs. On one thread of a CPU it pays from about 50 on
(benchmarks/shared_prefix.py); the wider a machine, the more positions take the time of one."""


def n_shared(model: LatentCore, rows: Sequence[Row]) -> int:
    """Return how many tokens of their prefixes rows are to share; each keeps one of its own, to go on from."""
    method = model.method
    reads_once = method.plan.prefix_kv == "base" and method.decoder.kind == "lm_head"
    if len(rows) < 2 or model.depth is not None or model.loop.hooks or not reads_once:
        return 0
    prefixes = [[i for span in row.prefix for i in span.ids] for row in rows]
    first, least = prefixes[0], min(map(len, prefixes)) - 1
    n = 0
    while n < least and all(prefix[n] == first[n] for prefix in prefixes):
        n += 1
    return n if n * (len(rows) - 1) >= SPARED_FROM else 0


def begin(model: LatentCore, rows: Sequence[Row], n: int, meter: CostMeter, slots: Tensor) -> tuple[Batch, Context]:
    """Return the batch of what rows have each to themselves, and the context in which it is to be read.

    Args:
        model: what reads.
        rows: prompts, the first ``n`` tokens of which are the same.
        n: 0 shares nothing.
        meter: counts what is read.
        slots: the rows of the meter that they are.
    """
    batch = model.batch([_without(row, n) for row in rows])
    context = model.new_context(batch, meter)
    if n > 0:
        shared = model.batch([_first(rows[0], n)])
        one = model.new_context(shared, meter)
        one.rows = slots[:1]
        with one.phase("prefill"):
            one.read(model.backbone.embed(shared.ids_BS))
        context = one.keep_rows(torch.zeros(len(rows), dtype=torch.long, device=model.device))
    context.rows = slots
    return batch, context


def _first(row: Row, n: int) -> Row:
    """Return the first tokens of a row as one."""
    return Row([Span(tuple(row.ids()[:n]), Kind.QUESTION)])


def _without(row: Row, n: int) -> Row:
    """Return a row without the first tokens of its prefix."""
    kept = []
    for span in row.prefix:
        kept.append(replace(span, ids=span.ids[n:]))
        n = max(n - len(span.ids), 0)
    return replace(row, prefix=kept)

"""What was written for a question, what it cost, and what a trace shows of its latents: `Generation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from innerloop.decoder.cost import Cost, CostMeter
from innerloop.engine.requests import Alternatives, Request
from innerloop.loop.trace import ShownStep, Trace
from innerloop.methods.denoise.commits import Commit
from innerloop.model.model import LatentCore
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from innerloop.text.row import IGNORE, Row, ShownBlock
from innerloop.text.tokenizer import token_names


@dataclass
class Generation:
    """What was written for one question.

    Attributes:
        text: all written text, without the end-of-sequence token.
        answer: the text after the last ``###``, or None.
        cost: what it cost.
        trace: the loop's record of the batch row (statistics (1,), read-outs (1, N, k)), where asked for; that of each
            block which the row opened while it answered is in ``trace.opened``.
        ended: whether the end-of-sequence token was reached.
        blocks: the steps that blocks of latents show, where asked for and the method has such blocks.
        depths: each token of the question, and each written one that was read, with the number of its iterations
            inside the model; empty for methods without.
        ids: the tokens written, the ends of sequence among them.
        log_likelihood: the sum of their log-probabilities ``log_probs``, where asked for; see `DecodeBatch.choose`.
        fed: the latents (n, D) that were fed beside its first n tokens, where it is replayable and they are fed more.
        alternatives: the likeliest tokens in place of each, where asked for, with their log-probabilities.
        commits: what each pass over its canvas has changed, where it is replayable and a method denoises.
        change: the mean relative change of the latents in their last iterations, where several starts were asked for.
        error: why nothing was written, where the question could not be answered.
    """

    text: str
    answer: str | None
    cost: Cost
    trace: Trace | None = None
    ended: bool = True
    blocks: tuple[ShownStep, ...] = ()
    depths: tuple[tuple[str, int], ...] = ()
    ids: list[int] = field(default_factory=list)
    log_likelihood: float | None = None
    log_probs: list[float] = field(default_factory=list)
    fed: Tensor | None = None
    alternatives: list[Alternatives] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    change: float | None = None
    error: str | None = None


def finish(model: LatentCore, requests: Sequence[Request], meter: CostMeter) -> list[Generation]:
    """Turn what requests have written into generations; split the time of writing into thought and answer."""
    depths = meter.token_depths()
    results = []
    for request, cost in zip(requests, meter.costs(model.backbone, [request.slot for request in requests])):
        ids, n_ends = request.written, model.method.n_ends
        ended = request.n_ends >= n_ends
        text = model.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        n_steps, n_marked = n_step_tokens(model, ids, text)
        if n_ends > 1:  # what separates the chain of thought from the answer is no part of it
            n_steps -= ids[:n_steps].count(model.encoder.eos_id)
        n_latents = request.billed * model.n_thought_positions(request.row, request.n_loops) + request.n_latents
        cost.thought_tokens = n_latents + n_steps
        cost.loops, cost.streams, cost.written = request.n_loops, model.method.streams, len(ids)
        cost.seconds["thought"] += sum(request.ticks[:n_marked])
        cost.seconds["answer"] += sum(request.ticks[n_marked:])
        marker = model.encoder.wording.mark
        answer = text.rsplit(marker, 1)[1].strip() if marker in text else None
        own = depths[request.slot][: len(request.row) + len(ids) - 1]  # a row that has ended may ride along for a while
        tokens = token_names(model.tokenizer, [*request.row.ids(), *ids]) if own else []
        one = Generation(text, answer, cost, ended=ended, depths=tuple(zip(tokens, own)), ids=list(ids))
        one.log_likelihood, one.log_probs, one.change = request.log_likelihood, request.log_probs, request.change
        one.fed = torch.stack(request.fed[: len(ids) - 1]) if request.fed[: len(ids) - 1] else None
        one.alternatives = request.alternatives
        results.append(traced(model, request, one))
    return results


def traced(model: LatentCore, request: Request, generation: Generation) -> Generation:
    """Put the trace of its row into a generation, where there is one."""
    if request.record is not None:
        record, row = request.record
        trace = generation.trace = record.row(row)
        trace.opened, trace.frames = [opened.row(at) for opened, at in request.opened], record.frames
        generation.blocks = tuple(trace.shown(block, model.tokenizer) for block in request.blocks)
    return generation


def n_step_tokens(model: LatentCore, ids: list[int], text: str) -> tuple[int, int]:
    """Return how many tokens were written before the answer's marker and up to its end; all, if it never came."""
    marker = model.encoder.wording.mark
    if marker not in text:
        return len(ids), len(ids)
    low, high = 0, len(ids)
    while low < high:  # the shortest beginning that spells the marker
        middle = (low + high) // 2
        if marker in model.tokenizer.decode(ids[: middle + 1], skip_special_tokens=True):
            high = middle
        else:
            low = middle + 1
    return max(low + 1 - len(model.tokenizer.encode(marker, add_special_tokens=False)), 0), low + 1


def failed(model: LatentCore, reason: str) -> Generation:
    """Return what stands for a question that could not be answered."""
    return Generation("", None, CostMeter(1, torch.device("cpu")).costs(model.backbone)[0], ended=False, error=reason)


def read_last(model: LatentCore, record: Trace, batch: Batch, thought: Thought, states: Tensor) -> None:
    """Record what the latents show in the pass that the answer sees, if that pass has read them."""
    first, end = batch.bounds
    n_latents = end - first
    if n_latents == 0 or thought.first_column > first:
        return
    start = first - thought.first_column
    latents = states[:, max(start - 1, 0) : start + n_latents]
    if start == 0 and thought.prompt is not None:
        before = thought.prompt[0][:, -1:]
        latents = torch.cat([model.head_input(before), latents], dim=1)
    record.last = record.read(model.backbone.head(latents), record.gold)


def gold_of(blocks: Sequence[Sequence[ShownBlock]], rows: Sequence[Row], device: torch.device) -> Tensor:
    """Return what the position before the latents and the latents should show (B, 1 + N), IGNORE where unknown."""
    n = max(sum(len(span.ids) for span in row.region) for row in rows)
    gold = torch.full((len(rows), 1 + n), IGNORE)
    for r, found in enumerate(blocks):
        for block in found:
            start = 1 + block.first
            gold[r, start : start + len(block.gold)] = torch.tensor(block.gold, dtype=torch.long)
    return gold.to(device)

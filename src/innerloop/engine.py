"""Batched generation with a KV cache through prefill, thought and answer.

gens = generate(model, ["3 ; + 4 ; * 2"], max_new_tokens=8)
gens[0].text, gens[0].answer, gens[0].cost
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from innerloop.context import Context
from innerloop.cost import Cost, Meter
from innerloop.errors import InputError
from innerloop.layout import ANSWER_PREFIX, Row
from innerloop.thought import think
from innerloop.trace import Trace

if TYPE_CHECKING:
    from innerloop.model import LatentModel

CHECK_EVERY = 8  # tokens between two looks at which rows have ended; a look waits for the device


@dataclass
class Generation:
    """What was written for one question.

    Attributes:
        text: all written text, without the end-of-sequence token.
        answer: the text after the last ``###``, or None.
        cost: what it cost.
        trace: the loop's record of the batch row (statistics (1,), read-outs (1, N, k)), where asked for.
        ended: whether the end-of-sequence token was reached.
    """

    text: str
    answer: str | None
    cost: Cost
    trace: Trace | None = None
    ended: bool = True


@torch.no_grad()
def generate(
    model: LatentModel,
    questions: Sequence[str],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    trace: bool = False,
    stage: int | None = None,
    loops: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Answer questions, in the order given.

    Args:
        model: the model; it is put into evaluation mode for the time being.
        questions: the questions.
        max_new_tokens: the most tokens to write per question.
        batch_size: how many rows run together; rows of like length share a batch.
        temperature: 0 writes the likeliest token, above it tokens are drawn.
        seed: of the draws.
        trace: record what the loop did, with read-outs.
        stage: the curriculum's stage whose layout is used; None: the last.
        loops: another number of loops than the model was trained with.
        progress: called with the number of questions answered since the last call.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
        raise InputError("generation needs temperature >= 0, max_new_tokens >= 1 and batch_size >= 1")
    rows = model.prompts(questions, stage, loops)
    for question, row in zip(questions, rows):
        check_length(model, question, row)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    generator = torch.Generator(device=model.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    results: list[Generation | None] = [None] * len(rows)
    room = model.backbone.context_length
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [rows[i] for i in chosen]
            budgets = [max_new_tokens if room is None else min(max_new_tokens, room - len(row)) for row in batch]
            for i, generation in zip(chosen, _generate_batch(model, batch, budgets, temperature, generator, trace)):
                results[i] = generation
            if progress is not None:
                progress(len(chosen))
    finally:
        model.train(was_training)
    return [generation for generation in results if generation is not None]


def check_length(model: LatentModel, question: str, row: Row) -> None:
    """Refuse a question that leaves no room for an answer."""
    room = model.backbone.context_length
    if room is not None and len(row) >= room:
        raise InputError(
            f"the question '{question[:40]}...' takes {len(row)} positions, but the model reads at most {room} "
            "and needs room for the answer; shorten the question"
        )


def _generate_batch(
    model: LatentModel,
    rows: Sequence[Row],
    budgets: list[int],
    temperature: float,
    generator: torch.Generator,
    trace: bool,
) -> list[Generation]:
    from innerloop.model import join

    batch = model.batch(rows)
    meter = Meter(len(rows), model.device)
    context = Context(model.backbone, len(rows), meter)
    record = model.new_trace() if trace else None
    suppressed = model.suppressed_ids()

    # Prefill and thought. What is pending is read with the first answer token.
    columns, mask = batch.columns(2)
    suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)] if columns.start < columns.stop else []
    thought = think(model.method, model.loop, batch, context, record, model.read_out)
    context = thought.context
    with meter.phase("answer" if context.length else "prefill"):
        states = context.read(*join([*thought.pending, *suffix]))[:, -1]

    # Answer, token by token; rows that have ended leave the batch now and then.
    written: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    ended = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    pending: list[Tensor] = []
    clock = [meter.now()]
    for n in range(1, max(budgets) + 1):
        meter.count_logits(context.rows, ~ended)
        next_ids = choose(model, states, suppressed, temperature, generator)
        pending.append(next_ids)
        ended = ended | (next_ids == model.spell.eos_id)
        if n in budgets or n % CHECK_EVERY == 0:
            alive, kept = _collect(pending, written, alive, model.spell.eos_id, budgets)
            pending = []
            if not alive:
                break
            if kept is not None:
                context, next_ids, ended = context.keep_rows(kept), next_ids[kept], ended[kept]
        clock.append(time.perf_counter())
        states = context.read(model.backbone.embed(next_ids[:, None]), counted_B=~ended)[:, -1]
    clock.append(meter.now())
    return _finish(model, rows, written, meter, clock, record)


def choose(
    model: LatentModel, states: Tensor, suppressed: Tensor, temperature: float, generator: torch.Generator
) -> Tensor:
    """Return the next token of each row (R,) from the states (R, D) that predict it."""
    logits = model.backbone.head(states).float()
    if len(suppressed):
        logits[:, suppressed] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _collect(pending: list[Tensor], written: list[list[int]], alive: list[int], eos: int, budgets: list[int]):
    """Move chosen tokens to the host; return the rows that go on, and their indices (None: all go on)."""
    tokens = torch.stack(pending, dim=1).tolist()
    going = []
    for place, (row, ids) in enumerate(zip(alive, tokens)):
        written[row] += ids[: ids.index(eos) + 1] if eos in ids else ids
        if eos not in ids and len(written[row]) < budgets[row]:
            going.append(place)
    if len(going) == len(alive):
        return alive, None
    return [alive[place] for place in going], torch.tensor(going, dtype=torch.long, device=pending[0].device)


def _finish(model, rows, written, meter, clock, record) -> list[Generation]:
    """Turn written ids into generations and split the decoding time into thought and answer."""
    costs = meter.costs(model.backbone)
    ticks = [later - earlier for earlier, later in pairwise(clock)]
    results = []
    for r, (row, ids, cost) in enumerate(zip(rows, written, costs)):
        ended = bool(ids) and ids[-1] == model.spell.eos_id
        text = model.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        n_steps, n_marked = _n_step_tokens(model, ids, text)
        cost.thought_tokens = model.n_thought_positions(row) + n_steps
        cost.seconds["thought"] += sum(ticks[:n_marked]) / len(rows)
        cost.seconds["answer"] += sum(ticks[n_marked:]) / len(rows)
        marker = ANSWER_PREFIX.strip()
        answer = text.rsplit(marker, 1)[1].strip() if marker in text else None
        results.append(Generation(text, answer, cost, None if record is None else record.row(r), ended))
    return results


def _n_step_tokens(model: LatentModel, ids: list[int], text: str) -> tuple[int, int]:
    """Return how many tokens were written before the answer's marker and up to its end; all, if it never came."""
    marker = ANSWER_PREFIX.strip()
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

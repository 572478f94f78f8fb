"""What was written for a question, and what it cost: `Generation`; and `Seat`, the question while it is answered.

A question that cannot be answered is found where it is laid out (`lay_out`), before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from innerloop.decoder.cost import Cost, Meter
from innerloop.errors import InputError
from innerloop.loop.trace import ShownStep, Trace
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from innerloop.text.encoder import ANSWER_PREFIX
from innerloop.text.row import IGNORE, Row, ShownBlock

if TYPE_CHECKING:
    from innerloop.model.model import LatentCore

NOTHING = -1  # in place of a token, where a row waits


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
        log_likelihood: the sum of their log-probabilities, where asked for; see `Writer.choose`.
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
    error: str | None = None


@dataclass
class Seat:
    """A question while it is answered.

    Attributes:
        index: which of the answers it will be.
        row: its layout.
        budget: how many tokens may be written.
        place: its row of the meter.
        blocks: the steps that its latents should show.
        draw: what its draws depend on besides the seed: which question it is, and which of its samples.
        twin: a number that seats have in common whose rows are the same.
        charged: whether its question's loops and latents are charged to it, not to another sample of the question.
        written: the tokens so far.
        ticks: the seconds of each, its share of the batch's.
        waited: the seconds since the last token in which the row waited.
        n_ends: ends of sequence among them.
        n_loops: iterations of its latents.
        n_latents: latents read while writing.
        log_likelihood: of what is written, where asked for.
        record: the trace of its batch, and its row there.
        opened: the same of each block that it has opened while writing.
    """

    index: int
    row: Row
    budget: int
    place: int = 0
    blocks: Sequence[ShownBlock] = ()
    draw: tuple[int, ...] = ()
    twin: int = 0
    charged: bool = True
    written: list[int] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)
    waited: float = 0.0
    n_ends: int = 0
    n_loops: int = 0
    n_latents: int = 0
    log_likelihood: float | None = None
    record: tuple[Trace, int] | None = None
    opened: list[tuple[Trace, int]] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        """Its place among those that wait: the shortest first, and rows that are the same after each other."""
        return len(self.row), self.twin

    def anew(self, budget: int) -> Seat:
        """Return the seat as it was before it was read."""
        return Seat(self.index, self.row, budget, blocks=self.blocks, draw=self.draw, twin=self.twin)

    def is_done(self, n_ends: int) -> bool:
        """Return whether it may write no more."""
        return self.n_ends >= n_ends or len(self.written) >= self.budget

    def take(
        self,
        ids: Sequence[int],
        ticks: Sequence[float],
        eos: int,
        n_ends: int,
        log_probs: Sequence[float] | None = None,
    ) -> None:
        """Take over tokens that were chosen for it, up to where it ends."""
        for i, (token, seconds) in enumerate(zip(ids, ticks)):
            if self.is_done(n_ends):
                break
            if token == NOTHING:
                self.waited += seconds
                continue
            self.ticks.append(seconds + self.waited)
            self.written.append(token)
            if log_probs is not None:
                self.log_likelihood = (self.log_likelihood or 0.0) + log_probs[i]
            self.waited = 0.0
            self.n_ends += token == eos


def finish(model: LatentCore, seats: Sequence[Seat], meter: Meter) -> list[Generation]:
    """Turn what seats have written into generations; split the time of writing into thought and answer."""
    depths = meter.token_depths()
    results = []
    for seat, cost in zip(seats, meter.costs(model.backbone, [seat.place for seat in seats])):
        ids, n_ends = seat.written, model.method.n_ends
        ended = seat.n_ends >= n_ends
        text = model.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        n_steps, n_marked = n_step_tokens(model, ids, text)
        if n_ends > 1:  # what separates the chain of thought from the answer is no part of it
            n_steps -= ids[:n_steps].count(model.spell.eos_id)
        cost.thought_tokens = seat.charged * model.n_thought_positions(seat.row) + seat.n_latents + n_steps
        cost.loops = seat.n_loops
        cost.seconds["thought"] += sum(seat.ticks[:n_marked])
        cost.seconds["answer"] += sum(seat.ticks[n_marked:])
        marker = ANSWER_PREFIX.strip()
        answer = text.rsplit(marker, 1)[1].strip() if marker in text else None
        own = depths[seat.place][: len(seat.row) + len(ids) - 1]  # a row that has ended may ride along for a while
        tokens = model.tokenizer.convert_ids_to_tokens([*seat.row.ids(), *ids]) if own else []
        one = Generation(text, answer, cost, ended=ended, depths=tuple(zip(tokens, own)), ids=list(ids))
        one.log_likelihood = seat.log_likelihood
        results.append(traced(model, seat, one))
    return results


def traced(model: LatentCore, seat: Seat, generation: Generation) -> Generation:
    """Put the trace of its row into a generation, where there is one."""
    if seat.record is not None:
        record, row = seat.record
        trace = generation.trace = record.row(row)
        trace.opened = [opened.row(at) for opened, at in seat.opened]
        generation.blocks = tuple(trace.shown(block, model.tokenizer) for block in seat.blocks)
    return generation


def n_step_tokens(model: LatentCore, ids: list[int], text: str) -> tuple[int, int]:
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


def failed(model: LatentCore, reason: str) -> Generation:
    """Return what stands for a question that could not be answered."""
    return Generation("", None, Meter(1, torch.device("cpu")).costs(model.backbone)[0], ended=False, error=reason)


def lay_out(
    model: LatentCore, question: str, stage: int | None, loops: int | None, steps: Sequence[str] | None
) -> tuple[Row, Sequence[ShownBlock]]:
    """Lay out a question, and the blocks of latents that show its steps; ``steps`` are None where nobody looks.

    Raises:
        InputError: it is no text, is empty, or leaves no room for an answer.
    """
    if not isinstance(question, str):
        raise InputError(f"a question is text, but this one is a {type(question).__name__}: {str(question)[:40]}")
    if not question.strip():
        raise InputError("the question is empty; write what is asked")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the question holds characters that no encoding has ({error.reason}); take them out"
        ) from None
    (row,) = model.prompts([question], stage, loops)
    check_length(model, question, row)
    return row, () if steps is None else model.shown_blocks([row], [steps], loops)[0]


def fits(model: LatentCore, question: str, stage: int | None = None) -> bool:
    """Tell whether a question can be asked: it is text that leaves room for an answer."""
    try:
        lay_out(model, question, stage, None, None)
    except Exception:  # a tokenizer names no errors of its own
        return False
    return True


def check_length(model: LatentCore, question: str, row: Row) -> None:
    """Refuse a question that leaves no room for an answer."""
    room, n = model.backbone.context_length, max(len(row), row.n_positions)
    if room is not None and (len(row) >= room or n > room):
        raise InputError(
            f"the question '{question[:40]}...' takes {n} positions, but the model reads at most {room} "
            "and needs room for the answer; shorten the question"
        )


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
    n = max(sum(len(piece.ids) for piece in row.region) for row in rows)
    gold = torch.full((len(rows), 1 + n), IGNORE)
    for r, found in enumerate(blocks):
        for block in found:
            start = 1 + block.first
            gold[r, start : start + len(block.gold)] = torch.tensor(block.gold, dtype=torch.long)
    return gold.to(device)

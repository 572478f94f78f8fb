"""Batched generation with a KV cache through prefill, thought and answer.

gens = generate(model, ["3 ; + 4 ; * 2"], max_new_tokens=8)
gens[0].text, gens[0].answer, gens[0].cost
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from innerloop.context import Context
from innerloop.cost import Cost, Meter
from innerloop.decoder import AnswerDecoder, Classifier
from innerloop.errors import InputError
from innerloop.layout import ANSWER_PREFIX, IGNORE, Batch, Block, Row, ShownBlock
from innerloop.thought import Masked, RegionPass, Thought, join, think
from innerloop.trace import ShownStep, Trace

if TYPE_CHECKING:
    from innerloop.model import LatentModel

NOTHING = -1  # in place of a token, where a row waits
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
        blocks: the steps that blocks of latents show, where asked for and the method has such blocks.
        depths: each token of the question, and each written one that was read, with the number of its iterations
            inside the model; empty for methods without.
    """

    text: str
    answer: str | None
    cost: Cost
    trace: Trace | None = None
    ended: bool = True
    blocks: tuple[ShownStep, ...] = ()
    depths: tuple[tuple[str, int], ...] = ()


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
    steps: Sequence[Sequence[str]] | None = None,
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
        steps: the gold steps of each question, where known: a trace then has the ranks of their tokens.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
        raise InputError("generation needs temperature >= 0, max_new_tokens >= 1 and batch_size >= 1")
    if steps is not None and len(steps) != len(questions):
        raise InputError(f"steps are of {len(steps)} questions, but {len(questions)} are asked")
    rows = model.prompts(questions, stage, loops)
    blocks = model.shown_blocks(rows, steps, loops) if trace else [[] for _ in rows]
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
            block = model.block(loops)
            record = model.new_trace() if trace else None
            if record is not None and any(blocks):
                record.gold = _gold([blocks[i] for i in chosen], batch, model.device)
            for i, generation in zip(
                chosen, _generate_batch(model, batch, budgets, temperature, generator, record, block)
            ):
                if generation.trace is not None:
                    generation.blocks = tuple(generation.trace.shown(one, model.tokenizer) for one in blocks[i])
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
    record: Trace | None,
    block: Block | None,
) -> list[Generation]:
    batch = model.batch(rows)
    meter = Meter(len(rows), model.device)
    context = model.new_context(batch, meter)
    context.trace = record
    suppressed = model.suppressed_ids()

    # Prefill and thought. What is pending is read with the first answer token.
    columns, mask = batch.columns(2)
    suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)] if columns.start < columns.stop else []
    thought = think(model.method, model.loop, batch, context, record, model.read_out, stem=model.spell.stem())
    context = thought.context
    if isinstance(model.decoder, Classifier):
        return _classified(model, rows, thought, meter, record)
    writer = Writer(model, context)
    if isinstance(model.decoder, AnswerDecoder):
        writer = ApartWriter(model, context, model.memory(thought), batch.ids_BS[:, columns])
    elif block is not None:
        writer = BlockWriter(model, context, block, [int(bool(row.region)) for row in rows], budgets)
    elif model.depth is not None and model.depth.waits:
        writer = PatientWriter(model, context, budgets)
    with meter.phase("answer" if context.length else "prefill"):
        logits = writer.start(join([*thought.pending, *suffix]))
    if record is not None and writer.first_states is not None:
        _read_last(model, record, batch, thought, writer.first_states)

    # Answer, token by token; rows that have ended leave the batch now and then.
    written: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    eos, n_ends = model.spell.eos_id, model.method.n_ends
    left_B = torch.full((len(rows),), n_ends, device=model.device)  # ends of sequence still to be written
    pending: list[Tensor] = []
    clock = [meter.now()]
    for n in itertools.count(1):
        next_ids = writer.settle(choose(logits, suppressed, temperature, generator))
        meter.count_logits(writer.rows, (left_B > 0) & (next_ids != NOTHING))
        pending.append(next_ids)
        left_B = left_B - (next_ids == eos).long()
        if n >= min(budgets[row] for row in alive) or n % CHECK_EVERY == 0:
            alive, kept = _collect(pending, written, alive, eos, n_ends, budgets)
            pending = []
            if not alive:
                break
            if kept is not None:
                writer.keep_rows(kept)
                next_ids, left_B = next_ids[kept], left_B[kept]
        clock.append(time.perf_counter())
        logits = writer.write(next_ids, left_B > 0)
    clock.append(meter.now())
    return _finish(model, rows, written, thought, writer.thoughts(), meter, clock, record)


class Writer:
    """Writes with the model itself, on what it has read."""

    def __init__(self, model: LatentModel, context: Context):
        self.backbone, self.context = model.backbone, context
        self.first_states: Tensor | None = None  # of all that was read in the pass of the first token

    @property
    def rows(self) -> Tensor | None:
        """Which rows of the batch still write; None: all."""
        return self.context.rows

    def start(self, pending: Masked) -> Tensor:
        """Read what comes before the first token; return its logits (R, V)."""
        self.first_states = self.context.read(*pending)
        return self.show(self.first_states)

    def write(self, ids: Tensor, counted_B: Tensor) -> Tensor:
        """Take the tokens (R,) as written; return the logits (R, V) of the next."""
        return self.show(self.context.read(self.backbone.embed(ids[:, None]), counted_B=counted_B))

    def show(self, states: Tensor) -> Tensor:
        """Return the logits (R, V) of the last column; where the pass has read them out already, nothing is done."""
        for deep in self.context.deep[-1:]:
            if deep.logits_BV is not None:
                logits, deep.logits_BV, deep.shown = deep.logits_BV, None, None  # they are large, and asked for once
                return logits
        return self.backbone.head(states[:, -1])

    def thoughts(self) -> list[tuple[int, int]]:
        """Return the latents that rows have read while writing, and their loops; none at all where there are none."""
        return []

    def settle(self, ids: Tensor) -> Tensor:
        """Return what is written in place of the tokens chosen; NOTHING where a row waits."""
        return ids

    def keep_rows(self, kept: Tensor) -> None:
        """Go on with some rows."""
        self.context = self.context.keep_rows(kept)


class BlockWriter(Writer):
    """Writes, and refines a block of latents where a row opens one.

    A row that has opened a block waits until every other has too, or has ended; then their blocks are refined together.

    Args:
        model: what writes.
        context: what has been read.
        block: what is refined.
        n_blocks: how many blocks each row has had.
        budgets: how many tokens each may write; a block that leaves the context too little room lowers it.
    """

    def __init__(self, model: LatentModel, context: Context, block: Block, n_blocks: list[int], budgets: list[int]):
        super().__init__(model, context)
        self.model, self.block, self.budgets = model, block, budgets
        self.n_blocks_B = torch.tensor(n_blocks, device=model.device)
        self.left_B = torch.tensor(budgets, device=model.device)
        self.n_latents, self.n_loops = [0] * len(budgets), [0] * len(budgets)
        self.waits_B = self.n_blocks_B < 0
        self.last_ids_B = torch.full_like(self.n_blocks_B, NOTHING)
        self.logits: Tensor | None = None

    def start(self, pending: Masked) -> Tensor:
        """Read what comes before the first token; return its logits (R, V)."""
        self.logits = super().start(pending)
        return self._allowed()

    @property
    def may_open_B(self) -> Tensor:
        """Whether a row may open a block: it has had few enough, and there is room for one more."""
        block, room = self.block, self.backbone.context_length
        few_B = self.n_blocks_B < block.most
        n_positions = 1 + len(block.region.ids) + len(block.closing.ids)
        return few_B if room is None else few_B & (self.context.next_position_B + n_positions <= room)

    def _allowed(self) -> Tensor:
        """Return the logits of the next tokens, none of which opens a block where none may be opened."""
        assert self.logits is not None
        opens_V = torch.arange(self.logits.shape[-1], device=self.logits.device) == self.block.opened_by
        return self.logits.masked_fill(~self.may_open_B[:, None] & opens_V, -torch.inf)

    def settle(self, ids: Tensor) -> Tensor:
        """Open a block where one must follow; rows that wait or have written all they may write nothing."""
        block = self.block
        if block.forced_after is not None:
            is_due = (self.last_ids_B == block.forced_after) & (ids != block.unless) & self.may_open_B
            ids = torch.where(is_due, block.opened_by, ids)
        ids = torch.where(self.waits_B | (self.left_B == 0), NOTHING, ids)
        self.left_B = self.left_B - (ids != NOTHING).long()
        return ids

    def write(self, ids: Tensor, counted_B: Tensor) -> Tensor:
        """Take the tokens as written; rows that wait read nothing."""
        assert self.logits is not None
        counted_B = counted_B & (self.left_B > 0)
        reads_B = counted_B & ~self.waits_B
        states = self.context.read(self.backbone.embed(ids.clamp(min=0)[:, None]), reads_B[:, None].long())
        self.logits = torch.where(reads_B[:, None], self.backbone.head(states[:, -1]), self.logits)
        self.last_ids_B = torch.where(reads_B, ids, self.last_ids_B)
        self.waits_B = self.waits_B | (reads_B & (ids == self.block.opened_by))
        if bool(self.waits_B.any()) and bool((self.waits_B | ~counted_B).all()):
            self._think()
        return self._allowed()

    def _think(self) -> None:
        """Refine the blocks of the rows that wait, and read what closes them."""
        model, block, waits_B = self.model, self.block, self.waits_B
        assert self.logits is not None
        ids = torch.tensor(block.region.ids, device=waits_B.device).expand(len(waits_B), -1)
        mask = waits_B[:, None].long().expand_as(ids)
        normed = model.method.loop.feedback_site == "post_norm"
        steps = RegionPass(self.context, mask, model.loop.weights, normed, state_mask=mask)
        n_loops = [block.n_loops if waits else 0 for waits in waits_B.tolist()]
        result = model.loop(steps, self.backbone.embed(ids), n_loops, None, model.read_out)
        closing = self.backbone.embed(torch.tensor(block.closing.ids, device=ids.device)).expand(len(waits_B), -1, -1)
        read = torch.cat([result.state, closing], dim=1)
        states = self.context.read(read, waits_B[:, None].long().expand(read.shape[:2]))
        self.logits = torch.where(waits_B[:, None], self.backbone.head(states[:, -1]), self.logits)
        self.n_blocks_B = self.n_blocks_B + waits_B
        self.last_ids_B = torch.where(waits_B, block.closing.ids[-1], self.last_ids_B)
        self.waits_B = torch.zeros_like(waits_B)
        rows = range(len(waits_B)) if self.rows is None else self.rows.tolist()
        for row, waits, ran in zip(rows, waits_B.tolist(), result.n_loops):
            self.n_latents[row] += waits * len(block.region.ids)
            self.n_loops[row] += ran
        if (room := self.backbone.context_length) is not None:
            over_B = (self.left_B + self.context.next_position_B - room).clamp(min=0) * waits_B
            self.left_B = self.left_B - over_B
            for row, over in zip(rows, over_B.tolist()):
                self.budgets[row] -= over

    def thoughts(self) -> list[tuple[int, int]]:
        """Return the latents that rows have read while writing, and their loops."""
        return list(zip(self.n_latents, self.n_loops))

    def keep_rows(self, kept: Tensor) -> None:
        """Go on with some rows."""
        super().keep_rows(kept)
        self.n_blocks_B, self.waits_B = self.n_blocks_B[kept], self.waits_B[kept]
        self.last_ids_B, self.left_B = self.last_ids_B[kept], self.left_B[kept]
        self.logits = None if self.logits is None else self.logits[kept]


class PatientWriter(Writer):
    """Writes with a model that may leave a token unfinished: its row waits for one more pass, the others write on.

    So one pass serves rows at every depth, and a token that needs more holds up its own row alone.

    Args:
        model: what writes.
        context: what has been read.
        budgets: how many tokens each row may write.
    """

    def __init__(self, model: LatentModel, context: Context, budgets: list[int]):
        super().__init__(model, context)
        context.may_wait = True
        self.left_B = torch.tensor(budgets, device=model.device)
        self.waits_B = torch.zeros_like(self.left_B, dtype=torch.bool)

    def start(self, pending: Masked) -> Tensor:
        """Read what comes before the first token; return its logits (R, V)."""
        self.first_states = self.context.read(*pending)
        return self._shown(self.first_states, ~self.waits_B)

    def settle(self, ids: Tensor) -> Tensor:
        """Return what is written; NOTHING by rows that wait or have written all they may."""
        ids = torch.where(self.waits_B | (self.left_B == 0), NOTHING, ids)
        self.left_B = self.left_B - (ids != NOTHING).long()
        return ids

    def write(self, ids: Tensor, counted_B: Tensor) -> Tensor:
        """Take the tokens as written; rows that wait read nothing new."""
        reads_B = counted_B & (ids != NOTHING) & (self.left_B > 0)
        embeds = self.backbone.embed(ids.clamp(min=0)[:, None])
        states = self.context.read(embeds, reads_B[:, None].long(), counted_B=counted_B)
        return self._shown(states, reads_B | self.waits_B)

    def _shown(self, states: Tensor, busy_B: Tensor) -> Tensor:
        """Return the logits (R, V) of the last pass, and note whose token it has left unfinished."""
        deep = self.context.deep[-1]
        if deep.done_BL is not None:
            self.waits_B = busy_B & ~deep.done_BL[:, -1]
        return self.show(states)

    def keep_rows(self, kept: Tensor) -> None:
        """Go on with some rows."""
        super().keep_rows(kept)
        self.left_B, self.waits_B = self.left_B[kept], self.waits_B[kept]


class ApartWriter(Writer):
    """Writes with a decoder of its own, which reads its few words anew for each; its work is not counted."""

    def __init__(self, model: LatentModel, context: Context, memory: Masked, ids_RS: Tensor):
        super().__init__(model, context)
        assert isinstance(model.decoder, AnswerDecoder)
        self.decoder, self.memory, self.ids_RS = model.decoder, memory, ids_RS

    def start(self, pending: Masked) -> Tensor:
        """Return the logits of the token after <eot>."""
        return self.decoder(self.ids_RS, self.memory, self.backbone)[:, -1]

    def write(self, ids: Tensor, counted_B: Tensor) -> Tensor:
        """Return the logits of the token after those written."""
        self.ids_RS = torch.cat([self.ids_RS, ids[:, None]], dim=1)
        return self.start(self.memory)

    def keep_rows(self, kept: Tensor) -> None:
        """Go on with some rows."""
        super().keep_rows(kept)
        (states, mask), self.ids_RS = self.memory, self.ids_RS[kept]
        self.memory = states[kept], None if mask is None else mask[kept]


def _read_last(model: LatentModel, record: Trace, batch: Batch, thought: Thought, states: Tensor) -> None:
    """Record what the latents show in the pass that the answer sees, if that pass has read them."""
    first, end = batch.bounds
    n_latents = end - first
    if n_latents == 0 or thought.first_column > first:
        return
    start = first - thought.first_column
    latents = states[:, max(start - 1, 0) : start + n_latents]
    if start == 0 and thought.prompt is not None:
        before = thought.prompt[0][:, -1:]
        normed = model.method.loop.feedback_site == "post_norm"
        latents = torch.cat([before if normed else model.backbone.norm(before), latents], dim=1)
    record.last = record.read(model.backbone.head(latents), record.gold)


def _gold(blocks: Sequence[Sequence[ShownBlock]], rows: Sequence[Row], device: torch.device) -> Tensor:
    """Return what the position before the latents and the latents should show (B, 1 + N), IGNORE where unknown."""
    n = max(sum(len(piece.ids) for piece in row.region) for row in rows)
    gold = torch.full((len(rows), 1 + n), IGNORE)
    for r, found in enumerate(blocks):
        for block in found:
            start = 1 + block.first
            gold[r, start : start + len(block.gold)] = torch.tensor(block.gold, dtype=torch.long)
    return gold.to(device)


def _classified(
    model: LatentModel, rows: Sequence[Row], thought: Thought, meter: Meter, record: Trace | None
) -> list[Generation]:
    """Answer by the class of the largest logit."""
    assert isinstance(model.decoder, Classifier)
    with meter.phase("answer"):
        best = model.decoder(thought).argmax(-1).tolist()
    results = []
    for r, (row, index, cost) in enumerate(zip(rows, best, meter.costs(model.backbone))):
        answer = model.decoder.classes[index]
        cost.thought_tokens = model.n_thought_positions(row)
        cost.loops = 0 if thought.loop is None else thought.loop.n_loops[r]
        results.append(Generation(ANSWER_PREFIX + answer, answer, cost, None if record is None else record.row(r)))
    return results


def choose(logits: Tensor, suppressed: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return the next token of each row (R,) from its logits (R, V)."""
    logits = logits.float()
    if len(suppressed):
        logits[:, suppressed] = -torch.inf
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _collect(
    pending: list[Tensor], written: list[list[int]], alive: list[int], eos: int, n_ends: int, budgets: list[int]
):
    """Move chosen tokens to the host; return the rows that go on, and their indices (None: all go on)."""
    tokens = torch.stack(pending, dim=1).tolist()
    going = []
    for place, (row, ids) in enumerate(zip(alive, tokens)):
        mine = written[row]
        for token in ids:
            if token != NOTHING and len(mine) < budgets[row] and mine.count(eos) < n_ends:
                mine.append(token)
        if len(mine) < budgets[row] and mine.count(eos) < n_ends:
            going.append(place)
    if len(going) == len(alive):
        return alive, None
    return [alive[place] for place in going], torch.tensor(going, dtype=torch.long, device=pending[0].device)


def _finish(model, rows, written, thought, thoughts, meter, clock, record) -> list[Generation]:
    """Turn written ids into generations and split the decoding time into thought and answer."""
    costs = meter.costs(model.backbone)
    ticks = [later - earlier for earlier, later in pairwise(clock)]
    depths = meter.token_depths()
    results = []
    for r, (row, ids, cost) in enumerate(zip(rows, written, costs)):
        ended = ids.count(model.spell.eos_id) == model.method.n_ends
        text = model.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        n_steps, n_marked = _n_step_tokens(model, ids, text)
        if model.method.n_ends > 1:  # what separates the chain of thought from the answer is no part of it
            n_steps -= ids[:n_steps].count(model.spell.eos_id)
        cost.thought_tokens = model.n_thought_positions(row) + n_steps
        cost.loops = 0 if thought.loop is None else thought.loop.n_loops[r]
        if thoughts:  # the blocks that were opened while answering
            cost.thought_tokens, cost.loops = cost.thought_tokens + thoughts[r][0], cost.loops + thoughts[r][1]
        cost.seconds["thought"] += sum(ticks[:n_marked]) / len(rows)
        cost.seconds["answer"] += sum(ticks[n_marked:]) / len(rows)
        marker = ANSWER_PREFIX.strip()
        answer = text.rsplit(marker, 1)[1].strip() if marker in text else None
        own = None if record is None else record.row(r)
        tokens = model.tokenizer.convert_ids_to_tokens([*row.ids(), *ids]) if depths else []
        mine = tuple(zip(tokens, depths[r])) if depths else ()
        results.append(Generation(text, answer, cost, own, ended, depths=mine))
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

"""Rows that write together, a token at each step. A batch is told which tokens were chosen, and says what may follow.

Rows leave a batch (`keep_rows`) and are joined by others (`join`), whatever they have read and written; none notices.

Shapes: `R` rows that write, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.decoder.ragged_cache import DepthCache
from innerloop.engine.drawing import Drawing, choose, without
from innerloop.engine.requests import NOTHING, Request
from innerloop.model.answer_decoder import AnswerDecoder
from innerloop.model.model import LatentCore
from innerloop.passes.context import Context, merge
from innerloop.passes.region import Masked, Region, RegionPass
from innerloop.text.row import Block


class DecodeBatch:
    """Writes with the model itself, on what it has read.

    Args:
        model: what writes.
        context: what has been read.
        requests: the rows.

    Attributes:
        drawing: how tokens are chosen.
        likely_R: the log-probability of the token that was last chosen, where asked for.
        others_2RK: the likeliest tokens in its place and their log-probabilities, where asked for.
    """

    per_row: ClassVar[tuple[str, ...]] = ("logits_RV", "chosen_R", "ends_R", "n_written_R")
    likely_R: Tensor | None = None
    others_2RK: Tensor | None = None
    forced_id = NOTHING

    def __init__(self, model: LatentCore, context: Context, requests: Sequence[Request]):
        self.model, self.backbone, self.context, self.requests = model, model.backbone, context, list(requests)
        self.drawing = Drawing()
        self.first_states: Tensor | None = None  # of all that was read in the pass of the first token
        zeros = torch.zeros(len(self.requests), dtype=torch.long, device=model.device)
        self.logits_RV = zeros[:, None]  # of the token that follows
        self.chosen_R, self.n_written_R = zeros, zeros
        self.ends_R = zeros + model.method.n_ends  # ends of sequence still to be written

    def start(self, pending: Masked) -> None:
        """Read what comes before the first token."""
        self.first_states = self.context.read(*pending)
        self.logits_RV = self.show(self.first_states)

    def choose(self, suppressed: Tensor) -> None:
        """Choose the next token of each row; NOTHING where a row waits.

        Log-probabilities are those among the tokens that may be written; of a token that had to be written it is 0.
        """
        drawing, allowed_RV = self.drawing, self.allowed()
        free_R = choose(allowed_RV, suppressed, drawing.temperature, drawing.numbers(self.n_written_R))
        forced_R = self.forced(free_R)
        ids_R = self.settle(free_R if forced_R is None else torch.where(forced_R, self.forced_id, free_R))
        is_written = ids_R != NOTHING
        if drawing.likely_at is not None:
            log_probs_RV = (without(allowed_RV, suppressed).float() / drawing.likely_at).log_softmax(-1)
            is_free = is_written if forced_R is None else is_written & ~forced_R
            self.likely_R = torch.where(is_free, log_probs_RV.gather(1, free_R[:, None])[:, 0], 0.0)
            if n := min(drawing.n_alternatives, log_probs_RV.shape[1]):
                best = log_probs_RV.topk(n)
                self.others_2RK = torch.stack([best.indices.double(), best.values.double()])
        if self.context.meter is not None:
            self.context.meter.count_logits(self.context.rows, (self.ends_R > 0) & is_written)
        self.n_written_R = self.n_written_R + is_written
        self.ends_R = self.ends_R - (ids_R == self.model.encoder.eos_id).long()
        self.chosen_R = ids_R

    def write(self) -> None:
        """Read the tokens that were chosen, so that the next can be."""
        embeds = self.backbone.embed(self.chosen_R[:, None])
        self.logits_RV = self.show(self.context.read(embeds, counted_B=self.ends_R > 0))

    def show(self, states: Tensor) -> Tensor:
        """Return the logits (R, V) of the last column; where the pass has read them out already, nothing is done."""
        for deep in self.context.depth.passes[-1:] if self.context.depth is not None else ():
            if deep.logits_BV is not None:
                logits, deep.logits_BV, deep.shown = deep.logits_BV, None, None  # they are large, and asked for once
                return logits
        return self.backbone.head(states[:, -1])

    def allowed(self) -> Tensor:
        """Return the logits of the tokens that may follow."""
        return self.logits_RV

    def forced(self, ids_R: Tensor) -> Tensor | None:
        """Return which rows must write ``forced_id`` in place of the tokens chosen; None: none ever."""
        return None

    def settle(self, ids_R: Tensor) -> Tensor:
        """Return what is written; NOTHING where a row waits."""
        return ids_R

    @property
    def joins(self) -> bool:
        """Whether rows may join now."""
        return not isinstance(self.context.cache, DepthCache) or self.context.cache.joins

    def keep_rows(self, kept: Sequence[int]) -> None:
        """Go on with some rows; a row may be kept more than once."""
        self.take_rows(torch.tensor(list(kept), dtype=torch.long, device=self.chosen_R.device))
        self.context = self.context.trim()
        self.requests = [self.requests[i] for i in kept]
        self.drawing = self.drawing.asked_by(self.requests, self.chosen_R.device)

    def take_rows(self, index: Tensor) -> None:
        """Let the rows be others of the same rows (R,); requests and padding stay as they are."""
        for name in self.per_row:
            setattr(self, name, getattr(self, name)[index])
        self.drawing = self.drawing.keep_rows(index)
        self.context = self.context.keep_rows(index)
        self.first_states = None

    def split(self, n: int) -> DecodeBatch:
        """Let the first ``n`` rows go, and return them."""
        head = copy.copy(self)
        head.keep_rows(range(n))
        self.keep_rows(range(n, len(self.requests)))
        return head

    def join(self, other: DecodeBatch) -> None:
        """Take in the rows of another batch of the same kind."""
        n, m = len(self.requests), len(other.requests)
        for name in self.per_row:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self.context = merge([(list(range(n)), self.context), (list(range(n, n + m)), other.context)])
        self.requests = [*self.requests, *other.requests]
        self.drawing = self.drawing.join(other.drawing, n, m).asked_by(self.requests, self.chosen_R.device)


class WaitingDecodeBatch(DecodeBatch):
    """Writes while some rows may wait: they write nothing in the meantime."""

    per_row = (*DecodeBatch.per_row, "room_R", "waits_R")

    def __init__(self, model: LatentCore, context: Context, requests: Sequence[Request]):
        super().__init__(model, context, requests)
        self.room_R = torch.tensor(
            [request.budget for request in requests], device=model.device
        )  # tokens still to be written
        self.waits_R = torch.zeros_like(self.room_R, dtype=torch.bool)

    def settle(self, ids_R: Tensor) -> Tensor:
        """Return what is written; NOTHING by rows that wait or have written all they may."""
        ids_R = torch.where(self.waits_R | (self.room_R == 0), NOTHING, ids_R)
        self.room_R = self.room_R - (ids_R != NOTHING).long()
        return ids_R


class LatentBlockBatch(WaitingDecodeBatch):
    """Writes, and refines a block of latents where a row opens one.

    A row that has opened a block waits until every other has too, or has ended; then their blocks are refined together.
    A block that leaves the context too little room lowers a row's budget.
    """

    per_row = (*WaitingDecodeBatch.per_row, "n_blocks_R", "last_R")

    def __init__(self, model: LatentCore, context: Context, requests: Sequence[Request], block: Block):
        super().__init__(model, context, requests)
        self.block, self.forced_id = block, block.opened_by
        self.n_blocks_R = torch.tensor([int(bool(request.row.region)) for request in requests], device=model.device)
        self.last_R = torch.full_like(self.n_blocks_R, NOTHING)

    @property
    def may_open_R(self) -> Tensor:
        """Whether a row may open a block: it has had few enough, and there is room for one more."""
        block, room = self.block, self.backbone.context_length
        few_R = self.n_blocks_R < block.most
        return few_R if room is None else few_R & (self.context.next_position_B + 1 + block.n_read <= room)

    def allowed(self) -> Tensor:
        """Return the logits of the next tokens, none of which opens a block where none may be opened."""
        opens_V = torch.arange(self.logits_RV.shape[-1], device=self.logits_RV.device) == self.block.opened_by
        return self.logits_RV.masked_fill(~self.may_open_R[:, None] & opens_V, -torch.inf)

    def forced(self, ids_R: Tensor) -> Tensor | None:
        """Return where a block must be opened."""
        block = self.block
        if block.forced_after is None:
            return None
        return (self.last_R == block.forced_after) & (ids_R != block.unless) & self.may_open_R

    def write(self) -> None:
        """Take the tokens as written; rows that wait read nothing."""
        ids_R, counted_R = self.chosen_R, (self.ends_R > 0) & (self.room_R > 0)
        reads_R = counted_R & ~self.waits_R
        states = self.context.read(self.backbone.embed(ids_R.clamp(min=0)[:, None]), reads_R[:, None].long())
        self.logits_RV = torch.where(reads_R[:, None], self.backbone.head(states[:, -1]), self.logits_RV)
        self.last_R = torch.where(reads_R, ids_R, self.last_R)
        self.waits_R = self.waits_R | (reads_R & (ids_R == self.block.opened_by))
        if bool(self.waits_R.any()) and bool((self.waits_R | ~counted_R).all()):
            self._think()

    def _think(self) -> None:
        """Refine the blocks of the rows that wait, and read what closes them."""
        model, block, waits_R = self.model, self.block, self.waits_R
        ids = torch.tensor(block.region.ids, device=waits_R.device).expand(len(waits_R), -1)
        mask = waits_R[:, None].long().expand_as(ids)
        steps = RegionPass(self.context, Region(mask, mask), model.loop.weights, model.method.plan.is_normed)
        n_loops = [block.n_loops if waits else 0 for waits in waits_R.tolist()]
        record = None if self.requests[0].record is None else model.new_trace()
        result = model.loop(steps, self.backbone.embed(ids), n_loops, record, model.read_out)
        closing = self.backbone.embed(torch.tensor(block.closing.ids, device=ids.device)).expand(len(waits_R), -1, -1)
        read = torch.cat([result.state, closing], dim=1)
        states = self.context.read(read, waits_R[:, None].long().expand(read.shape[:2]))
        if record is not None:  # what opened the blocks has been read out already
            record.last = record.read(torch.cat([self.logits_RV[:, None], self.backbone.head(states)], dim=1))
        self.logits_RV = torch.where(waits_R[:, None], self.backbone.head(states[:, -1]), self.logits_RV)
        self.n_blocks_R = self.n_blocks_R + waits_R
        self.last_R = torch.where(waits_R, block.closing.ids[-1], self.last_R)
        self.waits_R = torch.zeros_like(waits_R)
        for r, (request, waits, ran) in enumerate(zip(self.requests, waits_R.tolist(), result.n_loops)):
            request.n_latents += waits * len(block.region.ids)
            request.n_loops += ran
            if record is not None and waits:
                request.opened.append((record, r))
        if (room := self.backbone.context_length) is not None:
            over_R = (self.room_R + self.context.next_position_B - room).clamp(min=0) * waits_R
            self.room_R = self.room_R - over_R
            for request, over in zip(self.requests, over_R.tolist()):
                request.budget -= over

    @property
    def joins(self) -> bool:
        """Rows join while none waits, so that none waits for what has not begun."""
        return super().joins and not bool(self.waits_R.any())


class RaggedDecodeBatch(WaitingDecodeBatch):
    """Writes with a model that may leave a token unfinished: its row waits for one more pass, the others write on.

    So one pass serves rows at every depth, and a token that needs more holds up its own row alone.
    """

    def __init__(self, model: LatentCore, context: Context, requests: Sequence[Request]):
        super().__init__(model, context, requests)
        assert context.depth is not None
        context.depth.may_wait = True

    def start(self, pending: Masked) -> None:
        """Read what comes before the first token."""
        self.first_states = self.context.read(*pending)
        self._note(self.first_states, ~self.waits_R)

    def write(self) -> None:
        """Take the tokens as written; rows that wait read nothing new."""
        ids_R, counted_R = self.chosen_R, self.ends_R > 0
        reads_R = counted_R & (ids_R != NOTHING) & (self.room_R > 0)
        embeds = self.backbone.embed(ids_R.clamp(min=0)[:, None])
        states = self.context.read(embeds, reads_R[:, None].long(), counted_B=counted_R)
        self._note(states, reads_R | self.waits_R)

    def _note(self, states: Tensor, busy_R: Tensor) -> None:
        """Take the logits (R, V) of the last pass, and note whose token it has left unfinished."""
        assert self.context.depth is not None
        deep = self.context.depth.passes[-1]
        if deep.done_BL is not None:
            self.waits_R = busy_R & ~deep.done_BL[:, -1]
        self.logits_RV = self.show(states)


class SeparateDecoderBatch(DecodeBatch):
    """Writes with a decoder of its own, which reads its few words anew for each; its work is not counted.

    Args:
        model: what writes.
        context: what has been read.
        requests: the rows.
        memory: what the decoder attends to.
        ids_RS: the words that come first.
    """

    per_row = (*DecodeBatch.per_row, "ids_RS")
    joins = False  # its words have no padding

    def __init__(
        self, model: LatentCore, context: Context, requests: Sequence[Request], memory: Masked, ids_RS: Tensor
    ):
        super().__init__(model, context, requests)
        assert isinstance(model.decoder, AnswerDecoder)
        self.decoder, self.memory, self.ids_RS = model.decoder, memory, ids_RS

    def start(self, pending: Masked) -> None:
        """Say what follows <eot>."""
        self.logits_RV = self.decoder(self.ids_RS, self.memory, self.backbone)[:, -1]

    def write(self) -> None:
        """Say what follows the words so far."""
        self.ids_RS = torch.cat([self.ids_RS, self.chosen_R[:, None]], dim=1)
        self.start(self.memory)

    def take_rows(self, index: Tensor) -> None:
        """Let the rows be others of the same rows."""
        super().take_rows(index)
        states, mask = self.memory
        self.memory = states[index], None if mask is None else mask[index]

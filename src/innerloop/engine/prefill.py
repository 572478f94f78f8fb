"""Prefill and thought: some requests are read and thought about together, up to the logits of their first tokens.

Requests with the same prompt are duplicates: questions that are asked more than once, and those of which several
answers are drawn. One of them is read for all. What all begin with is read once (`innerloop.engine.shared_prefix`).

Shapes: `R` rows that write, `S` columns of what they have been given to write on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from innerloop.decoder.cost import CostMeter
from innerloop.engine.decoding import DecodeBatch, LatentBlockBatch, RaggedDecodeBatch, SeparateDecoderBatch
from innerloop.engine.drawing import Drawing
from innerloop.engine.generation import Generation, gold_of, read_last, traced
from innerloop.engine.hybrid import HybridDecodeBatch
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import Prompt, Request
from innerloop.engine.shared_prefix import begin, n_shared
from innerloop.loop.hooks import hooked
from innerloop.loop.starts import RandomStarts
from innerloop.loop.trace import Iteration, Trace
from innerloop.model.answer_decoder import AnswerDecoder, Classifier
from innerloop.model.model import LatentCore
from innerloop.passes.context import Context
from innerloop.passes.region import join
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from innerloop.text.examples import ANSWER_PREFIX


class Slots:
    """The rows of a meter: a request has one from when it is read until it is answered."""

    def __init__(self, n: int, device: torch.device):
        self.meter, self.free = CostMeter(n, device), list(range(n))[::-1]

    def take(self, requests: Sequence[Request]) -> None:
        """Give requests slots, in which nothing has been counted and whose time is theirs now."""
        for request in requests:
            request.slot = self.free.pop()
        taken = [request.slot for request in requests]
        self.meter.reset(self.of(requests), taken)
        self.meter.sharing = taken

    def release(self, requests: Sequence[Request]) -> None:
        """Take slots back."""
        self.free += [request.slot for request in requests]

    def of(self, requests: Sequence[Request]) -> Tensor:
        """Return the slots of requests."""
        return torch.tensor([request.slot for request in requests], device=self.meter.passes.device)


Told = Callable[[Sequence[Request], Iteration], None]


class Prefill:
    """Reads requests and thinks about them.

    Args:
        model: what reads.
        options: how questions are answered.
        n_slots: how many requests may be read and not answered at a time.
        told: called with what is thought about and each iteration, as soon as it has run, where a trace is asked for.
    """

    def __init__(self, model: LatentCore, options: EngineOptions, n_slots: int, told: Told | None = None):
        self.model, self.options, self.told = model, options, told
        self.block = model.block(options.loops)
        self.slots = Slots(n_slots, model.device)

    def __call__(self, requests: list[Request]) -> DecodeBatch | list[Generation]:
        """Return those who write, with the logits of their first tokens; or their answers, where these are classes."""
        model, is_traced = self.model, self.options.trace
        first: dict[Prompt, int] = {}
        same = [i if is_traced else first.setdefault(request.prompt, len(first)) for i, request in enumerate(requests)]
        read = [requests[same.index(i)] for i in range(len(set(same)))]
        self._bill(requests)
        record = self._trace(requests) if is_traced else None
        self.slots.take(requests)
        rows = [request.row for request in read]
        n = 0 if is_traced else n_shared(model, rows)
        batch, context = begin(model, rows, n, self.slots.meter, self.slots.of(read))

        # What is pending is read with the first answer token.
        columns, mask = batch.columns(2)
        suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)] if columns.start < columns.stop else []
        if record is not None and self.told is not None and model.depth is None:  # whose iterations are of tokens
            record.told = partial(self.told, requests)
        thought = self._think(read, batch, record, context)
        if record is not None:
            record.told = None
        if thought.loop is not None:
            for request, i in zip(requests, same):
                request.n_loops = request.billed * thought.loop.n_loops[i]
        for request, i in zip(requests, same):
            request.change = read[i].change
        if isinstance(model.decoder, Classifier):
            return self._classify(requests, same, thought)
        decode_batch = self._decode_batch(read, thought, batch.ids_BS[:, columns])
        with self.slots.meter.phase("answer" if thought.context.length > n else "prefill"):
            decode_batch.start(join([*thought.pending, *suffix]))
        if record is not None and decode_batch.first_states is not None:
            read_last(model, record, batch, thought, decode_batch.first_states)
        if len(read) < len(requests):
            self._copy_depths(requests, [read[i] for i in same])
            decode_batch.keep_rows(same)
            decode_batch.requests, decode_batch.context.rows = list(requests), self.slots.of(requests)
        decode_batch.context = decode_batch.context.trim()
        decode_batch.drawing = Drawing.of(requests, model.device)
        return decode_batch

    def _think(self, read: Sequence[Request], batch: Batch, record: Trace | None, context: Context) -> Thought:
        """Think about a batch; where each question has several starts, all but its first from a random one."""
        options = self.options
        if options.starts == 1:
            return self.model.think(batch, record, context)
        starts = RandomStarts([(one.options.seed, *one.draw) if one.draw[1] > 0 else None for one in read])
        with hooked(self.model.loop, starts):
            thought = self.model.think(batch, record, context)
        for request, change in zip(read, starts.settled()):
            request.change = change
        return thought

    def _bill(self, requests: Sequence[Request]) -> None:
        """Bill what the samples of a question share to the first of them here.

        In a trace each is read by itself, and so is each start.
        """
        firsts = {request.id: request for request in reversed(requests)}
        for request in requests:
            apart = self.options.trace or self.options.starts > 1
            request.billed = apart or request is firsts[request.id]

    def _trace(self, requests: list[Request]) -> Trace:
        """Begin a trace, with a meter of its own: both speak of rows by their place among the requests."""
        self.slots, record = Slots(len(requests), self.model.device), self.model.new_trace()
        if any(request.blocks for request in requests):
            record.gold = gold_of(
                [request.blocks for request in requests], [request.row for request in requests], self.model.device
            )
        for i, request in enumerate(requests):
            request.record = record, i
        return record

    def _decode_batch(self, requests: Sequence[Request], thought: Thought, ids_RS: Tensor) -> DecodeBatch:
        model, context = self.model, thought.context
        if isinstance(model.decoder, AnswerDecoder):
            return SeparateDecoderBatch(model, context, requests, model.memory(thought), ids_RS)
        if self.block is not None:
            return LatentBlockBatch(model, context, requests, self.block)
        if model.hybrid is not None:
            return HybridDecodeBatch(model, context, requests, self.options)
        return (RaggedDecodeBatch if model.depth is not None and model.depth.waits else DecodeBatch)(
            model, context, requests
        )

    def _copy_depths(self, requests: Sequence[Request], read: Sequence[Request]) -> None:
        """Let requests know how deeply their question was read, by whichever row it was read for."""
        depths = self.slots.meter.token_depths()
        for request, other in zip(requests, read):
            depths[request.slot] = list(depths[other.slot])

    def _classify(self, requests: list[Request], same: list[int], thought: Thought) -> list[Generation]:
        """Answer by the class of the largest logit."""
        model, meter = self.model, self.slots.meter
        assert isinstance(model.decoder, Classifier)
        with meter.phase("answer"):
            best = model.decoder(thought).argmax(-1).tolist()
        found = []
        for request, i, cost in zip(
            requests, same, meter.costs(model.backbone, [request.slot for request in requests])
        ):
            answer = model.decoder.classes[best[i]]
            cost.thought_tokens = model.n_thought_positions(request.row, request.n_loops)
            cost.loops = request.n_loops
            one = Generation(ANSWER_PREFIX + answer, answer, cost, change=request.change)
            found.append(traced(model, request, one))
        return found

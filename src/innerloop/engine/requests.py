"""A question while it is answered: `Request`; and what is refused where it is laid out, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from numpy.random import Generator
from torch import Tensor

from innerloop.engine.options import EngineOptions
from innerloop.errors import InputError, refuse
from innerloop.loop.trace import Trace
from innerloop.model.model import LatentCore
from innerloop.text.row import Block, Row, ShownBlock

NOTHING = -1  # in place of a token, where a row waits
Alternatives = tuple[tuple[int, float], ...]
"""Tokens that might have been written in place of one, with their log-probabilities, the likeliest first."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What duplicates have in common: by its number they come after each other."""

    number: int


@dataclass
class Request:
    """A question, or one of its samples, while it is answered.

    Attributes:
        id: of the question.
        row: its layout.
        budget: how many tokens may be written.
        options: how it is answered.
        blocks: the steps that its latents should show.
        draw: what its draws depend on besides the seed: which question it is, and which of its samples.
        prompt: what it has in common with its duplicates, whose rows are the same.
        turn: those of an earlier turn are read before it, however long they are.
        n_told: how many of its tokens have been told.
        slot: its row of the meter.
        billed: whether its question's loops and latents are billed to it, not to another sample of the question.
        written: the tokens so far.
        ticks: the seconds of each, its share of the batch's.
        waited: the seconds since the last token in which the row waited.
        alternatives: the likeliest tokens in place of each, where asked for.
        n_ends: ends of sequence among them.
        n_loops: iterations of its latents.
        n_latents: latents read while writing.
        log_probs: of each token that is written, where asked for, and ``log_likelihood``, of all.
        change: of its latents in their last iterations, where several starts are asked for.
        said: the tokens that have been read, ``noise``, what draws its latents' noise, and ``fed``, those latents (D,),
            where rows are fed more than tokens.
        record: the trace of its batch, and its row there.
        opened: the same of each block that it has opened while writing.
    """

    id: int
    row: Row
    budget: int
    options: EngineOptions
    blocks: Sequence[ShownBlock] = ()
    draw: tuple[int, ...] = (0, 0)
    prompt: Prompt = field(default_factory=lambda: Prompt(0))
    turn: int = 0
    n_told: int = 0
    slot: int = 0
    billed: bool = True
    written: list[int] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)
    waited: float = 0.0
    n_ends: int = 0
    n_loops: int = 0
    n_latents: int = 0
    log_probs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    log_likelihood: float | None = None
    change: float | None = None
    said: list[int] = field(default_factory=list)
    noise: Generator | None = None
    fed: list[Tensor] = field(default_factory=list)
    record: tuple[Trace, int] | None = None
    opened: list[tuple[Trace, int]] = field(default_factory=list)

    def __lt__(self, other: Request) -> bool:
        """Whether it is read before another: the shortest first, and duplicates after each other."""
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, ...]:
        return self.turn, len(self.row), self.prompt.number, self.id, self.draw[1]

    def anew(self, budget: int) -> Request:
        """Return it as it was before it was read."""
        how = self.options, self.blocks, self.draw, self.prompt, self.turn, self.n_told
        return Request(self.id, self.row, budget, *how)

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
        alternatives: Sequence[Alternatives] = (),
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
                self.log_probs.append(log_probs[i])
                self.log_likelihood = (self.log_likelihood or 0.0) + log_probs[i]
            self.alternatives += alternatives[i : i + 1]
            self.waited = 0.0
            self.n_ends += token == eos


def lay_out(
    model: LatentCore,
    question: str,
    stage: int | None,
    loops: int | None,
    steps: Sequence[str] | None,
    begun: Sequence[str] | None = None,
) -> tuple[Row, Sequence[ShownBlock]]:
    """Lay out a question, and the blocks of latents that show its steps; ``steps`` are None where nobody looks.

    Raises:
        InputError: it is no text, is empty, or leaves no room for an answer; or no answer of the method can have begun.
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
    if begun is not None:
        check_begun(model, row)
        row = replace(row, prefix=[*row.spans, *model.encoder.begun(begun)], suffix=[])
    check_length(model, question, row)
    return row, () if steps is None else model.shown_blocks([row], [steps], loops)[0]


def check_starts(model: LatentCore, row: Row, block: Block | None) -> None:
    """Refuse several starts for a row without latents that are refined together, all of them before it writes."""
    method = model.method
    has_state = method.plan.scope == "slots" and bool(row.region) and row.n_loops > 0
    refuse(
        (
            not has_state or block is not None or method.fixed_point.solver != "none",
            f"several starts are for latents that are refined together before the answer, which '{method.name}' with "
            "these settings does not do: leave starts out",
        )
    )


def check_begun(model: LatentCore, row: Row) -> None:
    """Refuse rows whose answers cannot go on from what they have begun with: those of one batch end alike."""
    method, name = model.method, model.method.name
    refuse(
        (method.family == "denoise", f"'{name}' fills a canvas, which does not begin at its left: leave begun out"),
        (bool(row.region) or row.next is not None, f"'{name}' thinks before it writes: leave begun out"),
        (model.block() is not None, f"'{name}' opens latents between what it writes: leave begun out"),
        (method.decoder.kind != "lm_head", f"'{name}' answers by a decoder of its own: leave begun out"),
        (model.encoder.running_text, "running text goes on as it is: add what it has begun with to the question"),
    )


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

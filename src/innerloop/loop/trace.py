"""`Trace`: what a loop did, iteration by iteration. Every loop of every method writes this one record.

Shapes: `A` rows still looping, `N` looped positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedTokenizerBase

from innerloop.loop.hooks import LoopHook, Step
from innerloop.loop.stabilize import rms
from innerloop.text.row import ANSWER_PASS, ShownBlock
from innerloop.text.tokenizer import token_names


@dataclass
class Iteration:
    """One iteration; statistics are per row (A,), over all looped positions.

    Attributes:
        loop: 1-based iteration.
        rows: which rows of the batch these are; the others have stopped.
        delta: ||z_t - z_{t-1}|| / ||z_t||.
        cosine: cos(z_t, z_{t-1}).
        rms: root mean square of z_t.
        score: the stop score, where there is one.
        changes: (A, N) the delta of each position by itself.
        top_ids: (A, N, k) most likely tokens of the read-out of u_t, where asked for.
        top_probs: (A, N, k) their probabilities.
        ranks: (A, N) how many tokens are likelier than the gold one; -1 where none is known.
    """

    loop: int
    rows: list[int]
    delta: Tensor
    cosine: Tensor
    rms: Tensor
    score: Tensor | None = None
    changes: Tensor | None = None
    top_ids: Tensor | None = None
    top_probs: Tensor | None = None
    ranks: Tensor | None = None

    def of(self, row: int) -> Iteration:
        """Return what belongs to one of its rows."""
        at = self.rows.index(row)
        fields = {name: value[at : at + 1] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Iteration(self.loop, [row], **fields)


@dataclass
class TopTokens:
    """What positions show through the head: their likeliest tokens (A, N, k) and these tokens' probabilities.

    ``ranks`` (A, N) tell how many tokens are likelier than the gold one; -1 where none is known.
    """

    top_ids: Tensor
    top_probs: Tensor
    ranks: Tensor | None = None


HIDDEN = -1  # stands for a mask among the tokens of a frame


@dataclass(frozen=True)
class Frame:
    """One pass over the canvas of one row, G tokens of which some are `HIDDEN`.

    Attributes:
        places: the tokens that it predicted, A of them.
        shown: what it predicted there (1, A, k).
        before: the G tokens before the pass.
        after: those after it: with what was committed, and without what was masked again.
    """

    places: list[int]
    shown: TopTokens
    before: list[int]
    after: list[int]


@dataclass(frozen=True)
class ShownStep:
    """The step that a block of latents shows.

    Attributes:
        text: its likeliest tokens, up to the end of the line.
        alternatives: at each position, the likeliest tokens with their probabilities.
        ranks: at each position, how many tokens are likelier than the gold one; None where none is known.
    """

    text: str
    alternatives: tuple[tuple[tuple[str, float], ...], ...]
    ranks: tuple[int | None, ...]


@dataclass
class Trace:
    """The iterations of a loop.

    ``last`` is the reading of the pass that the answer sees: of the position before the latents, and of the latents.
    ``opened`` are the traces of the blocks that a row opened by itself while it answered, in order; their iterations
    are of the latents alone, and their ``last`` is also of what closes the block. ``frames`` are the passes over a
    canvas.

    Args:
        read_out: maps outputs u (A, N, D) to logits (A, N, V); None records no read-outs.
        top_k: how many alternatives a read-out keeps.
        gold: (B, 1 + N) the tokens that the position before the latents and the latents should show, below 0 where none
            is known; None: nothing is known.
        told: called with each iteration as soon as it has run.
    """

    read_out: Callable[[Tensor], Tensor] | None = None
    top_k: int = 5
    iterations: list[Iteration] = field(default_factory=list)
    last: TopTokens | None = None
    gold: Tensor | None = None
    opened: list[Trace] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    told: Callable[[Iteration], None] | None = None

    def read(self, logits: Tensor, gold_AN: Tensor | None = None) -> TopTokens:
        """Return the likeliest tokens of logits (A, N, V), and the ranks of the gold ones."""
        top = logits.float().softmax(-1).topk(min(self.top_k, logits.shape[-1]), dim=-1)
        if gold_AN is None:
            return TopTokens(top.indices, top.values)
        own = logits.gather(-1, gold_AN.clamp(min=0)[..., None])
        ranks = (logits > own).sum(-1)
        return TopTokens(top.indices, top.values, torch.where(gold_AN < 0, -1, ranks))

    @torch.no_grad()
    def record(
        self,
        iteration: int,
        rows: list[int],
        output: Tensor,
        state: Tensor,
        previous: Tensor,
        score: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add ``iteration``, which turned ``previous`` into ``state`` by way of ``output`` u_t (all A, N, D).

        ``mask`` (A, N) is 1 where a position is real; the statistics leave out the others.
        """
        new, old = state.float(), previous.float()
        real: Tensor | float = 1.0
        if mask is not None:
            new, old = new * mask[..., None], old * mask[..., None]
            real = mask.float().mean(1).clamp(min=1e-8)
        changes = (new - old).norm(dim=2) / (new.norm(dim=2) + 1e-8)
        new, old = new.flatten(1), old.flatten(1)
        entry = Iteration(
            loop=iteration,
            rows=rows,
            delta=(new - old).norm(dim=1) / (new.norm(dim=1) + 1e-8),
            cosine=cosine_similarity(new, old, dim=1),
            rms=rms(new)[:, 0] / real**0.5,
            score=score,
            changes=changes,
        )
        if self.read_out is not None:
            reading = self.read(self.read_out(output), None if self.gold is None else self.gold[rows, 1:])
            entry.top_ids, entry.top_probs, entry.ranks = reading.top_ids, reading.top_probs, reading.ranks
        self.iterations.append(entry)
        if self.told is not None:
            self.told(entry)

    def row(self, row: int) -> Trace:
        """Return the trace of one row of the batch, as far as it went."""
        part = Trace(self.read_out, self.top_k)
        for entry in self.iterations:
            if row in entry.rows:
                part.iterations.append(entry.of(row))
        if self.last is not None:
            kept = {name: value[row : row + 1] for name, value in vars(self.last).items() if value is not None}
            part.last = TopTokens(**kept)
        return part

    def shown(self, block: ShownBlock, tokenizer: PreTrainedTokenizerBase) -> ShownStep:
        """Return the step that a block shows, in the trace of one row; a row that has stopped shows its last pass."""
        ran = [entry for entry in self.iterations if entry.loop <= block.iteration]
        found: list[tuple[TopTokens | Iteration, int]] = []
        for at in range(block.first, block.first + block.n):
            if (block.iteration == ANSWER_PASS or at < 0 or not ran) and self.last is not None:
                found.append((self.last, at + 1))  # what comes before the latents is the same in every pass
            elif ran:
                found.append((ran[-1], at))
        words, ids, ranks = [], [], []
        for reading, column in found:
            assert reading.top_ids is not None and reading.top_probs is not None
            best, probs = reading.top_ids[0, column].tolist(), reading.top_probs[0, column].tolist()
            rank = -1 if reading.ranks is None else int(reading.ranks[0, column])
            ids.append(best[0])
            words.append(tuple(zip(token_names(tokenizer, best), probs)))
            ranks.append(None if rank < 0 else rank)
        text = tokenizer.decode(ids)
        return ShownStep(text.partition("\n")[0] if text.strip() else "", tuple(words), tuple(ranks))


class TraceHook(LoopHook):
    """Records what happens in a trace."""

    wants_scores = True

    def __init__(self, trace: Trace):
        self.trace = trace

    def on_iteration(self, step: Step) -> None:
        """Record an iteration of the rows that ran it."""
        now, part = step.moment, step.part
        score, mask = (None if value is None else value[part] for value in (step.score, now.mask_BN))
        self.trace.record(
            step.iteration, step.rows, step.output[part], now.state[part], now.previous[part], score, mask
        )

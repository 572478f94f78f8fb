"""`Trace`: what a loop did, iteration by iteration. Every loop of every method writes this one record.

Shapes: `A` rows still looping, `N` looped positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from innerloop.stabilize import rms


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
        top_ids: (A, N, k) most likely tokens of the read-out of u_t, where asked for.
        top_probs: (A, N, k) their probabilities.
    """

    loop: int
    rows: list[int]
    delta: Tensor
    cosine: Tensor
    rms: Tensor
    score: Tensor | None = None
    top_ids: Tensor | None = None
    top_probs: Tensor | None = None


@dataclass
class Reading:
    """What positions show through the head: their likeliest tokens (A, N, k) and these tokens' probabilities."""

    top_ids: Tensor
    top_probs: Tensor


@dataclass
class Trace:
    """The iterations of a loop.

    ``last`` is the reading of the pass that the answer sees: of the position before the latents, and of the latents.

    Args:
        read_out: maps outputs u (A, N, D) to logits (A, N, V); None records no read-outs.
        top_k: how many alternatives a read-out keeps.
    """

    read_out: Callable[[Tensor], Tensor] | None = None
    top_k: int = 5
    iterations: list[Iteration] = field(default_factory=list)
    last: Reading | None = None

    def read(self, logits: Tensor) -> Reading:
        """Return the likeliest tokens of logits (A, N, V)."""
        top = logits.float().softmax(-1).topk(min(self.top_k, logits.shape[-1]), dim=-1)
        return Reading(top.indices, top.values)

    @torch.no_grad()
    def record(
        self,
        loop: int,
        rows: list[int],
        output: Tensor,
        state: Tensor,
        previous: Tensor,
        score: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add iteration ``loop``, which turned ``previous`` into ``state`` by way of ``output`` u_t (all A, N, D).

        ``mask`` (A, N) is 1 where a position is real; the statistics leave out the others.
        """
        new, old = state.float(), previous.float()
        real: Tensor | float = 1.0
        if mask is not None:
            new, old = new * mask[..., None], old * mask[..., None]
            real = mask.float().mean(1).clamp(min=1e-8)
        new, old = new.flatten(1), old.flatten(1)
        entry = Iteration(
            loop=loop,
            rows=rows,
            delta=(new - old).norm(dim=1) / (new.norm(dim=1) + 1e-8),
            cosine=cosine_similarity(new, old, dim=1),
            rms=rms(new)[:, 0] / real**0.5,
            score=score,
        )
        if self.read_out is not None:
            reading = self.read(self.read_out(output))
            entry.top_ids, entry.top_probs = reading.top_ids, reading.top_probs
        self.iterations.append(entry)

    def row(self, row: int) -> Trace:
        """Return the trace of one row of the batch, as far as it went."""
        part = Trace(self.read_out, self.top_k)
        for entry in self.iterations:
            if row in entry.rows:
                at = entry.rows.index(row)
                fields = {name: value[at : at + 1] for name, value in vars(entry).items() if isinstance(value, Tensor)}
                part.iterations.append(Iteration(entry.loop, [row], **fields))
        if self.last is not None:
            part.last = Reading(self.last.top_ids[row : row + 1], self.last.top_probs[row : row + 1])
        return part

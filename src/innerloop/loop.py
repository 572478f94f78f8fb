"""The inner loop: a state is refined by passes of the model before (or instead of) a word is written.

    z_0 = init
    for t = 1..T:   x_t = inject(z_{t-1}, t);   u_t = f(x_t);   z_t = residual(rescale(u_t), z_0, z_{t-1})

What `f` is makes the method: a pass over latent slots from a cached prefix, a pass that appends one position, a block
of the model's layers over all tokens, a bidirectional pass over a masked answer. The loop does not know.

Shapes: `B` rows, `N` looped positions, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from innerloop.errors import InputError, check_choices
from innerloop.stabilize import RescaleKind, ResidualKind, TimeEmbedding, TimeKind, rescale, residual, rms

Pass = Callable[[Tensor, int], Tensor]
"""``f(x_BND, t) -> u_BND`` for the 1-based iteration ``t``."""


@dataclass(frozen=True)
class LoopSettings:
    """How a state is carried from one iteration to the next; every looping method has these fields.

    Args:
        residual: how an iteration's output is mixed with the initial or the previous state.
        alpha: share of the new state in residuals A and B, in [0, 1].
        rescale: bring each output to the RMS of the embedding table (rms) or leave it (none).
        time: timestep embedding added to each iteration's input.
        feedback_site: what an iteration gives back: the state after the final norm, or before it.
        detach: cut the gradient from each iteration's input, and from what is fed once more in append, to the output
            that it was.
    """

    residual: ResidualKind = "none"
    alpha: float = 0.7
    rescale: RescaleKind = "none"
    time: TimeKind = "none"
    feedback_site: Literal["post_norm", "pre_norm"] = "post_norm"
    detach: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0.0 <= self.alpha <= 1.0:
            raise InputError(f"alpha is {self.alpha}, but it is a share: choose a value between 0 and 1")


@dataclass
class Iteration:
    """One iteration as the trace keeps it; statistics are per row (B,), over all looped positions.

    Attributes:
        loop: 1-based iteration.
        delta: ||z_t - z_{t-1}|| / ||z_t||.
        cosine: cos(z_t, z_{t-1}).
        rms: root mean square of z_t.
        top_ids: (B, N, k) most likely tokens of the read-out of u_t, where asked for.
        top_probs: (B, N, k) their probabilities.
    """

    loop: int
    delta: Tensor
    cosine: Tensor
    rms: Tensor
    top_ids: Tensor | None = None
    top_probs: Tensor | None = None


@dataclass
class Trace:
    """What a loop did, iteration by iteration. Every loop of every method writes this one record.

    Args:
        read_out: maps outputs u (B, N, D) to logits (B, N, V); None records no read-outs.
        top_k: how many alternatives a read-out keeps.
    """

    read_out: Callable[[Tensor], Tensor] | None = None
    top_k: int = 5
    iterations: list[Iteration] = field(default_factory=list)

    @torch.no_grad()
    def record(self, loop: int, output: Tensor, state: Tensor, previous: Tensor) -> None:
        """Add iteration ``loop``, which turned ``previous`` into ``state`` by way of ``output`` u_t (all B, N, D)."""
        new, old = state.float().flatten(1), previous.float().flatten(1)
        entry = Iteration(
            loop=loop,
            delta=(new - old).norm(dim=1) / (new.norm(dim=1) + 1e-8),
            cosine=cosine_similarity(new, old, dim=1),
            rms=rms(new)[:, 0],
        )
        if self.read_out is not None:
            top = self.read_out(output).float().softmax(-1).topk(self.top_k, dim=-1)
            entry.top_probs, entry.top_ids = top.values, top.indices
        self.iterations.append(entry)

    def row(self, row: int) -> Trace:
        """Return the trace of one row of the batch."""
        part = Trace(self.read_out, self.top_k)
        for entry in self.iterations:
            fields = {name: value[row : row + 1] for name, value in vars(entry).items() if isinstance(value, Tensor)}
            part.iterations.append(Iteration(entry.loop, **fields))
        return part


@dataclass
class LoopResult:
    """What a loop leaves behind: the final state z_T, the outputs u_1..u_T, and each row's last input (B, N, D)."""

    state: Tensor
    outputs: list[Tensor]
    last_input: Tensor


class InnerLoop(nn.Module):
    """The loop with its trained parts.

    Args:
        settings: how states are carried over.
        width: the width `D` of the states.
        max_loops: the number of iterations trained for; sizes what is indexed by iteration.
        tau: the RMS that ``rescale`` brings states to (scalar).
    """

    tau: Tensor

    def __init__(self, settings: LoopSettings, width: int, max_loops: int, tau: Tensor):
        super().__init__()
        self.settings = settings
        self.register_buffer("tau", tau.detach().clone())
        self.time = TimeEmbedding(max_loops, width) if settings.time == "lookup" and max_loops > 0 else None

    def rescale(self, output: Tensor) -> Tensor:
        """Apply rho to an output of the model."""
        return rescale(output, self.settings.rescale, self.tau)

    def inject(self, state: Tensor, loop: int) -> Tensor:
        """Make iteration ``loop``'s input x_t from the state before it."""
        if self.settings.detach and loop > 1:
            state = state.detach()
        return state if self.time is None else self.time(state, loop)

    def forward(
        self, f: Pass, state: Tensor, n_loops: int, loops_B: Tensor | None = None, trace: Trace | None = None
    ) -> LoopResult:
        """Run ``n_loops`` iterations of ``f`` from ``state`` z_0 (B, N, D).

        ``loops_B`` gives each row its own number, at most ``n_loops``; after it, the row's state stands still.
        """
        first, last_input, outputs = state, state, []
        for loop in range(1, n_loops + 1):
            inputs, going = self.inject(state, loop), None
            if loops_B is not None:  # a row that is done reads its last state as it is
                going = (loop <= loops_B)[:, None, None]
                still = state.detach() if self.settings.detach else state
                inputs, last_input = torch.where(going, inputs, still), torch.where(going, inputs, last_input)
            else:
                last_input = inputs
            output = f(inputs, loop)
            previous = state
            state = residual(self.rescale(output), first, previous, self.settings.residual, self.settings.alpha)
            if going is not None:
                state = torch.where(going, state, previous)
            outputs.append(output)
            if trace is not None:
                trace.record(loop, output, state, previous)
        return LoopResult(state, outputs, last_input)

"""The inner loop: a state is refined by passes of the model before (or instead of) a word is written.

    z_0 = init
    for t = 1..T:   x_t = inject(z_{t-1}, t);   u_t = f(x_t; weights of t);   z_t = residual(rescale(u_t), z_0, z_{t-1})
                    a row leaves when its stop score has reached the threshold

What `f` is makes the method: a pass over latent slots from a cached prefix, a pass that appends one position, a block
of the model's layers over all tokens, a bidirectional pass over a masked answer. The loop does not know.

Shapes: `B` rows, `N` looped positions, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from innerloop.config.loop import LoopSettings
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError
from innerloop.halting.controller import StopController
from innerloop.halting.evidence import RowInfo, StopInputs
from innerloop.halting.rule import rule_for
from innerloop.loop.fixed_point import jacobian_gain, solve
from innerloop.loop.hooks import Edit
from innerloop.loop.lora import LoopLora
from innerloop.loop.stabilize import (
    Rescale,
    Residual,
    TimeEmbedding,
    at_least_fp32,
)
from innerloop.loop.trace import Trace


class Pass(Protocol):
    """``f``: one pass of the model over the state."""

    compacts: bool
    """Whether rows that have ended leave the pass (then `keep_rows` is called), or stay and stand still."""

    state_mask: Tensor | None
    """1 where a position of the state (A, N) is real; None when all are."""

    before: Tensor | None
    """The state (A, 1, D) of the position before the region, for loops that shift; None where there is none."""

    row_info: RowInfo | None
    """What else stop rules may know of the rows; None: nothing."""

    def __call__(self, inputs: Tensor, loop: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return u_t (B, N, D) for the input x_t of the 1-based iteration ``loop``.

        Rows that are not active are not read. The first ``n_extra`` inputs are no part of the state and have no output.
        """

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with the rows ``rows`` (indices into those that ran last); the others have ended."""

    def probe(self) -> Pass:
        """Return a pass with the same past that may be called over and over and leaves nothing behind."""

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows that ran last, for what looks at their states."""


Watch = Callable[[Pass, StopInputs, "Tensor | None", Callable[[], Tensor]], None]
"""Told of each iteration: the pass, the moment, the score, and what reads out the outputs (B, N, V)."""


@dataclass
class LoopResult:
    """What a loop leaves behind.

    Attributes:
        state: the final state z_T of every row (B, N, D).
        first: z_0 (B, N, D).
        outputs: for each iteration, the rows that ran it and their outputs u_t (A, N, D).
        states: for each iteration, the rows that ran it and their states z_t (A, N, D).
        n_loops: how many iterations each row ran.
        gain: the factor by which the loop stretched a small change of its state, if asked for (scalar).
        stopped: which rows the stop score ended; the others ran all they were given.
        ponder_B: ACT's cost N + R of every row.
    """

    state: Tensor
    first: Tensor
    outputs: list[tuple[list[int], Tensor]]
    states: list[tuple[list[int], Tensor]]
    n_loops: list[int]
    gain: Tensor | None = None
    stopped: list[bool] = field(default_factory=list)
    ponder_B: Tensor | None = None


def _read(read_out: Callable[[Tensor], Tensor] | None, output: Tensor) -> Tensor:
    assert read_out is not None
    return read_out(output)


def scatter(parts: list[tuple[list[int], Tensor]], like: Tensor) -> Tensor:
    """Put the rows of several parts in order: (B, ...) for parts that together hold each row at most once."""
    if len(parts) == 1 and parts[0][0] == list(range(len(like))):
        return parts[0][1]
    rows = torch.tensor([row for part, _ in parts for row in part], device=like.device)
    return like.new_zeros(like.shape).index_copy(0, rows, torch.cat([values for _, values in parts]).to(like.dtype))


class SlotOffsets(nn.Module):
    """What distinguishes slots: a row each, added to the embedding of <lat>; zero at the start."""

    def __init__(self, n_slots: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(n_slots, width))

    def forward(self, region_BND: Tensor) -> Tensor:
        """Return the embeddings (B, N, D) of the slots."""
        return region_BND + self.table[: region_BND.shape[1]].to(region_BND.dtype)


class InnerLoop(nn.Module):
    """The loop with its trained parts.

    Args:
        settings: how states are carried over.
        width: the width `D` of the states.
        max_loops: the number of iterations trained for; sizes what is indexed by iteration.
        tau: the RMS that ``rescale`` brings states to (scalar).
        backbone: whose weights loop-wise LoRA updates.
        n_slots: give each of so many slots an embedding of its own; 0: all share that of <lat>.
        soft: (alpha, beta); a state z is fed back as alpha z + beta E^T softmax(W z), a mixture of the words it shows.
    """

    def __init__(
        self,
        settings: LoopSettings,
        width: int,
        max_loops: int,
        tau: Tensor,
        backbone: Backbone | None = None,
        n_slots: int = 0,
        soft: tuple[float, float] = (1.0, 0.0),
    ):
        super().__init__()
        if soft[1] > 0 and backbone is None:
            raise InputError("soft thinking needs the words of a backbone")
        self.soft, self._words = soft, [backbone]  # in a list, so that it is no part of the loop
        s = self.settings = settings
        self.max_loops = max_loops
        n = max(max_loops, 1)
        self.rescale = Rescale(
            s.rescale, width, tau, s.adapter_width, s.project_dropout, s.adapter_gain, s.project_norm
        )
        self.residual = Residual(s.residual, s.alpha, s.alpha_learn, s.gate_shape, s.gate_kind, width, n)
        self.time = None
        if s.time != "none" and max_loops > 0:
            self.time = TimeEmbedding(s.time, s.time_inject, n, width, s.time_norm, s.noise_level)
        self.slots = SlotOffsets(n_slots, width) if n_slots else None
        self.lora = None
        if s.lora != "none" and max_loops > 0:
            if backbone is None:
                raise InputError("loop-wise LoRA needs a backbone to update")
            self.lora = LoopLora(backbone, n, s.lora_rank, s.lora_gamma, s.lora, s.lora_targets, s.lora_beyond)
        self.stop = rule_for(s, width)
        self.watch: Watch | None = None
        self.edit: Edit | None = None

    def weights(self, loop: int) -> AbstractContextManager[None]:
        """Use iteration ``loop``'s weights in a block (0: the base weights)."""
        return nullcontext() if self.lora is None or loop < 1 else self.lora.at(loop)

    def inject(self, state: Tensor, loop: int, change_B: Tensor | None = None, noisy: bool = True) -> Tensor:
        """Make iteration ``loop``'s input x_t from the state before it.

        ``change_B`` is the relative change of the state in the iteration before (1 in the first).
        """
        s = self.settings
        if s.detach and loop > 1:
            state = state.detach()
        level = None
        noise = s.noise if self.training and noisy else 0.0
        if s.noise_level == "injected":
            level = torch.full((len(state),), noise, device=state.device)
        elif s.noise_level == "delta":
            level = torch.ones(len(state), device=state.device) if change_B is None else change_B.detach()
        inputs = state if self.time is None else self.time(state, loop, level)
        if noise > 0:
            n_extra = inputs.shape[1] - state.shape[1]
            error = noise * self.rescale.tau.to(state.dtype) * torch.randn_like(state)
            inputs = torch.cat([inputs[:, :n_extra], inputs[:, n_extra:] + error], dim=1)
        return inputs

    def feed_back(self, output: Tensor, before: Tensor | None) -> Tensor:
        """Return h' (B, N, D) for an output u; ``before`` (B, 1, D) is the state of the position before the region."""
        rescaled = self._restate(output)
        if self.settings.shift:
            assert before is not None
            rescaled = torch.cat([self._restate(before), rescaled[:, :-1]], dim=1)
        return rescaled if self.settings.feedback_scale == 1.0 else self.settings.feedback_scale * rescaled

    def _restate(self, output: Tensor) -> Tensor:
        """Return rho(u), mixed with the embeddings of the words that it shows if so asked."""
        state, (alpha, beta), backbone = self.rescale(output), self.soft, self._words[0]
        if beta == 0 or backbone is None:
            return state if alpha == 1 else alpha * state
        shares = at_least_fp32(backbone.head(state)).softmax(-1).to(state.dtype)
        table = backbone.embed(torch.arange(shares.shape[-1], device=state.device))
        return alpha * state + beta * (shares @ table.to(state.dtype))

    def step(
        self,
        f: Pass,
        state: Tensor,
        first: Tensor,
        loop: int,
        change_B: Tensor | None = None,
        active_B: Tensor | None = None,
        noisy: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one iteration; return (z_t, h'_t, u_t), each (B, N, D)."""
        inputs = self.inject(state, loop, change_B, noisy)
        output = f(inputs, loop, active_B, n_extra=inputs.shape[1] - state.shape[1])
        rescaled = self.feed_back(output, f.before)
        return self.residual(rescaled, first, state, loop), rescaled, output

    def forward(
        self,
        f: Pass,
        state: Tensor,
        n_loops: Sequence[int],
        trace: Trace | None = None,
        read_out: Callable[[Tensor], Tensor] | None = None,
        read_answer: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        n_free: int = 0,
    ) -> LoopResult:
        """Iterate ``f`` from ``state`` z_0 (B, N, D).

        Args:
            f: the pass.
            state: z_0.
            n_loops: each row's number of iterations, the most where rows may stop by themselves.
            trace: filled with what happens.
            read_out: maps outputs u to logits; needed by the stop scores that look at words.
            read_answer: maps states z_t, and which rows are active (None: all), to the logits (A, 1, V) of the answer's
                first token, which scores that look at words then read instead; needed by stop_site=answer.
            n_free: so many iterations at first are run without a gradient, and not kept.
        """
        s, least, limit = self.settings, min(n_loops), max(n_loops)
        if self.edit is not None:
            self.edit.enter(f, state, n_loops)
        if s.solver != "none" and limit > 0:
            return self._left(self._solve(f, state, n_loops, trace))
        stops = self.stop is not None and not self.training
        ending = None
        if self.stop is not None and (stops or s.stop == "act"):
            ending = StopController(self.stop, s, state, n_loops, f.row_info)
        going, halted, ran = list(range(len(state))), set[int](), [0] * len(state)
        whole, first, change_B = state, state, None
        result = LoopResult(state, state, [], [], ran)
        ended: list[tuple[list[int], Tensor]] = []
        for loop in range(1, limit + 1):
            # Rows that have ended leave, or stand still where the pass cannot spare them.
            staying = list(range(len(going)))
            if halted or loop > least:
                staying = [i for i, row in enumerate(going) if n_loops[row] >= loop and row not in halted]
            active_B = None
            if not staying:
                break
            if len(staying) < len(going) and f.compacts:
                leaving = [i for i in range(len(going)) if i not in set(staying)]
                ended.append(([going[i] for i in leaving], state[leaving]))
                f.keep_rows(staying)
                state, first = state[staying], first[staying]
                change_B = None if change_B is None else change_B[staying]
                if ending is not None:
                    ending.keep_rows(staying)
                going = [going[i] for i in staying]
            elif len(staying) < len(going):
                active_B = torch.tensor([i in set(staying) for i in range(len(going))], device=whole.device)
            for i in staying if active_B is not None else range(len(going)):
                ran[going[i]] += 1

            cut = [s.bptt is not None and 1 < loop == n_loops[row] - s.bptt + 1 for row in going]  # never z_0
            previous = state.detach() if all(cut) else state
            if any(cut) and not all(cut):
                previous = torch.where(torch.tensor(cut, device=state.device)[:, None, None], state.detach(), state)
            if self.edit is not None:
                previous = self.edit.feed(previous, loop, going)
            learns = torch.is_grad_enabled() and s.bptt != 0 and loop > n_free  # else the cache too is out of reach
            with torch.set_grad_enabled(learns):
                new, rescaled, output = self.step(f, previous, first, loop, change_B, active_B)
            if active_B is not None:
                new = torch.where(active_B[:, None, None], new, previous)
            if s.noise_level == "delta":
                change_B = relative_change(new, previous, f.state_mask)
            if loop > n_free:
                result.outputs.append((going, output))
                result.states.append((going, new))
            score = None
            moment = StopInputs(new, previous, rescaled, None, f.state_mask, loop=loop, limit=limit)
            if ending is not None and (loop < limit or trace is not None or self.watch is not None or s.stop == "act"):
                if ending.reads_words(loop) and read_answer is not None:
                    moment.logits, moment.logits_mask = read_answer(new, active_B), None
                elif ending.reads_words(loop) and read_out is not None:
                    moment.logits, moment.logits_mask = read_out(output), f.state_mask
                score = ending.look(moment, f.row_info)
                ending.mix(new, loop, going)
                if loop < limit and score is not None:
                    f.count(ending.flops(moment, active_B))
                if stops and loop < limit:
                    halted |= {row for row, is_done in zip(going, ending.done(loop)) if is_done}
            if self.watch is not None:
                self.watch(f, moment, score, partial(_read, read_out, output))
            if trace is not None:
                kept = [i for i in staying] if active_B is not None else list(range(len(going)))
                part = slice(None) if active_B is None else kept
                trace.record(
                    loop,
                    [going[i] for i in kept],
                    output[part],
                    new[part],
                    previous[part],
                    None if score is None else score[part],
                    None if f.state_mask is None else f.state_mask[part],
                )
            state = new
        result.state = scatter([*ended, (going, state)], whole)
        result.stopped = [row in halted for row in range(len(whole))]
        if ending is not None and ending.mixed is not None:
            result.state, result.ponder_B = ending.mixed, ending.ponder_B
        if s.bptt == 0:
            result.state = result.state.detach()
        if s.spectral_weight > 0 and limit > 0 and self.training:
            probe, mask = f.probe(), f.state_mask

            def stretch(z: Tensor) -> Tensor:
                return real(self.step(probe, z, first, limit, change_B, noisy=False)[0], mask)

            result.gain = jacobian_gain(stretch, real(state, mask))
        return self._left(result)

    def _left(self, result: LoopResult) -> LoopResult:
        """Return the result with the final state that an edit leaves."""
        if self.edit is not None:
            result.state = self.edit.leave(result.state, result.n_loops)
        return result

    def _solve(self, f: Pass, state: Tensor, n_loops: Sequence[int], trace: Trace | None) -> LoopResult:
        """Iterate to a fixed point instead of a fixed number of times; rows that stand still wait for the others."""
        s, first = self.settings, state
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def g(z: Tensor) -> Tensor:
            new, _, output = self.step(f, z, first, 1)
            seen[:] = [(output, new, z)]
            return real(new, f.state_mask)

        def on_iteration(loop: int, active_B: Tensor) -> None:
            if trace is not None:
                rows = torch.nonzero(active_B)[:, 0]
                output, new, old = (part[rows] for part in seen[0])
                mask = None if f.state_mask is None else f.state_mask[rows]
                trace.record(loop, rows.tolist(), output, new, old, mask=mask)

        start = real(state, f.state_mask)
        final, ran = solve(g, start, s.solver, n_loops, s.solver_tol, s.solver_gradient, s.alpha, on_iteration)
        gain = jacobian_gain(g, final) if s.spectral_weight > 0 and self.training else None
        rows = list(range(len(state)))
        return LoopResult(final, state, [(rows, seen[0][0])], [(rows, final)], ran, gain)


def real(states: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Return states (B, N, D) with zeros where a position is padding, so that it has no say in a row's norm."""
    return states if mask_BN is None else states * mask_BN[..., None]


def relative_change(new: Tensor, previous: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Return ||new - previous|| / ||new|| of each row (B,) over real positions, in fp32."""
    new, previous = real(new, mask_BN), real(previous, mask_BN)
    difference = (new - previous).float().flatten(1).norm(dim=1)
    return difference / (new.float().flatten(1).norm(dim=1) + 1e-8)

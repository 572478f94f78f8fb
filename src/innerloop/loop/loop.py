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

import torch
from torch import Tensor, nn

from innerloop.config.loop import FixedPointSettings, LoopSettings
from innerloop.config.stopping import StopSettings
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.onlooker import Onlooker
from innerloop.errors import InputError
from innerloop.halting.controller import StopController
from innerloop.halting.evidence import StopInputs
from innerloop.halting.rule import StopRule, rule_for
from innerloop.loop.fixed_point import jacobian_gain, solve
from innerloop.loop.hooks import LoopHook, Pass, Probed, Step
from innerloop.loop.lora import LoopLora
from innerloop.loop.rows import Rows
from innerloop.loop.stabilize import Rescale, Residual, TimeEmbedding, at_least_fp32, random_states
from innerloop.loop.trace import Trace, TraceHook

ReadAnswer = Callable[[Tensor, "Tensor | None"], Tensor]
NEVER, UNSOLVED = StopSettings(), FixedPointSettings()


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


class SlotOffsets(nn.Module):
    """What distinguishes slots: a row each, added to the embedding of <lat>; zero at the start."""

    def __init__(self, n_slots: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(n_slots, width))

    def forward(self, region_BND: Tensor) -> Tensor:
        """Return the embeddings (B, N, D) of the slots."""
        return region_BND + self.table[: region_BND.shape[1]].to(region_BND.dtype)


class InnerLoop(Onlooker):
    """The loop with its trained parts.

    Args:
        settings: how states are carried over.
        width: the width `D` of the states.
        max_loops: the number of iterations trained for; sizes what is indexed by iteration.
        tau: the RMS that ``rescale`` brings states to (scalar).
        backbone: whose weights loop-wise LoRA updates.
        stop: when a row ends by itself.
        fixed_point: whether a fixed point is looked for, and how far the loop may stretch.
        n_slots: give each of so many slots an embedding of its own; 0: all share that of <lat>.
        soft: (alpha, beta); a state z is fed back as alpha z + beta E^T softmax(W z), a mixture of the words it shows.
    """

    words: Backbone | None
    stop: StopRule | None

    def __init__(
        self,
        settings: LoopSettings,
        width: int,
        max_loops: int,
        tau: Tensor,
        backbone: Backbone | None = None,
        stop: StopSettings = NEVER,
        fixed_point: FixedPointSettings = UNSOLVED,
        n_slots: int = 0,
        soft: tuple[float, float] = (1.0, 0.0),
    ):
        super().__init__()
        if soft[1] > 0 and backbone is None:
            raise InputError("soft thinking needs the words of a backbone")
        self.soft = soft
        self.look_at(words=backbone)
        s = self.settings = settings
        self.stopping, self.fixed_point = stop, fixed_point
        self.max_loops = max_loops
        n = max(max_loops, 1)
        self.rescale = Rescale(s.rescale, width, tau, s.width, s.gain, s.norm)
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
        self.stop = rule_for(stop, width)
        self.hooks: tuple[LoopHook, ...] = ()

    def weights(self, iteration: int) -> AbstractContextManager[None]:
        """Use ``iteration``'s weights in a block (0: the base weights)."""
        return nullcontext() if self.lora is None or iteration < 1 else self.lora.at(iteration)

    def begin(self, state: Tensor) -> Tensor:
        """Return the states that iterations begin at: z_0, and in training random ones for some rows."""
        share = self.settings.random_starts
        return random_states(state, share) if self.training and share > 0 else state

    def inject(self, state: Tensor, iteration: int, change_B: Tensor | None = None, noisy: bool = True) -> Tensor:
        """Make ``iteration``'s input x_t from the state before it.

        ``change_B`` is the relative change of the state in the iteration before (1 in the first).
        """
        s = self.settings
        if s.detach and iteration > 1:
            state = state.detach()
        level = None
        noise = s.noise if self.training and noisy else 0.0
        if s.noise_level == "injected":
            level = torch.full((len(state),), noise, device=state.device)
        elif s.noise_level == "delta":
            level = torch.ones(len(state), device=state.device) if change_B is None else change_B.detach()
        inputs = state if self.time is None else self.time(state, iteration, level)
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
        return rescaled if self.settings.scale == 1.0 else self.settings.scale * rescaled

    def _restate(self, output: Tensor) -> Tensor:
        """Return rho(u), mixed with the embeddings of the words that it shows if so asked."""
        state, (alpha, beta), backbone = self.rescale(output), self.soft, self.words
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
        iteration: int,
        change_B: Tensor | None = None,
        active_B: Tensor | None = None,
        noisy: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one iteration; return (z_t, h'_t, u_t), each (B, N, D)."""
        inputs = self.inject(state, iteration, change_B, noisy)
        output = f(inputs, iteration, active_B, n_extra=inputs.shape[1] - state.shape[1])
        rescaled = self.feed_back(output, f.before)
        return self.residual(rescaled, first, state, iteration), rescaled, output

    def forward(
        self,
        f: Pass,
        state: Tensor,
        n_loops: Sequence[int],
        trace: Trace | None = None,
        read_out: Callable[[Tensor], Tensor] | None = None,
        read_answer: ReadAnswer | None = None,
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
                first token, which scores that look at words then read instead; needed by stop.site=answer.
            n_free: so many iterations at first are run without a gradient, and not kept.
        """
        hooks = self.hooks if trace is None else (*self.hooks, TraceHook(trace))
        for hook in hooks:
            hook.on_start(f, state, n_loops)
        if self.fixed_point.solver != "none" and max(n_loops) > 0:
            result = self._solve(f, state, n_loops, hooks)
        else:
            result = self._iterate(f, state, n_loops, hooks, Readers(read_out, read_answer), n_free)
        for hook in hooks:
            result.state = hook.on_end(result.state, result.n_loops)
        return result

    def _iterate(
        self,
        f: Pass,
        state: Tensor,
        n_loops: Sequence[int],
        hooks: Sequence[LoopHook],
        readers: Readers,
        n_free: int,
    ) -> LoopResult:
        """Iterate until every row has run its number of times, or stopped."""
        rows, limit, stop = Rows(f, state, n_loops), max(n_loops), None
        if self.stop is not None and (not self.training or self.stopping.rule == "act"):
            stop = StopController(self.stop, self.stopping, state, n_loops, f.row_info)
        rows.state = self.begin(state)
        result = LoopResult(state, state, [], [], rows.ran)
        for iteration in range(1, limit + 1):
            if not rows.advance(iteration, stop):
                break
            moment, output = self._advance(f, rows, iteration, n_free, hooks)
            moment.limit = limit
            if iteration > n_free:
                result.outputs.append((rows.going, output))
                result.states.append((rows.going, moment.state))
            score = None
            if stop is not None:
                score = self._stop(f, rows, stop, moment, partial(readers.show, moment, output, rows.active_B), hooks)
            ran, part = [rows.going[i] for i in rows.active], slice(None) if rows.active_B is None else rows.active
            step = Step(f, iteration, ran, part, output, moment, score, partial(readers.words, output))
            for hook in hooks:
                hook.on_iteration(step)
            rows.state = moment.state
        result.state, result.stopped = rows.final(), [row in rows.halted for row in range(len(state))]
        if stop is not None and stop.mixed is not None:
            result.state, result.ponder_B = stop.mixed, stop.ponder_B
        if self.settings.bptt == 0:
            result.state = result.state.detach()
        if self.fixed_point.spectral_weight > 0 and limit > 0 and self.training:
            result.gain = self._gain(f, rows, limit)
        return result

    def _advance(
        self, f: Pass, rows: Rows, iteration: int, n_free: int, hooks: Sequence[LoopHook]
    ) -> tuple[StopInputs, Tensor]:
        """Run one iteration of the rows that are going; return what it made of their states, and u_t."""
        s = self.settings
        previous = rows.cut(iteration, s.bptt)
        for hook in hooks:
            previous = hook.on_input(previous, iteration, rows.going)
        learns = torch.is_grad_enabled() and s.bptt != 0 and iteration > n_free  # else the cache too is out of reach
        with torch.set_grad_enabled(learns):
            new, rescaled, output = self.step(f, previous, rows.first, iteration, rows.change_B, rows.active_B)
        if rows.active_B is not None:
            new = torch.where(rows.active_B[:, None, None], new, previous)
        if s.noise_level == "delta":
            rows.change_B = relative_change(new, previous, f.state_mask)
        return StopInputs(new, previous, rescaled, None, f.state_mask, iteration=iteration), output

    def _stop(
        self,
        f: Pass,
        rows: Rows,
        stop: StopController,
        moment: StopInputs,
        show: Callable[[], None],
        hooks: Sequence[LoopHook],
    ) -> Tensor | None:
        """Score an iteration and let rows stop; return the scores, None where nobody looks."""
        is_last = moment.iteration == moment.limit
        if is_last and self.stopping.rule != "act" and not any(hook.wants_scores for hook in hooks):
            return None
        if stop.reads_words(moment.iteration):
            show()
        score = stop.look(moment, f.row_info)
        stop.mix(moment.state, moment.iteration, rows.going)
        if not is_last and score is not None:
            f.count(stop.flops(moment, rows.active_B))
        if not is_last and not self.training:
            rows.halted |= {row for row, is_done in zip(rows.going, stop.done(moment.iteration)) if is_done}
        return score

    def _gain(self, f: Pass, rows: Rows, iteration: int) -> Tensor:
        """Return the factor by which the last iteration stretches a small change of the state."""
        assert isinstance(f, Probed)
        probe, mask = f.probe(), f.state_mask

        def stretch(z: Tensor) -> Tensor:
            return real(self.step(probe, z, rows.first, iteration, rows.change_B, noisy=False)[0], mask)

        return jacobian_gain(stretch, real(rows.state, mask))

    def _solve(self, f: Pass, state: Tensor, n_loops: Sequence[int], hooks: Sequence[LoopHook]) -> LoopResult:
        """Iterate to a fixed point instead of a fixed number of times; rows that stand still wait for the others."""
        s, first = self.fixed_point, state
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def g(z: Tensor) -> Tensor:
            new, _, output = self.step(f, z, first, 1)
            seen[:] = [(output, new, z)]
            return real(new, f.state_mask)

        def on_iteration(iteration: int, active_B: Tensor) -> None:
            rows = torch.nonzero(active_B)[:, 0].tolist() if hooks else []
            for hook in hooks:
                output, new, old = seen[0]
                moment = StopInputs(new, old, new, None, f.state_mask, iteration=iteration, limit=max(n_loops))
                hook.on_iteration(
                    Step(f, iteration, rows, rows, output, moment, None, partial(Readers(None, None).words, output))
                )

        start = real(state, f.state_mask)
        final, ran = solve(g, start, s.solver, n_loops, s.tol, s.gradient, self.settings.alpha, on_iteration)
        gain = jacobian_gain(g, final) if s.spectral_weight > 0 and self.training else None
        rows = list(range(len(state)))
        return LoopResult(final, state, [(rows, seen[0][0])], [(rows, final)], ran, gain)


@dataclass
class Readers:
    """What reads words off outputs, and off the answer that a state would give."""

    read_out: Callable[[Tensor], Tensor] | None
    read_answer: ReadAnswer | None

    def words(self, output: Tensor) -> Tensor:
        """Return the logits (A, N, V) that outputs show."""
        assert self.read_out is not None
        return self.read_out(output)

    def show(self, moment: StopInputs, output: Tensor, active_B: Tensor | None) -> None:
        """Put the words that a stop rule reads where it looks."""
        if self.read_answer is not None:
            moment.logits, moment.logits_mask = self.read_answer(moment.state, active_B), None
        elif self.read_out is not None:
            moment.logits, moment.logits_mask = self.read_out(output), moment.mask_BN


def real(states: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Return states (B, N, D) with zeros where a position is padding, so that it has no say in a row's norm."""
    return states if mask_BN is None else states * mask_BN[..., None]


def relative_change(new: Tensor, previous: Tensor, mask_BN: Tensor | None = None) -> Tensor:
    """Return ||new - previous|| / ||new|| of each row (B,) over real positions, in fp32."""
    new, previous = real(new, mask_BN), real(previous, mask_BN)
    difference = (new - previous).float().flatten(1).norm(dim=1)
    return difference / (new.float().flatten(1).norm(dim=1) + 1e-8)

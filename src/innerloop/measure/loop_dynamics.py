"""A loop run twice, the second time nudged: how each iteration moves its state, stretches and remembers a change.

Shapes: `B` rows, `A` of them still looping, `N` looped positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity

from innerloop.loop.fixed_point import Map
from innerloop.loop.hooks import edited
from innerloop.loop.loop import InnerLoop, LoopResult, Pass, real, relative_change

POWER_ITERATIONS = 20
SETTLING = 10  # of them, before growth counts
NUDGE = 1e-3  # size of the change whose growth is followed, relative to the state
LOGITS_AT_ONCE = 2**24
NOTHING = 1e-20


class Jacobians:
    """Measures the spectral radius of each iteration just before it runs; an `innerloop.loop.hooks.Edit`.

    Args:
        loop: the loop, with its settings and weights.

    Attributes:
        radii: for each iteration the rows that are about to run it, and their spectral radii (A,).
    """

    def __init__(self, loop: InnerLoop):
        self.loop = loop
        self.radii: list[tuple[list[int], Tensor]] = []

    def begin(self, batch: Any, places: Sequence[int]) -> None:
        """Nothing depends on the batch."""

    def enter(self, f: Pass | None, state: Tensor, n_loops: Sequence[int]) -> None:
        """Learn what is iterated, and from where."""
        self.f, self.first = f, state
        self.before: tuple[list[int], Tensor] | None = None
        self.radii.clear()

    def feed(self, state: Tensor, loop: int, going: Sequence[int]) -> Tensor:
        """Measure the iteration at its input."""
        assert self.f is not None
        probe, mask, first = self.f.probe(), self.f.state_mask, self.first[list(going)]
        change_B: Tensor | None = None
        if self.before is not None and self.loop.settings.noise_level == "delta":
            rows, before = self.before
            change_B = relative_change(state, before[[rows.index(row) for row in going]], mask)
        self.before = list(going), state

        def g(z: Tensor) -> Tensor:
            return real(self.loop.step(probe, z, first, loop, change_B, noisy=False)[0], mask)

        self.radii.append((list(going), spectral_radius(g, real(state, mask))))
        return state

    def leave(self, state: Tensor, ran: Sequence[int]) -> Tensor:
        """Leave the state as it is."""
        return state

    def show(self, thought: Any, batch: Any) -> Any:
        """Leave the thought as it is."""
        return thought


class Nudge(Jacobians):
    """Changes what the first iteration is fed a little, in the same direction for every example."""

    def feed(self, state: Tensor, loop: int, going: Sequence[int]) -> Tensor:
        """Change the first input by `NUDGE` of its size."""
        if loop > 1:
            return state
        assert self.f is not None
        self.change = NUDGE * _sizes(real(state, self.f.state_mask)) * _direction(state)
        return state + self.change


def _direction(state: Tensor) -> Tensor:
    """Return a direction (1, N, D) of length one, the same for all rows."""
    drawn = torch.randn(state.shape[1:], generator=torch.Generator().manual_seed(0))
    return (drawn / drawn.norm()).to(state.device, state.dtype)[None]


def _sizes(states: Tensor) -> Tensor:
    """Return the norm of each row (B, 1, 1)."""
    return states.float().flatten(1).norm(dim=1).clamp(min=1e-30)[:, None, None].to(states.dtype)


@torch.no_grad()
def spectral_radius(g: Map, state: Tensor) -> Tensor:
    """Return for each row (B,) the spectral radius of dg/dz at ``state`` (B, N, D); rows must not depend on each other.

    Power iteration with Jacobian-vector products. Where the largest eigenvalues are a complex pair, single factors
    vary while the vector turns, so their geometric mean is taken after it has settled.
    """
    vector = _direction(state).expand_as(state)
    logs = []
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the other kernels have no JVP
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)  # torch's own
        for _ in range(POWER_ITERATIONS):
            with forward_ad.dual_level():
                output = g(forward_ad.make_dual(state, vector.contiguous()))
                tangent = forward_ad.unpack_dual(output).tangent
            vector = torch.zeros_like(state) if tangent is None else tangent
            size = _sizes(vector)
            logs.append(size.float().flatten().log())
            vector = vector / size
    radius_B = torch.stack(logs[SETTLING:]).mean(0).exp()
    return torch.where(radius_B < NOTHING, 0.0, radius_B)  # a change that is gone, as after k Jacobi iterations


@torch.no_grad()
def watch_loop(
    run: Callable[[], tuple[LoopResult, Tensor | None]],
    loop: InnerLoop,
    read_out: Callable[[Tensor], Tensor] | None = None,
    radius: bool = True,
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Run a loop twice, the second time nudged; return each iteration's measures (B,) and states (B, N, D).

    Among the measures, ``ran`` tells which rows ran the iteration; positions that are not real are zero in the states.

    Args:
        run: runs the loop, twice the same, and tells which positions are real (B, N); None: all.
        loop: the loop that it runs.
        read_out: maps outputs to logits, for ``kl``.
        radius: also measure Jacobians, which costs as many passes as `POWER_ITERATIONS` for each.
    """
    jacobians, nudge = Jacobians(loop), Nudge(loop)
    with edited(loop, jacobians) if radius else nullcontext():
        result, mask_BN = run()
    with edited(loop, nudge):
        other, _ = run()

    n_rows = len(result.first)
    ran = torch.tensor(result.n_loops)
    states = [_full(rows, states, result.first) for rows, states in result.states]
    nudged = [_full(rows, states, result.first) for rows, states in other.states]
    states, nudged = ([real(s, mask_BN) for s in some] for some in (states, nudged))
    path = [real(result.first, mask_BN).float(), *states]
    found: list[dict[str, Tensor]] = []
    shown: Tensor | None = None
    for t, (_, output) in enumerate(result.outputs, 1):
        new, old = path[t].flatten(1), path[t - 1].flatten(1)
        entry = {
            "change": (new - old).norm(dim=1) / new.norm(dim=1).clamp(min=1e-30),
            "cosine": cosine_similarity(new, old, dim=1),
            "drift": new.norm(dim=1) / path[1].flatten(1).norm(dim=1).clamp(min=1e-30),
            "size": _rms(new, path[t].shape[1:], mask_BN),
            "growth": (nudged[t - 1] - states[t - 1]).flatten(1).norm(dim=1)
            / nudge.change.float().flatten(1).norm(dim=1).clamp(min=1e-30),
        }
        if t > 1:
            entry["step_cosine"] = cosine_similarity(new - old, old - path[t - 2].flatten(1), dim=1)
        if radius:
            entry["radius"] = _full(*jacobians.radii[t - 1], torch.empty(n_rows))
        if read_out is not None:
            output_B = _full(result.outputs[t - 1][0], output, result.first)
            if shown is not None:
                entry["kl"] = _kl(output_B, shown, read_out, mask_BN)
            shown = output_B
        gone = (ran < t).to(new.device)
        entry = {name: value.float().masked_fill(gone.to(value.device), math.nan) for name, value in entry.items()}
        found.append(entry | {"ran": ~gone})
    return found, states


def _full(rows: list[int], values: Tensor, like: Tensor) -> Tensor:
    """Put the values of some rows in their places (B, ...), NaN in the others, in fp32."""
    whole = torch.full((len(like), *values.shape[1:]), math.nan, device=values.device)
    whole[rows] = values.float()
    return whole


def _rms(flat: Tensor, shape: Sequence[int], mask_BN: Tensor | None) -> Tensor:
    """Return the RMS over real positions of each row, given padded ones are zero."""
    n_B: Tensor | int = shape[0] if mask_BN is None else mask_BN.sum(1)
    return flat.norm(dim=1) / (n_B * shape[1]) ** 0.5


def _kl(new: Tensor, old: Tensor, read_out: Callable[[Tensor], Tensor], mask_BN: Tensor | None) -> Tensor:
    """Return KL(new || old) of the read-outs of outputs (B, N, D), in nats, a mean over real positions (B,)."""
    kept = torch.ones(new.shape[:2], device=new.device) if mask_BN is None else mask_BN.float()
    n_vocab = read_out(new[:1, :1]).shape[-1]
    size, parts = max(LOGITS_AT_ONCE // (new.shape[1] * n_vocab), 1), []
    for a, b in zip(new.split(size), old.split(size)):
        log_p, log_q = (read_out(x).float().log_softmax(-1) for x in (a, b))
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return (torch.cat(parts) * kept).sum(1) / kept.sum(1).clamp(min=1)

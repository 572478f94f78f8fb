"""What keeps a loop stable: timestep embedding, rescaling and residuals (slr.md, section 3).

Shapes: `B` rows, `N` looped positions, `D` width. Statistics are in fp32 whatever the states' type.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu, softmax

from innerloop.config.loop import (
    AlphaLearn,
    GateKind,
    GateShape,
    NoiseLevel,
    RescaleKind,
    ResidualKind,
    TimeInject,
    TimeKind,
)

CUT = 2.0  # standard deviations, at which random states are cut off
TIME_WIDTH = 256  # d_e, the width of the sinusoidal features
GATE_WIDTH = 256  # d_g, the hidden width of the gates of residual C


def at_least_fp32(values: Tensor) -> Tensor:
    """Widen half precision to fp32, where sums of squares and exponentials are safe; double stays double."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rms(states: Tensor) -> Tensor:
    """Return the root mean square over the last dimension, kept as size 1, in fp32 or better."""
    return at_least_fp32(states).pow(2).mean(-1, keepdim=True).sqrt()


def random_states(like: Tensor, share: float = 1.0) -> Tensor:
    """Return states (B, N, D) in which a share of the rows, drawn one by one, are noise of the size that they had.

    The noise is normal, cut off at two standard deviations (stable_loops.md, 3).
    """
    drawn_B11 = torch.rand(len(like), 1, 1, device=like.device) < share
    noise = nn.init.trunc_normal_(torch.empty_like(like, dtype=torch.float32), a=-CUT, b=CUT)
    return torch.where(drawn_B11, (rms(like) * noise).to(like.dtype), like)


def to_rms(states: Tensor, tau: Tensor) -> Tensor:
    """Scale states (..., D) to the RMS ``tau``: u tau / RMS(u)."""
    wide = at_least_fp32(states)
    mean_square = wide.pow(2).mean(-1, keepdim=True).clamp(min=1e-16)  # before the root: its slope at 0
    return (wide * (tau * mean_square.rsqrt())).to(states.dtype)


class Rescale(nn.Module):
    """Brings a loop's output to the scale of the embeddings: rho (slr.md, 3.5).

    Args:
        kind: none: as it is; rms: u tau / RMS(u); adapter: RMSNorm(u + W_b SiLU(W_a u)) tau, W_b zero at the start
            (spiralthinker.md, g_phi); project: LN(W_b GELU(W_a u + b_a) + b_b) (codi.md, prj).
        width: D.
        tau: the RMS to reach, that of the embedding table (scalar).
        hidden: the inner width of adapter and project; 0: D.
        gain: adapter: learn a gain per channel, one at the start.
        norm: project: end with the layer norm.
    """

    tau: Tensor

    def __init__(
        self,
        kind: RescaleKind,
        width: int,
        tau: Tensor,
        hidden: int = 0,
        gain: bool = False,
        norm: bool = True,
    ):
        super().__init__()
        self.kind = kind
        self.register_buffer("tau", tau.detach().clone().float())
        self.inner = self.outer = self.norm = self.gain = None
        if kind in ("adapter", "project"):
            has_bias = kind == "project"
            self.inner = nn.Linear(width, hidden or width, bias=has_bias)
            self.outer = nn.Linear(hidden or width, width, bias=has_bias)
        if kind == "adapter":
            nn.init.zeros_(self.outer.weight)  # type: ignore[union-attr]
            self.gain = nn.Parameter(torch.ones(width)) if gain else None
        elif kind == "project" and norm:
            self.norm = nn.LayerNorm(width)

    def forward(self, output: Tensor) -> Tensor:
        """Return rho(u), of the shape of u (..., D)."""
        if self.inner is None or self.outer is None:
            return output if self.kind == "none" else to_rms(output, self.tau)
        states = output.to(self.inner.weight.dtype)
        if self.kind == "project":
            states = self.outer(gelu(self.inner(states)))
            return (states if self.norm is None else self.norm(states)).to(output.dtype)
        states = to_rms(output + self.outer(silu(self.inner(states))).to(output.dtype), self.tau)
        return states if self.gain is None else states * self.gain.to(states.dtype)


class Residual(nn.Module):
    """Mixes a loop's rescaled output h' with h_0 and h_{t-1} (slr.md, 3.6).

    none: h'. sum: h' + h_0. A: alpha h' + (1 - alpha) h_0. B: alpha h' + (1 - alpha) h_{t-1}.
    C: g1 h' + g2 h_0 + g3 h_{t-1} with gates that see all three; at the start (alpha, (1 - alpha)/2, (1 - alpha)/2).

    Args:
        kind: which.
        alpha: share of the new state, in [0, 1].
        alpha_learn: keep alpha fixed, learn one for all iterations (shared) or one for each (per_iter), in (0, 1); or
            one for each that may be any number (free).
        gate_shape: one gate for a position (scalar) or one for each of its channels.
        gate_kind: softmax over the three; three sigmoids; or attention over the three with h' as the query.
        width: D.
        max_loops: iterations trained for; later ones use the last alpha.
    """

    def __init__(
        self,
        kind: ResidualKind,
        alpha: float,
        alpha_learn: AlphaLearn,
        gate_shape: GateShape,
        gate_kind: GateKind,
        width: int,
        max_loops: int,
    ):
        super().__init__()
        self.kind, self.alpha, self.gate_kind = kind, alpha, gate_kind
        self.logit = self.shares = None
        if alpha_learn == "free":
            self.shares = nn.Parameter(torch.full((max_loops,), alpha))
        elif alpha_learn != "fixed":
            n = max_loops if alpha_learn == "per_iter" else 1
            self.logit = nn.Parameter(torch.full((n,), _logit(alpha)))
        if kind == "C":
            shares = torch.tensor([alpha, (1 - alpha) / 2, (1 - alpha) / 2]).clamp(1e-4, 1 - 1e-4)
            self.shares_logit = nn.Buffer(shares.log() if gate_kind != "sigmoid" else torch.logit(shares))
            if gate_kind == "attention":
                self.query, self.key = nn.Linear(width, GATE_WIDTH), nn.Linear(width, GATE_WIDTH)
                nn.init.zeros_(self.key.weight)
                nn.init.zeros_(self.key.bias)
            else:
                self.n_gates = width if gate_shape == "channel" else 1
                self.hidden = nn.Linear(3 * width, GATE_WIDTH)
                self.gate = nn.Linear(GATE_WIDTH, 3 * self.n_gates)
                nn.init.zeros_(self.gate.weight)
                nn.init.zeros_(self.gate.bias)

    def alpha_at(self, iteration: int) -> Tensor | float:
        """Return alpha of the 1-based ``iteration``."""
        if self.shares is not None:
            return self.shares[min(iteration, len(self.shares)) - 1]
        return self.alpha if self.logit is None else self.logit[min(iteration, len(self.logit)) - 1].sigmoid()

    def forward(self, new: Tensor, first: Tensor, previous: Tensor, iteration: int) -> Tensor:
        """Return h_t from h'_t, h_0 and h_{t-1}, all (B, N, D)."""
        match self.kind:
            case "none":
                return new
            case "sum":
                return new + first
            case "A" | "B":
                alpha = self.alpha_at(iteration)
                return (alpha * new + (1 - alpha) * (first if self.kind == "A" else previous)).to(new.dtype)
        candidates = torch.stack([new, first, previous], dim=-2)  # (B, N, 3, D)
        return (self.gates(candidates) * candidates).sum(-2).to(new.dtype)

    def gates(self, candidates_BN3D: Tensor) -> Tensor:
        """Return g (B, N, 3, 1 or D) for the candidates h', h_0, h_{t-1}."""
        weights = self.key if self.gate_kind == "attention" else self.hidden
        normed = layer_norm(candidates_BN3D, candidates_BN3D.shape[-1:]).to(weights.weight.dtype)
        if self.gate_kind == "attention":
            scores = self.key(normed) @ self.query(normed[..., :1, :]).transpose(-1, -2) / math.sqrt(GATE_WIDTH)
            return softmax(at_least_fp32(scores) + self.shares_logit[:, None], dim=-2)
        raw = at_least_fp32(self.gate(silu(self.hidden(normed.flatten(-2)))).unflatten(-1, (3, self.n_gates)))
        raw = raw + self.shares_logit[:, None]
        return raw.sigmoid() if self.gate_kind == "sigmoid" else softmax(raw, dim=-2)


class TimeEmbedding(nn.Module):
    """Tells the model which iteration it is in (slr.md, 3.1 and 3.2); it changes nothing at the start of training.

    Args:
        kind: lookup: a table of ``max_loops`` rows, the last also for later iterations; sinusoidal: an MLP on sines.
        inject: add: x = h + e_t; concat: x = W_c [h; e_t]; token: one more position, holding e_t, before the slots.
        max_loops: iterations trained for.
        width: D.
        normalised: the sines see t / max_loops instead of t.
        noise_level: also tell the size of the noise that was injected, or of the last change of the state.
    """

    def __init__(
        self,
        kind: TimeKind,
        inject: TimeInject,
        max_loops: int,
        width: int,
        normalised: bool = False,
        noise_level: NoiseLevel = "none",
    ):
        super().__init__()
        self.kind, self.inject, self.max_loops, self.normalised = kind, inject, max_loops, normalised
        self.noise_level = noise_level
        if kind == "lookup":
            self.table = nn.Parameter(torch.zeros(max_loops, width))
        elif kind == "sinusoidal":
            self.mlp = _time_mlp(width)
        self.noise_mlp = _time_mlp(width) if noise_level != "none" else None
        self.mix = None
        if inject == "concat":
            self.mix = nn.Linear(2 * width, width, bias=False)
            with torch.no_grad():
                self.mix.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1))

    def vector(self, iteration: int, level_B: Tensor | None) -> Tensor:
        """Return e_t, (D,) or with a noise level (B, 1, D)."""
        if self.kind == "lookup":
            e = self.table[min(iteration, len(self.table)) - 1]
        else:
            time = iteration / self.max_loops if self.normalised else float(iteration)
            e = self.mlp(_features(self.mlp, torch.tensor([time], device=next(self.mlp.parameters()).device)))[0]
        if self.noise_mlp is None or level_B is None:
            return e
        return e + self.noise_mlp(_features(self.noise_mlp, 100 * torch.log10(1 + 1000 * level_B.float())))[:, None]

    def forward(self, states_BND: Tensor, iteration: int, level_B: Tensor | None = None) -> Tensor:
        """Return the input of ``iteration`` (1-based): (B, N, D), or (B, 1 + N, D) for ``token``."""
        e = self.vector(iteration, level_B).to(states_BND.dtype)
        if self.inject == "add":
            return states_BND + e
        if self.mix is not None:
            both = torch.cat([states_BND, e.expand_as(states_BND)], dim=-1)
            return self.mix(both.to(self.mix.weight.dtype)).to(states_BND.dtype)
        token = e.expand(len(states_BND), 1, -1)
        return torch.cat([token, states_BND], dim=1)


def sines(times: Tensor, width: int) -> Tensor:
    """Return phi (n, width) = [sin(t w_i), cos(t w_i)] with w_i = 10000^(-2i / width), in fp32."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=times.device) / half)
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _features(mlp: nn.Sequential, times: Tensor) -> Tensor:
    """Return the sines (n, d_e) of times in the type of the MLP that reads them."""
    return sines(times, TIME_WIDTH).to(next(mlp.parameters()).dtype)


def _time_mlp(width: int) -> nn.Sequential:
    last = nn.Linear(4 * TIME_WIDTH, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(TIME_WIDTH, 4 * TIME_WIDTH), nn.SiLU(), last)


def _logit(share: float) -> float:
    share = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))

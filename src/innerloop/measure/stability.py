"""How a loop behaves: does it come to rest, oscillate, expand, collapse or diverge? Loop by loop, over examples.

    change       ||z_t - z_{t-1}|| / ||z_t||          cosine   cos(z_t, z_{t-1})
    step_cosine  cos(z_t - z_{t-1}, z_{t-1} - z_{t-2}): negative where the loop oscillates
    drift, size  RMS(z_t) / RMS(z_1), and / RMS of the embeddings
    radius       spectral radius of dz_t / dz_{t-1}, by power iteration with Jacobian-vector products
    growth       how much larger a small change of what the first loop is fed has become in z_t
    kl           KL of what u_t shows through the head from what u_{t-1} shows, a mean over latents

(slr.md, "Metrics"; the words and formulas are those of docs/measuring.md.) Methods that append latents are measured
latent by latent: loop t compares the latent that it makes with the one before. Shapes: `B` rows, `A` of them still
looping, `N` looped positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity

from innerloop.calibrate.loop_scan import ruled_by
from innerloop.config.stopping import StopSettings
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.loop.fixed_point import Map
from innerloop.loop.hooks import edited
from innerloop.loop.loop import InnerLoop, LoopResult, Pass, real, relative_change
from innerloop.measure.statistics import clopper_pearson
from innerloop.text.batch import Batch
from innerloop.text.examples import Example

POWER_ITERATIONS = 20
SETTLING = 10  # of them, before growth counts
NUDGE = 1e-3  # size of the change whose growth is followed, relative to the state
MANY_TIMES = 1e3  # a state so many times as large as z_1 has diverged
LOGITS_AT_ONCE = 2**24
NOTHING = 1e-20
AT_REST, OSCILLATES, COLLAPSED = 0.05, -0.5, 0.01

MEASURES = ("change", "cosine", "step_cosine", "drift", "size", "radius", "growth", "kl")


@dataclass(frozen=True)
class Spread:
    """A measure over examples: mean, standard deviation, the 5 % quantile, the median and the 95 % quantile."""

    mean: float
    std: float
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Spread | None:
        """Return the spread of the finite values (B,); None where there are none."""
        known = values[values.isfinite()].double()
        if not len(known):
            return None
        low, median, high = torch.quantile(known, known.new_tensor([0.05, 0.5, 0.95])).tolist()
        return cls(known.mean().item(), known.std(correction=0).item(), low, median, high)


@dataclass(frozen=True)
class LoopStability:
    """What one loop did.

    Attributes:
        loop: t.
        n: the examples that ran it.
        measures: by name, see `MEASURES`; None where a measure has no value.
        spread: how far latents are from their mean over examples (RMS), in units of their RMS; 0: collapsed.
        centre: how far latents are from the mean of the embeddings (RMS), in units of the embeddings' RMS.
        finite: the share of examples whose state is finite.
    """

    loop: int
    n: int
    measures: dict[str, Spread | None]
    spread: float
    centre: float
    finite: float


@dataclass(frozen=True)
class Stability:
    """How a loop behaves.

    Attributes:
        loops: loop by loop.
        diverged: the share of examples whose last state is not finite, or very much larger than the first.
        appends: whether loops make latents one after the other, instead of refining the same.
    """

    loops: list[LoopStability] = field(default_factory=list)
    diverged: float = 0.0
    appends: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return stability.json but for what was measured on what; what is not finite is None."""
        entries: list[dict[str, Any]] = []
        for entry in self.loops:
            measures = {name: None if s is None else asdict(s) for name, s in entry.measures.items()}
            sizes = {"spread": _finite(entry.spread), "centre": _finite(entry.centre), "finite": entry.finite}
            entries.append({"loop": entry.loop, "n": entry.n, **measures, **sizes})
        return {"loops": entries, "diverged": self.diverged, "sentences": self.sentences()}

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Stability:
        """Return the stability whose fields JSON has kept."""
        loops = []
        for entry in fields["loops"]:
            measures = {
                name: None if spread is None else Spread(**spread) for name, spread in entry["measures"].items()
            }
            loops.append(LoopStability(**{**entry, "measures": measures}))
        return cls(loops, fields["diverged"], fields["appends"])

    def sentences(self) -> list[str]:
        """Say what the numbers mean."""
        if not self.loops:
            return []
        first, last = self.loops[0], self.loops[-1]
        said = []
        if self.diverged > 0:
            said.append(f"The state diverges in {self.diverged:.0%} of the examples.")
        (change, start), radius = (x.measures["change"] for x in (last, first)), last.measures["radius"]
        if change is not None and start is not None and not self.appends:
            moves = (
                f"loop {first.loop} changes the state by {start.median:.0%}, loop {last.loop} by {change.median:.0%}"
            )
            rests = "comes to rest" if change.median < AT_REST else "does not come to rest"
            said.append(f"The loop {rests}: {moves} (medians).")
        if radius is not None:
            does = "shrinks" if radius.median < 1 else "enlarges"
            said.append(f"The last loop {does} small differences: spectral radius {radius.median:.2f} (median).")
        turns = last.measures["step_cosine"]
        if turns is not None and turns.median < OSCILLATES:
            said.append(f"It oscillates: successive steps point against each other (cosine {turns.median:.2f}).")
        if last.n > 1 and last.spread < COLLAPSED:  # one example has nothing to differ from
            said.append("The latents have collapsed: they are the same for every example.")
        return said


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
    if radius:
        with edited(loop, jacobians):
            result, mask_BN = run()
    else:
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


@torch.no_grad()
def stability(
    model: LatentModel,
    examples: Sequence[Example],
    batch_size: int = 32,
    stage: int | None = None,
    n_jacobians: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Stability:
    """Measure how a model's loop behaves on the prompts of examples; a rule that would stop it is set aside.

    Args:
        model: a model whose method thinks in latents.
        examples: whose prompts are thought about.
        batch_size: rows per batch.
        stage: the curriculum's stage whose layout is used; None: the last.
        n_jacobians: spectral radii are of the first so many examples, as they cost the most.
        progress: called with the number of examples done since the last call.
    """
    check_loop(model, stage)
    method, rows = model.method, model.prompts([example.question for example in examples], stage)
    was_training = model.training
    model.eval()
    starts = [0, n_jacobians] if 0 < n_jacobians < len(rows) else [0]
    measures: dict[int, dict[str, list[Tensor]]] = {}
    states: dict[int, list[Tensor]] = {}
    rule = ruled_by(model) if isinstance(method, StopSettings) and method.loop.stop != "none" else nullcontext()
    dtype = model.backbone.embed(torch.zeros(1, 1, dtype=torch.long, device=model.device)).dtype

    def read_out(outputs: Tensor) -> Tensor:
        return model.read_out(outputs.to(dtype))

    with rule:
        for start, end in zip(starts, [*starts[1:], len(rows)]):
            for begin in range(start, end, batch_size):
                batch = model.batch(rows[begin : min(begin + batch_size, end)])

                def run(batch: Batch = batch) -> tuple[LoopResult, Tensor | None]:
                    thought = model.think(batch)
                    assert thought.loop is not None
                    return thought.loop, None if method.scope == "append" else thought.state_mask

                found, path = watch_loop(run, model.loop, read_out, radius=begin < n_jacobians)
                for t, entry in enumerate(found, 1):
                    for name, value in entry.items():
                        measures.setdefault(t, {}).setdefault(name, []).append(value.cpu())
                    states.setdefault(t, []).append(_latents(path[t - 1], batch, method.scope == "all").cpu())
                if progress is not None:
                    progress(len(batch))
    model.train(was_training)
    return _gathered(model, measures, states, method.scope == "append")


def has_loop(model: LatentModel) -> bool:
    """Tell whether there is a loop over latents whose iterations can be looked at."""
    try:
        check_loop(model)
    except InputError:
        return False
    return True


def check_loop(model: LatentModel, stage: int | None = None) -> None:
    """Refuse a model without a loop over latents."""
    method = model.method
    if method.family == "depth" or not model.prompts(["?"], stage)[0].n_loops:
        raise InputError(f"'{method.name}' has no loop over latents here, so there is no stability to measure")
    if method.loop.solver != "none":
        raise InputError("stability looks at each iteration, of which a solver keeps none: set solver to none")


def _latents(states: Tensor, batch: Batch, is_prompt: bool) -> Tensor:
    """Return the latents among the states (B, K, D); of prompts, whose lengths differ, their mean."""
    if is_prompt:
        n_B = batch.mask_BS[:, : batch.bounds[1]].sum(1)
        return states.sum(1, keepdim=True) / n_B[:, None, None]
    return states if batch.pinned_BN is None else states[:, batch.pinned_BN[0] == 0]


def _gathered(
    model: LatentModel, measures: dict[int, dict[str, list[Tensor]]], states: dict[int, list[Tensor]], appends: bool
) -> Stability:
    tau = model.backbone.embed_rms().item()
    table = torch.arange(model.backbone.config.vocab_size, device=model.device)
    centre = model.backbone.embed(table).float().mean(0).cpu()
    loops = []
    for t, by_name in measures.items():
        columns = {name: torch.cat(values) for name, values in by_name.items()}
        columns["size"] = columns["size"] / tau
        ran = columns["ran"]
        z = torch.cat(states[t])[ran]
        finite = z.flatten(1).isfinite().all(1)
        z = z[finite]
        spread = ((z - z.mean(0)).square().mean() / z.square().mean().clamp(min=1e-30)).sqrt().item()
        loops.append(
            LoopStability(
                loop=t,
                n=int(ran.sum()),
                measures={name: Spread.of(columns[name]) if name in columns else None for name in MEASURES},
                spread=spread,
                centre=((z - centre).square().mean().sqrt() / tau).item(),
                finite=finite.float().mean().item(),
            )
        )
    by_name = measures[max(measures)]
    last = torch.cat(by_name["drift"])[torch.cat(by_name["ran"])]
    diverged = (~last.isfinite() | (last > MANY_TIMES)).float().mean().item()
    return Stability(loops, diverged, appends)


def diverged_rate(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many of several runs have diverged, with the exact 95 % interval of the share.

    Args:
        points: of each run the entry of a suite's results.json, where training that went wrong left its ``error``, or
            stability.json, where a run has diverged if at least half of its examples have.
    """
    if not points:
        raise InputError("a rate over runs needs at least one run")
    n = sum(
        str(point.get("error", "")).startswith("DivergedError") or point.get("diverged", 0) >= 0.5 for point in points
    )
    return {"n": len(points), "diverged": n, "share": n / len(points), "ci95": list(clopper_pearson(n, len(points)))}

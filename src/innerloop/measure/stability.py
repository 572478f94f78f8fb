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

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.loop.loop import LoopResult
from innerloop.measure.loop_dynamics import watch_loop
from innerloop.measure.statistics import clopper_pearson
from innerloop.model.stopping import ruled_by
from innerloop.text.batch import Batch
from innerloop.text.codec import to_json
from innerloop.text.examples import Example

MANY_TIMES = 1e3  # a state so many times as large as z_1 has diverged
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
        entries = []
        for entry in to_json(self.loops):
            measures = entry.pop("measures")
            entries.append({"loop": entry.pop("loop"), "n": entry.pop("n"), **measures, **entry})
        return {"loops": entries, "diverged": self.diverged, "sentences": self.sentences()}

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
            rests = "comes to rest" if change.median < AT_REST else "does not come to rest"
            moves = f"loop {first.loop} changes the state by {start.median:.0%}, loop {last.loop} by"
            said.append(f"The loop {rests}: {moves} {change.median:.0%} (medians).")
        if radius is not None:
            does = "shrinks" if radius.median < 1 else "enlarges"
            said.append(f"The last loop {does} small differences: spectral radius {radius.median:.2f} (median).")
        turns = last.measures["step_cosine"]
        if turns is not None and turns.median < OSCILLATES:
            said.append(f"It oscillates: successive steps point against each other (cosine {turns.median:.2f}).")
        if last.n > 1 and last.spread < COLLAPSED:  # one example has nothing to differ from
            said.append("The latents have collapsed: they are the same for every example.")
        return said


@torch.no_grad()
def stability(
    model: LatentModel,
    examples: Sequence[Example],
    batch_size: int = 32,
    stage: int | None = None,
    n_jacobians: int = 32,
    progress: Callable[[int], None] = lambda n: None,
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
    was_training, appends = model.training, method.plan.scope == "append"
    model.eval()
    measures: dict[int, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    states: dict[int, list[Tensor]] = defaultdict(list)
    dtype = model.backbone.embed(torch.zeros(1, 1, dtype=torch.long, device=model.device)).dtype
    parts = [
        (of[begin : begin + batch_size], with_radius)
        for of, with_radius in ((rows[:n_jacobians], True), (rows[n_jacobians:], False))
        for begin in range(0, len(of), batch_size)
    ]

    def run(batch: Batch) -> tuple[LoopResult, Tensor | None]:
        thought = model.think(batch)
        assert thought.loop is not None
        return thought.loop, None if appends else thought.state_mask

    with ruled_by(model) if method.stop.rule != "none" else nullcontext():
        for part, with_radius in parts:
            batch = model.batch(part)
            found, path = watch_loop(
                partial(run, batch), model.loop, lambda outputs: model.read_out(outputs.to(dtype)), radius=with_radius
            )
            for t, entry in enumerate(found, 1):
                for name, value in entry.items():
                    measures[t][name].append(value.cpu())
                states[t].append(_latents(path[t - 1], batch, method.plan.scope == "all").cpu())
            progress(len(batch))
    model.train(was_training)
    return _gathered(model, measures, states, appends)


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
    if method.fixed_point.solver != "none":
        raise InputError(
            "stability looks at each iteration, of which a solver keeps none: set fixed_point.solver to none"
        )


def _latents(states: Tensor, batch: Batch, is_prompt: bool) -> Tensor:
    """Return the latents among the states (B, K, D); of prompts, whose lengths differ, their mean."""
    if is_prompt:
        n_B = batch.mask_BS[:, : batch.bounds[1]].sum(1)
        return states.sum(1, keepdim=True) / n_B[:, None, None]
    return states if batch.fixed_BN is None else states[:, batch.fixed_BN[0] == 0]


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

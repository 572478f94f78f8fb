"""The terms of the loss that look inside the loop (slr.md, section 4).

L_step: an iteration's outputs must show a step through the head.   L_hid: they follow a teacher's states.
L_deep: the answer is decoded after every iteration.                L_halt: the learned stop, as in PonderNet.
gain: the loop must not stretch a small change of its state beyond a bound.

Shapes: `B` rows, `N` slots, `D` width, `T` iterations, `U` supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, smooth_l1_loss

from innerloop.context import Context
from innerloop.errors import refuse
from innerloop.halting import masked_mean
from innerloop.layout import Batch

if TYPE_CHECKING:
    from innerloop.model import LatentModel
    from innerloop.thought import Thought


@dataclass(frozen=True)
class LossSettings:
    """What is learned inside the loop, besides the answer.

    Args:
        step_weight: lambda_step; iteration t must show step sigma(t) through the head. Scope slots only.
        hid_weight: lambda_hid; the states of iteration t are pulled to a teacher's at the end of step sigma(t).
        hid_layers: the teacher's last layer, or all.
        hid_distance: smooth L1 in units of the teacher's spread, or one minus cosine.
        teacher: folder of the chain-of-thought run whose states are the targets.
        deep_weight: lambda_deep; the answer is also decoded after every iteration.
        deep_schedule: weight of iteration t: proportional to t (linear), or softmax of t.
        halt_weight: lambda_halt; trains the gate of stop=halt (arXiv 2107.05407).
        halt_prior: chance of stopping per iteration that the gate is drawn to.
        halt_beta: strength of that pull.
    """

    step_weight: float = 0.0
    hid_weight: float = 0.0
    hid_layers: Literal["last", "all"] = "last"
    hid_distance: Literal["smooth_l1", "cosine"] = "smooth_l1"
    teacher: str | None = None
    deep_weight: float = 0.0
    deep_schedule: Literal["linear", "softmax"] = "linear"
    halt_weight: float = 0.0
    halt_prior: float = 0.2
    halt_beta: float = 0.01

    def __post_init__(self) -> None:
        weights = (self.step_weight, self.hid_weight, self.deep_weight, self.halt_weight, self.halt_beta)
        refuse(
            (min(weights) < 0, "weights of the loss cannot be negative"),
            (not 0 < self.halt_prior < 1, "halt_prior is a probability between 0 and 1"),
            (
                self.hid_weight > 0 and self.teacher is None,
                "hid_weight needs states to follow: set teacher to the folder of a chain-of-thought run",
            ),
        )

    @property
    def loop_term_weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {
            "step": self.step_weight,
            "hid": self.hid_weight,
            "deep": self.deep_weight,
            "halt": self.halt_weight,
        }


@dataclass
class Terms:
    """The means of the terms of a batch; each sum is divided by the count of the global batch."""

    model: LatentModel
    batch: Batch
    counts: dict[str, Any]
    means: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, count: str | None = None) -> None:
        """Add a term by its sum over the items that ``count`` (by default its name) counts."""
        n = self.counts[count or name]
        self.means[name] = total / (n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1))


def add_loop_terms(terms: Terms, thought: Thought, trains: bool) -> None:
    """Add the terms that the method gives a weight."""
    assert thought.loop is not None
    weights, batch = terms.model.method.term_weights, terms.batch
    if len(batch.read_targets_R):
        terms.add("step", step_loss(terms.model, batch, thought))
    if batch.follow_TB is not None:
        terms.add("hid", follow_loss(terms.model, batch, thought))
    if trains and (weights.get("deep") or weights.get("halt")):
        losses_TB = answer_losses(terms.model, batch, thought)
        if weights.get("deep"):
            terms.add("deep", deep_loss(losses_TB, terms.model.method.losses.deep_schedule, batch.n_loops), "answer")
        if weights.get("halt"):
            terms.add("halt", halting_loss(terms.model, batch, thought, losses_TB), "rows")
    if thought.loop.gain is not None:
        bound = terms.model.method.loop.spectral_bound
        terms.means["gain"] = (thought.loop.gain - bound).clamp(min=0).square()


def step_loss(model: LatentModel, batch: Batch, thought: Thought) -> Tensor:
    """Return the summed cross-entropy of the read-outs (slr.md, L_step)."""
    assert thought.loop is not None
    like = thought.loop.state
    outputs = held(thought.loop.outputs, like, max(batch.n_loops))
    read = outputs.flatten(0, 2)[batch.read_at_R]
    return cross_entropy(model.read_out(read).float(), batch.read_targets_R, reduction="sum")


def held(parts: list[tuple[list[int], Tensor]], like: Tensor, n_loops: int) -> Tensor:
    """Return what each row had at every iteration (T, B, N, D); a row that has stopped keeps its last."""
    seen: list[Tensor] = []
    for rows, values in parts:
        at = torch.tensor(rows, device=like.device)
        before = seen[-1] if seen else torch.zeros_like(like)
        seen.append(values.to(like.dtype) if rows == list(range(len(like))) else before.index_copy(0, at, values))
    return torch.stack([*seen, *seen[-1:] * (n_loops - len(seen))])


def follow_loss(model: LatentModel, batch: Batch, thought: Thought) -> Tensor:
    """Return the summed distance of each iteration's mean state to the teacher's at its step (slr.md, L_hid).

    Smooth L1 is a mean over the width, in units of the standard deviation of the layer's targets in the batch.
    """
    assert thought.loop is not None and batch.teacher is not None and batch.follow_TB is not None
    with torch.no_grad():
        context = Context(model.teacher, len(batch))
        targets = context.read(model.teacher.embed(batch.teacher.ids_BS), batch.teacher.mask_BS, all_states=True)
    layers = range(1, len(targets)) if model.method.losses.hid_layers == "all" else [len(targets) - 1]
    total = thought.loop.state.new_zeros((), dtype=torch.float32)
    for (rows, _), states, follow_B in zip(thought.loop.outputs, thought.layer_states, batch.follow_TB):
        at = follow_B[rows]
        chosen = torch.nonzero(at >= 0)[:, 0]
        for layer in layers if len(chosen) else ():
            target = targets[layer].flatten(0, 1)[at[chosen]].float()
            mean = masked_mean(states[layer], None if thought.region_mask is None else thought.region_mask[rows])
            total = total + _distance(mean[chosen].float(), target, model.method.losses.hid_distance) / len(layers)
    return total


def _distance(student: Tensor, target: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return (1 - cosine_similarity(student, target, dim=-1)).sum()
    spread = target.std().clamp(min=1e-6)
    return smooth_l1_loss(student, target, reduction="none").mean(-1).sum() / spread


def answer_losses(model: LatentModel, batch: Batch, thought: Thought) -> Tensor:
    """Return the summed loss of each row's written tokens when it answers after iteration t: (T, B)."""
    assert thought.loop is not None
    n_columns = batch.ids_BS.shape[1]
    losses = []
    for state in held(thought.loop.states, thought.loop.state, len(thought.loop.states)):
        pending = [(state, thought.region_mask)]
        states = model.answer_states(batch, thought, thought.context.fork(), pending)
        loss_U = cross_entropy(model.backbone.head(states).float(), batch.targets_U, reduction="none")
        losses.append(loss_U.new_zeros(len(batch)).index_add(0, batch.predict_at_U // n_columns, loss_U))
    return torch.stack(losses)


def deep_loss(losses_TB: Tensor, schedule: str, n_loops: list[int]) -> Tensor:
    """Return sum_t w_t L_t; w over a row's iterations proportional to t (linear) or softmax of t (slr.md, L_deep)."""
    t, ran_TB = _iterations(losses_TB, n_loops)
    raw_TB = t * ran_TB if schedule == "linear" else (t - len(t)).exp() * ran_TB
    return (raw_TB / raw_TB.sum(0).clamp(min=1e-30) * losses_TB).sum()


def _iterations(like_TB: Tensor, n_loops: list[int]) -> tuple[Tensor, Tensor]:
    """Return t (T, 1), and (T, B) 1 where a row has an iteration t, both in fp32."""
    t = torch.arange(1, len(like_TB) + 1, device=like_TB.device).float()[:, None]
    return t, (t <= torch.tensor(n_loops, device=like_TB.device)).float()


def halting_distribution(logits_TB: Tensor, n_loops: list[int]) -> Tensor:
    """Return p_t = lambda_t prod_{j<t} (1 - lambda_j), a row's last taking the rest, (T, B) in fp32."""
    log_stop, log_go = (
        logits_TB.float().sigmoid().clamp(min=1e-12).log(),
        (-logits_TB.float()).sigmoid().clamp(min=1e-12).log(),
    )
    before = torch.cat([torch.zeros_like(log_go[:1]), log_go.cumsum(0)[:-1]])
    t, ran_TB = _iterations(logits_TB, n_loops)
    is_last_TB = t == torch.tensor(n_loops, device=t.device)
    return (before + log_stop.masked_fill(is_last_TB, 0.0)).exp() * ran_TB


def halting_loss(model: LatentModel, batch: Batch, thought: Thought, losses_TB: Tensor) -> Tensor:
    """Return, summed over rows, sum_t p_t L_t + beta KL(p || truncated geometric), L_t a mean over tokens."""
    assert thought.loop is not None and model.loop.stop is not None
    settings = model.method.losses
    states = held(thought.loop.states, thought.loop.state, len(thought.loop.states))
    logits = torch.stack([model.loop.stop.halting_logit(state, thought.region_mask) for state in states])
    p = halting_distribution(logits, batch.n_loops)
    n = torch.tensor(batch.n_targets, device=p.device).clamp(min=1)
    t, ran_TB = _iterations(p, batch.n_loops)
    prior = (1 - settings.halt_prior) ** (t - 1) * ran_TB
    prior = prior / prior.sum(0).clamp(min=1e-30)
    divergence = (p * (p.clamp(min=1e-12).log() - prior.clamp(min=1e-12).log())).sum(0)
    return ((p * losses_TB / n).sum(0) + settings.halt_beta * divergence).sum()

"""The terms of the loss that look inside the loop (slr.md, section 4).

L_step: an iteration's outputs must show a step through the head.   L_hid: they follow a teacher's states.
L_deep: the answer is decoded after every iteration.                L_halt: the learned stop, as in PonderNet.
gain: the loop must not stretch a small change of its state beyond a bound.

Shapes: `B` rows, `N` slots, `D` width, `T` iterations, `U` supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from innerloop.decoder.token_losses import ALL, Show, summed_loss, token_losses
from innerloop.halting.evidence import masked_mean
from innerloop.halting.learned import exit_distribution, expected_loss, pull
from innerloop.passes.context import Context
from innerloop.text.batch import Batch, Sites
from innerloop.text.row import ANSWER_PASS

if TYPE_CHECKING:
    from innerloop.model.model import LatentModel
    from innerloop.passes.thought import Thought


@dataclass
class Terms:
    """The means of the terms of a batch; each sum is divided by the count of the global batch.

    ``targets`` are the teacher's states after every layer (B, S, D).
    """

    model: LatentModel
    batch: Batch
    counts: dict[str, Any]
    means: dict[str, Tensor] = field(default_factory=dict)
    targets: tuple[Tensor, ...] = ()

    def add(self, name: str, total: Tensor, count: str | None = None) -> None:
        """Add a term by its sum over the items that ``count`` (by default its name) counts."""
        n = self.counts[count or name]
        self.add_mean(name, total / (torch.where(n > 0, n, 1) if isinstance(n, Tensor) else n or 1))

    def add_mean(self, name: str, mean: Tensor) -> None:
        """Add a term by its share of the global batch's mean."""
        self.means[name] = self.means[name] + mean if name in self.means else mean


def add_loop_terms(terms: Terms, batch: Batch, thought: Thought, trains: bool) -> None:
    """Add the terms that the method gives a weight, for a batch or one link of it."""
    from innerloop.model.step_decoder import told_loss

    model, weights = terms.model, terms.model.method.term_weights
    if batch.readouts:
        terms.add("step", step_loss(model, batch, thought))
    if batch.taught is not None:
        terms.targets = tuple(batch.taught[:, None])
    elif batch.teacher is not None and (terms.counts["hid"] or weights.get("teacher")):
        terms.targets = teacher_states(model, batch, terms)
    if batch.follows:
        terms.add("hid", follow_loss(model, batch, thought, terms.targets))
    if batch.told and model.step_decoder is not None:
        terms.add_mean("aux", told_loss(model, batch, thought, counts_K3=terms.counts.get("told")))
    if thought.loop is None:
        return
    if trains and (weights.get("deep") or weights.get("halt")):
        losses_TB = answer_losses(model, batch, thought)
        if weights.get("deep"):
            terms.add("deep", deep_loss(losses_TB, model.method.losses.deep_schedule, batch.n_loops), "answer")
        if weights.get("halt"):
            terms.add("halt", halting_loss(model, batch, thought, losses_TB), "rows")
    if thought.loop.ponder_B is not None and trains and weights.get("ponder"):
        terms.add("ponder", thought.loop.ponder_B.sum(), "rows")
    if thought.loop.gain is not None:
        bound = model.method.loop.spectral_bound
        terms.add("gain", len(batch) * (thought.loop.gain - bound).clamp(min=0).square(), "rows")


def step_loss(model: LatentModel, batch: Batch, thought: Thought) -> Tensor:
    """Return the summed cross-entropy of the read-outs (slr.md and lotus.md, L_step)."""
    total = batch.ids_BS.new_zeros((), dtype=torch.float32)
    for sites in batch.readouts:
        total = total + summed_loss(showing(model, batch, thought, sites), sites.targets_F, model.loss_chunk)
    return total


def site_logits(model: LatentModel, batch: Batch, thought: Thought, sites: Sites) -> Tensor:
    """Return what places of a pass show through the head (F, V); the position before the region is one of them."""
    return showing(model, batch, thought, sites)(ALL)


def showing(model: LatentModel, batch: Batch, thought: Thought, sites: Sites) -> Show:
    """Return what shows places of a pass through the head."""
    if sites.loop == ANSWER_PASS:
        states, start = thought.answer[-1], thought.first_column
    else:
        assert thought.loop is not None
        states, start = held(thought.loop.outputs, thought.loop.state, sites.loop), batch.bounds[0]
    if start == batch.bounds[0] and thought.prompt is not None:
        before = thought.prompt[0][:, -1:]
        if sites.loop == ANSWER_PASS and model.method.loop.feedback_site == "pre_norm":
            before = model.backbone.norm(before)
        states, start = torch.cat([before, states], dim=1), start - 1
    chosen = states[sites.rows_F, sites.columns_F - start]
    if sites.loop != ANSWER_PASS and model.method.loop.feedback_site == "pre_norm":
        chosen = model.backbone.norm(chosen)
    return model.backbone.shown(chosen)


def held(parts: list[tuple[list[int], Tensor]], like: Tensor, loop: int) -> Tensor:
    """Return what each row had at iteration ``loop`` (B, ...); a row that has stopped keeps its last."""
    whole: Tensor | None = None
    for rows, values in parts[:loop]:
        if rows == list(range(len(like))):
            whole = values.to(like.dtype)
        else:
            whole = values.new_zeros(len(like), *values.shape[1:]).to(like.dtype) if whole is None else whole
            whole = whole.index_copy(0, torch.tensor(rows, device=like.device), values.to(like.dtype))
    assert whole is not None
    return whole


def teacher_states(model: LatentModel, batch: Batch, terms: Terms) -> tuple[Tensor, ...]:
    """Return the states that the teacher has after every layer (B, S, D), without gradient.

    A model that teaches itself also learns to write what the teacher reads (codi.md, L_T).
    """
    assert batch.teacher is not None
    settings, taught = model.method.losses, batch.teacher
    backbone = model.backbone if settings.teacher == "self" else model.teacher

    def read() -> tuple[Tensor, ...]:
        return Context(backbone, len(batch)).read(backbone.embed(taught.ids_BS), taught.mask_BS, all_states=True)

    learns = settings.teacher == "self" and settings.teacher_weight > 0
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        states = read()
    if learns:
        chosen = states[-1].flatten(0, 1)[taught.predict_at_U]
        terms.add("teacher", summed_loss(backbone.shown(chosen), taught.targets_U, model.loss_chunk))
        if settings.teacher_passes == 2:
            with torch.no_grad():
                states = read()
    return tuple(state.detach() for state in states)


def follow_loss(model: LatentModel, batch: Batch, thought: Thought, targets: tuple[Tensor, ...]) -> Tensor:
    """Return the summed, weighted distance of followed states to the teacher's (slr.md, L_hid; codi.md, L_KD).

    A distance is a mean over the width and the layers; all but the cosine are in units of the standard deviation of the
    layer's targets in the batch, all links and passes of it, each counted once.
    """
    settings = model.method.losses
    first = {"last": len(targets) - 1, "all": 1, "all+emb": 0}[settings.hid_layers]
    total = batch.ids_BS.new_zeros((), dtype=torch.float32)
    for layer in range(first, len(targets)):
        flat = targets[layer].flatten(0, 1)
        wanted = [flat[sites.targets_F].float() for sites in batch.follows]
        spread = flat[batch.followed_P].float().std().clamp(min=1e-6)
        for sites, target in zip(batch.follows, wanted):
            if sites.loop == ANSWER_PASS:
                states, start, mask = thought.answer[layer - len(targets)], thought.first_column, None
            else:
                assert thought.loop is not None
                parts = [
                    (rows, s[layer - len(targets)]) for (rows, _), s in zip(thought.loop.outputs, thought.layer_states)
                ]
                states, start = held(parts, thought.loop.state, sites.loop), batch.bounds[0]
                mask = thought.state_mask
            is_mean = sites.columns_F < 0
            student = states[sites.rows_F, (sites.columns_F - start).clamp(min=0)]
            if sites.loop != ANSWER_PASS:
                student = torch.where(is_mean[:, None], masked_mean(states, mask)[sites.rows_F], student)
            if model.follower is not None:
                student = model.follower(student.to(model.follower.weight.dtype))
            distances = distance(student.float(), target, settings.hid_distance, spread)
            total = total + (sites.weights_F * distances).sum() / (len(targets) - first)
    return total


def distance(student: Tensor, target: Tensor, kind: str, spread: Tensor) -> Tensor:
    """Return the distance of each of some states (F, D) to its target (F,)."""
    match kind:
        case "cosine":
            return 1 - cosine_similarity(student, target, dim=-1)
        case "l1":
            return (student - target).abs().mean(-1) / spread
        case "l1_sum":
            return (student - target).abs().sum(-1) / spread
        case "l2":
            return (student - target).square().mean(-1) / spread**2
    return smooth_l1_loss(student, target, reduction="none").mean(-1) / spread


def answer_losses(model: LatentModel, batch: Batch, thought: Thought) -> Tensor:
    """Return the summed loss of each row's written tokens when it answers after iteration t: (T, B)."""
    assert thought.loop is not None
    n_columns = batch.ids_BS.shape[1]
    losses = []
    for loop in range(1, len(thought.loop.states) + 1):
        state = held(thought.loop.states, thought.loop.state, loop)
        loss_U = token_losses(model.writing(batch, thought, state), batch.targets_U, model.loss_chunk)
        losses.append(loss_U.new_zeros(len(batch)).index_add(0, batch.predict_at_U // n_columns, loss_U))
    return torch.stack(losses)


def every_pass_loss(model: LatentModel, batch: Batch, thought: Thought, last: Tensor) -> Tensor:
    """Return the summed loss of the written tokens: that of the last pass, or the mean of all (spiralthinker.md, L_CE).

    ``last`` is that of the last pass; the others read the states z_0..z_{K-1} in its place.
    """
    loop = thought.loop
    if not model.method.learns_every_pass or loop is None:
        return last
    earlier = [loop.first, *(held(loop.states, loop.state, k) for k in range(1, len(loop.states)))]
    shown = (model.writing(batch, thought, state) for state in earlier)
    totals = [summed_loss(show, batch.targets_U, model.loss_chunk) for show in shown]
    return torch.stack([*totals, last]).mean()


def deep_loss(losses_TB: Tensor, schedule: str, n_loops: list[int]) -> Tensor:
    """Return sum_t w_t L_t; w over a row's iterations proportional to t (linear) or softmax of t (slr.md, L_deep)."""
    t, ran_TB = _iterations(losses_TB, n_loops)
    raw_TB = t * ran_TB if schedule == "linear" else (t - len(t)).exp() * ran_TB
    return (raw_TB / raw_TB.sum(0).clamp(min=1e-30) * losses_TB).sum()


def _iterations(like_TB: Tensor, n_loops: list[int]) -> tuple[Tensor, Tensor]:
    """Return t (T, 1), and (T, B) 1 where a row has an iteration t, both in fp32."""
    t = torch.arange(1, len(like_TB) + 1, device=like_TB.device).float()[:, None]
    return t, (t <= torch.tensor(n_loops, device=like_TB.device)).float()


def halting_loss(model: LatentModel, batch: Batch, thought: Thought, losses_TB: Tensor) -> Tensor:
    """Return, summed over rows, sum_t p_t L_t + beta KL(p || prior), L_t a mean over tokens."""
    assert thought.loop is not None and model.loop.stop is not None
    settings = model.method.losses
    n = len(thought.loop.states)
    states = [held(thought.loop.states, thought.loop.state, loop) for loop in range(1, n + 1)]
    logits = torch.stack([model.loop.stop.halting_logit(state, thought.state_mask) for state in states])
    p = exit_distribution(logits, batch.n_loops)
    n_targets = torch.tensor(batch.n_targets, device=p.device).clamp(min=1)
    divergence = pull(p, settings.halt_pull, settings.halt_prior, batch.n_loops)
    return (expected_loss(p, losses_TB / n_targets) + settings.halt_beta * divergence).sum()

"""The terms of the loss that look inside the loop (slr.md, section 4).

L_step: an iteration's outputs must show a step through the head.   L_hid: they follow a teacher's states.
L_deep: the answer is decoded after every iteration.                L_halt: the learned stop, as in PonderNet.

Shapes: `B` rows, `N` slots, `D` width, `T` iterations, `U` supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from innerloop.config.losses import HaltSettings, HiddenSettings
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.token_losses import ALL, AtOnce, LogitsFn, summed_loss, token_losses
from innerloop.halting.evidence import masked_mean
from innerloop.halting.learned import exit_distribution, expected_loss, pull
from innerloop.halting.rule import StopRule
from innerloop.loop.trace import Trace
from innerloop.passes.context import Context
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.text.batch import Batch, Targets
from innerloop.text.row import ANSWER_PASS


@dataclass
class Output:
    """A loss and what it is made of.

    Attributes:
        loss: the weighted sum of the terms.
        terms: each term's mean over its own supervised items, before weighting.
        trace: the loop's record, where asked for.
        measured: what depth methods report of a pass, such as the shares of tokens that routers chose.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    trace: Trace | None = None
    measured: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Terms:
    """The means of the terms of a batch; each sum is divided by the count of the global batch."""

    counts: dict[str, Any]
    means: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, count: str | None = None) -> None:
        """Add a term by its sum over the items that ``count`` (by default its name) counts."""
        n = self.counts[count or name]
        self.add_mean(name, total / (torch.where(n > 0, n, 1) if isinstance(n, Tensor) else n or 1))

    def add_all(self, terms: PassTerms) -> None:
        """Add several terms by their sums and counts."""
        for name, (total, count) in terms.items():
            self.add(name, total, count)

    def add_mean(self, name: str, mean: Tensor) -> None:
        """Add a term by its share of the global batch's mean."""
        self.means[name] = self.means[name] + mean if name in self.means else mean


def step_loss(inputs: LossInputs) -> Tensor:
    """Return the summed cross-entropy of the read-outs (slr.md and lotus.md, L_step)."""
    total = inputs.batch.ids_BS.new_zeros((), dtype=torch.float32)
    for sites in inputs.batch.token_targets:
        total = total + summed_loss(showing(inputs, sites), sites.targets_F, inputs.chunk)
    return total


def site_logits(inputs: LossInputs, sites: Targets) -> Tensor:
    """Return what places of a pass show through the head (F, V); the position before the region is one of them."""
    return showing(inputs, sites)(ALL)


def showing(inputs: LossInputs, sites: Targets) -> LogitsFn:
    """Return what shows places of a pass through the head."""
    batch, thought = inputs.batch, inputs.thought
    is_answer = sites.iteration == ANSWER_PASS
    if is_answer:
        states, start = thought.answer[-1], thought.first_column
    else:
        assert thought.loop is not None
        states = state_at(thought.loop.outputs, thought.loop.state, sites.iteration)
        start = batch.bounds[0] + (sites.iteration - 1 if thought.appends else 0)
    if start == batch.bounds[0] and thought.prompt is not None:
        before = thought.prompt[0][:, -1:]
        before = inputs.head_input(before) if is_answer else before  # the answer's pass gives inputs of the head
        states, start = torch.cat([before, states], dim=1), start - 1
    chosen = states[sites.rows_F, sites.columns_F - start]
    return inputs.backbone.head_inputs(chosen if is_answer else inputs.head_input(chosen))


def state_at(parts: list[tuple[list[int], Tensor]], like: Tensor, iteration: int) -> Tensor:
    """Return what each row had at ``iteration`` (B, ...); a row that has stopped keeps its last."""
    whole: Tensor | None = None
    for rows, values in parts[:iteration]:
        if rows == list(range(len(like))):
            whole = values.to(like.dtype)
        else:
            whole = values.new_zeros(len(like), *values.shape[1:]).to(like.dtype) if whole is None else whole
            whole = whole.index_copy(0, torch.tensor(rows, device=like.device), values.to(like.dtype))
    assert whole is not None
    return whole


@dataclass
class TeacherStates:
    """What a teacher made of the rows that it reads: its states after every layer (B, S, D), without gradient.

    ``loss`` is what it lost on what it reads, where it is the model itself and learns to write that too (codi.md, L_T).
    """

    layers: tuple[Tensor, ...]
    loss: Tensor | None = None


def read_teacher(backbone: Backbone, taught: Batch, learns: bool, passes: int, chunk: AtOnce) -> TeacherStates:
    """Let a backbone read a teacher's rows; with ``passes`` 2 what it learns from is another pass than its states."""

    def read() -> tuple[Tensor, ...]:
        context = Context(backbone, len(taught))
        return context.read(backbone.embed(taught.ids_BS), taught.mask_BS, all_states=True)

    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        states, loss = read(), None
    if learns:
        chosen = states[-1].flatten(0, 1)[taught.predict_at_U]
        loss = summed_loss(backbone.head_inputs(chosen), taught.targets_U, chunk)
        if passes == 2:
            with torch.no_grad():
                states = read()
    return TeacherStates(tuple(state.detach() for state in states), loss)


def follow_loss(
    inputs: LossInputs, targets: tuple[Tensor, ...], settings: HiddenSettings, projection: nn.Linear | None = None
) -> Tensor:
    """Return the summed, weighted distance of followed states to the teacher's (slr.md, L_hid; codi.md, L_KD).

    A distance is a mean over the width and the layers; all but the cosine and smooth_l1_raw are in units of the
    standard deviation of the layer's targets in the batch, all segments and passes of it, each counted once.
    """
    batch = inputs.batch
    first = {"last": len(targets) - 1, "all": 1, "all+emb": 0}[settings.layers]
    total = batch.ids_BS.new_zeros((), dtype=torch.float32)
    for layer in range(first, len(targets)):
        flat = targets[layer].flatten(0, 1)
        wanted = [flat[sites.targets_F].float() for sites in batch.hidden_targets]
        spread = flat[batch.followed_P].float().std().clamp(min=1e-6)
        for sites, target in zip(batch.hidden_targets, wanted):
            student = _following(inputs, sites, layer - len(targets))
            if projection is not None:
                student = projection(student.to(projection.weight.dtype))
            distances = distance(student.float(), target, settings.distance, spread)
            total = total + (sites.weights_F * distances).sum() / (len(targets) - first)
    return total


def _following(inputs: LossInputs, sites: Targets, layer: int) -> Tensor:
    """Return the states (F, D) of a layer, counted from the last, that follow at some sites of a pass."""
    batch, thought = inputs.batch, inputs.thought
    if sites.iteration == ANSWER_PASS:
        return thought.answer[layer][sites.rows_F, (sites.columns_F - thought.first_column).clamp(min=0)]
    assert thought.loop is not None
    parts = [(rows, states[layer]) for (rows, _), states in zip(thought.loop.outputs, thought.layer_states)]
    states = state_at(parts, thought.loop.state, sites.iteration)
    student = states[sites.rows_F, (sites.columns_F - batch.bounds[0]).clamp(min=0)]
    is_mean = sites.columns_F < 0
    return torch.where(is_mean[:, None], masked_mean(states, thought.state_mask)[sites.rows_F], student)


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
    smooth = smooth_l1_loss(student, target, reduction="none").mean(-1)
    return smooth if kind == "smooth_l1_raw" else smooth / spread


def answer_losses(inputs: LossInputs) -> Tensor:
    """Return the summed loss of each row's written tokens when it answers after iteration t: (T, B)."""
    batch, loop = inputs.batch, inputs.thought.loop
    assert loop is not None
    n_columns = batch.ids_BS.shape[1]
    losses = []
    for t in range(1, len(loop.states) + 1):
        loss_U = token_losses(inputs.write(state_at(loop.states, loop.state, t)), batch.targets_U, inputs.chunk)
        losses.append(loss_U.new_zeros(len(batch)).index_add(0, batch.predict_at_U // n_columns, loss_U))
    return torch.stack(losses)


def every_pass_loss(inputs: LossInputs, last: Tensor) -> Tensor:
    """Return the summed loss of the written tokens, the mean over all passes (spiralthinker.md, L_CE).

    ``last`` is that of the last pass; the others read the states z_0..z_{K-1} in its place.
    """
    loop = inputs.thought.loop
    if loop is None:
        return last
    earlier = [loop.first, *(state_at(loop.states, loop.state, k) for k in range(1, len(loop.states)))]
    totals = [summed_loss(inputs.write(state), inputs.batch.targets_U, inputs.chunk) for state in earlier]
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


def halting_loss(inputs: LossInputs, losses_TB: Tensor, settings: HaltSettings, stop: StopRule) -> Tensor:
    """Return, summed over rows, sum_t p_t L_t + beta KL(p || prior), L_t a mean over tokens."""
    batch, thought = inputs.batch, inputs.thought
    assert thought.loop is not None
    n = len(thought.loop.states)
    states = [state_at(thought.loop.states, thought.loop.state, loop) for loop in range(1, n + 1)]
    logits = torch.stack([stop.halting_logit(state, thought.state_mask) for state in states])
    p = exit_distribution(logits, batch.n_loops)
    n_targets = torch.tensor(batch.n_targets, device=p.device).clamp(min=1)
    divergence = pull(p, settings.pull, settings.prior, batch.n_loops)
    return (expected_loss(p, losses_TB / n_targets) + settings.beta * divergence).sum()

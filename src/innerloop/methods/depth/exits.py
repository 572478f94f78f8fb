"""What is learned at the ways out of a loop: losses after every iteration, and a gate that chooses one for each token.

    exits:  sum_{t<T} w_t (CE_t + kd KL(p_T || p_t)), the last distribution p_T detached  (relaxed_recursive.md, 4)
    gate:   lambda_t = sigmoid(w h_t + b);  p_t = lambda_t prod_{j<t} (1 - lambda_j), p_T the rest  (looped.md, 4)
            distribution: sum_t p_t CE_t + beta (log T - H(p));  improvement: lambda_t learns whether iteration t gained

Shapes: `T` iterations, `U` supervised tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div

from innerloop.config.losses import ExitSettings
from innerloop.decoder.token_losses import ALL, AtOnce, HeadInputs, LogitsFn, by_rows, token_losses
from innerloop.halting.learned import exit_distribution, expected_loss, gain_targets, pull
from innerloop.passes.loss_inputs import LossInputs, PassTerms


def exit_terms(settings: ExitSettings, inputs: LossInputs) -> PassTerms:
    """Return the terms of a pass whose exits are known.

    The gate's is what turns the loss of the last exit, which is learned anyway, into that of all.
    """
    batch, deep, head = inputs.batch, inputs.thought.deep[-1], inputs.backbone.head
    n_columns, terms = batch.ids_BS.shape[1], PassTerms()
    rows, at = batch.predict_at_U // n_columns, batch.predict_at_U % n_columns - inputs.thought.first_column
    states = [exit_BLD[rows, at] for exit_BLD in deep.exits]
    chunk, targets_U = inputs.chunk, batch.targets_U
    if settings.weight > 0:
        last = _last_said(head, states[-1].detach(), chunk) if settings.kd > 0 else None
        total = states[-1].new_zeros((), dtype=torch.float32)
        for t, state in enumerate(states[:-1], 1):
            share = 1.0 if settings.schedule == "equal" else t / len(states)
            losses_of = partial(_losses_of, HeadInputs(head, state), targets_U, last, settings.kd)
            total = total + share * by_rows(losses_of, len(targets_U), chunk).sum()
        terms["exits"] = total, "answer"
    if settings.gate != "none":
        losses_TU = torch.stack([token_losses(HeadInputs(head, s), batch.targets_U, chunk) for s in states])
        logits_TU = torch.stack([gate_BL[rows, at] for gate_BL in deep.gates])
        if settings.gate == "distribution":
            total = distribution_loss(losses_TU, logits_TU, settings.gate_beta) - losses_TU[-1].sum()
        else:
            total = improvement_loss(losses_TU, logits_TU)
        terms["gate"] = total, "answer"
    return terms


def _last_said(head: Callable[[Tensor], Tensor], states_UD: Tensor, chunk: AtOnce) -> LogitsFn:
    """Return what gives the log-probabilities of the last exit, which learns nothing here; made once if all at once."""
    show = HeadInputs(lambda states: head(states).float().log_softmax(-1), states_UD)
    if chunk is not None:
        return show
    with torch.no_grad():
        whole_UV = show(ALL)
    return lambda part: whole_UV[part]


def _losses_of(show: LogitsFn, targets_U: Tensor, last: LogitsFn | None, kd: float, part: slice) -> Tensor:
    last_UV = None
    if last is not None:
        with torch.no_grad():
            last_UV = last(part)
    return exit_losses(show(part).float(), targets_U[part], last_UV, kd)


def exit_losses(logits_UV: Tensor, targets_U: Tensor, last_UV: Tensor | None, kd: float) -> Tensor:
    """Return CE + kd KL(p_T || p_t) of each token (U,); ``last_UV`` are the log-probabilities of the last exit."""
    losses_U = cross_entropy(logits_UV, targets_U, reduction="none")
    if last_UV is None:
        return losses_U
    return losses_U + kd * kl_div(logits_UV.log_softmax(-1), last_UV, reduction="none", log_target=True).sum(-1)


def distribution_loss(losses_TU: Tensor, logits_TU: Tensor, beta: float) -> Tensor:
    """Return sum_t p_t CE_t + beta KL(p || uniform), summed over tokens."""
    p_TU = exit_distribution(logits_TU)
    return (expected_loss(p_TU, losses_TU) + beta * pull(p_TU, "uniform")).sum()


def improvement_loss(losses_TU: Tensor, logits_TU: Tensor) -> Tensor:
    """Return, summed over tokens, the mean over t = 2..T of BCE(1 - lambda_t, w_t), w_t how much iteration t gained."""
    wanted = gain_targets(losses_TU)
    return binary_cross_entropy_with_logits(-logits_TU[1:].float(), wanted, reduction="none").mean(0).sum()

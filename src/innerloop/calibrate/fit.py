"""Fitting what decides to stop: a classifier on statistics, a probe on states; and the thresholds that go with them.

The model itself is frozen. What is learned is kept as plain numbers in the rule (adainfer.md, 4; halting.md, 3b and 5).

Shapes: `T` iterations, `M` rows or tokens, `F` features, `D` width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from innerloop.config.stopping import JudgeKind
from innerloop.errors import InputError
from innerloop.halting.rule import StopRule

MOST_VECTORS = 1000  # rows that an RBF machine is fitted to
CERTAIN = 20.0  # the margin where there is nothing to learn: all rows are alike
PROBE_STEPS, PROBE_RATE = 300, 1e-2


def fit_judge(
    features_TMF: Tensor, labels_TM: Tensor, kind: JudgeKind = "logistic", per_step: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Fit a classifier to all iterations but the last, or one to each; return its numbers by name.

    Features are standardised; classes weigh alike; regularisation is L2 with C = 1.
    """
    n_T, _, n_F = features_TMF.shape
    groups = [slice(t, t + 1) for t in range(n_T - 1)] if per_step else [slice(0, n_T - 1)]
    fitted = []
    for group in groups:
        x_NF, y_N = features_TMF[group].reshape(-1, n_F).double(), labels_TM[group].reshape(-1)
        mean, scale = x_NF.mean(0), x_NF.std(0, correction=0).clamp(min=1e-6)
        fitted.append({"mean": mean, "scale": scale, **_machine((x_NF - mean) / scale, y_N, kind, seed)})
    most = max(len(one["share"]) for one in fitted)
    for one in fitted:  # so that all have as many support vectors; those added count for nothing
        missing = most - len(one["share"])
        one["share"] = torch.cat([one["share"], torch.zeros(missing).double()])
        one["vectors"] = torch.cat([one["vectors"], torch.zeros(missing, n_F).double()])
    numbers = {
        name: torch.stack([one[short] for one in fitted])
        for name, short in (
            ("mean_KF", "mean"),
            ("scale_KF", "scale"),
            ("weight_KF", "weight"),
            ("bias_K", "bias"),
            ("vectors_KSF", "vectors"),
            ("share_KS", "share"),
            ("gamma_K", "gamma"),
        )
    }
    return {**numbers, "tau_T": torch.zeros(n_T)}


def _machine(z_NF: Tensor, y_N: Tensor, kind: JudgeKind, seed: int) -> dict[str, Tensor]:
    """Fit one classifier to standardised features; what a kind does not have is empty."""
    n_F = z_NF.shape[1]
    empty = {
        "weight": torch.zeros(n_F).double(),
        "vectors": torch.zeros(0, n_F).double(),
        "share": torch.zeros(0).double(),
        "gamma": torch.zeros(()).double(),
    }
    if bool(y_N.all()) or not bool(y_N.any()):
        return {**empty, "bias": torch.tensor(CERTAIN if bool(y_N.all()) else -CERTAIN).double()}
    linear_model, svm = _sklearn()
    if kind == "svm_rbf":
        z_NF, y_N = _balanced(z_NF, y_N, seed)
        machine = svm.SVC(kernel="rbf", C=1.0, gamma="scale", class_weight="balanced").fit(z_NF.numpy(), y_N.numpy())
        vectors, share = (torch.as_tensor(a) for a in (machine.support_vectors_, machine.dual_coef_[0]))
        gamma = 1 / (n_F * z_NF.var(correction=0))
        return {**empty, "vectors": vectors, "share": share, "gamma": gamma, "bias": _bias(machine)}
    if kind == "svm_linear":
        machine = svm.LinearSVC(C=1.0, class_weight="balanced", random_state=seed, dual=False)
    else:
        machine = linear_model.LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
    machine.fit(z_NF.numpy(), y_N.numpy())
    return {**empty, "weight": torch.as_tensor(machine.coef_[0]).double(), "bias": _bias(machine)}


def _bias(machine: Any) -> Tensor:
    return torch.tensor(float(machine.intercept_[0])).double()


def _balanced(z_NF: Tensor, y_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows of both classes, as many of each as there are, up to half of `MOST_VECTORS`."""
    order = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(seed))
    chosen = [order[y_N[order] == label][: MOST_VECTORS // 2] for label in (False, True)]
    rows = torch.cat(chosen)
    return z_NF[rows], y_N[rows]


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import linear_model, svm
    except ImportError:
        raise InputError("fitting a classifier needs scikit-learn: pip install 'innerloop[fit]'") from None
    return linear_model, svm


def fit_probe(rule: StopRule, states_TMD: Tensor, labels_TM: Tensor, seed: int = 0) -> float:
    """Train a probe by binary cross-entropy on all iterations but the last, all rows at once; return the last loss."""
    assert rule.probe is not None
    device = next(rule.probe.parameters()).device
    states_NND = states_TMD[:-1].flatten(0, 1)[:, None].to(device)
    labels_N = labels_TM[:-1].flatten().float().to(device)
    loss = torch.zeros(())
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for part in rule.probe:
            if isinstance(part, torch.nn.Linear):
                part.reset_parameters()
        optimizer = torch.optim.Adam(rule.probe.parameters(), lr=PROBE_RATE)
        for _ in range(PROBE_STEPS):
            loss = binary_cross_entropy_with_logits(rule.probe_logit(states_NND), labels_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    rule.probe.zero_grad()
    return loss.item()


def fitted_thresholds(
    scores_TM: Tensor,
    agrees_TM: Tensor,
    target: float,
    patience: int = 1,
    min_rows: int = 50,
    min_loops: int = 1,
    check_every: int = 1,
) -> Tensor:
    """Return for each iteration the loosest threshold tau_t (T,).

    Of those that come as far as iteration t and have a score of at least tau_t, a share of at least ``target`` agrees
    with the last iteration; where fewer than ``min_rows`` would stop, iteration t is closed (infinity), as are those
    that are not looked at. Nobody stops before iteration ``min_loops``.
    """
    n_T, n_M = scores_TM.shape
    tau_T = torch.full((n_T,), math.inf)
    streak_M, goes_M = torch.zeros(n_M, dtype=torch.long), torch.ones(n_M, dtype=torch.bool)
    for t in range(check_every, n_T, check_every):
        score_M, agrees_M = scores_TM[t - 1], agrees_TM[t - 1]
        tau_T[t - 1] = _loosest(score_M[goes_M], agrees_M[goes_M], target, min_rows)
        streak_M = torch.where(score_M >= tau_T[t - 1], streak_M + 1, 0)
        if t >= min_loops:
            goes_M = goes_M & ~(streak_M >= patience)
    return tau_T


def _loosest(score_N: Tensor, agrees_N: Tensor, target: float, min_rows: int) -> float:
    order = torch.argsort(score_N, descending=True)
    score_N, hits_N = score_N[order], agrees_N[order].double().cumsum(0)
    n_N = torch.arange(1, len(order) + 1)
    is_edge_N = torch.ones_like(n_N, dtype=torch.bool)
    is_edge_N[:-1] = score_N[1:] < score_N[:-1]  # rows with the same score stop together
    good_N = torch.nonzero(is_edge_N & (hits_N >= target * n_N) & (n_N >= min_rows))[:, 0]
    return float(score_N[good_N[-1]]) if len(good_N) else math.inf

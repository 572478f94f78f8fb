"""Fitting what decides to stop: a classifier on statistics, a probe on states; and the thresholds that go with them.

The model itself is frozen. What is learned is kept as plain numbers in the rule (adainfer.md, 4; halting.md, 3b and 5).

Shapes: `T` iterations, `M` rows or tokens, `F` features, `D` width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from innerloop.calibrate.loop_scan import stops_at
from innerloop.config.stopping import ExitClassifierKind, StopSettings
from innerloop.errors import check_installed
from innerloop.halting.rule import StopRule

MOST_VECTORS = 1000  # rows that an RBF machine is fitted to
CERTAIN = 20.0  # the margin where there is nothing to learn: all rows are alike
PROBE_STEPS, PROBE_RATE = 300, 1e-2
AT_ONCE = StopSettings()


def fit_classifier(
    features_TMF: Tensor,
    labels_TM: Tensor,
    kind: ExitClassifierKind = "logistic",
    per_step: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fit a classifier to all iterations but the last, or one to each; return its numbers by name.

    Features are standardised; classes weigh alike; regularisation is L2 with C = 1.
    """
    n_T = len(features_TMF)
    groups = [slice(t, t + 1) for t in range(n_T - 1)] if per_step else [slice(0, n_T - 1)]
    fitted = [_fitted(features_TMF[g].flatten(0, 1).double(), labels_TM[g].flatten(), kind, seed) for g in groups]
    numbers = {}
    for name, first in fitted[0].items():  # support vectors that are added, so that all have as many, count for nothing
        values = [one[name] for one in fitted]
        numbers[name] = pad_sequence(values, batch_first=True) if first.ndim else torch.stack(values)
    return {**numbers, "tau_T": torch.zeros(n_T)}


def check_sklearn() -> None:
    """Refuse where scikit-learn is not installed."""
    check_installed("fitting a classifier needs scikit-learn", "fit", "sklearn")


def _fitted(x_NF: Tensor, y_N: Tensor, kind: ExitClassifierKind, seed: int) -> dict[str, Tensor]:
    """Fit one classifier; what a kind does not have is empty."""
    mean, scale, n_F = x_NF.mean(0), x_NF.std(0, correction=0).clamp(min=1e-6), x_NF.shape[1]
    none = x_NF.new_zeros(())
    numbers = {"mean_KF": mean, "scale_KF": scale, "weight_KF": none.expand(n_F), "bias_K": none, "gamma_K": none}
    numbers |= {"vectors_KSF": x_NF.new_zeros(0, n_F), "share_KS": x_NF.new_zeros(0)}
    if bool(y_N.all()) or not bool(y_N.any()):
        return numbers | {"bias_K": none + (CERTAIN if bool(y_N.all()) else -CERTAIN)}
    check_sklearn()
    from sklearn import linear_model, svm

    z_NF = (x_NF - mean) / scale
    if kind == "svm_rbf":
        z_NF, y_N = _balanced(z_NF, y_N, seed)
        machine = svm.SVC(kernel="rbf", C=1.0, gamma="scale", class_weight="balanced")
    elif kind == "svm_linear":
        machine = svm.LinearSVC(C=1.0, class_weight="balanced", random_state=seed, dual=False)
    else:
        machine = linear_model.LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
    machine.fit(z_NF.numpy(), y_N.numpy())
    numbers["bias_K"] = none + float(machine.intercept_[0])
    if kind != "svm_rbf":
        return numbers | {"weight_KF": torch.as_tensor(machine.coef_[0]).double()}
    vectors, share = (torch.as_tensor(of) for of in (machine.support_vectors_, machine.dual_coef_[0]))
    return numbers | {"vectors_KSF": vectors, "share_KS": share, "gamma_K": 1 / (n_F * z_NF.var(correction=0))}


def _balanced(z_NF: Tensor, y_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows of both classes, as many of each as there are, up to half of `MOST_VECTORS`."""
    order = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order[y_N[order] == label][: MOST_VECTORS // 2] for label in (False, True)])
    return z_NF[rows], y_N[rows]


def fit_probe(rule: StopRule, states_TMD: Tensor, labels_TM: Tensor, seed: int = 0) -> float:
    """Train a probe by binary cross-entropy on all iterations but the last, all rows at once; return the last loss."""
    assert rule.probe is not None
    device = next(rule.probe.parameters()).device
    states_N1D = states_TMD[:-1].flatten(0, 1)[:, None].to(device)
    labels_N = labels_TM[:-1].flatten().float().to(device)
    loss = torch.zeros(())
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for part in rule.probe:
            if isinstance(part, torch.nn.Linear):
                part.reset_parameters()
        optimizer = torch.optim.Adam(rule.probe.parameters(), lr=PROBE_RATE)
        for _ in range(PROBE_STEPS):
            loss = binary_cross_entropy_with_logits(rule.probe_logit(states_N1D), labels_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    rule.probe.zero_grad()
    return loss.item()


def fitted_thresholds(
    scores_TM: Tensor, agrees_TM: Tensor, target: float, min_rows: int = 50, options: StopSettings = AT_ONCE
) -> Tensor:
    """Return for each iteration the loosest threshold tau_t (T,).

    Of those that come as far as iteration t and have a score of at least tau_t, a share of at least ``target`` agrees
    with the last iteration; where fewer than ``min_rows`` would stop, iteration t is closed (infinity), as are those
    that ``options`` do not look at. Nobody stops before iteration ``min_loops``, and without ``patience``.
    """

    def limit(t: int, goes_M: Tensor) -> Tensor:
        tau_T[t - 1] = _loosest(scores_TM[t - 1][goes_M], agrees_TM[t - 1][goes_M], target, min_rows)
        return tau_T[t - 1]

    tau_T = torch.full((len(scores_TM),), math.inf)
    stops_at(scores_TM, options, limit)
    return tau_T


def _loosest(score_N: Tensor, agrees_N: Tensor, target: float, min_rows: int) -> float:
    order = torch.argsort(score_N, descending=True)
    score_N, hits_N = score_N[order], agrees_N[order].double().cumsum(0)
    n_N = torch.arange(1, len(order) + 1)
    is_edge_N = torch.ones_like(n_N, dtype=torch.bool)
    is_edge_N[:-1] = score_N[1:] < score_N[:-1]  # rows with the same score stop together
    good_N = torch.nonzero(is_edge_N & (hits_N >= target * n_N) & (n_N >= min_rows))[:, 0]
    return float(score_N[good_N[-1]]) if len(good_N) else math.inf

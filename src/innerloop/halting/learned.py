"""Learned stopping: the mathematics of gates that give each iteration a rate lambda_t of stopping.

ACT (arXiv 1603.08983), PonderNet (arXiv 2107.05407), Ouro (arXiv 2510.25741); halting.md, 3c to 3e. All in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.config.losses import Pull


def _iterations(like_TB: Tensor, n_loops: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return t (T, 1), and as (T, B) where a row has an iteration t, and where it is its last."""
    n_rows = like_TB.shape[1]
    t = torch.arange(1, len(like_TB) + 1, device=like_TB.device)[:, None]
    ran_B = torch.tensor([len(like_TB)] * n_rows if n_loops is None else list(n_loops), device=like_TB.device)
    return t, t <= ran_B, t == ran_B


def exit_distribution(logits_TB: Tensor, n_loops: Sequence[int] | None = None) -> Tensor:
    """Return p_t = lambda_t prod_{j<t} (1 - lambda_j), a row's last iteration taking the rest, (T, B).

    ``logits_TB`` are those of lambda_t; the last's does not matter. ``n_loops``: of each row; None: all T.
    """
    log_stop = logits_TB.float().sigmoid().clamp(min=1e-12).log()
    log_go = (-logits_TB.float()).sigmoid().clamp(min=1e-12).log()
    before = torch.cat([torch.zeros_like(log_go[:1]), log_go.cumsum(0)[:-1]])
    _, ran_TB, is_last_TB = _iterations(logits_TB, n_loops)
    return (before + log_stop.masked_fill(is_last_TB, 0.0)).exp() * ran_TB


def expected_loss(p_TB: Tensor, losses_TB: Tensor) -> Tensor:
    """Return sum_t p_t L_t of each row (B,)."""
    return (p_TB * losses_TB).sum(0)


def pull(p_TB: Tensor, kind: Pull, prior: float = 0.2, n_loops: Sequence[int] | None = None) -> Tensor:
    """Return how far the distribution over iterations is from a prior (B,).

    geometric: KL(p || G), G_t = prior (1 - prior)^(t-1), truncated and normalised (PonderNet); geometric_reverse:
    KL(G || p); uniform: KL(p || uniform) = log T - H(p) (Ouro).
    """
    t, ran_TB, _ = _iterations(p_TB, n_loops)
    g_TB = ran_TB.float() if kind == "uniform" else (1 - prior) ** (t.float() - 1) * ran_TB
    g_TB = g_TB / g_TB.sum(0).clamp(min=1e-30)
    log_p, log_g = p_TB.clamp(min=1e-12).log(), g_TB.clamp(min=1e-12).log()
    return (g_TB * (log_g - log_p)).sum(0) if kind == "geometric_reverse" else (p_TB * (log_p - log_g)).sum(0)


def gain_targets(losses_TB: Tensor, least: float = 0.005, sharpness: float = 50.0) -> Tensor:
    """Return how much it was worth to go on to iteration t = 2..T, (T - 1, B) in (0, 1) (Ouro's second stage).

    w_t = sigmoid(50 (I_t - 0.005)), I_t = max(0, L_{t-1} - L_t): the target of 1 - lambda_t.
    """
    gained = (losses_TB[:-1] - losses_TB[1:]).clamp(min=0)
    return torch.sigmoid(sharpness * (gained - least)).detach()


@dataclass
class ActShares:
    """ACT's shares a_t of the iterations, one at a time: a_t = u_t until sum u >= 1 - eps, then what is left.

    Attributes:
        total_B: sum of u_j so far.
        is_over_B: which rows have had their last share.
        ponder_B: N + R of the rows that have; its gradient is that of R.
    """

    total_B: Tensor
    is_over_B: Tensor
    ponder_B: Tensor

    @staticmethod
    def empty(n_rows: int, device: torch.device) -> ActShares:
        """Return the shares before the first iteration."""
        zeros = torch.zeros(n_rows, device=device)
        return ActShares(zeros, zeros.bool(), zeros)

    def keep_rows(self, rows: Tensor) -> ActShares:
        """Return the shares of some rows."""
        return ActShares(self.total_B[rows], self.is_over_B[rows], self.ponder_B[rows])

    def take(self, rate_B: Tensor, iteration: int, threshold: float, is_last_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_t (B,), and which rows end with it; where ``is_last_B`` a row takes what is left."""
        before_B, self.total_B = self.total_B, self.total_B + rate_B
        ends_B = ~self.is_over_B & ((self.total_B >= threshold) | is_last_B)
        rest_B = 1 - before_B
        share_B = torch.where(ends_B, rest_B, rate_B).masked_fill(self.is_over_B, 0.0)
        self.ponder_B = torch.where(ends_B, iteration + rest_B, self.ponder_B)
        self.is_over_B = self.is_over_B | ends_B
        return share_B, ends_B

"""The loss of group-relative policy optimisation (hrpo.md, section 4), equal to TRL's (`tests/test_grpo_trl.py`).

    A_i  = (R_i - mean_g) / (std_g + 1e-4)                          std unbiased; 0 where all of a group are alike
    rho  = exp(lp - lp_old)                                          1 in the first update of a rollout
    L_k  = -min(rho A, clip(rho, 1 - eps, 1 + eps') A) + beta (exp(lr - lp) - (lr - lp) - 1)

Shapes: `N` samples, in groups of G that follow each other; `U` actions (written tokens), sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.train.grpo_arguments import GrpoArguments

TINY = 1e-4


def advantages(rewards_N: Tensor, n_group: int, scale: str) -> Tensor:
    """Return how much better each sample is than the mean of its group (N,), in fp32.

    Args:
        rewards_N: their rewards; a sample without (NaN) is no part of its group, and 0.
        n_group: G.
        scale: what that is divided by: the standard deviation of the group, of the batch, or nothing (none).
    """
    rewards_GN = rewards_N.double().view(-1, n_group)
    found_GN = rewards_GN - rewards_GN.nanmean(1, keepdim=True)
    if scale != "none":
        spread = spread_of(rewards_GN) if scale == "group" else spread_of(rewards_GN.view(1, -1))
        found_GN = found_GN / (spread[:, None] + TINY)
    found_GN = torch.where(is_flat(rewards_GN)[:, None], 0.0, found_GN)  # rounding of the mean must move nothing
    return found_GN.nan_to_num(0.0).flatten().float()


def spread_of(rewards_GN: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each row's numbers, NaN left out; 0 for fewer than two."""
    n_G = (~rewards_GN.isnan()).sum(1)
    squares_G = (rewards_GN - rewards_GN.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares_G / (n_G - 1).clamp(min=1)).sqrt()


def is_flat(rewards_GN: Tensor) -> Tensor:
    """Return which groups have equal rewards alone, from which nothing is learned."""
    top_G = rewards_GN.nan_to_num(-torch.inf).amax(1)
    return (rewards_GN.nan_to_num(torch.inf).amin(1) == top_G) | rewards_GN.isnan().all(1)


@dataclass
class Played:
    """Samples that are learned from in one forward pass.

    Attributes:
        advantages_U: that of each action's sample.
        weights_U: what each action counts in the loss; see `weights_of`.
        old_U: log-probabilities before the first update; None: this is it.
        reference_U: those of the model before training, where it counts.
    """

    advantages_U: Tensor
    weights_U: Tensor
    old_U: Tensor | None = None
    reference_U: Tensor | None = None


def weights_of(lengths_N: Tensor, loss_type: str, n_samples: float, n_tokens: float, longest: int) -> Tensor:
    """Return what each action counts in the loss (U,).

    Args:
        lengths_N: how many actions each sample has.
        loss_type: grpo: samples count alike; dapo: actions do; dr_grpo: actions do, in samples as long as can be.
        n_samples: of the global batch.
        n_tokens: of the global batch.
        longest: the most actions that a sample may have.
    """
    each_N = {
        "grpo": 1 / (lengths_N.float() * n_samples),
        "dapo": torch.full_like(lengths_N, 1, dtype=torch.float32) / n_tokens,
        "dr_grpo": torch.full_like(lengths_N, 1, dtype=torch.float32) / (n_samples * longest),
    }[loss_type]
    return each_N.repeat_interleave(lengths_N)


def policy_loss(log_probs_U: Tensor, played: Played, args: GrpoArguments) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and means over actions: of the divergence where it counts, and of the share that is clipped."""
    old_U = log_probs_U.detach() if played.old_U is None else played.old_U
    ratio_U, gain_U = (log_probs_U - old_U).exp(), played.advantages_U
    low, high = 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
    losses_U = -torch.minimum(ratio_U * gain_U, ratio_U.clamp(low, high) * gain_U)
    is_cut_U = ((ratio_U < low) & (gain_U < 0)) | ((ratio_U > high) & (gain_U > 0))
    measured = {"clip_ratio": is_cut_U.float().mean()}
    if played.reference_U is not None:
        gap_U = played.reference_U - log_probs_U
        divergence_U = gap_U.exp() - gap_U - 1
        losses_U = losses_U + args.beta * divergence_U
        measured["kl"] = divergence_U.detach().mean()
    return (played.weights_U * losses_U).sum(), measured

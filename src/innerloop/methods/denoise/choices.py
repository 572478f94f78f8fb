"""How likely a choice of masks is: a ranking (Plackett-Luce), or a coin for each (dcolt.md, 3; unmasking_policy.md, 3).

Shapes: `R` canvases, `G` tokens of each, `K` places chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

NEVER = -1e30  # in place of minus infinity, whose gradient is no number


def ranking_log_prob(score_RG: Tensor, may_RG: Tensor, order_RK: Tensor, is_chosen_RK: Tensor) -> Tensor:
    """Return the log-probability (R,) of drawing places one after the other, none twice, by softmax of their scores.

        sum_j [ g_j - logsumexp of g over the places not drawn before j ]

    Args:
        score_RG: g.
        may_RG: the places that may be drawn.
        order_RK: those drawn, in order.
        is_chosen_RK: which of these count; they come first.
    """
    chosen_RK = score_RG.gather(1, order_RK).masked_fill(~is_chosen_RK, NEVER)
    is_left_RG = may_RG.clone()
    is_left_RG[torch.arange(len(order_RK), device=order_RK.device)[:, None].expand_as(order_RK)[is_chosen_RK],
               order_RK[is_chosen_RK]] = False  # fmt: skip
    never = score_RG.new_full((len(score_RG), 1), NEVER)  # something to add up where nothing is left
    rest_R1 = torch.cat([score_RG.masked_fill(~is_left_RG, NEVER), never], dim=1).logsumexp(1, keepdim=True)
    tail_RK = chosen_RK.flip(1).logcumsumexp(1).flip(1)
    return (chosen_RK - torch.logaddexp(tail_RK, rest_R1)).masked_fill(~is_chosen_RK, 0.0).sum(1)


def coins_log_prob(logit_RG: Tensor, may_RG: Tensor, is_drawn_RG: Tensor) -> Tensor:
    """Return the log-probability (R,) of which places were drawn, each by itself with the chance sigmoid(logit)."""
    each_RG = torch.where(is_drawn_RG, logsigmoid(logit_RG), logsigmoid(-logit_RG))
    return each_RG.masked_fill(~may_RG, 0.0).sum(1)

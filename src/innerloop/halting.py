"""Stop scores: when has a state been refined enough? (slr.md, section 6; halting.md, section 3)

Every score grows as the loop converges, and a row stops once its score has reached the threshold for long enough; so an
infinite threshold never stops. Shapes: `B` rows, `N` positions, `D` width, `V` vocabulary; scores are (B,) in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

StopKind = Literal["none", "delta", "delta_undamped", "cos", "kl", "entropy", "argmax", "halt"]
Agg = Literal["mean", "last", "max"]

DEFAULT_THRESHOLDS: dict[str, float] = {
    "delta": 1.52,  # relative change below 0.03 (arXiv 2502.05171)
    "delta_undamped": 1.52,
    "cos": 3.0,  # 1 - cosine below 1e-3
    "kl": 3.0,  # KL divergence of successive read-outs below 1e-3
    "entropy": 3.0,  # change of entropy below 1e-3
    "argmax": 5.0,  # the same likeliest token five times running
    "halt": 0.9,  # cumulative halting probability
}
READS_OUT = ("kl", "entropy", "argmax")
TINY = 1e-30


@dataclass
class Moment:
    """What a score may look at after an iteration.

    Attributes:
        state: h_t (B, N, D).
        previous: h_{t-1} (B, N, D).
        rescaled: h'_t, the output before the residual (B, N, D).
        logits: the read-out of u_t (B, N, V), for scores that look at words.
        mask_BN: 1 where a position of the states is real; None when all are.
        logits_mask: 1 where a position of the logits is real; None when all are.
    """

    state: Tensor
    previous: Tensor
    rescaled: Tensor
    logits: Tensor | None = None
    mask_BN: Tensor | None = None
    logits_mask: Tensor | None = None


def neglog(distance: Tensor) -> Tensor:
    """Turn a distance into a score that grows as it shrinks: -log10(d)."""
    return -torch.log10(distance.float().clamp(min=TINY))


def aggregate(distance_BN: Tensor, agg: Agg, mask_BN: Tensor | None = None) -> Tensor:
    """Reduce a distance per real position to one per row: the mean, the last position's, or the largest."""
    mask_BN = torch.ones_like(distance_BN) if mask_BN is None else mask_BN.to(distance_BN.dtype)
    if agg == "last":  # regions are padded on the right
        last_B = mask_BN.sum(1).long().clamp(min=1) - 1
        return distance_BN.gather(1, last_B[:, None])[:, 0]
    if agg == "max":
        return distance_BN.masked_fill(mask_BN == 0, 0.0).amax(1)
    return distance_BN.masked_fill(mask_BN == 0, 0.0).sum(1) / mask_BN.sum(1).clamp(min=1)


def masked_mean(states_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Return the mean over real positions (B, D)."""
    if mask_BN is None:
        return states_BND.mean(1)
    weights = mask_BN[..., None].to(states_BND.dtype)
    return (states_BND * weights).sum(1) / weights.sum(1).clamp(min=1)


class StopRule(nn.Module):
    """Scores the rows of a running loop; remembers what it must about the iterations before.

    Args:
        kind: what is looked at.
        width: the width of the states; ``halt`` learns a linear gate on them.
        agg: how positions are reduced.
    """

    def __init__(self, kind: StopKind, width: int, agg: Agg = "mean"):
        super().__init__()
        self.kind, self.agg = kind, agg
        self.gate = nn.Linear(width, 1) if kind == "halt" else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, -1.0)
        self.reset()

    def reset(self) -> None:
        """Forget: a new loop begins."""
        self.memory: Tensor | None = None
        self.run: Tensor | None = None

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with the rows ``rows`` alone."""
        self.memory = None if self.memory is None else self.memory[rows]
        self.run = None if self.run is None else self.run[rows]

    def halting_logit(self, state: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Return the logit of lambda_t (B,), read from the mean over positions."""
        assert self.gate is not None
        mean = masked_mean(state, mask_BN)
        return self.gate(mean.to(self.gate.weight.dtype))[:, 0].float()

    def score(self, now: Moment) -> Tensor:
        """Return s(h_t) (B,); minus infinity where there is nothing to compare with yet."""
        match self.kind:
            case "delta" | "delta_undamped":
                new = now.state if self.kind == "delta" else now.rescaled
                change = (new.float() - now.previous.float()).norm(dim=-1)
                return neglog(aggregate(change / (new.float().norm(dim=-1) + 1e-8), self.agg, now.mask_BN))
            case "cos":
                cosine = cosine_similarity(now.state.float(), now.previous.float(), dim=-1)
                return neglog(aggregate((1 - cosine).clamp(min=0), self.agg, now.mask_BN))
            case "kl" | "entropy" | "argmax":
                assert now.logits is not None
                return self._word_score(now.logits, now.logits_mask)
            case "halt":
                survival = torch.ones(len(now.state), device=now.state.device) if self.memory is None else self.memory
                self.memory = survival * (1 - self.halting_logit(now.state, now.mask_BN).sigmoid())
                return 1 - self.memory
        raise ValueError(f"no score of kind {self.kind}")

    def _word_score(self, logits_BNV: Tensor, mask_BN: Tensor | None) -> Tensor:
        log_p = logits_BNV.float().log_softmax(-1)
        never = log_p.new_full((len(log_p),), -torch.inf)
        if self.kind == "argmax":
            top, before = log_p.argmax(-1), self.memory
            self.memory = top
            if before is None:
                self.run = torch.zeros(len(top), device=top.device)
                return never
            same = (top == before) if mask_BN is None else (top == before) | (mask_BN == 0)
            same = same.all(1)
            self.run = torch.where(same, self.run + 1, 0.0)  # type: ignore[operator]
            return self.run
        before = self.memory
        if self.kind == "kl":
            self.memory = log_p
            if before is None:
                return never
            divergence = (log_p.exp() * (log_p - before)).sum(-1).clamp(min=0)
            return neglog(aggregate(divergence, self.agg, mask_BN))
        entropy = -(log_p.exp() * log_p).sum(-1)
        self.memory = entropy
        return never if before is None else neglog(aggregate((entropy - before).abs(), self.agg, mask_BN))

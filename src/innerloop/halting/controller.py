"""`StopController`: which rows of a running loop end, iteration by iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from innerloop.config.stopping import StopSettings
from innerloop.halting.evidence import RowInfo, StopInputs
from innerloop.halting.learned import ActShares
from innerloop.halting.rule import StopRule, decayed


class StopController:
    """Watches a loop with a rule; also mixes the states of its iterations where the rule is ACT.

    Args:
        rule: scores the rows.
        settings: when a score is enough.
        state: z_0 (B, N, D).
        n_loops: the most iterations of each row.
        row_info: what the pass knows of its rows.
    """

    def __init__(
        self, rule: StopRule, settings: StopSettings, state: Tensor, n_loops: Sequence[int], row_info: RowInfo | None
    ):
        self.rule, self.settings, self.n_loops = rule, settings, n_loops
        rule.reset(len(state), row_info)
        self.streak_B = torch.zeros(len(state), dtype=torch.long, device=state.device)
        self.shares = self.mixed = self.ponder_B = None
        if settings.rule == "act":
            self.shares = ActShares.empty(len(state), state.device)
            never_runs = torch.tensor([n == 0 for n in n_loops], device=state.device)
            self.mixed = state * never_runs[:, None, None]
            self.ponder_B = self.shares.ponder_B

    mixed: Tensor | None
    ponder_B: Tensor | None

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with some rows."""
        index = torch.tensor(rows, device=self.streak_B.device)
        self.streak_B = self.streak_B[index]
        self.shares = None if self.shares is None else self.shares.keep_rows(index)
        self.rule.keep_rows(index)

    def is_due(self, iteration: int) -> bool:
        """Whether ``iteration`` is looked at."""
        return iteration % self.settings.check_every == 0

    def reads_words(self, iteration: int) -> bool:
        """Whether ``iteration`` must be read out."""
        return self.rule.reads_words and self.is_due(iteration)

    def look(self, now: StopInputs, row_info: RowInfo | None) -> Tensor | None:
        """Score the rows (B,); None where the iteration is not looked at."""
        if self.rule.reads_words and not self.is_due(now.iteration):
            return None
        now.features = {} if row_info is None else row_info.features
        score_B = self.rule.score(now)
        if self.is_due(now.iteration):
            written_B = None if row_info is None else row_info.written_B
            threshold = decayed(self.settings.kappa, written_B, self.settings.decay)
            self.streak_B = torch.where(score_B >= threshold, self.streak_B + 1, 0)
        return score_B

    def done(self, iteration: int) -> list[bool]:
        """Return which rows end after ``iteration``: the one question to the device in an iteration."""
        if not self.is_due(iteration) or iteration < self.settings.min_loops:
            return [False] * len(self.streak_B)
        return (self.streak_B >= self.settings.patience).tolist()

    def mix(self, new: Tensor, iteration: int, rows: list[int]) -> None:
        """Add the share of ``iteration``, whose states are ``new`` (B, N, D), to the rows ``rows`` (ACT)."""
        if self.shares is None or self.mixed is None or self.ponder_B is None:
            return
        index = torch.tensor(rows, device=new.device)
        is_last_B = torch.tensor([self.n_loops[row] == iteration for row in rows], device=new.device)
        rate_B = self.rule.kept["rate"]
        share_B, ends_B = self.shares.take(rate_B, iteration, self.settings.kappa, is_last_B)
        weight_B = share_B if self.settings.act_output == "weighted" else ends_B
        self.mixed = self.mixed.index_add(0, index, weight_B.to(new.dtype)[:, None, None] * new)
        self.ponder_B = self.ponder_B.index_copy(0, index, self.shares.ponder_B)

    def flops(self, now: StopInputs, active_B: Tensor | None) -> Tensor:
        """Return the FLOPs of looking at each row (B,)."""
        flops_B = self.rule.flops * _n_real(now.state, now.mask_BN)
        if now.logits is not None:
            flops_B = flops_B + 2 * now.state.shape[-1] * now.logits.shape[-1] * _n_real(now.logits, now.logits_mask)
        return flops_B if active_B is None else flops_B * active_B


def _n_real(values_BN: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Return how many positions of each row are real (B,), in double precision."""
    if mask_BN is not None:
        return mask_BN.sum(1).double()
    return torch.full((len(values_BN),), float(values_BN.shape[1]), dtype=torch.float64, device=values_BN.device)

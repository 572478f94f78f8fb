"""Policies that choose how canvases are filled, pass by pass; an action is what one pass keeps (dcolt.md, 3 and 4).

    policy = RankingPolicy(model)                                    # a model of `dcolt`
    rollouts = policy.roll_out([". 4 1 3 / .."], samples=8, seed=0, max_new_tokens=32)
    log_probs_U = policy.replay(model, policy.batch(rollouts))       # an action a pass, with a gradient

Commits are replayed on the canvases that they were made on, so several updates may use them.

Shapes: `N` rollouts, `P` columns of questions, `U` passes, rollout by rollout, `G` tokens of each, `K` places chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from innerloop.engine.at_work import evaluating
from innerloop.engine.canvas_rollouts import CanvasRollout, fill_canvases
from innerloop.engine.learned_canvases import (
    Stage,
    blocks_of,
    coins_likelihood,
    padded,
    predicted,
    ranked,
    ranking_likelihood,
    times_of,
)
from innerloop.engine.rollouts import Rollout
from innerloop.errors import refuse
from innerloop.methods.denoise.commits import Commit, canvases_of
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.denoise.unmasking_policy import UnmaskingPolicy
from innerloop.model.model import LatentCore
from innerloop.passes.canvas import Prompts


@dataclass(frozen=True)
class LearnedRollout(CanvasRollout):
    """A canvas that was filled as a policy chose.

    Attributes:
        alpha: of the reward that counts passes.
    """

    alpha: float = 1.0

    @property
    def n_actions(self) -> int:
        """One a pass."""
        return len(self.commits)

    @property
    def log_probs(self) -> list[float]:
        """The log-probability of each."""
        return [one.log_prob for one in self.commits]

    @property
    def columns(self) -> dict[str, float]:
        """How much of a reward is left after its passes (unmasking_policy.md, 4)."""
        return {"speed": (1 - len(self.commits) / self.gen_length) ** self.alpha}


@dataclass
class CanvasBatch:
    """The passes of some rollouts as tensors.

    Attributes:
        n_targets: the passes of each rollout.
        ids_NP: the questions, padded before.
        mask_NP: 1 where they are real.
        rows_U: the rollout of each pass.
        tokens_UG: what its canvas held before it.
        asked_UG: the masks that it could fill.
        block_UG: the places of the active block.
        time_U: what the scorer is told of time.
        order_UK: the places chosen, in order.
        chosen_UK: the tokens there.
        is_chosen_UK: which of them are real.
        seen_UG: what a policy that sees confidences alone saw.
        is_drawn_UG: the places that it drew.
    """

    n_targets: list[int]
    ids_NP: Tensor
    mask_NP: Tensor
    rows_U: Tensor
    tokens_UG: Tensor
    asked_UG: Tensor
    block_UG: Tensor
    time_U: Tensor
    order_UK: Tensor
    chosen_UK: Tensor
    is_chosen_UK: Tensor
    seen_UG: Tensor
    is_drawn_UG: Tensor

    def to(self, device: torch.device) -> CanvasBatch:
        """Return the batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "n_targets"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def stage(self, part: slice) -> Stage:
        """Return canvases before some of the passes, each with its question."""
        rows = self.rows_U[part]
        ids, mask = self.ids_NP[rows], self.mask_NP[rows]
        prompts = Prompts(ids, None if bool(self.mask_NP.all()) else mask)
        asked_UG, block_UG = self.asked_UG[part], self.block_UG[part]
        rows, places = asked_UG.nonzero(as_tuple=True)
        return Stage(prompts, self.tokens_UG[part], asked_UG, (rows, places), block_UG, self.time_U[part])


class LearnedPolicy:
    """What policies of canvases share: rollouts, and their passes as tensors.

    Args:
        model: what fills canvases.
        temperature: of the distribution that tokens are drawn from.
        batch_size: canvases that share a pass.
    """

    depends = False

    def __init__(self, model: LatentCore, temperature: float = 1.0, batch_size: int = 64):
        method = model.method
        assert isinstance(method, DenoisingMethod)
        self.model, self.method, self.temperature, self.batch_size = model, method, temperature, batch_size
        self.mask_id = method.mask_id(model.encoder)

    def roll_out(
        self,
        questions: Sequence[str],
        samples: int,
        seed: int,
        max_new_tokens: int,
        places: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Return the samples of each question; a draw depends on the seed, the question's place and the sample's."""
        drawn = self.temperature, self.batch_size, places
        found = fill_canvases(self.model, questions, samples, seed, max_new_tokens, *drawn)
        alpha = self.method.alpha if isinstance(self.method, UnmaskingPolicy) else 1.0
        kept = [LearnedRollout(**vars(one), alpha=alpha) for one in found]
        return list(kept)

    def batch(self, rollouts: Sequence[Rollout]) -> CanvasBatch:
        """Return the passes of rollouts as tensors."""
        kept = [one for one in rollouts if isinstance(one, LearnedRollout)]
        ids, n = [one.row.ids() for one in kept], self.method.gen_length
        width, pad = max(map(len, ids)), self.model.encoder.pad_id
        commits = [commit for one in kept for commit in one.commits]
        tokens = [held for one in kept for held in list(canvases_of(one.commits, n, self.mask_id))[:-1]]
        return CanvasBatch(
            [one.n_actions for one in kept],
            torch.tensor([[pad] * (width - len(own)) + own for own in ids]),
            torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in ids]),
            torch.tensor([r for r, one in enumerate(kept) for _ in one.commits]),
            torch.from_numpy(np.stack(tokens)),
            _spread(commits, [[1.0] * len(one.asked) for one in commits], n).bool(),
            blocks_of([one.bounds for one in commits], n),
            times_of(self.method, [i for one in kept for i in range(one.n_actions)]),
            *padded([(one.places, one.tokens) for one in commits], torch.device("cpu")),
            _spread(commits, [one.seen or (0.0,) * len(one.asked) for one in commits], n),
            _spread(commits, [_drawn(one) for one in commits], n).bool(),
        )


class RankingPolicy(LearnedPolicy):
    """DCoLT's: masks are ranked by a scorer, and predicted; both are learned."""

    def replay(self, model: LatentCore, batch: CanvasBatch, is_reference: bool = False) -> Tensor:
        """Return the log-probability of each pass's choice (U,), with a gradient.

        With checkpointed passes so many canvases as share a pass are gone through together, and again for the gradient.
        """
        n, size = len(batch.rows_U), self.batch_size if model.checkpoint_passes else len(batch.rows_U)
        with evaluating(list(model.modules())):
            parts = [slice(first, first + size) for first in range(0, n, size)]
            if not model.checkpoint_passes:
                return torch.cat([self._likelihood(model, batch, part) for part in parts])
            return torch.cat([checkpoint(self._likelihood, model, batch, part, use_reentrant=False) for part in parts])

    def _likelihood(self, model: LatentCore, batch: CanvasBatch, part: slice) -> Tensor:
        """Return those of some passes."""
        stage = batch.stage(part)
        states_RGD, logits_AV = predicted(model, stage, self._never(model))
        score_RG = ranked(model, stage, states_RGD, logits_AV, self.mask_id)
        chosen = batch.order_UK[part], batch.chosen_UK[part], batch.is_chosen_UK[part]
        return ranking_likelihood(score_RG, logits_AV / self.temperature, stage, *chosen)

    def _never(self, model: LatentCore) -> Tensor:
        """Return the tokens that are never written."""
        ends = [model.encoder.eos_id] if self.method.sampler.eos == "never" else []
        return torch.cat([model.suppressed_ids(), torch.tensor(ends, device=model.device, dtype=torch.long)])


class CoinsPolicy(LearnedPolicy):
    """That of learned unmasking: masks are filled by a coin each; the predictor is not asked again, and learns nothing.

    Raises:
        InputError: a temperature is set, or the method's beta, which is for answering.
    """

    def __init__(self, model: LatentCore, temperature: float = 1.0, batch_size: int = 64):
        super().__init__(model, temperature, batch_size)
        refuse(
            (
                temperature != 1.0,
                f"'{self.method.name}' writes the likeliest tokens, so temperature has no effect: leave it out, or set "
                "method.tau",
            ),
        )
        model.backbone.requires_grad_(False)

    def replay(self, model: LatentCore, batch: CanvasBatch, is_reference: bool = False) -> Tensor:
        """Return the log-probability of each pass's draws (U,), with a gradient to the scorer."""
        assert model.scorer is not None and isinstance(self.method, UnmaskingPolicy)
        logit_UG = model.scorer(batch.seen_UG, batch.tokens_UG == self.mask_id, batch.time_U) / self.method.tau
        return coins_likelihood(logit_UG, batch.asked_UG, batch.is_drawn_UG, self.method.fallback)


def _drawn(commit: Commit) -> list[float]:
    """Return 1 for each place asked for that was filled, if a coin said so."""
    places = () if commit.is_fallback else commit.places
    return [float(at in places) for at in commit.asked]


def _spread(commits: Sequence[Commit], values: Sequence[Sequence[float]], n: int) -> Tensor:
    """Return numbers of the places asked for (U, G), 0 elsewhere."""
    found = torch.zeros(len(commits), n)
    for u, (commit, own) in enumerate(zip(commits, values)):
        found[u, list(commit.asked)] = torch.tensor(own)
    return found

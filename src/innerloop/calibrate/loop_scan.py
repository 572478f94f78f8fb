"""What a loop shows when nothing stops it, iteration by iteration: every score, word, statistic and state.

From it follows where a rule would stop at any threshold, without running anything again. What is scanned are the rows
of methods that think in latents, and the tokens that write of methods whose loop runs inside the token.

Shapes: `T` iterations, `M` rows or tokens, `F` features, `D` width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop.config.stopping import StopSettings
from innerloop.engine.latent_model import LatentModel
from innerloop.halting.evidence import StopInputs, masked_mean
from innerloop.halting.rule import decayed
from innerloop.loop.loop import Pass
from innerloop.methods.depth.exit_pass import ExitPass
from innerloop.model.stopping import ruled_by
from innerloop.passes.ragged import TokenPass
from innerloop.text.examples import Example


@dataclass
class LoopScan:
    """What was seen.

    Attributes:
        scores_TM: the stop score; minus infinity where it was not looked at.
        written_M: how many tokens were written before each token; 0 for rows.
        tops_TM: the likeliest token, of tokens that write.
        gold_M: the right one.
        losses_TM: minus its log-probability.
        features_TMF: what a classifier looks at, where the rule is one.
        states_TMD: the states, where asked for.
    """

    scores_TM: Tensor
    written_M: Tensor
    tops_TM: Tensor | None = None
    gold_M: Tensor | None = None
    losses_TM: Tensor | None = None
    features_TMF: Tensor | None = None
    states_TMD: Tensor | None = None

    @property
    def agrees_TM(self) -> Tensor:
        """Whether an iteration shows what the last one shows."""
        assert self.tops_TM is not None
        return self.tops_TM == self.tops_TM[-1]

    def stops_at(self, options: StopSettings, threshold: float | Tensor) -> Tensor:
        """Return after how many iterations each row would stop (M,), at a threshold, or one for each iteration (T,)."""
        if isinstance(threshold, Tensor):
            return stops_at(self.scores_TM, options, lambda t, goes_M: threshold[t - 1])
        limit_M = decayed(threshold, self.written_M, options.stop_decay)
        return stops_at(self.scores_TM, options, lambda t, goes_M: limit_M)


def stops_at(scores_TM: Tensor, options: StopSettings, limit: Callable[[int, Tensor], float | Tensor]) -> Tensor:
    """Return after how many iterations rows stop (M,); ``limit`` is told t and who is still going, before each look."""
    n_T, n_M = scores_TM.shape
    stops_M, streak_M, goes_M = torch.full((n_M,), n_T), torch.zeros(n_M), torch.ones(n_M, dtype=torch.bool)
    for t in range(options.check_every, n_T, options.check_every):
        streak_M = torch.where(scores_TM[t - 1] >= limit(t, goes_M), streak_M + 1, 0)
        ends_M = goes_M & (streak_M >= options.patience) & (t >= options.min_loops)
        stops_M, goes_M = torch.where(ends_M, t, stops_M), goes_M & ~ends_M
    return stops_M


class _Watcher:
    """Takes down what a loop does; ``gold_X`` are the words that tokens must write, where it runs inside them."""

    def __init__(self, model: LatentModel, gold_X: Tensor | None, wants_states: bool):
        self.model, self.gold_X, self.wants_states = model, gold_X, wants_states
        self.tokens_A: Tensor | None = None
        self.written_A: Tensor | None = None
        self.seen: dict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, f: Pass, now: StopInputs, score: Tensor | None, read: Callable[[], Tensor]) -> None:
        """Take down an iteration."""
        if isinstance(f, TokenPass):
            self.tokens_A = f.flat_A
        if f.row_info is not None:
            self.written_A = f.row_info.written_B
        unknown = torch.full_like(now.state[:, 0, 0], -math.inf)
        self.seen["scores_TM"].append((unknown if score is None else score).float())
        if self.gold_X is not None and self.tokens_A is not None:
            logits = read() if now.logits is None else now.logits
            if isinstance(f, ExitPass) and f.n_candidates:
                logits = f.read_all(now.state)
            losses = cross_entropy(logits[:, 0].float(), self.gold_X[self.tokens_A], reduction="none")
            self.seen["tops_TM"].append(logits[:, 0].argmax(-1))
            self.seen["losses_TM"].append(losses)
        rule = self.model.loop.stop
        if rule is not None and rule.classifier is not None and score is not None:
            self.seen["features_TMF"].append(rule.features(now))
        if self.wants_states:
            self.seen["states_TMD"].append(masked_mean(now.state, now.mask_BN).float())


@torch.no_grad()
def scan_loop(
    model: LatentModel,
    examples: Sequence[Example],
    batch_size: int = 64,
    wants_states: bool = False,
    most_tokens: int | None = None,
    seed: int = 0,
) -> LoopScan:
    """Run a model's loop over examples, with their gold answers written, to its end.

    Args:
        model: the model; its rule stays as it is, its threshold is set aside.
        examples: the examples.
        batch_size: rows per batch.
        wants_states: keep the states.
        most_tokens: keep so many tokens only, drawn at random.
        seed: of that draw.
    """
    was_training, generator = model.training, torch.Generator().manual_seed(seed)
    model.eval()
    parts = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        most = None if most_tokens is None else max(most_tokens * len(chunk) // len(examples), 1)
        parts.append(_scanned(model, chunk, wants_states, most, generator))
    model.train(was_training)
    return LoopScan(**{name: torch.cat([p[name] for p in parts], int(parts[0][name].ndim > 1)) for name in parts[0]})


def _scanned(
    model: LatentModel, examples: Sequence[Example], wants_states: bool, most: int | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return what one batch shows, by the names of `LoopScan`; at most so many tokens of it."""
    assert isinstance(model.method, StopSettings)
    rule, inside = {**model.method.rule, "stop_threshold": math.inf}, model.depth is not None
    if model.method.loop.stop == "classifier":  # its features do not depend on when it was asked last
        rule["check_every"] = 1
    batch = model.batch(model.rows(examples))
    gold_X = batch.ids_BS.flatten().index_copy(0, batch.predict_at_U, batch.targets_U) if inside else None
    watcher = _Watcher(model, gold_X, wants_states)
    with ruled_by(model, **rule):
        model.loop.watch = watcher
        try:
            thought = model.think(batch)
            if inside:
                model.written_logits(batch, thought)
        finally:
            model.loop.watch = None
    seen = {name: torch.stack(values).cpu() for name, values in watcher.seen.items()}
    if not inside:
        return seen | {"written_M": torch.zeros(len(examples), dtype=torch.long)}
    assert watcher.tokens_A is not None and watcher.written_A is not None
    chosen, gold = torch.searchsorted(watcher.tokens_A, batch.predict_at_U).cpu(), batch.targets_U.cpu()
    if most is not None:
        drawn = torch.randperm(len(chosen), generator=generator)[:most].sort().values
        chosen, gold = chosen[drawn], gold[drawn]
    seen = {name: values[:, chosen] for name, values in seen.items()}
    return seen | {"gold_M": gold, "written_M": watcher.written_A.cpu()[chosen]}

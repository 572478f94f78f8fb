"""What a loop shows when nothing stops it: every score, word, statistic and state, iteration by iteration.

From it follows where a rule would stop at any threshold, without running anything again. What is surveyed are the rows
of methods that think in latents, and the tokens that write of methods whose loop runs inside the token.

Shapes: `T` iterations, `M` rows or tokens, `F` features, `D` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop.config.stopping import StopKind, StopSettings
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.halting.evidence import Moment, masked_mean
from innerloop.halting.rule import decayed, rule_for
from innerloop.loop.loop import Pass
from innerloop.methods import Method
from innerloop.methods.depth.exit_pass import ExitPass
from innerloop.passes.ragged import TokenPass
from innerloop.text.examples import Example

TRAINED_BY: dict[str, tuple[Any, tuple[StopKind, ...]]] = {
    "gate": ("none", ("halt", "halt_sample")),
    "halt_weight": (0.0, ("halt", "halt_sample")),
    "ponder_weight": (0.0, ("act",)),
}
"""Settings of training that some rules learn by: what they are without, and the rules."""


def use_rule(model: LatentModel, **options: Any) -> None:
    """Let a model stop by other `StopSettings` than it has; those not named get their usual values.

    What a rule has learned is kept where the new one is of the same kind. What a rule of another kind was trained by is
    set aside.
    """
    if not isinstance(model.method, StopSettings):
        raise InputError(f"'{model.method.name}' has no loop that could stop by itself")
    usual = {field.name: field.default for field in fields(StopSettings)}
    if unknown := set(options) - set(usual):
        raise InputError(f"{', '.join(sorted(unknown))}: no setting of stopping; these are {', '.join(usual)}")
    stop = options.get("stop", "none")
    aside = {
        name: off for name, (off, kinds) in TRAINED_BY.items() if hasattr(model.method, name) and stop not in kinds
    }
    use_method(model, replace(model.method, **{**usual, **options, **aside}))


def use_method(model: LatentModel, method: Method) -> None:
    """Let a model reason by other settings of its method, of those that have no weights but the stop rule's."""
    old, new = model.loop.stop, rule_for(method.loop, model.backbone.width)
    if old is not None and new is not None:
        known, wanted = old.state_dict(), new.state_dict()
        fits = {name: value for name, value in known.items() if name in wanted and _fits(name, value, wanted[name])}
        new.load_state_dict({**wanted, **fits})
    model.method, model.loop.settings = method, method.loop
    model.loop.stop = None if new is None else new.to(model.device).train(model.loop.training)
    if model.depth is not None:
        object.__setattr__(model.depth, "method", method)


@contextmanager
def ruled_by(model: LatentModel, **options: Any) -> Iterator[None]:
    """Let a model stop by other settings in a block; see `use_rule`."""
    loop, before = model.loop, (model.method, model.loop.settings, model.loop.stop)
    use_rule(model, **options)
    try:
        yield
    finally:
        model.method, loop.settings, loop.stop = before
        if model.depth is not None:
            object.__setattr__(model.depth, "method", model.method)


def _fits(name: str, value: Tensor, wanted: Tensor) -> bool:
    return name.startswith("judge.") or value.shape == wanted.shape


@dataclass
class Survey:
    """What was seen.

    Attributes:
        scores_TM: the stop score; minus infinity where it was not looked at.
        example_M: of which example each row or token is.
        written_M: how many tokens were written before it.
        tops_TM: the likeliest token, of tokens that write.
        gold_M: the right one.
        losses_TM: minus its log-probability.
        features_TMF: what a classifier looks at, where the rule is one.
        states_TMD: the states, where asked for.
    """

    scores_TM: Tensor
    example_M: Tensor
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

    def stops_at(self, settings: StopSettings, threshold: float, tau_T: Tensor | None = None) -> Tensor:
        """Return after how many iterations each row would stop (M,), at a threshold of its score less ``tau_T``."""
        scores_TM = self.scores_TM if tau_T is None else self.scores_TM - tau_T[:, None]
        limits = decayed(threshold, self.written_M, settings.stop_decay)
        n_T = len(scores_TM)
        stops_M = torch.full_like(self.example_M, n_T)
        streak_M, goes_M = torch.zeros_like(stops_M), torch.ones_like(stops_M, dtype=torch.bool)
        for t, score_M in enumerate(scores_TM[:-1], 1):
            if t % settings.check_every:
                continue
            streak_M = torch.where(score_M >= limits, streak_M + 1, 0)
            ends_M = goes_M & (streak_M >= settings.patience) & (t >= settings.min_loops)
            stops_M, goes_M = torch.where(ends_M, t, stops_M), goes_M & ~ends_M
        return stops_M


class Watcher:
    """Collects what an inner loop does; ``gold_X`` are the words that tokens must write, where it runs inside them."""

    def __init__(self, model: LatentModel, wants_states: bool, gold_X: Tensor | None):
        self.model, self.wants_states, self.gold_X = model, wants_states, gold_X
        self.tokens_A: Tensor | None = None
        self.written_A: Tensor | None = None
        self.scores: list[Tensor] = []
        self.tops: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.features: list[Tensor] = []
        self.states: list[Tensor] = []

    def __call__(self, f: Pass, now: Moment, score: Tensor | None, read: Callable[[], Tensor]) -> None:
        """Take down an iteration."""
        if isinstance(f, TokenPass):
            self.tokens_A = f.flat_A
        if f.hints is not None:
            self.written_A = f.hints.written_B
        self.scores.append(torch.full_like(now.state[:, 0, 0], -math.inf).float() if score is None else score.float())
        if self.gold_X is not None and self.tokens_A is not None:
            logits = read() if now.logits is None else now.logits
            if isinstance(f, ExitPass) and f.n_candidates:
                logits = f.read_all(now.state)
            self.tops.append(logits[:, 0].argmax(-1))
            self.losses.append(cross_entropy(logits[:, 0].float(), self.gold_X[self.tokens_A], reduction="none"))
        stop = self.model.loop.stop
        if stop is not None and stop.judge is not None and score is not None:
            self.features.append(stop.features(now))
        if self.wants_states:
            self.states.append(masked_mean(now.state, now.mask_BN).float())


@contextmanager
def watched(model: LatentModel, watcher: Watcher) -> Iterator[None]:
    """Let a watcher see what the inner loop does in a block."""
    model.loop.watch = watcher
    try:
        yield
    finally:
        model.loop.watch = None


@torch.no_grad()
def survey(
    model: LatentModel,
    examples: Sequence[Example],
    batch_size: int = 64,
    wants_states: bool = False,
    most_tokens: int | None = None,
    seed: int = 0,
) -> Survey:
    """Run a model's loop over examples, with their gold answers written, to its end.

    Args:
        model: the model; its rule stays as it is, its threshold is set aside.
        examples: the examples.
        batch_size: rows per batch.
        wants_states: keep the states.
        most_tokens: keep so many tokens only, drawn at random.
        seed: of that draw.
    """
    assert isinstance(model.method, StopSettings)
    rule, inside = {**model.method.rule, "stop_threshold": math.inf}, model.depth is not None
    if model.method.loop.stop == "classifier":  # its features do not depend on when it was asked last
        rule["check_every"] = 1
    was_training, generator = model.training, torch.Generator().manual_seed(seed)
    model.eval()
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        batch = model.batch(model.rows(chunk))
        gold_X = batch.ids_BS.flatten().index_copy(0, batch.predict_at_U, batch.targets_U) if inside else None
        watcher = Watcher(model, wants_states, gold_X)
        with ruled_by(model, **rule), watched(model, watcher):
            thought = model.think(batch)
            if inside:
                model.written_logits(batch, thought)
        rows = torch.arange(len(chunk), device=model.device)
        part = {
            "scores": torch.stack(watcher.scores),
            "tops": torch.stack(watcher.tops) if watcher.tops else None,
            "losses": torch.stack(watcher.losses) if watcher.losses else None,
            "features": torch.stack(watcher.features) if watcher.features else None,
            "states": torch.stack(watcher.states) if watcher.states else None,
        }
        if inside:
            assert watcher.tokens_A is not None and watcher.written_A is not None
            chosen = torch.searchsorted(watcher.tokens_A, batch.predict_at_U)
            gold, rows = batch.targets_U, batch.predict_at_U // batch.ids_BS.shape[1]
            if most_tokens is not None:
                share = max(most_tokens * len(chunk) // len(examples), 1)
                drawn = torch.randperm(len(chosen), generator=generator)[:share].sort().values.to(chosen.device)
                chosen, gold, rows = chosen[drawn], gold[drawn], rows[drawn]
            part = {name: None if value is None else value[:, chosen] for name, value in part.items()}
            part |= {"gold": gold, "written": watcher.written_A[chosen]}
        parts.append({name: v.cpu() for name, v in (part | {"example": rows + start}).items() if v is not None})
    model.train(was_training)
    whole = {name: torch.cat([p[name] for p in parts], dim=int(parts[0][name].ndim > 1)) for name in parts[0]}
    written = whole.get("written", torch.zeros_like(whole["example"]))
    return Survey(
        whole["scores"],
        whole["example"],
        written,
        *(whole.get(name) for name in ("tops", "gold", "losses", "features", "states")),
    )

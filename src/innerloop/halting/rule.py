"""`StopRule`: every score of the catalogue behind one interface."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from innerloop.config.stopping import COMPARES, DRAWS, READS_OUT, WORDS, Feature, StopSettings
from innerloop.halting import states, words
from innerloop.halting.baselines import drawn_depths, uniform
from innerloop.halting.classifier import ExitClassifier
from innerloop.halting.evidence import RowInfo, StopInputs, aggregate, masked_mean, neglog

GATES = {"halt": -1.0, "halt_sample": -1.0, "act": 1.0}  # and the bias that each begins with
PROBE_WIDTH = 64  # inner width of mlp_probe
UNSURE = -4.0  # bias of a probe that knows nothing: it does not stop
STATE_FLOPS = 6  # per element of a state, of a score that compares two


def decayed(threshold: float, written_B: Tensor | None, span: int) -> float | Tensor:
    """Return CALM's threshold clip(0.9 tau + 0.1 exp(-4 i / span), 0, 1) of the i-th token written (arXiv 2207.07061).

    ``written_B`` is i, from 0; None: nothing has been written yet. A span of 0 leaves the threshold alone, and so does
    an infinite one, which never stops.
    """
    if span == 0 or math.isinf(threshold):
        return threshold
    if written_B is None:
        return min(max(0.9 * threshold + 0.1, 0.0), 1.0)
    return (0.9 * threshold + 0.1 * torch.exp(-4 * written_B.float() / span)).clamp(0, 1)


class StopRule(nn.Module):
    """Scores the rows of a running loop; remembers what it must about the iterations before.

    Args:
        settings: what is looked at.
        width: the width of the states.
    """

    def __init__(self, settings: StopSettings, width: int):
        super().__init__()
        self.kind, self.agg, self.compare_init = settings.rule, settings.agg, settings.compare_init
        kind = self.kind
        self.histogram, self.width = settings.histogram, width
        self.n_drawn = 0
        self.gate = nn.Linear(width, 1) if kind in GATES else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, GATES[kind])
        self.probe = None
        if kind == "mlp_probe":
            last = nn.Linear(PROBE_WIDTH, 1)
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, UNSURE)
            self.probe = nn.Sequential(nn.Linear(width, PROBE_WIDTH), nn.GELU(), last)
        self.classifier = ExitClassifier(settings.features) if kind == "classifier" else None
        self.reset()

    @property
    def reads_words(self) -> bool:
        """Whether the score needs logits."""
        return self.kind in READS_OUT or (self.classifier is not None and bool({*WORDS} & {*self.classifier.features}))

    @property
    def flops(self) -> float:
        """FLOPs of a check per position, without those of reading words."""
        if self.gate is not None:
            return 2.0 * self.width
        if self.probe is not None:
            return 2.0 * sum(p.numel() for p in self.probe.parameters() if p.ndim == 2)
        if self.classifier is not None:
            return float(STATE_FLOPS * self.width * len({*self.classifier.features} - {*WORDS, "depth"}))
        return float(STATE_FLOPS * self.width if self.kind in COMPARES else 0)

    def reset(self, n_rows: int = 0, row_info: RowInfo | None = None) -> None:
        """Forget: a new loop of ``n_rows`` rows begins."""
        self.kept: dict[str, Tensor] = {}
        if self.kind not in DRAWS or n_rows == 0:
            return
        places_B = None if row_info is None else row_info.places_B
        if places_B is None:  # rows without a place of their own are numbered as they come
            places_B = torch.arange(self.n_drawn, self.n_drawn + n_rows)
            self.n_drawn += n_rows
        if self.kind == "random":
            self.kept["drawn"] = drawn_depths(places_B, self.histogram).float()
        else:
            self.kept["drawn"] = uniform(places_B)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with the rows ``rows`` alone."""
        self.kept = {name: value[rows.to(value.device)] for name, value in self.kept.items()}

    def halting_logit(self, state: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Return the logit of lambda_t (B,), read from the mean over positions."""
        assert self.gate is not None
        mean = masked_mean(state, mask_BN)
        return self.gate(mean.to(self.gate.weight.dtype))[:, 0].float()

    def probe_logit(self, state: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Return the logit (B,) of "the last iteration would show the same", read from the mean over positions."""
        assert self.probe is not None
        mean = masked_mean(state, mask_BN)
        return self.probe(mean.to(next(self.probe.parameters()).dtype))[:, 0].float()

    def score(self, now: StopInputs) -> Tensor:
        """Return s(h_t) (B,); minus infinity where there is nothing to compare with yet."""
        match self.kind:
            case "fixed":
                return torch.full((len(now.state),), float(now.iteration), device=now.state.device)
            case "random":
                return now.iteration - self.kept["drawn"].to(now.state.device)
            case "halt" | "halt_sample":
                return self._cumulative(now)
            case "act":
                return self._sum(now)
            case "mlp_probe":
                return self.probe_logit(now.state, now.mask_BN).sigmoid()
            case "classifier":
                assert self.classifier is not None
                return self.classifier.score(self.features(now), now.iteration)
        if self.kind in COMPARES:
            return self._never(now.state) if now.iteration == 1 and not self.compare_init else self._state_score(now)
        assert now.logits is not None
        return self._word_score(now.logits.float().log_softmax(-1), now.logits_mask)

    def features(self, now: StopInputs) -> Tensor:
        """Return what the classifier looks at (B, F): what the pass has told, else from its states and words."""
        assert self.classifier is not None
        return torch.stack([self._feature(name, now) for name in self.classifier.features], dim=1)

    def _feature(self, name: Feature, now: StopInputs) -> Tensor:
        if name in now.features:
            return now.features[name]
        if name in WORDS:
            assert now.logits is not None
            top_BN, gap_BN = words.top_two(now.logits.float().log_softmax(-1))
            return words.certainty(gap_BN if name == "gap" else top_BN, self.agg, now.logits_mask)
        if name == "block":
            return 1 - aggregate(1 - states.cosine(now), self.agg, now.mask_BN)
        if name == "depth":
            return torch.full((len(now.state),), now.iteration / now.limit, device=now.state.device)
        raise ValueError(f"the pass has no taps for {name}")

    def _never(self, like: Tensor) -> Tensor:
        return torch.full((len(like),), -torch.inf, device=like.device)

    def _swap(self, name: str, value: Tensor) -> Tensor | None:
        """Remember a value for the next iteration; return the one remembered before."""
        before, self.kept[name] = self.kept.get(name), value
        return before

    def _cumulative(self, now: StopInputs) -> Tensor:
        """Return 1 - prod (1 - lambda_j): the chance of having stopped, less the draw where one was made."""
        rate = self.halting_logit(now.state, now.mask_BN).sigmoid()
        survival = self.kept.get("survival", torch.ones_like(rate)) * (1 - rate)
        self.kept["survival"] = survival
        return 1 - survival - (self.kept["drawn"].to(rate.device) if self.kind == "halt_sample" else 0)

    def _sum(self, now: StopInputs) -> Tensor:
        """Return sum u_j; u_t is kept for `ActShares`."""
        self.kept["rate"] = rate = self.halting_logit(now.state, now.mask_BN).sigmoid()
        self.kept["sum"] = self.kept.get("sum", torch.zeros_like(rate)) + rate
        return self.kept["sum"]

    def _state_score(self, now: StopInputs) -> Tensor:
        match self.kind:
            case "delta":
                return states.change(now.state, now, self.agg)
            case "delta_undamped":
                return states.change(now.rescaled, now, self.agg)
            case "absolute":
                return states.distance(now, self.agg)
            case "cos":
                return states.angle(now, self.agg)
        step = now.state.float() - now.previous.float()
        before = self._swap("step", step)
        if before is None:
            return self._never(step)
        score = states.acceleration(step, before, now, self.agg)
        last = self._swap("score", score)
        return self._never(step) if last is None else torch.minimum(score, last)  # it must hold twice in a row

    def _word_score(self, log_p: Tensor, mask_BN: Tensor | None) -> Tensor:
        match self.kind:
            case "top_prob":
                return words.certainty(words.top_two(log_p)[0], self.agg, mask_BN)
            case "gap":
                return words.certainty(words.top_two(log_p)[1], self.agg, mask_BN)
            case "entropy_level":
                return words.spread(log_p, self.agg, mask_BN)
            case "argmax":
                return self._run_length(log_p.argmax(-1), mask_BN)
            case "kl_reverse" | "minp_kl":
                log_p = words.without_tail(log_p) if self.kind == "minp_kl" else log_p
                before = self._swap("log_p", log_p)
                before = words.uniform_like(log_p) if before is None else before
                return neglog(aggregate(words.divergence(before, log_p), self.agg, mask_BN))
            case "kl":
                before = self._swap("log_p", log_p)
                if before is None:
                    return self._never(log_p)
                return neglog(aggregate(words.divergence(log_p, before), self.agg, mask_BN))
        entropy = words.entropy(log_p)
        before = self._swap("entropy", entropy)
        if before is None:
            return self._never(log_p)
        return neglog(aggregate((entropy - before).abs(), self.agg, mask_BN))

    def _run_length(self, top_BN: Tensor, mask_BN: Tensor | None) -> Tensor:
        before = self._swap("top", top_BN)
        if before is None:
            self.kept["run"] = torch.zeros(len(top_BN), device=top_BN.device)
            return self._never(top_BN)
        same = (top_BN == before) if mask_BN is None else (top_BN == before) | (mask_BN == 0)
        self.kept["run"] = torch.where(same.all(1), self.kept["run"] + 1, 0.0)
        return self.kept["run"]


def rule_for(settings: StopSettings, width: int) -> StopRule | None:
    """Return the rule of some settings for states of a width; None where nothing stops."""
    return StopRule(settings, width) if settings.stops else None

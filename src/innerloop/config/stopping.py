"""When a loop ends by itself: the stop rules that there are, and their options."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from innerloop.errors import check_choices, refuse

StopKind = Literal[
    "none",
    "delta",
    "delta_undamped",
    "cos",
    "absolute",
    "acceleration",
    "kl",
    "kl_reverse",
    "minp_kl",
    "entropy",
    "entropy_level",
    "argmax",
    "top_prob",
    "gap",
    "fixed",
    "random",
    "halt",
    "halt_sample",
    "act",
    "mlp_probe",
    "classifier",
]

DEFAULT_THRESHOLDS: dict[str, float] = {
    "delta": 1.52,  # relative change below 0.03 (arXiv 2502.05171)
    "delta_undamped": 1.52,
    "cos": 3.0,  # 1 - cosine below 1e-3
    "absolute": 1.52,  # ours, as for delta
    "acceleration": 1.52,  # ours, as for delta
    "kl": 3.0,  # KL divergence of successive read-outs below 1e-3
    "kl_reverse": 3.0,
    "minp_kl": 5.0,  # below 1e-5
    "entropy": 3.0,  # change of entropy below 1e-3
    "entropy_level": 1.0,  # ours: a tenth of the largest possible entropy
    "argmax": 5.0,  # the same likeliest token five times running
    "top_prob": 0.9,  # ours
    "gap": 0.8,  # arXiv 2403.02181, as remembered
    "fixed": 1.0,  # one iteration
    "random": 0.0,  # the depth that was drawn
    "halt": 0.9,  # cumulative halting probability
    "halt_sample": 0.0,  # the draw
    "act": 0.99,  # 1 - eps (arXiv 1603.08983)
    "mlp_probe": 0.9,  # ours
    "classifier": 0.0,  # the threshold that was fitted for the iteration
}
READS_OUT = ("kl", "entropy", "argmax", "kl_reverse", "minp_kl", "entropy_level", "top_prob", "gap")
COMPARES = ("delta", "delta_undamped", "cos", "absolute", "acceleration")
LEARNED = ("halt", "halt_sample", "act", "mlp_probe", "classifier")
PROBABILITIES = ("top_prob", "gap", "halt", "mlp_probe")
DRAWS = ("random", "halt_sample")
Agg = Literal["mean", "last", "max"]
Feature = Literal["gap", "top", "attention", "mlp", "block", "depth"]
FEATURES: tuple[Feature, ...] = ("gap", "top", "attention", "mlp", "block", "depth")
"""Lead and probability of the likeliest token; cosines of successive outputs (attention, MLP, whole block); t / T."""
WORDS: tuple[Feature, ...] = ("gap", "top")
TAPPED: tuple[Feature, ...] = ("attention", "mlp")
ExitClassifierKind = Literal["logistic", "svm_linear", "svm_rbf"]


@dataclass(frozen=True)
class StopSettings:
    """When a row's loop ends by itself, in answering; in training nothing stops.

    Args:
        stop: score that ends a row's loop when answering: none; of states: delta, delta_undamped, cos, absolute,
            acceleration; of the words that they show: kl (of the new from the old), kl_reverse (of the old from the
            new), minp_kl, entropy (its change), entropy_level, argmax, top_prob, gap; learned: halt, halt_sample, act,
            mlp_probe, classifier; controls: fixed, random.
        stop_threshold: kappa; a row stops when its score reaches it. None: the score's usual value.
        stop_site: scores that look at words look at what the latents show (latents), or at the first token of the
            answer itself, read by one more pass over <eot> and the answer's mark in every iteration (answer).
        stop_agg: reduce a score over positions by mean, last or max (the least settled position decides).
        min_loops: iterations before a row may stop.
        patience: consecutive checks for which the score must hold.
        check_every: look only after every so many iterations.
        compare_init: scores of states may stop after the first iteration, by how far it moved the initial state.
        stop_histogram: random: the shares of rows that stop after 1, 2, ... iterations.
        stop_seed: of what random and halt_sample draw.
        stop_decay: the threshold of a probability falls from 0.9 kappa + 0.1 to 0.9 kappa over about so many written
            tokens (arXiv 2207.07061); 0: it stays.
        stop_features: classifier: what it looks at: gap, top, block (cosine of successive states), depth (t / T).
        stop_classifier: classifier: logistic, svm_linear or svm_rbf; `calibrate` fits it.
        stop_per_step: classifier: one for each iteration, instead of one for all.
        probe_width: mlp_probe: its inner width; `calibrate` fits it.
        act_output: act: the state that is answered from is ACT's weighted mean of all iterations', or the last.
    """

    has_taps: ClassVar[bool] = False

    stop: StopKind = "none"
    stop_threshold: float | None = None
    stop_site: Literal["latents", "answer"] = "latents"
    stop_agg: Agg = "mean"
    min_loops: int = 1
    patience: int = 1
    check_every: int = 1
    compare_init: bool = True
    stop_histogram: tuple[float, ...] = ()
    stop_seed: int = 0
    stop_decay: int = 0
    stop_features: tuple[Feature, ...] = ("gap", "top", "depth")
    stop_classifier: ExitClassifierKind = "logistic"
    stop_per_step: bool = False
    probe_width: int = 64
    act_output: Literal["weighted", "last"] = "weighted"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("stop_histogram", "stop_features"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        stop, shares, named = self.stop, self.stop_histogram, self.stop_features
        known = FEATURES if self.has_taps else tuple(name for name in FEATURES if name not in TAPPED)
        is_judged = (named, self.stop_classifier, self.stop_per_step) != (
            StopSettings.stop_features,
            StopSettings.stop_classifier,
            StopSettings.stop_per_step,
        )
        refuse(
            (
                self.stop_site == "answer" and stop not in READS_OUT,
                f"stop_site=answer is for the scores that look at words: set stop to {', '.join(READS_OUT)}",
            ),
            (min(self.min_loops, self.patience) < 1, "min_loops and patience must be at least 1"),
            (self.check_every < 1, "check_every must be at least 1"),
            (
                not self.compare_init and stop not in COMPARES,
                f"compare_init is for the scores of states: set stop to {', '.join(COMPARES)}",
            ),
            (
                (stop == "random") != bool(shares) or min(shares, default=0) < 0 or (bool(shares) and sum(shares) == 0),
                "stop=random draws depths from the shares in stop_histogram: give those of 1, 2, ... iterations, and "
                "leave it out with other scores",
            ),
            (
                self.stop_seed != 0 and stop not in DRAWS,
                f"stop_seed is for what is drawn: set stop to {' or '.join(DRAWS)}",
            ),
            (
                self.stop_decay < 0 or (self.stop_decay > 0 and stop not in PROBABILITIES),
                f"stop_decay counts tokens, for scores that are probabilities: set stop to {', '.join(PROBABILITIES)}",
            ),
            (
                not named or len(set(named)) < len(named) or not set(named) <= set(known),
                f"stop_features are some of {', '.join(known)}, each once",
            ),
            (
                is_judged and stop != "classifier",
                "stop_features, stop_classifier and stop_per_step are for stop=classifier",
            ),
            (
                self.probe_width < 1 or (self.probe_width != 64 and stop != "mlp_probe"),
                "probe_width is for stop=mlp_probe, and at least 1",
            ),
            (
                stop == "act" and (self.min_loops, self.patience, self.check_every) != (1, 1, 1),
                "act ends when its shares add up: set min_loops, patience and check_every to 1",
            ),
            (stop != "act" and self.act_output != "weighted", "act_output is for stop=act"),
        )

    @property
    def threshold(self) -> float:
        """kappa, of the chosen stop score."""
        return DEFAULT_THRESHOLDS[self.stop] if self.stop_threshold is None else self.stop_threshold

    @property
    def rule(self) -> dict[str, Any]:
        """The fields that say when a loop ends."""
        return {field.name: getattr(self, field.name) for field in fields(StopSettings)}

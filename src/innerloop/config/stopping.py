"""When a loop ends by itself: the stop rules that there are, and their options."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Bounds, Natural, SomeLoops, Weight
from innerloop.errors import refuse

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


GATED = ("halt", "halt_sample")  # rules whose gate a loss must train


class StopSettings(Checked):
    """When a row's loop ends by itself, in answering; in training nothing stops.

    A method's own group is a frozen dataclass on this one whose fields are those that the method has.

    Args:
        rule: score that ends a row's loop when answering: none; of states: delta, delta_undamped, cos, absolute,
            acceleration; of the words that they show: kl (of the new from the old), kl_reverse (of the old from the
            new), minp_kl, entropy (its change), entropy_level, argmax, top_prob, gap; learned: halt, halt_sample, act,
            mlp_probe, classifier; controls: fixed, random.
        threshold: kappa; a row stops when its score reaches it. None: the score's usual value.
        min_loops: iterations before a row may stop.
        patience: consecutive checks for which the score must hold.
        check_every: look only after every so many iterations.
        histogram: random: the shares of rows that stop after 1, 2, ... iterations.
        site: scores that look at words look at what the latents show (latents), or at the first token of the answer
            itself, read by one more pass over <eot> and the answer's mark in every iteration (answer).
        agg: reduce a score over positions by mean, last or max (the least settled position decides).
        act_output: act: the state that is answered from is ACT's weighted mean of all iterations', or the last.
        compare_init: scores of states may stop after the first iteration, by how far it moved the initial state.
        decay: the threshold of a probability falls from 0.9 kappa + 0.1 to 0.9 kappa over about so many written tokens
            (arXiv 2207.07061); 0: it stays.
        features: classifier: what it looks at: gap, top, block (cosine of successive states), depth (t / T), and where
            a loop goes through layers their attention and their mlp.
        classifier: classifier: logistic, svm_linear or svm_rbf; `calibrate` fits it.
        per_step: classifier: one for each iteration, instead of one for all.
    """

    has_taps: ClassVar[bool] = False
    """Whether the outputs of attention and MLP can be compared."""
    untrained: ClassVar[tuple[str, ...]] = (*GATED, "act")
    """Rules that nothing in the method could train or use."""

    rule: StopKind = "none"
    threshold: Annotated[float, Bounds(infinite=True)] | None = None
    min_loops: SomeLoops = 1
    patience: SomeLoops = 1
    check_every: SomeLoops = 1
    histogram: tuple[Weight, ...] = ()
    site: Literal["latents", "answer"] = "latents"
    agg: Agg = "mean"
    act_output: Literal["weighted", "last"] = "weighted"
    compare_init: bool = True
    decay: Natural = 0
    features: tuple[Feature, ...] = ("gap", "top", "depth")
    classifier: ExitClassifierKind = "logistic"
    per_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        rule, shares, named = self.rule, self.histogram, self.features
        known = FEATURES if self.has_taps else tuple(name for name in FEATURES if name not in TAPPED)
        is_judged = (named, self.classifier, self.per_step) != (
            StopSettings.features,
            StopSettings.classifier,
            StopSettings.per_step,
        )
        refuse(
            (rule in self.untrained, f"stop.rule={rule} needs a loss that this method has not: choose another score"),
            (
                self.site == "answer" and rule not in READS_OUT,
                f"stop.site=answer is for the scores that look at words: set stop.rule to {', '.join(READS_OUT)}",
            ),
            (
                not self.compare_init and rule not in COMPARES,
                f"stop.compare_init is for the scores of states: set stop.rule to {', '.join(COMPARES)}",
            ),
            (
                (rule == "random") != bool(shares) or (bool(shares) and sum(shares) == 0),
                "stop.rule=random draws depths from the shares in stop.histogram: give those of 1, 2, ... iterations, "
                "and leave it out with other scores",
            ),
            (
                self.decay > 0 and rule not in PROBABILITIES,
                f"stop.decay counts tokens, for scores that are probabilities: set stop.rule to "
                f"{', '.join(PROBABILITIES)}",
            ),
            (
                not named or len(set(named)) < len(named) or not set(named) <= set(known),
                f"stop.features are some of {', '.join(known)}, each once",
            ),
            (
                is_judged and rule != "classifier",
                "stop.features, stop.classifier and stop.per_step are for stop.rule=classifier",
            ),
            (
                rule == "act" and (self.min_loops, self.patience, self.check_every) != (1, 1, 1),
                "act ends when its shares add up: set stop.min_loops, stop.patience and stop.check_every to 1",
            ),
            (rule != "act" and self.act_output != "weighted", "stop.act_output is for stop.rule=act"),
        )

    @property
    def kappa(self) -> float:
        """The threshold, of the chosen score."""
        return DEFAULT_THRESHOLDS[self.rule] if self.threshold is None else self.threshold

    @property
    def stops(self) -> bool:
        """Whether a row may stop by itself."""
        return self.rule != "none"


@dataclass(frozen=True)
class CommonStop(StopSettings):
    """What every method that may stop has."""

    rule: StopKind = "none"
    threshold: float | None = None
    min_loops: int = 1
    patience: int = 1
    check_every: int = 1
    histogram: tuple[float, ...] = ()

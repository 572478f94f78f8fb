"""When has a state been refined enough? One catalogue of stop rules for every loop (halting.md; slr.md, section 6).

Every score grows as the loop converges, and a row stops once its score has reached the threshold for long enough; so an
infinite threshold never stops. A row is a block of latents, or a single token of a pass: the rules do not know.

    states.py    what the states say          words.py     what the words say that they show
    learned.py   gates and probes             judge.py     a classifier fitted to statistics
    control.py   fixed and random depths      oracles.py   the best there could be, for evaluation alone
    rule.py      `StopRule`, which is all of them             settings.py  its options, which every loop has
    ending.py    which rows of a running loop end

Shapes: `B` rows, `N` positions, `D` width, `V` vocabulary, `T` iterations; scores are (B,) in fp32.
"""

from innerloop.calibrate.oracles import first_agreeing, first_correct, oracle_agree, oracle_correct
from innerloop.config.stopping import StopSettings
from innerloop.halting.baselines import drawn_depths, uniform
from innerloop.halting.classifier import FEATURES, Feature, Judge, JudgeKind
from innerloop.halting.controller import Ending
from innerloop.halting.evidence import TINY, Agg, Hints, Moment, aggregate, masked_mean, neglog
from innerloop.halting.learned import (
    ActShares,
    Pull,
    act_weights,
    exit_distribution,
    expected_loss,
    gain_targets,
    pull,
)
from innerloop.halting.rule import (
    COMPARES,
    DEFAULT_THRESHOLDS,
    LEARNED,
    PROBABILITIES,
    READS_OUT,
    StopKind,
    StopRule,
    decayed,
)

__all__ = [
    "COMPARES",
    "DEFAULT_THRESHOLDS",
    "FEATURES",
    "LEARNED",
    "PROBABILITIES",
    "READS_OUT",
    "TINY",
    "ActShares",
    "Agg",
    "Ending",
    "Feature",
    "Hints",
    "Judge",
    "JudgeKind",
    "Moment",
    "Pull",
    "StopKind",
    "StopRule",
    "StopSettings",
    "act_weights",
    "aggregate",
    "decayed",
    "drawn_depths",
    "exit_distribution",
    "expected_loss",
    "first_agreeing",
    "first_correct",
    "gain_targets",
    "masked_mean",
    "neglog",
    "oracle_agree",
    "oracle_correct",
    "pull",
    "uniform",
]

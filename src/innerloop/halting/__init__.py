"""When has a state been refined enough? One catalogue of stop rules for every loop (halting.md; slr.md, section 6).

Every score grows as the loop converges, and a row stops once its score has reached the threshold for long enough; so an
infinite threshold never stops. A row is a block of latents, or a single token of a pass: the rules do not know.

    rule.py         `StopRule`, every score of the catalogue       states.py     what the states say
    controller.py   which rows of a running loop end               words.py      what the words say that they show
    evidence.py     what a score may look at                       learned.py    the mathematics of gates
    classifier.py   a classifier fitted to statistics              baselines.py  fixed and random depths

Shapes: `B` rows, `N` positions, `D` width, `V` vocabulary, `T` iterations; scores are (B,) in fp32.
"""

from innerloop.config.stopping import StopSettings
from innerloop.halting.baselines import drawn_depths, uniform
from innerloop.halting.classifier import FEATURES, ExitClassifier, ExitClassifierKind, Feature
from innerloop.halting.controller import StopController
from innerloop.halting.evidence import TINY, Agg, RowInfo, StopInputs, aggregate, masked_mean, neglog
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
    "ExitClassifier",
    "ExitClassifierKind",
    "Feature",
    "Pull",
    "RowInfo",
    "StopController",
    "StopInputs",
    "StopKind",
    "StopRule",
    "StopSettings",
    "act_weights",
    "aggregate",
    "decayed",
    "drawn_depths",
    "exit_distribution",
    "expected_loss",
    "gain_targets",
    "masked_mean",
    "neglog",
    "pull",
    "uniform",
]

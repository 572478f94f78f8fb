"""Measuring: accuracy with its interval and its cost; whether latents are used, what they hold, how loops behave."""

from innerloop.measure.accuracy import Prediction, evaluate, result_of
from innerloop.measure.statistics import Verdict, verdict, verdict_of_files, wilson

__all__ = ["Prediction", "Verdict", "evaluate", "result_of", "verdict", "verdict_of_files", "wilson"]

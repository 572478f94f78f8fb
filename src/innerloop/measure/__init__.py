"""Measuring: accuracy with its interval, and what it cost."""

from innerloop.measure.accuracy import Prediction, evaluate, result_of, wilson

__all__ = ["Prediction", "evaluate", "result_of", "wilson"]

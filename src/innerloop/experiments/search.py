"""Search: points drawn from ranges by Optuna's TPE sampler, each told from the accuracies of those before.

What was drawn is written down (OUT/trials.json) and what was measured lies in the runs, so a search that was
interrupted goes on where it was: every draw depends on the points before it alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from innerloop.errors import InputError
from innerloop.experiments.grid import Axis, Choices
from innerloop.experiments.summary import read_json
from innerloop.model.checkpoint import write_text

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TRIALS = "trials.json"
DIGITS = 4  # of a number drawn from a range, so that it can be read and typed again
MOST_DRAWS = 50  # in vain, before all points are taken to be tried
Settings = dict[str, Any]


def search(
    axes: Sequence[Axis],
    n_trials: int,
    at_once: int,
    folder: Path,
    scores_of: Callable[[Sequence[Settings]], Sequence[float | None]],
) -> list[Settings]:
    """Draw points, ``at_once`` at a time, until there are ``n_trials``; return all in order.

    Args:
        axes: what is drawn: values or ranges.
        n_trials: how many points.
        at_once: how many are drawn before the next are told of their scores.
        folder: where trials.json lies.
        scores_of: measures points, all that are known each time; None for one that failed.

    Raises:
        InputError: Optuna is missing, or the folder holds a search over other values.
    """
    try:
        import optuna
    except ImportError:
        raise InputError("--search optuna needs Optuna: pip install 'innerloop[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if n_trials < 1:
        raise InputError(f"--trials is {n_trials}, but must be at least 1")
    trials = _known(folder / TRIALS, axes)
    distributions = {axis.field: _distribution(axis) for axis in axes}
    while True:
        scores = scores_of(trials) if trials else []
        if len(trials) >= n_trials:
            return trials
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=len(trials)))
        for settings, score in zip(trials, scores):
            state = optuna.trial.TrialState.COMPLETE if score is not None else optuna.trial.TrialState.FAIL
            indexed = {axis.field: _index(axis, settings[axis.field]) for axis in axes}
            study.add_trial(
                optuna.trial.create_trial(state=state, params=indexed, distributions=distributions, value=score)
            )
        drawn: list[Settings] = []
        for _ in range(MOST_DRAWS):
            params = study.ask(distributions).params
            settings = {axis.field: _value(axis, params[axis.field]) for axis in axes}
            if settings not in trials and settings not in drawn:
                drawn.append(settings)
            if len(drawn) == min(at_once, n_trials - len(trials)):
                break
        if not drawn:
            return trials
        trials += drawn
        write_text(folder / TRIALS, json.dumps({"axes": _written(axes), "trials": trials}, indent=1) + "\n")


def _known(path: Path, axes: Sequence[Axis]) -> list[Settings]:
    """Return the points that were drawn before."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    found = read_json(path)
    if found.get("axes") != _written(axes):
        raise InputError(f"{path} is of a search over other values: choose another folder with --out")
    return list(found["trials"])


def _written(axes: Sequence[Axis]) -> Mapping[str, Any]:
    return {
        a.field: list(a.values) if isinstance(a, Choices) else [a.low, a.high, "log" if a.log else "even"] for a in axes
    }


def _distribution(axis: Axis) -> BaseDistribution:
    """Return what Optuna draws from: values are drawn by their index."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, Choices):
        return CategoricalDistribution(range(len(axis.values)))
    if axis.is_whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _index(axis: Axis, value: Any) -> Any:
    return axis.values.index(value) if isinstance(axis, Choices) else value


def _value(axis: Axis, drawn: Any) -> Any:
    if isinstance(axis, Choices):
        return axis.values[drawn]
    if axis.is_whole:
        return int(drawn)
    return min(max(float(f"{drawn:.{DIGITS}g}"), axis.low), axis.high)

"""Trials: the combinations of a grid, or what a search draws from ranges, by Optuna's samplers.

Optuna keeps what was drawn in OUT/study.log, and what was measured lies in the runs, so that what was interrupted goes
on where it was. A trial that failed stays open, and is tried again by the next command.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from innerloop.errors import InputError
from innerloop.experiments.grid import Axes, Settings, optuna, settings_of, value_name, values_of, variant_name

if TYPE_CHECKING:  # an extra, and slow to import
    from optuna import Study

STUDY = "study.log"
MOST_DRAWS = 50  # in vain, before all trials are taken to be tried


def check_grid(axes: Axes) -> None:
    """Refuse ranges, which have no combinations."""
    if ranges := [field for field, axis in axes.items() if values_of(axis) is None]:
        raise InputError(f"{ranges[0]} has a range, which only a search draws from: list values, or --search optuna")


def combinations(axes: Axes) -> list[Settings]:
    """Return the trials of a grid, the values of the last field changing first."""
    check_grid(axes)
    study = optuna().create_study()
    return _in_order(axes, _draw(study, axes, [], _size(axes), _size(axes), is_grid=True))


def search(
    axes: Axes,
    n_trials: int | None,
    at_once: int,
    folder: Path,
    scores_of: Callable[[Sequence[Settings]], Sequence[float | None]],
) -> list[Settings]:
    """Draw trials, ``at_once`` at a time, until there are ``n_trials``; return all in order.

    Args:
        axes: what is drawn: values or ranges.
        n_trials: how many trials; None: every combination of values.
        at_once: how many are drawn before the next are told of their scores.
        folder: where Optuna keeps them; each set of axes is a study of its own.
        scores_of: measures trials, all that are known each time; None for one that failed.
    """
    made, is_grid = optuna(), n_trials is None
    n = _size(axes) if n_trials is None else n_trials
    folder.mkdir(parents=True, exist_ok=True)
    storage = made.storages.JournalStorage(made.storages.journal.JournalFileBackend(str(folder / STUDY)))
    name = json.dumps({field: json.loads(made.distributions.distribution_to_json(a)) for field, a in axes.items()})
    study = made.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    while True:
        trials = [trial for trial in study.get_trials() if trial.state is not made.trial.TrialState.FAIL]
        known = [settings_of(axes, trial.params) for trial in trials]
        shown = _in_order(axes, known) if is_grid else known
        scores = dict(zip(map(variant_name, shown), scores_of(shown))) if known else {}
        for trial, name_of in zip(trials, map(variant_name, known)):
            if not trial.state.is_finished() and scores[name_of] is not None:
                study.tell(trial.number, scores[name_of])
        drawing = made.load_study(study_name=name, storage=storage)
        if len(known) >= n or not _draw(drawing, axes, known, n - len(known), n if is_grid else at_once, is_grid):
            return shown


def _draw(study: Study, axes: Axes, known: Sequence[Settings], n: int, at_once: int, is_grid: bool) -> list[Settings]:
    """Draw at most ``n`` trials that are not known, ``at_once`` at most; the same ones after the same trials."""
    samplers = optuna().samplers
    study.sampler = (
        samplers.GridSampler({field: axis.choices for field, axis in axes.items()})  # type: ignore[attr-defined]
        if is_grid
        else samplers.TPESampler(seed=len(study.get_trials()))
    )
    names, drawn, in_vain = set(map(variant_name, known)), list[Settings](), 0
    while len(drawn) < min(n, at_once) and in_vain < MOST_DRAWS:
        trial = study.ask(dict(axes))
        settings = settings_of(axes, trial.params)
        if variant_name(settings) in names:
            study.tell(trial, state=optuna().trial.TrialState.FAIL)
            in_vain += 1
        else:
            names.add(variant_name(settings))
            drawn.append(settings)
    return drawn


def _size(axes: Axes) -> int:
    return math.prod(len(values_of(axis) or ()) for axis in axes.values())


def _in_order(axes: Axes, trials: Sequence[Settings]) -> list[Settings]:
    """Return trials of a grid in the order of its values."""

    def place(settings: Settings) -> list[int]:
        return [
            [value_name(value) for value in values_of(axis) or ()].index(value_name(settings[field]))
            for field, axis in axes.items()
        ]

    return sorted(trials, key=place)

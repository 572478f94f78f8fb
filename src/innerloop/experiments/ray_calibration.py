"""Calibration on a Ray cluster: examples are answered there in parts, by the rule that the search has come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from torch import Tensor

from innerloop.calibrate.settings import CalibrationSettings
from innerloop.calibrate.threshold_search import Answers, ThresholdSearch
from innerloop.engine.latent_model import LatentModel
from innerloop.experiments.ray import cluster
from innerloop.measure.shards import parts_of
from innerloop.methods import Method
from innerloop.model.stopping import use_rule
from innerloop.tasks import Task
from innerloop.text.examples import Example

Loaded = tuple[str, Method | None, str]
"""A run's folder or any model, how it reasons where the folder does not say, and the type of its weights."""


@contextmanager
def answering_on_ray(who: Loaded, on_cpu: bool = False) -> Iterator[Answers]:
    """Join a cluster; what is yielded answers the examples of a search there."""
    with cluster() as joined:

        def answer(search: ThresholdSearch, examples: Sequence[Example]) -> dict[str, Any]:
            parts = parts_of(examples, (0 if on_cpu else joined.n_gpus) or joined.n_cpus)
            weights = {name: tensor.cpu() for name, tensor in search.rule.state_dict().items()}
            stop: Any = search.model.method.stop
            given = who, search.task, search.settings, (asdict(stop), weights)
            tasks = [joined.submit(_answer, *given, [examples[i] for i in part], on_cpu=on_cpu) for part in parts]
            found = [task.result() for task in tasks]
            order = sorted((place, p, i) for p, part in enumerate(parts) for i, place in enumerate(part))
            return {name: [found[p][name][i] for _, p, i in order] for name in found[0]}

        yield answer


def _answer(
    who: Loaded,
    task: Task,
    settings: CalibrationSettings,
    rule: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    examples: Sequence[Example],
) -> dict[str, Any]:
    """Answer examples on a node, stopping by a rule: its settings, and its weights."""
    model, (options, weights) = _model(*who), rule
    use_rule(model, **options)
    search = ThresholdSearch(model, task, settings)
    search.rule.load_state_dict(weights)
    return search.answer(examples)


@lru_cache(maxsize=1)
def _model(run: str, method: Method | None, dtype: str) -> LatentModel:
    """Load a model; a worker that is asked again has it still."""
    return LatentModel.from_pretrained(run, method, dtype=dtype)

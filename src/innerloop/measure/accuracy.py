"""Accuracy on a task: generate, extract, compare; with a 95 % interval and the cost per example."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from innerloop.checks.arguments import checked
from innerloop.checks.values import Count, Loops, Seed
from innerloop.decoder.cost import Cost, mean_cost, total_cost
from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.options import Many
from innerloop.engine.test_time import ONCE, TestTimeCompute
from innerloop.errors import InputError
from innerloop.measure.statistics import wilson
from innerloop.methods import name_of
from innerloop.model import run_folder
from innerloop.tasks import Task
from innerloop.text.examples import Example


@dataclass(frozen=True)
class Prediction:
    """One answered example.

    ``predicted`` is None where the text holds no answer; ``error`` tells why there is no text, where a question could
    not be answered at all. Of several samples, ``text`` is the one that was picked, ``samples`` are the answers of all
    in the order of the draws, and ``cost`` is that of all. ``timed_out`` says that ``predicted`` was too hard to
    compare with ``gold``, and counts as wrong.
    """

    id: str
    question: str
    text: str
    predicted: str | None
    gold: str
    correct: bool
    cost: Cost
    error: str | None = None
    samples: Sequence[str | None] | None = None
    timed_out: bool = False


@checked
def evaluate(
    model: LatentModel,
    task: Task,
    examples: Sequence[Example],
    max_new_tokens: Count | None = None,
    batch_size: Many = 64,
    stage: int | None = None,
    loops: Loops | None = None,
    progress: Callable[[int], None] | None = None,
    attempts: TestTimeCompute = ONCE,
    seed: Seed = 0,
    begun: Sequence[Sequence[str]] | None = None,
    places: Sequence[int] | None = None,
) -> list[Prediction]:
    """Answer examples, by default greedily, and check the answers.

    Args:
        model: the model.
        task: extracts and checks answers.
        examples: what to answer.
        max_new_tokens: the most tokens to write; None: as the task says.
        batch_size: rows per batch.
        stage: the curriculum's stage whose layout is used; None: the last.
        loops: another number of loops than the model was trained with.
        progress: called with the number of examples answered since the last call.
        attempts: how often each is tried, and which answer counts.
        seed: of what is drawn.
        begun: what each answer has begun with, and is told to begin with: see `innerloop.engine.generate`.
        places: the place of each example among all, where these are a part of them (`innerloop.measure.shards`), none
            of which need be answered.

    Raises:
        InputError: the task is running text, or not one example could be answered.
    """
    if task.running_text:
        raise InputError(
            f"task '{task.name}' has no right answers, so there is no accuracy: innerloop eval RUN measures how well "
            "its text is predicted"
        )
    found = attempts.answer(
        model,
        [example.question for example in examples],
        seed,
        progress,
        max_new_tokens=task.max_new_tokens if max_new_tokens is None else max_new_tokens,
        batch_size=batch_size,
        stage=stage,
        loops=loops,
        begun=begun,
        places=places,
        strict=False,
    )
    if begun is not None:
        mark = model.encoder.wording.mark
        found = [
            [replace(one, text=_joined(texts, mark) + one.text) for one in tried] for texts, tried in zip(begun, found)
        ]
    predictions = [_predicted(task, example, tried, attempts) for example, tried in zip(examples, found)]
    return predictions if places is not None else check_answered(predictions)


def check_answered(predictions: list[Prediction]) -> list[Prediction]:
    """Refuse predictions none of which is an answer."""
    if predictions and all(p.error is not None for p in predictions):
        raise InputError(f"not one example could be answered: {predictions[0].error}")
    return predictions


def _predicted(task: Task, example: Example, tried: Sequence[Generation], attempts: TestTimeCompute) -> Prediction:
    generation, samples = attempts.choose(task, tried)
    predicted = task.extract(generation.text)
    correct = predicted is not None and task.compare(predicted, example.answer)
    return Prediction(
        example.id,
        example.question,
        generation.text,
        predicted,
        example.answer,
        correct is True,
        total_cost([one.cost for one in tried]) if len(tried) > 1 else generation.cost,
        generation.error,
        samples if len(tried) > 1 else None,
        correct is None,
    )


def _joined(begun: Sequence[str], mark: str) -> str:
    return "".join(f"{text} " if text == mark else f"{text}\n" for text in begun)


def answered(examples: Sequence[Example], predictions: Sequence[Prediction]) -> tuple[list[Example], list[Prediction]]:
    """Return the examples that could be answered at all, and their predictions."""
    kept = [(example, p) for example, p in zip(examples, predictions, strict=True) if p.error is None]
    return [example for example, _ in kept], [p for _, p in kept]


def accuracy_of(predictions: Sequence[Prediction]) -> float:
    """Return the share of correct predictions."""
    return sum(p.correct for p in predictions) / max(len(predictions), 1)


def scores_of(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Return what result.json says of predictions alone: accuracy and its interval, what failed or took too long to be
    compared, the mean cost; of several samples also their diversity, 0 where all of a question have one answer, and 1
    where no two have.

    A question that could not be answered counts as wrong, but has no part in the cost, which is that of an answer.
    """
    n, n_correct, timed_out = (
        len(predictions),
        sum(p.correct for p in predictions),
        sum(p.timed_out for p in predictions),
    )
    costs = [p.cost for p in predictions if p.error is None]
    unlike = [(len(set(p.samples)) - 1) / (len(p.samples) - 1) for p in predictions if p.samples]
    return {
        "n": n,
        "accuracy": accuracy_of(predictions),
        "ci95": list(wilson(n_correct, n)),
        "unparsable": sum(p.predicted is None for p in predictions),
        **({"failed": n - len(costs)} if len(costs) < n else {}),
        **({"timed_out": timed_out} if timed_out else {}),
        **({"diversity": statistics.mean(unlike)} if unlike else {}),
        "cost": mean_cost(costs),
    }


def result_of(
    model: LatentModel, task: Task, split: str, predictions: Sequence[Prediction], seed: int | None, name: str
) -> dict[str, Any]:
    """Return result.json: accuracy, interval, cost, and what produced them.

    Args:
        model: what answered.
        task: what it answered.
        split: which examples.
        predictions: its answers.
        seed: the seed it was trained with, where known.
        name: the model's name or folder.
    """
    found = scores_of(predictions)
    if hasattr(task, "match"):
        found["accuracy_by_match"] = {match: _rematch(task, match, predictions) for match in ("number", "string")}
    return told_of(model, task, split, found, seed, name)


def told_of(
    model: LatentModel, task: Task, split: str, found: Mapping[str, Any], seed: int | None, name: str
) -> dict[str, Any]:
    """Return what was found of a split, between what was measured and what produced it."""
    return {
        "task": {"name": task.name, "version": task.version, **asdict(task)},
        "split": split,
        **found,
        "method": {"name": name_of(model.method), **asdict(model.method)},
        "model": name,
        "saved": run_folder.identity(name),
        "seed": seed,
        "versions": versions(),
        "device": device_name(model.device),
    }


def _rematch(task: Task, match: str, predictions: Sequence[Prediction]) -> float:
    other = replace(task, match=match)  # type: ignore[call-arg]
    found = [(other.extract(p.text), p.gold) for p in predictions]
    return sum(text is not None and other.is_correct(text, gold) for text, gold in found) / max(len(found), 1)


def versions() -> dict[str, str]:
    """Return the versions that numbers depend on."""
    return {"python": platform.python_version()} | {n: version(n) for n in ("innerloop", "torch", "transformers")}


def device_name(device: torch.device) -> str:
    """Return the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"

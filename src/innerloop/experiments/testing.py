"""How a job of a suite is tested: once trained, or as another way of answering with a run that is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from innerloop.disk.files import try_to_unlink, write_text
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.requests import fits
from innerloop.errors import InputError
from innerloop.experiments.suite import EvalConfig, Key
from innerloop.experiments.summary import CONTROLS, STABILITY, write_answers
from innerloop.measure.accuracy import Prediction, accuracy_of, evaluate, result_of
from innerloop.measure.controls import controls
from innerloop.measure.result_cache import ResultCache, digest_of, made_of
from innerloop.measure.stability import Stability, has_loop, stability
from innerloop.measure.statistics import wilson
from innerloop.measure.subject import Subject
from innerloop.tasks import Task
from innerloop.text.codec import to_json
from innerloop.text.examples import Example
from innerloop.train.recipe import CONFIG, Recipe, load_recipe

N_TRACED = 64
TEST_CACHE = "exam.parts.json"  # beside a job until it has been tested


def tested(key: Key, recipe: Recipe, test: EvalConfig, begins: Callable[[str], None], run: str | None = None) -> None:
    """Test a job and write what was found to its folder.

    Args:
        key: its variant and seed.
        recipe: what it is; of one that answers with another's run, the method may have other settings.
        test: how it is tested.
        begins: told what is measured next.
        run: the run that answers; None: its own.
    """
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    trained = recipe.method if run is None else load_recipe(Path(run) / CONFIG).method
    model = LatentModel.from_pretrained(run or recipe.out, None if recipe.method == trained else recipe.method)
    task, seed = recipe.task, key[1]
    asked, examples = test.attempts.asked(seed), task.examples(test.split, test.limit)
    facts = made_of(model, task, test.split, examples, {"limit": test.limit, **asked}, seed)
    cache = ResultCache(out / TEST_CACHE, facts)
    cache.begins = begins
    asking = _Asking(model, test, seed, cache)
    predictions = cache.value(list[Prediction], "accuracy", lambda: asking.answers(task, examples))
    result = {"variant": key[0], "exam": to_json(test)}
    result |= result_of(model, task, test.split, predictions, seed, run or recipe.out)
    result |= {"asked": asked} if asked else {}
    if test.also:
        result["also"] = {name: asking.also(name, task, fields) for name, fields in test.also.items()}
    if asking.iterates:
        result["loops"], refused = asking.by_loops("accuracy", task, examples)
        result |= {"loops_refused": refused} if refused else {}
        if result["loops"] and hasattr(model.method, "max_loops"):
            result["change"] = change_by_loop(model, [e.question for e in examples[:N_TRACED]], max(result["loops"]))
    what = {"method": model.method.name, "model": recipe.out, "task": task.name, "split": test.split, "seed": seed}
    if test.controls:
        found = controls(Subject(model, task, examples, predictions, seed=seed, cache=cache))
        told = {**what, "n": len(found.unedited), **found.as_dict()}
        write_text(out / CONTROLS, json.dumps(told, indent=2) + "\n")
    if test.stability and has_loop(model):
        read = [example for example in examples if fits(model, example.question)]
        behaves = cache.value(Stability, "stability", lambda: stability(model, read))
        result["diverged"] = behaves.diverged
        write_text(out / STABILITY, json.dumps({**what, "n": len(read), **behaves.as_dict()}, indent=2) + "\n")
    write_answers(out, result, predictions)
    try_to_unlink(out / TEST_CACHE)


class _Asking:
    """A trained job that answers as its test says; accuracies are kept as soon as they are known."""

    def __init__(self, model: LatentModel, test: EvalConfig, seed: int, cache: ResultCache):
        self.model, self.test, self.cache = model, test, cache
        self.answers = partial(evaluate, model, attempts=test.attempts, seed=seed)
        self.iterates = bool(test.loops) and model.method.takes_loops

    def score(self, name: str, task: Task, examples: list[Example], loops: int | None = None) -> dict[str, Any]:
        """Return accuracy and interval with a number of iterations."""

        def measure() -> dict[str, Any]:
            answered = self.answers(task, examples, loops=loops)
            n_correct = sum(p.correct for p in answered)
            return {"accuracy": accuracy_of(answered), "ci95": list(wilson(n_correct, len(answered)))}

        return self.cache(name, measure)  # type: ignore[no-any-return]

    def by_loops(
        self, about: str, task: Task, examples: list[Example]
    ) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """Return accuracy by number of iterations, and of numbers that the method cannot run with why not."""
        scores: dict[int, dict[str, Any]] = {}
        refused: dict[int, str] = {}
        for n in self.test.loops:
            try:
                scores[n] = self.score(f"{about} of {n} loops", task, examples, n)
            except InputError as error:
                refused[n] = str(error)
        return scores, refused

    def also(self, name: str, task: Task, fields: Mapping[str, Any]) -> dict[Any, Any]:
        """Return accuracy on other examples, as trained and by number of iterations."""
        other = replace(task, **fields)  # type: ignore[type-var]
        examples = other.examples(self.test.split, self.test.limit)
        about = f"{name} {fields} {digest_of(examples)[:8]}"
        found: dict[Any, Any] = {"trained": self.score(f"{about} as trained", other, examples)}
        return found | (self.by_loops(about, other, examples)[0] if self.iterates else {})


def change_by_loop(model: LatentModel, questions: Sequence[str], loops: int) -> list[float | None]:
    """Return the relative change of the state in each iteration, a mean over questions; None where it has diverged.

    Questions that cannot be answered are left out.
    """
    answers = model.generate(questions, loops=loops, trace=True, max_new_tokens=1, strict=False)
    changes = [[entry.delta[0].item() for entry in a.trace.iterations] for a in answers if a.trace is not None]
    return to_json([sum(column) / len(column) for column in zip(*changes)])  # type: ignore[no-any-return]

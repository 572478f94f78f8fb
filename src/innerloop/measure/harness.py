"""lm-evaluation-harness: its tasks answered by a run, so that results can be set beside the field's.

    innerloop eval RUN --backend lm-eval --tasks gsm8k --shots 0

A request's context is the question, word for word: what a task puts around its questions is part of it, and a run
that has never seen that may do worse than on its own task. Tasks that write need nothing else; tasks that weigh given
answers need a method that answers right after its latents; one that denoises weighs them by a bound. Some requests at a
time are answered and kept in a `ResultCache`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from innerloop.disk.files import write_text
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError, check_installed
from innerloop.measure.accuracy import device_name, versions
from innerloop.measure.bound import bounds
from innerloop.measure.result_cache import ResultCache, digest
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.text.examples import Example
from innerloop.text.row import Kind

try:
    from lm_eval.api.model import LM
except ImportError:
    LM = None

RESULT = "lm_eval.json"
PARTS = "lm_eval.parts.json"
PART = 8  # batches that are kept together
DRAWS = 128  # of the bound of an answer's likelihood, where the method denoises
MOST_TOKENS = 256  # written where a task does not say
KEPT = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")


def check_harness() -> None:
    """Refuse where lm-evaluation-harness is not installed."""
    check_installed("--backend lm-eval needs lm-evaluation-harness", "eval", "lm_eval")


def evaluate_tasks(
    model: LatentModel,
    tasks: Sequence[str],
    name: str,
    folder: Path,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    tasks_dir: str | None = None,
    cache: ResultCache | None = None,
    planned: Callable[[int], None] = lambda n: None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness, and write what it reports to FOLDER/lm_eval.json.

    Args:
        model: what answers.
        tasks: their names.
        name: the model's name or folder, for the record.
        folder: where the result goes.
        shots: examples put before a question; None: as each task says.
        limit: only the first examples of each task.
        batch_size: rows per batch.
        tasks_dir: a folder with tasks of your own, in the harness's YAML form.
        cache: where answers are kept as soon as some are known, and taken from if they are there.
        planned: told how many requests there are, as far as that is known.
        progress: told how many requests have been answered since the last call.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks_dir)
    for task in tasks:
        if task not in manager.all_tasks:
            raise InputError(f"lm-evaluation-harness has no task '{task}': `lm-eval ls tasks` lists them")
    found = simple_evaluate(
        model=harness_model(model, batch_size, cache, planned, progress),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    if found is None:
        raise InputError("lm-evaluation-harness gave no result: only the first process of several has one")
    report = {key: found[key] for key in KEPT if key in found} | {
        "method": {"name": model.method.name},
        "model": name,
        "versions_used": {**versions(), "lm_eval": version("lm_eval")},
        "device": device_name(model.device),
    }
    text = json.dumps(report, indent=2, default=str) + "\n"
    write_text(folder / RESULT, text)
    return json.loads(text)  # type: ignore[no-any-return]


def harness_model(
    model: LatentModel,
    batch_size: int = 32,
    cache: ResultCache | None = None,
    planned: Callable[[int], None] = lambda n: None,
    progress: Callable[[int], None] = lambda n: None,
) -> Any:
    """Return a model as lm-evaluation-harness wants one, an ``lm_eval.api.model.LM``; see `evaluate_tasks`."""
    kept, asked = ResultCache() if cache is None else cache, 0

    def answered(kind: str, requests: list[Any], answer: Callable[[Sequence[Any], int], Any]) -> list[Any]:
        """Answer requests some at a time, each of them with its number in all; what was kept is taken."""
        nonlocal asked
        asked += len(requests)
        planned(asked)
        found: list[Any] = []
        for begin in range(0, len(requests), PART * batch_size):
            some = [request.args for request in requests[begin : begin + PART * batch_size]]
            found += kept(f"{kind} {begin}, {digest(some)}", partial(answer, some, begin))
            progress(len(some))
        return found

    class Answering(LM):  # type: ignore[misc, valid-type]
        """Answers requests by the engine that answers everything else."""

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return answered("written", requests, lambda some, begin: written(model, some, batch_size, begin))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = answered("weighed", requests, lambda some, _: weighed(model, some, batch_size))
            return [(total, is_likeliest) for total, is_likeliest in found]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise InputError("a run answers questions: the perplexity of running text is not defined for it")

    return Answering()


def written(
    model: LatentModel, requests: Sequence[tuple[str, dict[str, Any]]], batch_size: int, seed: int = 0
) -> list[str]:
    """Return what is written after each context, up to the first of the strings that end it."""
    texts: dict[int, str] = {}
    order = sorted(range(len(requests)), key=lambda i: json.dumps(requests[i][1], sort_keys=True))
    for _, group in groupby(order, key=lambda i: json.dumps(requests[i][1], sort_keys=True)):
        chosen = list(group)
        options = requests[chosen[0]][1]
        draws = options.get("do_sample", False) and options.get("temperature", 1.0) > 0
        answers = model.generate(
            [requests[i][0] for i in chosen],
            max_new_tokens=int(options.get("max_gen_toks") or MOST_TOKENS),
            batch_size=batch_size,
            temperature=float(options.get("temperature", 1.0)) if draws else 0.0,
            seed=seed,
        )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        for i, answer in zip(chosen, answers):
            ends = [at for stop in stops if stop and (at := answer.text.find(stop)) >= 0]
            texts[i] = answer.text[: min(ends)] if ends else answer.text
    return [texts[i] for i in range(len(requests))]


def weighed(model: LatentModel, requests: Sequence[tuple[str, str]], batch_size: int) -> list[tuple[float, bool]]:
    """Return for each (context, answer) the log-probability of answering so, and whether it is likeliest."""
    results: list[tuple[float, bool]] = []
    for begin in range(0, len(requests), batch_size):
        part = requests[begin : begin + batch_size]
        examples = [Example(context, (), answer.strip()) for context, answer in part]
        _check_answers_at_once(model, examples[0])
        if isinstance(model.method, DenoisingMethod):
            results += _bounded(model, examples, batch_size)
            continue
        targets = model.batch(model.rows(examples))
        split = targets.targets_U.split(targets.n_targets)
        for logits, own in zip(model.answer_logits(examples), split):
            log_p = logits.float().log_softmax(-1)
            own = own.to(log_p.device)
            total = log_p.gather(1, own[:, None]).sum().item()
            results.append((total, bool((log_p.argmax(-1) == own).all())))
    return results


def _bounded(model: LatentModel, examples: Sequence[Example], batch_size: int) -> list[tuple[float, bool]]:
    """Return the bound of each answer's log-probability, of the same draws for all, and whether the model says it."""
    written = model.generate([example.question for example in examples], batch_size=batch_size)
    rows = [model.method.lay_out(example, model.encoder, 0) for example in examples]
    found = []
    for example, row, answer in zip(examples, rows, written):
        (bound,) = bounds(model, [example], DRAWS, batch_size=batch_size)
        given = row.ids()[row.region_start :]
        found.append((-bound.nll, answer.ids == given[: given.index(model.encoder.eos_id) + 1]))
    return found


def _check_answers_at_once(model: LatentModel, example: Example) -> None:
    """Refuse methods that write steps before the answer: what they would write is not known."""
    told = Example(example.question, ("a step", "a step"), example.answer)
    writes = any(span.kind is Kind.STEP for row in model.rows([told])[0].segments() for span in row.spans)
    row, prompt = model.rows([example])[0], model.prompts([example.question])[0]
    alike = (row.prefix, row.region, row.n_loops) == (prompt.prefix, prompt.region, prompt.n_loops)
    if writes or not alike or row.next is not None:
        raise InputError(
            f"'{model.method.name}' writes steps before it answers, so given answers cannot be weighed: choose tasks "
            "that write (output_type: generate_until)"
        )

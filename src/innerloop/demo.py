"""The demo: five ways to answer the same questions, trained with one budget on a CPU in minutes, and the table.

All methods continue from one chain-of-thought checkpoint for the same number of steps with the same data and seed, so
that what differs between the rows is the method.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from innerloop.errors import InputError
from innerloop.measure import evaluate, result_of
from innerloop.methods import Coconut, Cot, Method, NoCot, Pause, Slr
from innerloop.model import LatentModel
from innerloop.progress import bar
from innerloop.recipe import BackboneChoice, Recipe
from innerloop.report import write_report
from innerloop.run import run_recipe
from innerloop.tasks import Chain

TASK = Chain(n_ops=5, modulus=5)
BACKBONE = {
    "type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
WARM_UP_STEPS = 400


def demo_methods(steps: int) -> list[Method]:
    """Return what the demo compares; curricula are fitted into ``steps``."""
    return [
        NoCot(),
        Cot(),
        Pause(n_pauses=5),
        Coconut(latents_per_step=1, max_stage=5, first_stage=1, stage_unit="step", stage_length=max(steps // 8, 1)),
        Slr(n_slots=5, slots_per_step=1, max_loops=5, step_weight=1.0),
    ]


def demo(out: str = "runs/demo", steps: int = 800, seed: int = 0, workers: int = 2) -> None:
    """Train and compare methods on the embedded chain task, on a CPU in minutes, and print the table.

    Args:
        out: where the runs, the table (results.json) and report.html go.
        steps: training steps of every method, after a common chain-of-thought warm-up.
        seed: of data order and weights.
        workers: methods trained side by side, each on one thread.
    """
    console = Console()
    folder = Path(out)
    if (folder / "results.json").exists():
        raise InputError(f"{folder} holds a demo already; choose another folder with --out, or remove it")
    if steps < 1 or workers < 1:
        raise InputError("the demo needs steps >= 1 and workers >= 1")
    console.print(
        f"Chain task: {TASK.n_ops} operations modulo {TASK.modulus}. Five methods continue from one chain-of-thought "
        f"checkpoint for {steps} steps each (seed {seed})."
    )
    chosen = demo_methods(steps)
    warm = Recipe(
        TASK, BackboneChoice(scratch=BACKBONE), Cot(), _training(WARM_UP_STEPS, seed), str(folder / "warm_up")
    )
    start = BackboneChoice(model=warm.out)
    recipes = [Recipe(TASK, start, m, _training(steps, seed), str(folder / m.name)) for m in chosen]
    _train_all(console, warm, recipes, workers)

    results = []
    torch.set_num_threads(1)
    examples = TASK.examples("test")
    with bar(console) as progress:
        row = progress.add_task("answering the test questions", total=len(examples) * len(recipes), note="")
        for recipe in recipes:
            model = LatentModel.from_pretrained(recipe.out)
            predictions = evaluate(model, TASK, examples, progress=lambda n: progress.advance(row, n))
            result = result_of(model, TASK, "test", predictions, seed, recipe.out)
            (Path(recipe.out) / "result.json").write_text(json.dumps(result, indent=2) + "\n")
            results.append(result)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_report(
        folder / "report.html", f"innerloop demo: chain, {TASK.n_ops} operations modulo {TASK.modulus}", results
    )
    console.print(result_table(results))
    console.print(
        f"The table is in {folder / 'results.json'} and {folder / 'report.html'}. Next, look inside one answer:",
        soft_wrap=True,
    )
    console.print(f'  innerloop ask {folder / "slr"} "{examples[0].question}"', highlight=False, soft_wrap=True)


def result_table(results: list[dict[str, Any]]) -> Table:
    """Return results as the table of methods."""
    table = Table("method", title="per example", title_justify="left")
    for column in ("accuracy", "95 % interval", "passes", "positions", "thought", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        cost, (low, high) = result["cost"], result["ci95"]
        table.add_row(
            result["method"]["name"],
            f"{result['accuracy']:.1%}",
            f"{low:.1%} - {high:.1%}",
            f"{cost['passes']:.1f}",
            f"{cost['positions']:.1f}",
            f"{cost['thought_tokens']:.1f}",
            f"{1000 * sum(cost['seconds'].values()):.2f}",
        )
    return table


def _training(steps: int, seed: int) -> dict[str, Any]:
    return {
        "learning_rate": 1e-3,
        "max_steps": steps,
        "batch_size": 64,
        "seed": seed,
        "save_strategy": "no",
        "use_cpu": True,
    }


def _train_all(console: Console, warm: Recipe, recipes: list[Recipe], workers: int) -> None:
    """Train the warm-up, then the methods side by side, with one bar each."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, bar(console) as progress:
        messages = manager.Queue()
        names = ["warm-up (cot)", *(recipe.method.name for recipe in recipes)]
        totals = [recipe.train["max_steps"] for recipe in (warm, *recipes)]
        rows = {n: progress.add_task(n, total=total, start=False, note="") for n, total in zip(names, totals)}

        def listen() -> None:
            while (message := messages.get()) is not None:
                name, step, note = message
                progress.start_task(rows[name])
                progress.update(rows[name], completed=step, **({"note": note} if note else {}))

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            _run_pool(context, warm, recipes, names, messages, workers)
        finally:
            messages.put(None)
            listener.join()


def _run_pool(context: Any, warm: Recipe, recipes: list[Recipe], names: list[str], messages: Any, workers: int) -> None:
    """Train the warm-up, then the methods."""
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        try:
            pool.submit(_train_one, warm, names[0], messages).result()
            jobs = [pool.submit(_train_one, r, n, messages) for r, n in zip(recipes, names[1:])]
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # tiny models run faster so, and the workers share the cores
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _train_one(recipe: Recipe, name: str, messages: Any) -> None:
    run_recipe(recipe, resume=True, callbacks=lambda stage, title: [_Report(name, messages)])


class _Report(TrainerCallback):
    """Sends progress to the process that shows it."""

    def __init__(self, name: str, messages: Any):
        self.name, self.messages = name, messages

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send the step, now and then."""
        if state.global_step % 5 == 0 or state.global_step == state.max_steps:
            self.messages.put((self.name, state.global_step, ""))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Send the newest loss."""
        if logs and "loss" in logs:
            self.messages.put((self.name, state.global_step, f"loss {logs['loss']:.3f}"))

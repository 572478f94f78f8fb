"""The demo: five ways to answer the same questions, trained with one budget on a CPU in minutes, and the table.

All methods continue from one chain-of-thought checkpoint for the same number of steps with the same data and seed, so
that what differs between the rows is the method.
"""

from __future__ import annotations

import json
from shlex import join
from typing import Any

from innerloop.checks.values import Count, Seed
from innerloop.cli.arguments import console
from innerloop.disk.files import write_text
from innerloop.disk.names import check_folder
from innerloop.errors import InputError
from innerloop.methods import Coconut, Cot, Method, NoCot, Pause, Slr
from innerloop.methods.latent.coconut import CoconutSchedule
from innerloop.tasks import Chain

TASK = Chain(n_ops=5, modulus=5)
BACKBONE = {"type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
WARM_UP_STEPS = 400
TIMED = 64  # questions that all answer in turns
LOOPS = (1, 2, 3, 4, 5, 6, 8, 10)  # numbers of iterations to answer with, besides that of training


def demo_methods(steps: int) -> list[Method]:
    """Return what the demo compares; curricula are fitted into ``steps``."""
    return [
        NoCot(),
        Cot(),
        Pause(n_pauses=5),
        Coconut(
            latents_per_step=1,
            curriculum=CoconutSchedule(max_stage=5, first_stage=1, unit="step", length=max(steps // 8, 1)),
        ),
        Slr(n_slots=5, slots_per_step=1, max_loops=5, step_weight=1.0),
    ]


def demo(out: str = "runs/demo", steps: Count = 800, seed: Seed = 0, workers: Count = 2, denoise: bool = False) -> None:
    """Train and compare methods on the embedded chain task, on a CPU in minutes, and print the table; again, the table.

    Args:
        out: where the runs, the table (results.json) and report.html go.
        steps: training steps of every method, after a common chain-of-thought warm-up.
        seed: of data order and weights.
        workers: methods trained side by side, each on one thread.
        denoise: instead show how Latin squares are filled in from masks; it trains and writes nothing.
    """
    if denoise:
        from innerloop.cli.exact_demo import show

        show(console, seed)
        return
    from innerloop.engine.latent_model import LatentModel
    from innerloop.experiments.compare import suite_rows, timed
    from innerloop.experiments.jobs import known_result, run_suite
    from innerloop.experiments.report import write_report
    from innerloop.experiments.suite import EvalConfig, Suite
    from innerloop.experiments.summary import summary_table
    from innerloop.experiments.verdicts import verdicts
    from innerloop.lens import look, write_page
    from innerloop.lens.page import check_viz
    from innerloop.train.recipe import BackboneChoice, Recipe

    folder = check_folder(out, "--out")
    check_viz()
    warm = Recipe(
        TASK, BackboneChoice(scratch=BACKBONE), Cot(), _training(WARM_UP_STEPS, seed), str(folder / "warm_up")
    )
    start, chosen = BackboneChoice(model=warm.out), demo_methods(steps)
    jobs = {(m.name, seed): Recipe(TASK, start, m, _training(steps, seed), str(folder / m.name)) for m in chosen}
    suite = Suite(out, {seed: warm}, jobs, EvalConfig(loops=LOOPS, controls=True))
    is_known = all(known_result(suite, key) is not None for key in suite.jobs)
    console.print(
        f"Chain task: {TASK.n_ops} operations modulo {TASK.modulus}. Five methods continue from one chain-of-thought "
        f"checkpoint for {steps} steps each (seed {seed})."
        + (f" All are in {folder} already; to start over, remove it or choose another by --out." if is_known else ""),
        soft_wrap=True,
    )
    results = run_suite(suite, workers, console)
    if failed := [f"{r['variant']}: {r['error']}" for r in results if "error" in r]:
        raise InputError(f"the demo could not finish: {'; '.join(failed)}")
    examples = TASK.examples("test", 8)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    title = f"innerloop demo: chain, {TASK.n_ops} operations modulo {TASK.modulus}"
    rows = timed(suite_rows(suite, results), TASK, [e.question for e in TASK.examples("test", TIMED)], folder)
    write_report(folder / "report.html", title, rows, verdicts(rows, "cot"))
    record = look(LatentModel.from_pretrained(folder / "slr"), TASK, examples, run=str(folder / "slr"))
    write_page(record, folder / "lens.html")
    console.print(summary_table(rows))
    console.print(
        f"To open in a browser: {folder / 'report.html'} (the table, what more loops do, and whether the latents carry "
        f"the answers) and {folder / 'lens.html'} (what SLR's latents show). Or look inside one answer here:",
        soft_wrap=True,
    )
    console.print(
        f"  {join(['innerloop', 'ask', str(folder / 'slr'), examples[0].question])}", highlight=False, soft_wrap=True
    )


def _training(steps: int, seed: int) -> dict[str, Any]:
    shared = {"learning_rate": 1e-3, "batch_size": 64, "save_strategy": "no", "use_cpu": True}
    return {**shared, "max_steps": steps, "seed": seed}

"""What `innerloop eval` measures besides accuracy: files beside result.json, and tables and sentences on the screen.

--controls    controls.json, and the key "controls" of result.json
--stability   stability.json
--probes      probes.json, with the swaps
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from innerloop.engine.generation import fits
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.test_time import ONCE, Attempts
from innerloop.errors import InputError
from innerloop.measure import probes as probing
from innerloop.measure import swap as swapping
from innerloop.measure.accuracy import Prediction
from innerloop.measure.controls import Controls, controls
from innerloop.measure.latents import keys_of, unseen
from innerloop.measure.parts import Parts
from innerloop.measure.stability import Spread, Stability, check_loop, stability
from innerloop.model import checkpoint
from innerloop.tasks import Task
from innerloop.terminal.wide_table import Bands
from innerloop.text.examples import Example
from innerloop.train.callbacks import bar

PROBE_EXAMPLES = 1000  # to learn from
MOST_CELLS = 12  # columns of a table of probes


@dataclass(frozen=True)
class Measurement:
    """What is measured on what, and where it is written.

    Attributes:
        model: the model.
        task: the task.
        split: the split of the examples.
        examples: the examples that could be answered.
        unedited: their answers.
        name: the run's folder or the model's name.
        seed: the seed that it was trained with, where known.
        folder: where the files go.
        console: where tables go.
        options: max_new_tokens, batch_size and stage, as `evaluate` takes them.
        parts: what has been measured; every part is kept as soon as it is known.
    """

    model: LatentModel
    task: Task
    split: str
    examples: Sequence[Example]
    unedited: Sequence[Prediction]
    name: str
    seed: int | None
    folder: Path
    console: Console
    options: dict[str, Any]
    parts: Parts

    def run(self, with_controls: bool, with_stability: bool, with_probes: bool) -> None:
        """Measure what is asked for, one after the other; each file is written as soon as it is known."""
        if with_controls:
            report = self._controls()
            path = self.folder / "result.json"
            _write(path, json.loads(path.read_text()) | {"controls": report})
        if with_stability:
            self._stability()
        if with_probes:
            self._probes()

    def _controls(self) -> dict[str, Any]:
        with bar(self.console) as progress:
            row = progress.add_task("controls", total=None, note="")
            found = controls(
                self.model,
                self.task,
                self.examples,
                self.unedited,
                **self.options,
                **self._told(progress, row),
            )
        report = self._what() | {"n": len(self.examples)} | found.as_dict()
        self._show(controls_view(found), "controls.json", report)
        return report

    def _stability(self) -> None:
        batch_size, stage = self.options["batch_size"], self.options["stage"]
        with bar(self.console) as progress:
            row = progress.add_task("stability", total=len(self.examples), note="")

            def measure() -> dict[str, Any]:
                done = self._told(progress, row)["progress"]
                return asdict(stability(self.model, self.examples, batch_size, stage, progress=done))

            found = Stability.read(self.parts("stability", measure))
        report = self._what() | {"n": len(self.examples)} | found.as_dict()
        self._show(stability_view(found), "stability.json", report)

    def _probes(self) -> None:
        train = _to_learn_from(self.task, self.split)
        train = _that_fit(self.model, train, self.options["stage"])
        with bar(self.console) as progress:
            rows = [progress.add_task(title, total=None, note="") for title in ("probes", "swaps")]
            told = self.options | self._told(progress, rows[0])
            found = probing.probes(self.model, self.task, train, self.examples, **told)
            told = self.options | self._told(progress, rows[1])
            swapped = swapping.swaps(self.model, self.task, self.examples, self.unedited, **told)
        said = [*probing.sentences(found), *swapping.sentences(swapped)]
        report = self._what() | {
            "n_train": len(train),
            "n_test": len(self.examples),
            "probes": [probe.as_dict() for probe in found],
            "best": [probe.as_dict() for probe in probing.best(found)],
            "swap": [one.as_dict() for one in swapped],
            "sentences": said,
        }
        self._show(Group(probes_view(found), swaps_view(swapped), Text("\n".join(said))), "probes.json", report)

    def _told(self, progress: Progress, row: TaskID) -> dict[str, Any]:
        """Return what a measurement tells its progress to, and where it keeps its parts."""
        self.parts.begins = lambda name: progress.update(row, note=name.partition(",")[0])
        return {
            "planned": lambda n: progress.update(row, total=n),
            "progress": lambda n: progress.advance(row, n),
            "parts": self.parts,
        }

    def _what(self) -> dict[str, Any]:
        method, task = self.model.method.name, self.task.name
        return {"method": method, "model": self.name, "task": task, "split": self.split, "seed": self.seed}

    def _show(self, view: RenderableType, name: str, report: Mapping[str, Any]) -> None:
        _write(self.folder / name, report)
        self.console.print(view)
        self.console.print(str(self.folder / name), soft_wrap=True)


def _write(path: Path, report: Mapping[str, Any]) -> None:
    checkpoint.write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def check_asked(
    model: LatentModel,
    task: Task,
    split: str,
    examples: Sequence[Example],
    stage: int | None,
    loops: int | None,
    with_controls: bool,
    with_stability: bool,
    with_probes: bool,
    attempts: Attempts = ONCE,
) -> None:
    """Refuse before anything starts what could not be measured afterwards."""
    if loops is not None and (with_controls or with_stability or with_probes):
        raise InputError("controls, stability and probes are of the loops that were trained: leave --loops out")
    if not attempts.is_plain and (with_controls or with_stability or with_probes):
        raise InputError(
            "controls, stability and probes are of one answer: leave --samples, --temperature, --beams out"
        )
    if with_probes:
        probing.check(model, stage)
        tested_on = _that_fit(model, examples, stage)
        probing.check_enough(_that_fit(model, _to_learn_from(task, split), stage), tested_on)
        _check_exchange(model, tested_on, stage, "probes")
    if with_stability:
        check_loop(model, stage)
    if with_controls and unseen(model, stage) is None:
        _check_exchange(model, _that_fit(model, examples, stage), stage, "controls")


def _that_fit(model: LatentModel, examples: Sequence[Example], stage: int | None) -> list[Example]:
    """Return the examples that a model can be asked."""
    return [example for example in examples if fits(model, example.question, stage)]


def _check_exchange(model: LatentModel, examples: Sequence[Example], stage: int | None, measure: str) -> None:
    """Refuse examples, all of which can be asked, between which no latents could be exchanged."""
    if len(set(keys_of(model.prompts([example.question for example in examples], stage)))) < 2:
        raise InputError(
            f"{measure} exchange latents between questions: give at least two different ones that can be answered"
        )


def _to_learn_from(task: Task, split: str) -> list[Example]:
    """Return what probes learn from: other examples than those they are tested on."""
    return task.examples("valid" if split == "train" else "train", PROBE_EXAMPLES)


def controls_view(found: Controls) -> RenderableType:
    """Return the controls as tables, and what they mean."""
    report = found.as_dict()
    parts: list[RenderableType] = []
    if found.effects:
        table = Table(title="are the latents used?", title_justify="left")
        for column in ("control", "accuracy", "95 %", "change", "95 %", "p", "same answers"):
            table.add_column(column, justify="left" if column == "control" else "right")
        whole = report["unedited"]
        table.add_row("none", f"{whole['accuracy']:.1%}", _interval(whole["ci95"]), "", "", "", "")
        for entry in report["controls"]:
            table.add_row(entry["title"], *_cells(entry))
        parts.append(table)
    for title, key, name in (("loops", "loops", "loops"), ("latents that the answer sees", "kept_latents", "kept")):
        if report[key]:
            table = Table(title=f"accuracy against {title}", title_justify="left")
            for column in (title.split()[0], "accuracy", "95 %", "change", "95 %", "p", "same answers"):
                table.add_column(column, justify="right")
            for entry in report[key]:
                label = f"{entry[name]}" + (" (trained)" if entry.get("trained") else "")
                table.add_row(label, *_cells(entry))
            parts.append(table)
    lines = [report["verdict"]["sentence"]]
    lines += [
        f"left out: {entry['control'].replace('_', ' ')}; {entry['why']}"
        for entry in report["left_out"]
        if found.kind != "none"
    ]
    return Group(*parts, Text("\n".join(lines)))


def _cells(entry: Mapping[str, Any]) -> list[str]:
    low, high = entry["difference_ci95"]
    p = "< 0.001" if entry["p"] < 0.001 else f"{entry['p']:.3f}"
    return [
        f"{entry['accuracy']:.1%}",
        _interval(entry["ci95"]),
        f"{100 * entry['difference']:+.1f}",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        p,
        f"{entry['same_answers']:.0%}",
    ]


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"


def stability_view(found: Stability) -> RenderableType:
    """Return the measures of each loop, median and 5 % to 95 % over examples, and what they mean."""
    loops = found.loops
    names = [name for name in loops[0].measures if any(entry.measures[name] is not None for entry in loops)]
    columns = [("loop", [str(entry.loop) for entry in loops])]
    columns += [(name.replace("_", " "), [_spread(entry.measures[name]) for entry in loops]) for name in names]
    columns += [(side, [f"{getattr(entry, side):.2f}" for entry in loops]) for side in ("spread", "centre")]
    title = "stability: median (5 % to 95 % of the examples)"
    return Group(Bands(title, columns, [name for name, _ in columns]), Text("\n".join(found.sentences())))


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3g}\n({spread.low:.2g} to {spread.high:.2g})"


def probes_view(found: Sequence[probing.Probe]) -> RenderableType:
    """Return what is read off which latent after each loop, the best loop of each."""
    latents = sorted({probe.latent for probe in found})
    shown = [latents[i] for i in swapping.evenly(len(latents), MOST_CELLS)]
    table = Table(title="accuracy of linear probes (after learning from shuffled labels)", title_justify="left")
    table.add_column("what")
    table.add_column("after loop", justify="right")
    for latent in shown:
        table.add_column(f"latent {latent}", justify="right")
    for step, loop in dict.fromkeys((probe.step, probe.loop) for probe in found):
        row = {p.latent: f"{p.accuracy:.0%} ({p.control:.0%})" for p in found if (p.step, p.loop) == (step, loop)}
        what = "answer" if step == "answer" else f"step {int(step) + 1}"
        passes = {p.loop for p in found if p.answer_pass}
        table.add_row(what, "answer" if loop in passes else str(loop), *(row.get(latent, "") for latent in shown))
    return table


def swaps_view(found: Sequence[swapping.Swap]) -> RenderableType:
    """Return what swaps do."""
    table = Table(title="latents swapped between examples", title_justify="left")
    for column in ("latents", "after loop", "follow the donor", "95 %", "by chance", "stay", "n"):
        table.add_column(column, justify="right")
    for swap in found:
        loop = "the last" if swap.loop is None else str(swap.loop)
        share = f"{swap.follows:.0%}", _interval(swap.ci95), f"{swap.by_chance:.0%}", f"{swap.keeps:.0%}"
        table.add_row(str(swap.latents), loop, *share, str(swap.n))
    return table

"""What `innerloop eval` measures besides accuracy: files beside result.json, and tables and sentences on the screen.

--controls    controls.json, and the key "controls" of result.json
--stability   stability.json
--probes      probes.json, with the swaps
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from innerloop.disk.files import write_text
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.requests import fits
from innerloop.engine.test_time import ONCE, TestTimeCompute
from innerloop.errors import InputError, refuse
from innerloop.measure import probes as probing
from innerloop.measure import swap as swapping
from innerloop.measure.control_verdict import Controls
from innerloop.measure.controls import controls
from innerloop.measure.latents import keys_of, unseen
from innerloop.measure.stability import Spread, Stability, check_loop, stability
from innerloop.measure.subject import Subject
from innerloop.measure.written import WrittenSteps, writes_steps, written_steps
from innerloop.tasks import Task
from innerloop.terminal.progress import bar
from innerloop.terminal.wide_table import Bands
from innerloop.text.codec import to_json
from innerloop.text.examples import Example

PROBE_EXAMPLES = 1000  # to learn from
MOST_CELLS = 12  # columns of a table of probes


@dataclass(frozen=True)
class Measurement:
    """What is measured on what, and where it is written.

    Attributes:
        subject: the model, the examples that could be answered, and their answers; every part is kept at once.
        split: the split of the examples.
        name: the run's folder or the model's name.
        seed: the seed that it was trained with, where known.
        folder: where the files go.
        console: where tables go.
    """

    subject: Subject
    split: str
    name: str
    seed: int | None
    folder: Path
    console: Console

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
        with self._telling("controls"):
            found = controls(self.subject)
            steps = written_steps(self.subject) if writes_steps(self.subject.model) else None
        views, report = [controls_view(found)], {"n": len(self.subject.examples)} | found.as_dict()
        if steps is not None:
            views, report = [*views, steps_view(steps)], report | {"written_steps": steps.as_dict()}
        return self._show(Group(*views), "controls.json", report)

    def _stability(self) -> None:
        of, n = self.subject, len(self.subject.examples)
        with self._telling("stability", n):
            measure = partial(stability, of.model, of.examples, of.batch_size, of.stage, progress=of.progress)
            found = of.cache.value(Stability, "stability", measure)
        self._show(stability_view(found), "stability.json", {"n": n} | found.as_dict())

    def _probes(self) -> None:
        subject = self.subject
        train = _that_fit(subject.model, _to_learn_from(subject.task, self.split), subject.stage)
        with self._telling("probes"):
            found = probing.probes(subject, train)
        with self._telling("swaps"):
            swapped = swapping.swaps(subject)
        said = [*probing.sentences(found), *swapping.sentences(swapped)]
        report = {
            "n_train": len(train),
            "n_test": len(subject.examples),
            "probes": [probe.as_dict() for probe in found],
            "best": [probe.as_dict() for probe in probing.best(found)],
            "swap": to_json(swapped),
            "sentences": said,
        }
        self._show(Group(probes_view(found), swaps_view(swapped), Text("\n".join(said))), "probes.json", report)

    @contextmanager
    def _telling(self, title: str, total: int | None = None) -> Iterator[None]:
        """Show in a bar what the subject's measurement does in a block."""
        with bar(self.console) as progress:
            row = progress.add_task(title, total=total, note="")
            self.subject.cache.begins = lambda name: progress.update(row, note=name.partition(",")[0])
            self.subject.planned = lambda n: progress.update(row, total=n)
            self.subject.progress = partial(progress.advance, row)
            yield

    def _show(self, view: RenderableType, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
        method, task = self.subject.model.method.name, self.subject.task.name
        what = {"method": method, "model": self.name, "task": task, "split": self.split, "seed": self.seed}
        report = {**what, **found}
        _write(self.folder / name, report)
        self.console.print(view)
        self.console.print(str(self.folder / name), soft_wrap=True)
        return report


def _write(path: Path, report: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


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
    attempts: TestTimeCompute = ONCE,
) -> None:
    """Refuse before anything starts what could not be measured afterwards."""
    what, is_any = "controls, stability and probes are of", with_controls or with_stability or with_probes
    refuse(
        (is_any and loops is not None, f"{what} the loops that were trained: leave --loops out"),
        (is_any and not attempts.is_plain, f"{what} one answer: leave --samples, --starts, --temperature, --beams out"),
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
    report, numbers = found.as_dict(), ("accuracy", "95 %", "change", "95 %", "p", "same answers")
    parts: list[RenderableType] = []
    if found.effects:
        whole = report["unedited"]
        rows: list[Sequence[str]] = [("none", f"{whole['accuracy']:.1%}", _interval(whole["ci95"]), "", "", "", "")]
        rows += [(entry["title"], *_cells(entry)) for entry in report["controls"]]
        parts.append(_table("are the latents used?", ("control", *numbers), rows, n_left=1))
    for title, key, name in (("loops", "loops", "loops"), ("latents that the answer sees", "kept_latents", "kept")):
        if report[key]:
            rows = [
                (f"{entry[name]}" + (" (trained)" if entry.get("trained") else ""), *_cells(entry))
                for entry in report[key]
            ]
            parts.append(_table(f"accuracy against {title}", (title.split()[0], *numbers), rows))
    lines = [report["verdict"]["sentence"]]
    if found.kind != "none":
        lines += [f"left out: {one['control'].replace('_', ' ')}; {one['why']}" for one in report["left_out"]]
    return Group(*parts, Text("\n".join(lines)))


def steps_view(found: WrittenSteps) -> RenderableType:
    """Return what written steps do as a table, and in words."""
    report, numbers = found.as_dict(), ("accuracy", "95 %", "change", "95 %", "p", "same answers")
    rows = [(f"{float(share):.0%} of its steps", *_cells(one)) for share, one in report["early"].items()]
    rows += [("a wrong step, and more", *_cells(report["mistaken"]))]
    rows += [("another's steps", *_cells(report["exchanged"]))]
    title = f"are the written steps used? (n = {found.n}, {found.n_steps:.1f} steps)"
    return Group(_table(title, ("answered after", *numbers), rows, n_left=1), Text(found.sentence))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], n_left: int = 0) -> Table:
    """Return a table whose columns stand to the right, but for the first ``n_left``."""
    table = Table(title=Text(title), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i < n_left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = (100 * bound for bound in entry["difference_ci95"])
    p = "< 0.001" if entry["p"] < 0.001 else f"{entry['p']:.3f}"
    change = f"{100 * entry['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}"
    return f"{entry['accuracy']:.1%}", _interval(entry["ci95"]), *change, p, f"{entry['same_answers']:.0%}"


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
    shown, rows = [latents[i - 1] for i in swapping.evenly(len(latents), MOST_CELLS)], []
    passes = {probe.loop for probe in found if probe.answer_pass}
    for step, loop in dict.fromkeys((probe.step, probe.loop) for probe in found):
        cells = {p.latent: f"{p.accuracy:.0%} ({p.control:.0%})" for p in found if (p.step, p.loop) == (step, loop)}
        what = "answer" if step == "answer" else f"step {step}"
        rows.append((what, "answer" if loop in passes else str(loop), *(cells.get(latent, "") for latent in shown)))
    title = "accuracy of linear probes (after learning from shuffled labels)"
    return _table(title, ("what", "after loop", *(f"latent {latent}" for latent in shown)), rows, n_left=1)


def swaps_view(found: Sequence[swapping.Swap]) -> RenderableType:
    """Return what swaps do."""
    rows = []
    for swap in found:
        loop = "the last" if swap.loop is None else str(swap.loop)
        share = f"{swap.follows:.0%}", _interval(swap.ci95), f"{swap.by_chance:.0%}", f"{swap.keeps:.0%}"
        rows.append((str(swap.latents), loop, *share, str(swap.n)))
    columns = ("latents", "after loop", "follow the donor", "95 %", "by chance", "stay", "n")
    return _table("latents swapped between examples", columns, rows)

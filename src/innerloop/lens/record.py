"""What there is to see inside the answers to some examples, as plain data: `look` answers them and writes it down.

Every number is taken from the answer's `Trace`, its `Cost` or from `measure.readout`; nothing is computed anew except
means over the passes that read written tokens. Examples are answered one at a time, so that no pass is padded and the
cost is that of a question asked alone.

    record = look(model, task, task.examples("test", 8))
    record.looks[0].grid[0].cells[1].top      # the likeliest tokens of latent 1 after loop 1, with probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from innerloop.decoder.cost import Cost
from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.lens.depth import depth_grid, depth_loops, read_tokens
from innerloop.lens.film import film_columns, film_grid
from innerloop.lens.grid import Cell, Column, Line, Loop, cells_of, loops_of
from innerloop.lens.latents import (
    Part,
    Step,
    Stop,
    block_steps,
    column_before,
    gold_tokens,
    how_it_ended,
    latent_columns,
    opened_curves,
    opened_parts,
    side_by_side,
    single_steps,
    times,
)
from innerloop.measure.accuracy import versions
from innerloop.measure.readout import Shown, shown_steps
from innerloop.measure.result_cache import ResultCache, digest_of
from innerloop.tasks import Task
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, Row

Family = Literal["latents", "depth", "canvas", "text"]


@dataclass(frozen=True)
class Look:
    """What there is to see inside one answer.

    Attributes:
        id: of the example.
        question: its text.
        steps: the gold steps.
        gold: the gold answer.
        text: all written text.
        predicted: the answer found in it; None where there is none.
        is_right: whether the task accepts it.
        ended: whether the text came to its end by itself.
        cost: what the answer cost.
        columns: latents, or tokens, from left to right.
        grid: one line of cells for each loop, and one for the pass that the answer sees.
        loops: the statistics of each iteration.
        shown: gold steps beside decoded ones, for methods that say which latents show which step.
        stop: how the loop ended; None where there is none over latents.
        notes: what the reader should know about this answer.
    """

    id: str
    question: str
    steps: tuple[str, ...]
    gold: str
    text: str
    predicted: str | None
    is_right: bool
    ended: bool
    cost: Cost
    columns: tuple[Column, ...] = ()
    grid: tuple[Line, ...] = ()
    loops: tuple[Loop, ...] = ()
    shown: tuple[Step, ...] = ()
    stop: Stop | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What there is to see in a run.

    Attributes:
        run: the model's name or folder.
        method: the method's name.
        summary: what the method does.
        paper: where it comes from.
        task: the task's name.
        split: whose examples these are.
        family: whether latents, tokens of unlike depth, a canvas, or text alone are looked at.
        versions: of what ran.
        looks: the examples.
    """

    run: str
    method: str
    summary: str
    paper: str
    task: str
    split: str
    family: Family
    versions: dict[str, str]
    looks: tuple[Look, ...]


def look(
    model: LatentModel,
    task: Task,
    examples: Sequence[Example],
    split: str = "test",
    run: str = "",
    loops: int | None = None,
    max_new_tokens: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
    parts: ResultCache | None = None,
) -> Record:
    """Answer examples one at a time and write down what there is to see inside.

    Args:
        model: the model.
        task: checks the answers.
        examples: what is asked.
        split: whose examples these are, for the record.
        run: the model's name or folder, for the record.
        loops: another number of loops than the model was trained with.
        max_new_tokens: the most tokens to write; None: as the task says.
        progress: called with the number of examples answered since the last call.
        parts: keeps each example as soon as it is known; those that it knows already are not answered.
    """
    if not examples:
        raise InputError("there is no example to look at: give at least one")
    parts = ResultCache() if parts is None else parts
    names = [f"look {digest_of([example])}" for example in examples]
    missing = [i for i, name in enumerate(names) if name not in parts]
    shown = dict(zip(missing, steps_shown(model, [examples[i] for i in missing], loops)))

    def seen(i: int) -> tuple[Look, Family]:
        answer = answer_alone(model, task, examples[i], loops, max_new_tokens)
        return look_at(model, task, examples[i], answer, loops, shown[i])

    if missing:  # what is made ready at the first answer shall not count as its time
        model.generate([examples[missing[0]].question], max_new_tokens=1, trace=True, loops=loops)
    kept = []
    for i, name in enumerate(names):
        kept.append(parts.value(tuple[Look, Family], name, partial(seen, i)))  # type: ignore[arg-type]
        progress(1)
    looks, families = zip(*kept)
    family: Family = next(name for name in ("depth", "latents", "canvas", "text") if name in families)
    method = model.method
    what = (run, method.name, method.summary, method.paper, task.name, split)
    return Record(*what, family, versions(), looks)


def answer_alone(
    model: LatentModel, task: Task, example: Example, loops: int | None = None, max_new_tokens: int | None = None
) -> Generation:
    """Answer one example with a trace, by itself (see `look` for the arguments)."""
    most = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    return model.generate(
        [example.question], steps=[example.steps], max_new_tokens=most, batch_size=1, trace=True, loops=loops
    )[0]


def steps_shown(model: LatentModel, examples: Sequence[Example], loops: int | None = None) -> list[list[Shown]]:
    """Return what the latents of each example show where they learned to show steps; nothing where they did not."""
    told = [i for i, example in enumerate(examples) if example.steps]
    found: list[list[Shown]] = [[] for _ in examples]
    if loops is None and model.method.step_weight > 0:
        for i, shown in zip(told, shown_steps(model, [examples[i] for i in told])):
            found[i] = [replace(one, example=0) for one in shown]
    return found


def look_at(
    model: LatentModel,
    task: Task,
    example: Example,
    answer: Generation,
    loops: int | None = None,
    shown: Sequence[Shown] | None = None,
) -> tuple[Look, Family]:
    """Return what there is to see inside an answer made by `answer_alone`, and what kind of thing that is.

    ``shown`` is what `steps_shown` says of the example, where it is known.
    """
    predicted = task.extract(answer.text)
    is_right = predicted is not None and task.is_correct(predicted, example.answer)
    asked = (example.id, example.question, tuple(example.steps), example.answer)
    base = Look(*asked, answer.text, predicted, is_right, answer.ended, answer.cost)
    if answer.depths:
        tokens = read_tokens(model, answer)
        grid, notes = depth_grid(model, answer, tokens)
        n_asked = len(model.prompts([example.question], loops=loops)[0])
        columns = tuple(Column(token, "asked" if i < n_asked else "written", d) for i, (token, d) in enumerate(tokens))
        return replace(base, columns=columns, grid=grid, loops=depth_loops(answer, tokens), notes=notes), "depth"
    trace = answer.trace
    if trace is not None and trace.frames:
        grid, notes = film_grid(trace.frames, model.tokenizer)
        return replace(base, columns=film_columns(trace.frames), grid=grid, notes=notes), "canvas"
    row = model.prompts([example.question], loops=loops)[0]
    if trace is None or not (trace.iterations or trace.last or trace.opened):
        name = model.method.name
        return replace(base, notes=(f"'{name}' thinks in what it writes: there are no latents to look into.",)), "text"
    shown = steps_shown(model, [example], loops)[0] if shown is None else shown
    return _latents(model, base, row, answer, shown, loops), "latents"


def _latents(
    model: LatentModel, base: Look, row: Row, answer: Generation, shown: Sequence[Shown], loops: int | None
) -> Look:
    """Fill in the map of latents and loops."""
    trace, blocks = answer.trace, model.shown_blocks([row], [base.steps], loops)[0]
    assert trace is not None
    gold, columns, notes = gold_tokens(model, blocks, answer, shown), latent_columns(model, row, blocks), list[str]()
    lines: list[Line] = []
    if model.method.plan.scope == "append":
        read = [cells_of(model.tokenizer, entry)[0] for entry in trace.iterations]
        cells: tuple[Cell | None, ...] = (*read, *[None] * (len(columns) - len(read)))
        lines.append(Line("when read", None, cells[: len(columns)]))
        notes.append(
            "Each loop reads one latent more; a cell shows what comes out where that latent is read, and its change is "
            "that from this latent to the next. "
            "The last latent is read together with what is written, and that pass is not read out."
        )
    else:
        has_before = trace.last is not None and trace.last.top_ids.shape[1] == len(columns) + 1
        if has_before:
            columns = (column_before(model, row, blocks), *columns)
        shift = int(has_before)
        for entry in trace.iterations:
            own = cells_of(model.tokenizer, entry, gold, entry.loop, 0)
            lines.append(Line(f"loop {entry.loop}", entry.loop, (*[None] * shift, *own)))
        if trace.last is not None:
            lines.append(Line("answer", ANSWER_PASS, cells_of(model.tokenizer, trace.last, gold, ANSWER_PASS, -shift)))
            notes.append("The line 'answer' is the pass that reads the final latents together with the answer.")
    curves, stop = loops_of(trace), how_it_ended(model, trace, row.n_loops)
    if trace.opened:
        parts = opened_parts(model, trace, loops)
        columns, lines = side_by_side([Part(columns, tuple(lines)), *parts] if columns else parts)
        curves, stop = opened_curves(model, trace, loops, row.n_loops)
        n = len(parts)
        notes.append(f"{times(n, 'block')} {'was' if n == 1 else 'were'} opened by what was written.")
    return replace(
        base,
        columns=columns,
        grid=tuple(lines),
        loops=curves,
        shown=(*block_steps(blocks, base.steps, answer), *single_steps(model, answer, shown)),
        stop=stop,
        notes=tuple(notes),
    )

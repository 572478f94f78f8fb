"""What there is to see inside the answers to some examples, as plain data: `look` answers them and writes it down.

Every number is taken from the answer's `Trace`, its `Cost` or from `measure.readout`; nothing is computed anew except
means over the passes that read written tokens. Examples are answered one at a time, so that no pass is padded and the
cost is that of a question asked alone.

    record = look(model, task, task.examples("test", 8))
    record.looks[0].grid[0].cells[0].top      # the likeliest tokens of latent 1 after loop 1, with probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from innerloop.cost import Cost
from innerloop.engine import Generation
from innerloop.errors import InputError
from innerloop.examples import Example
from innerloop.layout import ANSWER_PASS, Kind, Row
from innerloop.lens.depth import depth_grid, depth_loops, read_tokens
from innerloop.lens.grid import Cell, Column, Line, Loop, Spot, cells_of, loop_of
from innerloop.measure.accuracy import versions
from innerloop.measure.readout import Shown, shown_steps
from innerloop.model import LatentModel
from innerloop.show import visible
from innerloop.tasks import Task

Family = Literal["latents", "depth", "text"]


@dataclass(frozen=True)
class Step:
    """A step that latents are expected to show, and the one they show.

    Attributes:
        where: the latents and the loop.
        gold: the text expected; None where it is not known.
        decoded: the likeliest tokens there.
        is_right: whether they are those expected; None where nothing is.
    """

    where: str
    gold: str | None
    decoded: str
    is_right: bool | None


@dataclass(frozen=True)
class Stop:
    """How a loop over latents came to its end.

    Attributes:
        rule: the stop score's name; none where nothing stops.
        threshold: which the score must reach.
        ran: the iterations of this row.
        limit: the most it could have run.
        why: the decision in a sentence.
    """

    rule: str
    threshold: float | None
    ran: int
    limit: int
    why: str


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
        family: whether latents, tokens of unlike depth, or text alone are looked at.
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
    progress: Callable[[int], None] | None = None,
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
    """
    if not examples:
        raise InputError("there is no example to look at: give at least one")
    looks, families = [], set[Family]()
    for example in examples:
        answer = answer_alone(model, task, example, loops, max_new_tokens)
        one, family = look_at(model, task, example, answer, loops)
        looks.append(one)
        families.add(family)
        if progress is not None:
            progress(1)
    family = next(name for name in ("depth", "latents", "text") if name in families)
    method = model.method
    names = (run, method.name, method.summary, method.paper, task.name, split)
    return Record(*names, family, versions(), tuple(looks))


def answer_alone(
    model: LatentModel, task: Task, example: Example, loops: int | None = None, max_new_tokens: int | None = None
) -> Generation:
    """Answer one example with a trace, by itself (see `look` for the arguments)."""
    most = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    steps = [example.steps]
    return model.generate([example.question], max_new_tokens=most, batch_size=1, trace=True, loops=loops, steps=steps)[
        0
    ]


def look_at(
    model: LatentModel, task: Task, example: Example, answer: Generation, loops: int | None = None
) -> tuple[Look, Family]:
    """Return what there is to see inside an answer made by `answer_alone`, and what kind of thing that is."""
    predicted = task.extract(answer.text)
    is_right = predicted is not None and task.is_correct(predicted, example.answer)
    base = Look(
        example.id,
        example.question,
        tuple(example.steps),
        example.answer,
        answer.text,
        predicted,
        is_right,
        answer.ended,
        answer.cost,
    )
    if answer.depths:
        tokens = read_tokens(model, answer)
        grid, notes = depth_grid(model, answer, tokens)
        n_asked = len(model.prompts([example.question], loops=loops)[0])
        columns = tuple(Column(token, "asked" if i < n_asked else "written", d) for i, (token, d) in enumerate(tokens))
        return replace(base, columns=columns, grid=grid, loops=depth_loops(answer, tokens), notes=notes), "depth"
    row = model.prompts([example.question], loops=loops)[0]
    if answer.trace is None or (not answer.trace.iterations and answer.trace.last is None):
        name = model.method.name
        return replace(base, notes=(f"'{name}' thinks in what it writes: there are no latents to look into.",)), "text"
    expects = loops is None and model.method.losses.step_weight > 0 and example.steps
    shown = shown_steps(model, [example])[0] if expects else []
    return _latents(
        model, base, row, answer, _expected(model, row, example, answer, shown, loops), shown, loops
    ), "latents"


def _expected(
    model: LatentModel,
    row: Row,
    example: Example,
    answer: Generation,
    shown: Sequence[Shown],
    loops: int | None,
) -> dict[Spot, tuple[str, int]]:
    """Return the gold token, and its rank, of each (pass, position) where one is expected."""
    assert answer.trace is not None
    found: dict[Spot, tuple[str, int]] = {}
    blocks = model.shown_blocks([row], [example.steps], loops)[0]
    ran = len(answer.trace.iterations)
    for block, step in zip(blocks, answer.blocks):
        for q, (token, rank) in enumerate(zip(block.gold, step.ranks)):
            if rank is not None:
                at = block.first + q
                is_answer = answer.trace.last is not None and (block.loop == ANSWER_PASS or at < 0 or not ran)
                found[ANSWER_PASS if is_answer else min(block.loop or ran, ran), at] = (
                    visible(model.tokenizer, token),
                    rank,
                )
    for entry in shown:
        ids = model.tokenizer.convert_tokens_to_ids([entry.gold])
        loop = ANSWER_PASS if entry.position < 0 else entry.loop
        found[loop, entry.position] = visible(model.tokenizer, ids[0]), entry.rank
    return found


def _latents(
    model: LatentModel,
    base: Look,
    row: Row,
    answer: Generation,
    gold: dict[Spot, tuple[str, int]],
    shown: Sequence[Shown],
    loops: int | None,
) -> Look:
    """Fill in the map of latents and loops."""
    trace = answer.trace
    assert trace is not None
    columns, notes = _columns(model, row, loops), list[str]()
    lines: list[Line] = []
    if model.method.scope == "append":
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
            columns = (_before(model, row, loops), *columns)
        shift = int(has_before)
        for entry in trace.iterations:
            own = cells_of(model.tokenizer, entry, gold, entry.loop, 0)
            lines.append(Line(f"loop {entry.loop}", entry.loop, (*[None] * shift, *own)))
        if trace.last is not None:
            lines.append(Line("answer", ANSWER_PASS, cells_of(model.tokenizer, trace.last, gold, ANSWER_PASS, -shift)))
            notes.append("The line 'answer' is the pass that reads the final latents together with the answer.")
    ran, more = len(trace.iterations), answer.cost.loops - len(trace.iterations)
    if more > 0:
        notes.append(
            f"{_times(more, 'further iteration')} refined blocks that were opened while writing; the trace "
            "holds the first block alone."
        )
    return replace(
        base,
        columns=columns,
        grid=tuple(lines),
        loops=tuple(loop_of(entry) for entry in trace.iterations),
        shown=(*_blocks(model, base, row, answer, loops), *_pairs(model, answer, shown)),
        stop=_stop(model, [loop.score for loop in map(loop_of, trace.iterations)], ran, row.n_loops),
        notes=tuple(notes),
    )


def _before(model: LatentModel, row: Row, loops: int | None) -> Column:
    """Return the position before the latents, which may show the first token of a step."""
    is_read = any(block.first < 0 for block in model.shown_blocks([row], None, loops)[0])
    return Column(visible(model.tokenizer, row.prefix[-1].ids[-1]), "before", group=1 if is_read else None)


def _columns(model: LatentModel, row: Row, loops: int | None) -> tuple[Column, ...]:
    """Return the looped positions: latents by their number, text as it is; with the block that each belongs to."""
    groups: dict[int, int] = {}
    for number, block in enumerate(model.shown_blocks([row], None, loops)[0], 1):
        groups |= {block.first + q: number for q in range(block.n)}
    columns: list[Column] = []
    slot = 0
    for piece in row.region:
        for token_id in piece.ids:
            is_latent = piece.kind is Kind.LATENT
            slot += is_latent
            name = str(slot) if is_latent else visible(model.tokenizer, token_id)
            columns.append(Column(name, "latent" if is_latent else "text", group=groups.get(len(columns))))
    return tuple(columns)


def _blocks(model: LatentModel, base: Look, row: Row, answer: Generation, loops: int | None) -> list[Step]:
    """Return the steps that blocks show."""
    steps = []
    for number, (place, block) in enumerate(zip(model.shown_blocks([row], [base.steps], loops)[0], answer.blocks), 1):
        gold = base.steps[number - 1] if number <= len(base.steps) else None
        known = block.ranks[: len(place.gold)]
        is_right = all(rank == 0 for rank in known) if known else None
        when = "the answer's pass" if place.loop == ANSWER_PASS else f"loop {place.loop}"
        steps.append(Step(f"block {number}, {when}", gold, block.text.strip(), is_right))
    return steps


def _pairs(model: LatentModel, answer: Generation, shown: Sequence[Shown]) -> list[Step]:
    """Return what each loop is expected to show, for methods whose latents show steps outside blocks."""
    if answer.blocks:
        return []
    tokenizer, loops = model.tokenizer, sorted({entry.loop for entry in shown})
    steps = []
    for loop in loops:
        own = [entry for entry in shown if entry.loop == loop]
        numbers = [entry.position + 1 for entry in own]
        where = f"latent {numbers[0]}" if len(own) == 1 else f"latents {numbers[0]} to {numbers[-1]}"
        gold = tokenizer.convert_tokens_to_string([e.gold for e in own]).strip()
        decoded = tokenizer.convert_tokens_to_string([e.alternatives[0][0] for e in own]).strip()
        when = "the answer's pass" if loop == ANSWER_PASS else f"loop {loop}"
        steps.append(Step(f"{where}, {when}", gold, decoded, all(e.rank == 0 for e in own)))
    return steps


def _stop(model: LatentModel, scores: Sequence[float | None], ran: int, limit: int) -> Stop | None:
    """Return how the loop over latents ended."""
    settings = model.method.loop
    if limit == 0:
        return None
    rule = settings.stop
    if settings.solver != "none":
        why = f"A fixed point was looked for to {settings.solver_tol:g}: {ran} of at most {_times(limit)} ran."
        return Stop(rule, None, ran, limit, why)
    if rule == "none":
        return Stop(rule, None, ran, limit, f"No stop rule is on: the loop ran {_times(ran)}, as set.")
    threshold, score = settings.threshold, scores[-1] if scores else None
    reached = "" if score is None else f" ({rule} score {score:.3g}, threshold {threshold:.3g})"
    if ran < limit:
        why = f"The stop rule ended the loop after {ran} of {_times(limit)}{reached}."
    else:
        why = f"The stop rule did not end the loop before its last iteration, {limit}{reached}."
    asked = [
        f"{name} {value}" for name in ("min_loops", "patience", "check_every") if (value := getattr(settings, name)) > 1
    ]
    return Stop(rule, threshold, ran, limit, why + (f" It asks for {', '.join(asked)}." if asked else ""))


def _times(n: int, word: str = "iteration") -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"

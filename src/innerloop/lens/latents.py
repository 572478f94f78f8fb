"""The map of a loop over latents: its columns, the gold tokens in it, the steps it shows and how it ended.

Blocks of latents that a row opened while it wrote have their maps beside that of the first, their curves together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.lens.grid import Cell, Column, Line, Loop, Spot, cells_of, loops_of
from innerloop.loop.trace import Trace
from innerloop.measure.readout import Shown
from innerloop.terminal.views import LATENT, visible
from innerloop.text.row import ANSWER_PASS, Kind, Row, ShownBlock


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


def gold_tokens(
    model: LatentModel, blocks: Sequence[ShownBlock], answer: Generation, shown: Sequence[Shown]
) -> dict[Spot, tuple[str, int]]:
    """Return the gold token, and its rank, of each (pass, position) where one is expected."""
    assert answer.trace is not None
    found: dict[Spot, tuple[str, int]] = {}
    ran = len(answer.trace.iterations)
    for block, step in zip(blocks, answer.blocks):
        for at, token, rank in zip(range(block.first, block.first + block.n), block.gold, step.ranks):
            if rank is not None:
                is_answer = answer.trace.last is not None and (block.iteration == ANSWER_PASS or at < 0 or not ran)
                loop = ANSWER_PASS if is_answer else min(block.iteration or ran, ran)
                found[loop, at] = visible(model.tokenizer, token), rank
    for entry in shown:
        ids = model.tokenizer.convert_tokens_to_ids([entry.gold])
        loop = ANSWER_PASS if entry.position < 0 else entry.loop
        found[loop, entry.position] = visible(model.tokenizer, ids[0]), entry.rank
    return found


def latent_columns(model: LatentModel, row: Row, blocks: Sequence[ShownBlock]) -> tuple[Column, ...]:
    """Return the looped positions: latents by their number, text as it is; with the block that each belongs to."""
    groups = {block.first + q: number for number, block in enumerate(blocks, 1) for q in range(block.n)}
    columns: list[Column] = []
    slots = count(1)
    for span in row.region:
        is_latent = span.kind is Kind.LATENT
        for token_id in span.ids:
            name = str(next(slots)) if is_latent else visible(model.tokenizer, token_id)
            columns.append(Column(name, "latent" if is_latent else "text", group=groups.get(len(columns))))
    return tuple(columns)


def names_of_columns(model: LatentModel, question: str, loops: int | None = None) -> tuple[list[str], list[str]]:
    """Return what a terminal calls the looped positions of a question, and those of a block opened while writing.

    Where each loop reads one latent more, there is one column, in which the line of a loop is the latent of its number.
    """
    if model.method.plan.scope == "append":
        return [LATENT], []
    row = model.prompts([question], loops=loops)[0]
    columns = latent_columns(model, row, model.shown_blocks([row], None, loops)[0])
    own = [f"{LATENT} {column.name}" if column.kind == "latent" else column.name for column in columns]
    block = model.block(loops)
    if block is None:
        return own, []
    latents = [f"{LATENT} {n}" for n in range(1, len(block.region.ids) + 1)]
    return own, [*latents, *(visible(model.tokenizer, token) for token in block.closing.ids)]


def column_before(model: LatentModel, row: Row, blocks: Sequence[ShownBlock]) -> Column:
    """Return the position before the latents, which may show the first token of a step."""
    is_read = any(block.first < 0 for block in blocks)
    return Column(visible(model.tokenizer, row.prefix[-1].ids[-1]), "before", group=1 if is_read else None)


def block_steps(blocks: Sequence[ShownBlock], gold: Sequence[str], answer: Generation) -> list[Step]:
    """Return the steps that blocks show, beside the gold ones."""
    steps = []
    for number, (place, block) in enumerate(zip(blocks, answer.blocks), 1):
        known = block.ranks[: len(place.gold)]
        is_right = all(rank == 0 for rank in known) if known else None
        expected = gold[number - 1] if number <= len(gold) else None
        steps.append(Step(f"block {number}, {_when(place.iteration)}", expected, block.text.strip(), is_right))
    return steps


def _when(loop: int | None) -> str:
    return "the answer's pass" if loop == ANSWER_PASS else f"loop {loop}"


def single_steps(model: LatentModel, answer: Generation, shown: Sequence[Shown]) -> list[Step]:
    """Return what each loop is expected to show, for methods whose latents show steps outside blocks."""
    if answer.blocks:
        return []
    tokenizer, steps = model.tokenizer, []
    for loop in sorted({entry.loop for entry in shown}):
        own = [entry for entry in shown if entry.loop == loop]
        numbers = [entry.position + 1 for entry in own]
        where = f"latent {numbers[0]}" if len(own) == 1 else f"latents {numbers[0]} to {numbers[-1]}"
        gold = tokenizer.convert_tokens_to_string([e.gold for e in own]).strip()
        decoded = tokenizer.convert_tokens_to_string([e.alternatives[0][0] for e in own]).strip()
        steps.append(Step(f"{where}, {_when(loop)}", gold, decoded, all(e.rank == 0 for e in own)))
    return steps


def how_it_ended(model: LatentModel, trace: Trace, limit: int) -> Stop | None:
    """Return how the loop over latents ended; None where none was to run."""
    stop, solved, loops = model.method.stop, model.method.fixed_point, loops_of(trace)
    if limit == 0:
        return None
    ran = len(loops)
    rule = stop.rule
    if solved.solver != "none":
        why = f"A fixed point was looked for to {solved.tol:g}: {ran} of at most {times(limit)} ran."
        return Stop(rule, None, ran, limit, why)
    if rule == "none":
        return Stop(rule, None, ran, limit, f"No stop rule is on: the loop ran {times(ran)}, as set.")
    threshold, score = stop.kappa, loops[-1].score if loops else None
    reached = "" if score is None else f" ({rule} score {score:.3g}, threshold {threshold:.3g})"
    if ran < limit:
        why = f"The stop rule ended the loop after {ran} of {times(limit)}{reached}."
    else:
        why = f"The stop rule did not end the loop before its last iteration, {limit}{reached}."
    asked = [
        f"{name} {value}" for name in ("min_loops", "patience", "check_every") if (value := getattr(stop, name)) > 1
    ]
    return Stop(rule, threshold, ran, limit, why + (f" It asks for {', '.join(asked)}." if asked else ""))


def times(n: int, word: str = "iteration") -> str:
    """Return a number with its noun."""
    return f"{n} {word}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class Part:
    """The map of one block."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


def opened_parts(model: LatentModel, trace: Trace, loops: int | None) -> list[Part]:
    """Return the map of each block that a row opened: what opened it, its latents, and what closed it."""
    block = model.block(loops)
    assert block is not None
    columns = (
        Column(visible(model.tokenizer, block.opened_by), "before"),
        *(Column(str(n), "latent") for n in range(1, len(block.region.ids) + 1)),
        *(Column(visible(model.tokenizer, token), "text") for token in block.closing.ids),
    )
    parts = []
    for opened in trace.opened:
        assert opened.last is not None
        lines = []
        for entry in opened.iterations:
            own = cells_of(model.tokenizer, entry)
            closing: list[Cell | None] = [None] * len(block.closing.ids)
            lines.append(Line(f"loop {entry.loop}", entry.loop, (None, *own, *closing)))
        lines.append(Line("answer", ANSWER_PASS, cells_of(model.tokenizer, opened.last)))
        parts.append(Part(columns, tuple(lines)))
    return parts


def side_by_side(parts: Sequence[Part]) -> tuple[tuple[Column, ...], list[Line]]:
    """Put the maps of blocks beside each other; a block has no cells in passes that it did not run."""
    columns = tuple(replace(column, group=n) for n, part in enumerate(parts, 1) for column in part.columns)
    found = {line.loop: line for part in parts for line in part.lines}
    passes = sorted(found, key=lambda loop: (loop == ANSWER_PASS, loop or 0))
    lines = []
    for loop in passes:
        cells: list[Cell | None] = []
        for part in parts:
            own = [line.cells for line in part.lines if line.loop == loop]
            cells += own[0] if own else [None] * len(part.columns)
        lines.append(replace(found[loop], cells=tuple(cells)))
    return columns, lines


def opened_curves(
    model: LatentModel, trace: Trace, loops: int | None, first_limit: int
) -> tuple[tuple[Loop, ...], Stop | None]:
    """Return the statistics of all blocks, and how the loop of each ended; ``first_limit`` is of the first block."""
    block = model.block(loops)
    assert block is not None
    limits = [first_limit, *[block.n_loops] * len(trace.opened)]
    blocks = [(one, limit) for one, limit in zip((trace, *trace.opened), limits) if one.iterations]
    curves = tuple(loop for n, (one, _) in enumerate(blocks, 1) for loop in loops_of(one, f"block {n}"))
    ends = [how_it_ended(model, one, limit) for one, limit in blocks]
    told = [f"Block {n}: {end.why}" for n, end in enumerate(ends, 1) if end is not None]
    if not ends or ends[0] is None:
        return curves, None
    is_same = len({end.why for end in ends if end is not None}) == 1
    return curves, replace(ends[0], why=ends[0].why if is_same else " ".join(told))

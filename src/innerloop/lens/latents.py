"""The map of a loop over latents: its columns, the gold tokens in it, the steps it shows and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.lens.grid import Column, Spot, loops_of
from innerloop.loop.trace import Trace
from innerloop.measure.readout import Shown
from innerloop.terminal.views import LATENT, visible
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, Kind, Row


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


def latent_columns(model: LatentModel, row: Row, loops: int | None) -> tuple[Column, ...]:
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


def names_of_columns(model: LatentModel, question: str, loops: int | None = None) -> tuple[list[str], list[str]]:
    """Return what a terminal calls the looped positions of a question, and those of a block opened while writing.

    Where each loop reads one latent more, there is one column, in which the line of a loop is the latent of its number.
    """
    if model.method.scope == "append":
        return [LATENT], []
    row = model.prompts([question], loops=loops)[0]
    columns = latent_columns(model, row, loops)
    own = [f"{LATENT} {column.name}" if column.kind == "latent" else column.name for column in columns]
    block = model.block(loops)
    if block is None:
        return own, []
    latents = [f"{LATENT} {n}" for n in range(1, len(block.region.ids) + 1)]
    return own, [*latents, *(visible(model.tokenizer, token) for token in block.closing.ids)]


def column_before(model: LatentModel, row: Row, loops: int | None) -> Column:
    """Return the position before the latents, which may show the first token of a step."""
    is_read = any(block.first < 0 for block in model.shown_blocks([row], None, loops)[0])
    return Column(visible(model.tokenizer, row.prefix[-1].ids[-1]), "before", group=1 if is_read else None)


def block_steps(model: LatentModel, row: Row, example: Example, answer: Generation, loops: int | None) -> list[Step]:
    """Return the steps that blocks show."""
    steps = []
    places = model.shown_blocks([row], [example.steps], loops)[0]
    for number, (place, block) in enumerate(zip(places, answer.blocks), 1):
        gold = example.steps[number - 1] if number <= len(example.steps) else None
        known = block.ranks[: len(place.gold)]
        is_right = all(rank == 0 for rank in known) if known else None
        when = "the answer's pass" if place.loop == ANSWER_PASS else f"loop {place.loop}"
        steps.append(Step(f"block {number}, {when}", gold, block.text.strip(), is_right))
    return steps


def single_steps(model: LatentModel, answer: Generation, shown: Sequence[Shown]) -> list[Step]:
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


def how_it_ended(model: LatentModel, trace: Trace, limit: int) -> Stop | None:
    """Return how the loop over latents ended; None where none was to run."""
    settings, loops = model.method.loop, loops_of(trace)
    if limit == 0:
        return None
    ran = len(loops)
    rule = settings.stop
    if settings.solver != "none":
        why = f"A fixed point was looked for to {settings.solver_tol:g}: {ran} of at most {times(limit)} ran."
        return Stop(rule, None, ran, limit, why)
    if rule == "none":
        return Stop(rule, None, ran, limit, f"No stop rule is on: the loop ran {times(ran)}, as set.")
    threshold, score = settings.threshold, loops[-1].score if loops else None
    reached = "" if score is None else f" ({rule} score {score:.3g}, threshold {threshold:.3g})"
    if ran < limit:
        why = f"The stop rule ended the loop after {ran} of {times(limit)}{reached}."
    else:
        why = f"The stop rule did not end the loop before its last iteration, {limit}{reached}."
    asked = [
        f"{name} {value}" for name in ("min_loops", "patience", "check_every") if (value := getattr(settings, name)) > 1
    ]
    return Stop(rule, threshold, ran, limit, why + (f" It asks for {', '.join(asked)}." if asked else ""))


def times(n: int, word: str = "iteration") -> str:
    """Return a number with its noun."""
    return f"{n} {word}{'' if n == 1 else 's'}"

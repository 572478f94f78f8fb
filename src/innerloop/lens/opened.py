"""Blocks of latents that a row opened while it wrote: their maps beside that of the first, their curves together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from innerloop.engine.latent_model import LatentModel
from innerloop.lens.grid import Cell, Column, Line, Loop, cells_of, loops_of
from innerloop.lens.latents import Stop, how_it_ended
from innerloop.loop.trace import Trace
from innerloop.terminal.views import visible
from innerloop.text.row import ANSWER_PASS


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

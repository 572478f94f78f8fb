"""The map of a depth method: which tokens ran how many iterations, and what each showed after every one of them.

A trace of such a method holds one loop for every pass: the one that reads the question, and one for each written token.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.lens.grid import Cell, Line, Loop, cells_of, loop_of
from innerloop.loop.trace import Iteration
from innerloop.terminal.views import visible

Pass = list[Iteration]
ASKED, WRITTEN = "reading the question", "mean of written tokens"


def passes_of(answer: Generation) -> list[Pass]:
    """Return the iterations of a trace, pass by pass."""
    passes: list[Pass] = []
    for entry in [] if answer.trace is None else answer.trace.iterations:
        if not passes or entry.loop <= passes[-1][-1].loop:
            passes.append([])
        passes[-1].append(entry)
    return passes


def read_tokens(model: LatentModel, answer: Generation) -> list[tuple[str, int]]:
    """Return the tokens as they can be seen, with their depths; not the end of the text, which nothing follows."""
    depths = list(answer.depths)
    if answer.ended and depths[-1][0] == model.tokenizer.eos_token:
        depths.pop()
    ids = model.tokenizer.convert_tokens_to_ids([token for token, _ in depths])
    return [
        (token if token_id is None else visible(model.tokenizer, token_id), depth)  # a row of the table may be no token
        for token_id, (token, depth) in zip(ids, depths)
    ]


def depth_grid(
    model: LatentModel, answer: Generation, tokens: Sequence[tuple[str, int]]
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """Return what each token showed after each iteration that it ran, and what to know about that."""
    found: dict[int, list[Cell | None]] = {}
    start = 0
    for entries in passes_of(answer):
        n = 0
        for entry in entries:
            cells = cells_of(model.tokenizer, entry)
            n = len(cells)
            line = found.setdefault(entry.loop, [None] * len(tokens))
            for at, cell in enumerate(cells, start):
                if at < len(tokens) and tokens[at][1] >= entry.loop:
                    line[at] = cell
        start += n
    notes = ["A token's iterations are those that read it: what it shows afterwards is the token that follows it."]
    stop = model.method.stop
    if stop.stops:
        notes.append(f"Each token stops by itself, once its {stop.rule} score reaches {stop.kappa:.3g}.")
    if not found:
        notes.append("This method leaves no read-out of single iterations, so only their number is known.")
    elif start < len(tokens):
        notes.append("Only the pass that reads the question was read out iteration by iteration.")
    lines = tuple(Line(f"iteration {loop}", loop, tuple(cells)) for loop, cells in sorted(found.items()))
    return lines, tuple(notes)


def depth_loops(answer: Generation, tokens: Sequence[tuple[str, int]]) -> tuple[Loop, ...]:
    """Return the statistics of the pass that reads the question, and their means over the passes of written tokens."""
    passes = passes_of(answer)
    if not passes:
        return ()
    loops = [loop_of(entry, ASKED) for entry in passes[0]]
    n_asked = _width(passes[0])
    depths = [depth for _, depth in tokens[n_asked:]]
    written = [
        [loop_of(entry) for entry in entries if entry.loop <= depth]
        for entries, depth in zip(passes[1:], depths)
        if _width(entries) == 1
    ]
    for loop in sorted({entry.loop for entries in written for entry in entries}):
        own = [entry for entries in written for entry in entries if entry.loop == loop]
        change, cosine, rms = (mean([getattr(entry, name) for entry in own]) for name in ("change", "cosine", "rms"))
        loops.append(Loop(loop, change, cosine, rms, None, WRITTEN))
    return tuple(loops)


def _width(entries: Pass) -> int:
    top_ids = entries[0].top_ids
    assert top_ids is not None
    return top_ids.shape[1]

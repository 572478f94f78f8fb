"""The film of a canvas: pass by pass, what each of its tokens was predicted to be, and which were committed.

A canvas begins as masks. A pass predicts some of them, the commit rule keeps some of that, and some rules mask tokens
again (llada.md, remdm.md, section 6).
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from innerloop.lens.grid import Cell, Column, Line, words_of
from innerloop.loop.trace import HIDDEN, Frame
from innerloop.terminal.views import visible

Shown = tuple[tuple[str, float], ...]


def film_columns(frames: list[Frame]) -> tuple[Column, ...]:
    """Return the places of a canvas, numbered from 1."""
    return tuple(Column(str(i + 1), "place") for i in range(len(frames[0].after)))


def film_grid(frames: list[Frame], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """Return a line of cells for each pass, and what to know about them."""
    known: dict[int, Shown] = {}  # what each token was when it was committed, alone
    lines = []
    for number, frame in enumerate(frames, 1):
        predicted = {place: i for i, place in enumerate(frame.places)}
        cells = []
        for place in range(len(frame.after)):
            cell = _cell(frame, place, predicted.get(place), known.get(place), tokenizer)
            if cell is not None and cell.state == "committed":
                known[place] = cell.top[:1]
            cells.append(cell)
        lines.append(Line(f"pass {number}", number, tuple(cells)))
    notes = ["A cell is a token of the canvas after a pass: what was committed, or the likeliest while it is hidden."]
    if any(cell is None for line in lines for cell in line.cells):
        notes.append("Hidden tokens that the commit rule did not look at in a pass have no cell there.")
    return tuple(lines), tuple(notes)


def _cell(
    frame: Frame, place: int, at: int | None, known: Shown | None, tokenizer: PreTrainedTokenizerBase
) -> Cell | None:
    """Return a token after a pass that predicted it as its ``at``-th; None: it is hidden, and was not predicted."""
    before, after = frame.before[place], frame.after[place]
    if after == before != HIDDEN:
        return Cell(known or ((visible(tokenizer, after), 1.0),), state="kept")
    if at is None:
        if after == before:
            return None
        word = visible(tokenizer, before if after == HIDDEN else after)
        return (
            Cell(known or ((word, 1.0),), state="masked again")
            if after == HIDDEN
            else Cell(((word, 1.0),), state="committed")
        )
    ids, probs = frame.shown.top_ids[0, at], frame.shown.top_probs[0, at]
    top = words_of(tokenizer, ids, probs)
    if after == HIDDEN:
        return Cell(top, state="hidden" if before == HIDDEN else "masked again")
    mine = [(word, prob) for token, (word, prob) in zip(ids.tolist(), top) if token == after]
    rest = tuple(one for token, one in zip(ids.tolist(), top) if token != after)
    return Cell((*(mine or [(visible(tokenizer, after), 0.0)]), *rest), state="committed")

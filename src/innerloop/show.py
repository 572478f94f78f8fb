"""Showing rows and thoughts in a terminal: a laid-out row position by position, a trace loop by loop."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from innerloop.layout import IGNORE, Kind, Row
from innerloop.trace import Trace

COLOURS = {
    Kind.QUESTION: "cyan",
    Kind.MARKER: "bold magenta",
    Kind.LATENT: "bold yellow",
    Kind.STEP: "green",
    Kind.ANSWER: "bold blue",
}
NO_LABEL = "·"


def legend() -> Text:
    """Return the meaning of the colours and lines."""
    line = Text("kinds: ")
    for kind, colour in COLOURS.items():
        line.append(f"{kind.value} ", style=colour)
    line.append(f"\nlines: token; label, that is what the position before must predict ({NO_LABEL} none); position id")
    return line


def row_view(row: Row, tokenizer: PreTrainedTokenizerBase, width: int = 100) -> RenderableType:
    """Return a row as cells of token, label and position, wrapped to a width."""
    lines: list[RenderableType] = []
    for cells in _wrap(list(_cells(row, tokenizer)), width):
        tokens, labels, positions = Text(), Text(), Text()
        for token, label, position, colour in cells:
            size = max(len(token), len(label), len(position)) + 1
            tokens.append(token.ljust(size), style=colour)
            labels.append(label.ljust(size), style="white" if label != NO_LABEL else "dim")
            positions.append(position.ljust(size), style="dim")
        lines += [tokens, labels, positions]
    for loop, readout in enumerate(row.readouts, 1):
        shown = [NO_LABEL if i == IGNORE else _visible(tokenizer, i) for i in readout]
        lines.append(Text(f"loop {loop} must show: {' '.join(shown)}", style=COLOURS[Kind.LATENT]))
    if row.n_loops:
        lines.append(Text(f"the latents are refined {row.n_loops} times", style=COLOURS[Kind.LATENT]))
    return Group(*lines)


def _cells(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, str, str]]:
    position = slot = 0
    for piece in row.pieces:
        for token_id in piece.ids:
            token = _visible(tokenizer, token_id)
            if piece.kind is Kind.LATENT:
                token, slot = f"{token}{slot}", slot + 1
            yield (
                token,
                _visible(tokenizer, token_id) if piece.supervised else NO_LABEL,
                str(position),
                COLOURS[piece.kind],
            )
            position += 1


def _wrap(cells: list[tuple[str, str, str, str]], width: int) -> Iterator[list[tuple[str, str, str, str]]]:
    line: list[tuple[str, str, str, str]] = []
    used = 0
    for cell in cells:
        size = max(map(len, cell[:3])) + 1
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append(cell)
        used += size
    if line:
        yield line


def _visible(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    text = tokenizer.decode([token_id])
    return text.replace("\n", "⏎").replace(" ", "␣") or tokenizer.convert_ids_to_tokens(token_id)


def trace_view(trace: Trace, tokenizer: PreTrainedTokenizerBase, max_slots: int = 12) -> Table:
    """Return the loops of one row: how much the state changed, and what each latent showed through the head."""
    table = Table(title="what the latents held", title_justify="left")
    scored = any(entry.score is not None for entry in trace.iterations)
    for column in ("loop", "change", "cosine", "RMS", *(["stop score"] if scored else [])):
        table.add_column(column, justify="right")
    n_slots = max((e.top_ids.shape[1] for e in trace.iterations if e.top_ids is not None), default=0)
    for slot in range(min(n_slots, max_slots)):
        table.add_column(f"latent {slot}")
    for entry in trace.iterations:
        numbers = [f"{entry.delta[0].item():.3f}", f"{entry.cosine[0].item():.3f}", f"{entry.rms[0].item():.2f}"]
        if entry.score is not None:
            numbers.append(f"{entry.score[0].item():.2f}")
        slots = []
        if entry.top_ids is not None and entry.top_probs is not None:
            for ids, probs in zip(entry.top_ids[0][:max_slots].tolist(), entry.top_probs[0][:max_slots].tolist()):
                slots.append(f"{_visible(tokenizer, ids[0])} {probs[0]:.2f}")
        table.add_row(str(entry.loop), *numbers, *slots)
    return table


def print_rows(console: Console, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print rows with their legend."""
    console.print(legend())
    for row in rows:
        console.print()
        console.print(row_view(row, tokenizer, max(console.width - 2, 40)))

"""Showing rows and thoughts in a terminal: a laid-out row position by position, a trace loop by loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from innerloop.engine.generation import Generation
from innerloop.loop.trace import HIDDEN, Frame, Iteration, ShownStep, TopTokens, Trace
from innerloop.terminal.wide_table import Bands
from innerloop.text.row import ANSWER_PASS, Kind, Row
from innerloop.text.tokenizer import token_names

COLOURS = {
    Kind.QUESTION: "cyan",
    Kind.MARKER: "bold magenta",
    Kind.LATENT: "bold yellow",
    Kind.STEP: "green",
    Kind.ANSWER: "bold blue",
}
NO_LABEL = "·"
NUMBERS = ("loop", "change", "cosine", "RMS", "stop score")  # columns that are no positions
LATENT = "latent"
MAX_SLOTS = 12  # positions of a trace that a terminal shows


def legend() -> Text:
    """Return the meaning of the colours and lines."""
    line = Text("kinds: ")
    for kind, colour in COLOURS.items():
        line.append(f"{kind.value} ", style=colour)
    line.append(f"\nlines: token; label, that is what the position before must predict ({NO_LABEL} none); position id")
    return line


def row_view(row: Row, tokenizer: PreTrainedTokenizerBase) -> RenderableType:
    """Return a row as cells of token, label and position, as many side by side as there is room for."""
    if row.next is not None:
        views = (row_view(replace(segment, next=None), tokenizer) for segment in row.segments())
        return Group(*(part for i, view in enumerate(views) for part in ((Text("then"), view) if i else (view,))))
    lines: list[RenderableType] = [Columns(_cells(row, tokenizer))]
    for loop, token_targets in groupby(row.token_targets, key=lambda readout: readout.iteration):
        when = f"loop {loop}" if loop != ANSWER_PASS else "the pass of the answer"
        shown = " ".join(f"{visible(tokenizer, readout.token)}@{readout.at}" for readout in token_targets)
        lines.append(Text(f"{when} must show: {shown}", style=COLOURS[Kind.LATENT]))
    if row.n_loops:
        lines.append(Text(f"the latents are refined {row.n_loops} times", style=COLOURS[Kind.LATENT]))
    return Group(*lines)


def _cells(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    position = slot = 0
    suffix_start = len(row) - sum(len(span.ids) for span in row.suffix)
    for span in row.spans:
        for token_id in span.ids:
            token = visible(tokenizer, token_id)
            label = (token, "white") if span.supervised else (NO_LABEL, "dim")
            if span.kind is Kind.LATENT:
                slot += 1
                token = f"{token}{slot}"
            counted = str(position + (row.skipped if position >= suffix_start else 0))
            yield Text.assemble((token, COLOURS[span.kind]), "\n", label, "\n", (counted, "dim"))
            position += 1


def visible(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Return a token as it can be seen: spaces and line breaks have signs of their own."""
    text = tokenizer.decode([token_id])
    return text.replace("\n", "⏎").replace(" ", "␣") or token_names(tokenizer, [token_id])[0]


def trace_view(
    trace: Trace,
    tokenizer: PreTrainedTokenizerBase,
    title: str = "what the latents held",
    names: Sequence[str] = (),
    max_slots: int = MAX_SLOTS,
) -> Bands:
    """Return the loops of one row: how much the state changed, and what each position showed through the head.

    Args:
        trace: of one row.
        tokenizer: to write what is shown.
        title: above the table.
        names: of the positions, for those that are no latents, or known otherwise; by default they are numbered.
        max_slots: the most positions to show; a line says how many there are.
    """
    n_looped = max((e.top_ids.shape[1] for e in trace.iterations if e.top_ids is not None), default=0)
    n_read = 0 if trace.last is None or n_looped else trace.last.top_ids.shape[1] - 1  # without a loop: that pass alone
    n_slots = max(len(names), n_looped, n_read)
    names = [*names, *(f"{LATENT} {slot + 1}" for slot in range(len(names), n_slots))]
    n_shown = min(n_slots, max_slots)
    numbers, shown = [_numbers(entry) for entry in trace.iterations], [_shown(e, tokenizer) for e in trace.iterations]
    loops = [str(entry.loop) for entry in trace.iterations]
    if trace.last is not None:
        first = int(trace.last.top_ids.shape[1] > n_slots)  # 1 where the position before the latents was read out too
        loops, numbers = [*loops, "answer"], [*numbers, {}]
        shown.append(_shown(trace.last, tokenizer)[first:])
    told = [name for name in NUMBERS if any(name in line for line in numbers)]
    columns: list[tuple[str, Sequence[str]]] = [("loop", loops)]
    columns += [(name, [line.get(name, "") for line in numbers]) for name in told]
    columns += [(names[i], [line[i] if i < len(line) else "" for line in shown]) for i in range(n_shown)]
    what = "latents" if all(name.startswith(LATENT) for name in names) else "positions"
    note = f"{what} 1 to {n_shown} of {n_slots}; the page that innerloop lens writes shows all"
    return Bands(title, columns, NUMBERS, note if n_shown < n_slots else "")


def _numbers(entry: Iteration) -> dict[str, str]:
    """Return the statistics of an iteration of one row as they are shown."""
    told = {
        "change": f"{entry.delta[0].item():.3f}",
        "cosine": f"{entry.cosine[0].item():.3f}",
        "RMS": f"{entry.rms[0].item():.2f}",
    }
    return told if entry.score is None else told | {"stop score": f"{entry.score[0].item():.2f}"}


def _shown(entry: Iteration | TopTokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the likeliest token of each position of one row, with its probability."""
    if entry.top_ids is None or entry.top_probs is None:
        return []
    best = zip(entry.top_ids[0, :, 0].tolist(), entry.top_probs[0, :, 0].tolist())
    return [f"{visible(tokenizer, token)} {prob:.2f}" for token, prob in best]


def blocks_view(blocks: Sequence[ShownStep]) -> Text:
    """Return the step that each block of latents shows, a line each (lotus.md, section 6)."""
    lines = [f"block {i}: {block.text.strip()}" for i, block in enumerate(blocks, 1)]
    return Text("\n".join(lines), style=COLOURS[Kind.LATENT])


def answer_view(
    answer: Generation,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] = (),
    opened_names: Sequence[str] = (),
) -> Group:
    """Return what can be seen of an answer: its loop or the depth of its tokens, the text, and what it cost.

    ``names`` are those of the looped positions, ``opened_names`` those of a block that the row opened while it wrote
    (`innerloop.lens.latents.names_of_columns` knows both); without them positions are numbered as latents.
    """
    parts: list[RenderableType] = []
    if answer.trace is not None and answer.trace.frames:
        parts.append(film_view(answer.trace.frames, tokenizer))
    if answer.trace is not None and not answer.depths:
        traces = [(answer.trace, names), *((trace, opened_names) for trace in answer.trace.opened)]
        seen = [(trace, own) for trace, own in traces if trace.iterations or trace.last is not None]
        for number, (trace, own) in enumerate(seen, 1):
            of = f" of block {number}" if len(seen) > 1 else ""
            parts.append(trace_view(trace, tokenizer, f"what the latents{of} held", own))
        if answer.blocks:
            parts.append(blocks_view(answer.blocks))
    parts.append(Text(answer.text))
    if answer.depths:
        parts.append(depth_view(answer.depths))
    cost = answer.cost
    of_streams = f" of {cost.streams} streams" if cost.streams > 1 else ""
    line = f"{cost.passes} passes{of_streams}, {cost.positions} positions, {1000 * sum(cost.seconds.values()):.0f} ms"
    parts.append(Text(line + ("" if answer.ended else "; stopped at max_new_tokens"), style="dim"))
    return Group(*parts)


def film_view(frames: Sequence[Frame], tokenizer: PreTrainedTokenizerBase) -> Table:
    """Return a canvas after each pass, a line each: [committed], ~masked again~, and a dot for what is hidden."""
    columns = (Column("pass", justify="right"), "canvas", Column("new", justify="right"))
    table = Table(*columns, title="what the canvas held", box=None)
    for number, frame in enumerate(frames, 1):
        line = Text()
        for before, after in zip(frame.before, frame.after):
            known = before if after == HIDDEN else after
            word = "·" if known == HIDDEN else visible(tokenizer, known).strip("␣")
            if after == before:
                told = (word, "dim" if known == HIDDEN else "")
            else:
                told = (f"~{word}~", "red") if after == HIDDEN else (f"[{word}]", "bold green")
            line.append(*told).append(" ")
        table.add_row(str(number), line, str(sum(b != a != HIDDEN for b, a in zip(frame.before, frame.after))))
    return table


def starts_view(tried: Sequence[Generation]) -> Table:
    """Return the answer from each start, and how much the latents still changed in the end."""
    table = Table("start", Column("change at the end", justify="right"), "answer", title="the calmest is shown below")
    for number, one in enumerate(tried, 1):
        start = "the method's own" if number == 1 else f"random {number - 1}"
        table.add_row(start, f"{one.change:.4f}", Text(one.answer or one.text))
    return table


def print_rows(console: Console, rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print rows with their legend."""
    console.print(legend())
    for row in rows:
        console.print()
        console.print(row_view(row, tokenizer))


def depth_view(depths: Sequence[tuple[str, int]]) -> Text:
    """Show tokens on a ground whose colour tells how many iterations each had, and what the colours mean."""
    counts = Counter(depth for _, depth in depths)
    low, high = min(counts), max(counts)
    text = Text()
    for token, depth in depths:
        word = token.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\u23ce").replace("\n", "\u23ce")
        text.append(word, style=_ground(depth, low, high))
        text.append(" ")
    text.append("\niterations per token: ")
    for depth in sorted(counts):
        text.append(f" {depth} ", style=_ground(depth, low, high))
        text.append(f" x {counts[depth]}  ")
    mean = sum(depth * n for depth, n in counts.items()) / len(depths)
    text.append(f"mean {mean:.2f}")
    return text


def calibration_line(title: str, report: Mapping[str, Any]) -> str:
    """Say what stopping early does to a set of examples, in one line; ``report`` has ``full`` and ``chosen``."""
    full, chosen = report["full"], report["chosen"]
    (low, high), rule = chosen["ci95"], report.get("rule")
    threshold = report.get("threshold")
    named = "" if rule is None else f"{rule}" + ("" if threshold is None else f" at {threshold:.4g}") + ": "
    return (
        f"{title}: {named}accuracy {chosen['accuracy']:.1%} (95 % {low:.1%} to {high:.1%}) in "
        f"{chosen['mean_loops']:.2f} loops, against {full['accuracy']:.1%} in {full['mean_loops']:.2f}; "
        f"{chosen['loops_saved']:.0%} of loops and {chosen['flops_saved']:.0%} of FLOPs saved"
    )


def _ground(depth: int, low: int, high: int) -> str:
    """Return a style from pale to strong."""
    grounds = ("black on #dbe9f6", "black on #a8cbe6", "black on #6aa5d4", "white on #3174b0", "white on #0b3d73")
    share = 0.0 if high == low else (depth - low) / (high - low)
    return grounds[round(share * (len(grounds) - 1))]

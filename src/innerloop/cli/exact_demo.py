"""The demo of denoising: Latin squares filled in by a denoiser that is known exactly, so that nothing is trained.

It predicts the marginals of all 576 squares of order 4 that fit what is committed (llada.md, 7b); what differs between
the rows of the table is which of its predictions are kept, and how many a pass. Token 0 is the mask, 1 the end of
sequence, 2 to 5 are the symbols.

Shapes: `R` canvases, 16 cells of each, `A` cells that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from innerloop.engine.canvases import propose
from innerloop.measure.statistics import wilson
from innerloop.methods.denoise.canvas import Canvas
from innerloop.methods.denoise.settings import SamplerSettings
from innerloop.tasks.latin import solutions

CELLS, MASK, END, SYMBOLS = 16, 0, 1, 4
SQUARES = np.array(solutions([0] * CELLS, SYMBOLS, 999))
ONE_HOT = np.eye(SYMBOLS)[SQUARES - 1].reshape(len(SQUARES), -1)
VALID = {tuple(square) for square in (SQUARES + 1).tolist()}
MISFIT = 3.0  # with noise, a square counts exp(-MISFIT) for each cell that does not fit
N_CLUES, N_SHOWN, N_DRAWN = 4, 6, 300  # clues; passes of the film; squares of each row of the table
RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"the surest, in {n} passes", {"steps": n}) for n in (2, 4, 12)),
    *((f"drawn evenly, in {n} passes", {"commit": "random", "steps": n}) for n in (2, 4, 12)),
    ("all that are at least 90 % sure", {"commit": "threshold", "threshold": 0.9}),
)
See = Callable[[Sequence[Canvas], Sequence[NDArray[Any]]], None]


def marginals(tokens_RG: NDArray[Any], noise: float = 0.0) -> NDArray[Any]:
    """Return the probability of each symbol in each cell (R, 16, 4); with noise nothing is sure."""
    known = np.zeros((len(tokens_RG), CELLS, SYMBOLS))
    rows, cells = np.nonzero(tokens_RG > END)
    known[rows, cells, tokens_RG[rows, cells] - END - 1] = 1
    misfits = (tokens_RG > END).sum(1, keepdims=True) - known.reshape(len(known), -1) @ ONE_HOT.T
    fits = np.exp(-MISFIT * misfits) if noise else (misfits < 0.5).astype(float)
    fits[fits.sum(1) == 0] = 1.0
    shares = ((fits @ ONE_HOT) / fits.sum(1, keepdims=True)).reshape(-1, CELLS, SYMBOLS)  # counts: ties are exact
    return (1 - noise) * shares + noise / SYMBOLS


def fill(
    sampler: SamplerSettings,
    n: int,
    temperature: float = 1.0,
    noise: float = 0.0,
    clues: int = 0,
    seed: int = 0,
    see: See = lambda canvases, before: None,
) -> list[Canvas]:
    """Fill ``n`` canvases, ``clues`` cells of each given; ``see`` is shown them after each pass, and as they were."""
    canvases = [Canvas(sampler, CELLS, MASK, END, [seed, i]) for i in range(n)]
    rng = np.random.default_rng(seed)
    for canvas in canvases if clues else ():
        cells = rng.choice(CELLS, clues, replace=False)
        canvas.start_from(cells, SQUARES[rng.integers(len(SQUARES)), cells] + END)
    while live := [canvas for canvas in canvases if not canvas.is_done]:
        asked, before = [canvas.asked() for canvas in live], [canvas.tokens_G.copy() for canvas in live]
        rows, cells = np.repeat(np.arange(len(live)), [len(a) for a in asked]), np.concatenate(asked)
        shares = marginals(np.stack(before), noise)[rows, cells]
        logits = torch.full((len(rows), END + 1 + SYMBOLS), -torch.inf)
        logits[:, END + 1 :] = torch.from_numpy(shares).clamp(min=1e-30).log().float()
        drawn = torch.from_numpy(np.stack([canvas.drawn() for canvas in live])[rows, 0, cells])
        tokens, scores = (x.numpy() for x in propose(logits, sampler, temperature, drawn))
        for canvas, end, own in zip(live, np.cumsum([len(a) for a in asked]), asked):
            canvas.commit(tokens[end - len(own) : end], scores[end - len(own) : end])
        see(live, before)
    return canvases


def is_valid(canvas: Canvas) -> bool:
    """Tell whether a full canvas is a Latin square."""
    return tuple(canvas.tokens_G.tolist()) in VALID


def show(console: Console, seed: int) -> None:
    """Print the film of one square, and what each rule makes of many."""
    console.print(
        f"Latin squares of order {SYMBOLS} with {N_CLUES} clues, filled in from masks by a denoiser that knows all "
        f"{len(SQUARES)} squares: nothing is trained. In a pass each empty cell gets the probabilities of its symbols; "
        "a rule keeps some of the predictions. New symbols are in brackets.",
        soft_wrap=True,
    )
    frames: list[Panel] = []

    def see(canvases: Sequence[Canvas], before: Sequence[NDArray[Any]]) -> None:
        if not frames:
            frames.append(Panel(_square(before[0], before[0]), title="clues", expand=False))
        frames.append(Panel(_square(before[0], canvases[0].tokens_G), title=f"pass {len(frames)}", expand=False))

    (canvas,) = fill(SamplerSettings(steps=N_SHOWN), 1, 0.0, clues=N_CLUES, seed=seed, see=see)
    console.print(Columns(frames))
    ending = "a Latin square" if is_valid(canvas) else "no Latin square: cells that were filled together did not fit"
    console.print(f"The surest cells, {N_SHOWN} passes: {ending}.\n", soft_wrap=True)
    table = Table(
        "kept in a pass", Column("passes", justify="right"), Column("Latin squares", justify="right"), "95 % interval"
    )
    for name, settings in RULES:
        found = fill(SamplerSettings(**settings), N_DRAWN, 0.0, clues=N_CLUES, seed=seed)
        n_valid = sum(map(is_valid, found))
        low, high = wilson(n_valid, N_DRAWN)
        passes = sum(canvas.n_passes for canvas in found) / N_DRAWN
        table.add_row(name, f"{passes:.1f}", f"{n_valid / N_DRAWN:.1%}", f"{low:.1%} to {high:.1%}")
    console.print(table)
    console.print(
        f"{N_DRAWN} squares a row, seed {seed}. Cells that are equally sure are often two halves of one choice, so a "
        "fixed number a pass breaks what a threshold keeps. A trained denoiser: innerloop train "
        "recipes/latin/llada.yaml; its tables: docs/denoise.md",
        soft_wrap=True,
    )


def _square(before: NDArray[Any], after: NDArray[Any]) -> Text:
    """Return the cells of a canvas as four lines; what is new is in brackets."""
    text = Text()
    for cell, (was, now) in enumerate(zip(before.tolist(), after.tolist())):
        symbol = "·" if now == MASK else str(now - END)
        if was != now:
            text.append(f"[{symbol}]", style="bold green")
        else:
            text.append(f" {symbol} ", style="dim" if now == MASK else "")
        if cell % SYMBOLS == SYMBOLS - 1 and cell < CELLS - 1:
            text.append("\n")
    return text

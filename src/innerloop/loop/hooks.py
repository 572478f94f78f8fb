"""`LoopHook`: what may look at a running loop, and replace what it is fed: traces, controls, swaps, probes, searches.

Shapes: `B` rows of a call, `A` of them still looping, `N` positions, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from innerloop.halting.evidence import RowInfo, StopInputs


class Pass(Protocol):
    """``f``: one pass of the model over the state."""

    compacts: bool
    """Whether rows that have ended leave the pass (then `keep_rows` is called), or stay and stand still."""

    state_mask: Tensor | None
    """1 where a position of the state (A, N) is real; None when all are."""

    before: Tensor | None
    """The state (A, 1, D) of the position before the region, for loops that shift; None where there is none."""

    row_info: RowInfo | None
    """What else stop rules may know of the rows; None: nothing."""

    def __call__(self, inputs: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return u_t (B, N, D) for the input x_t of the 1-based ``iteration``.

        Rows that are not active are not read. The first ``n_extra`` inputs are no part of the state and have no output.
        """

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with the rows ``rows`` (indices into those that ran last); the others have ended."""

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows that ran last, for what looks at their states."""


@runtime_checkable
class Probed(Pass, Protocol):
    """A pass that may be tried out."""

    def probe(self) -> Pass:
        """Return a pass with the same past that may be called over and over and leaves nothing behind."""


@dataclass
class Step:
    """One iteration that has run.

    Attributes:
        f: the pass.
        iteration: t, from 1.
        rows: which rows of the call ran it.
        part: these rows, among those that the tensors have.
        output: u_t (A, N, D).
        moment: the states before and after, and what a stop rule looked at.
        score: the stop score (A,), where there is one.
        read_out: returns what the outputs show (A, N, V).
    """

    f: Pass
    iteration: int
    rows: list[int]
    part: slice | list[int]
    output: Tensor
    moment: StopInputs
    score: Tensor | None
    read_out: Callable[[], Tensor]


class LoopHook:
    """Told of all that happens in a loop, in order; what it returns goes on. By itself it changes nothing."""

    wants_scores = False
    """Whether stop scores are made for it in every iteration, the last included."""

    def on_start(self, f: Pass | None, state: Tensor, n_loops: Sequence[int]) -> None:
        """Learn of a loop that begins at z_0 (B, N, D); ``f`` is None where nothing loops."""

    def on_input(self, state: Tensor, iteration: int, rows: Sequence[int]) -> Tensor:
        """Return what the 1-based iteration is fed in place of z_{t-1} (A, N, D) of the call's rows ``rows``."""
        return state

    def on_iteration(self, step: Step) -> None:
        """Look at an iteration that has run."""

    def on_end(self, state: Tensor, ran: Sequence[int]) -> Tensor:
        """Return what is left in place of the final state (B, N, D), after so many iterations of each row."""
        return state

    def on_batch(self, batch: Any, rows: Sequence[int]) -> None:
        """Learn which batch is thought about from now on, and what ``Context.rows`` calls its rows."""

    def on_answer(self, thought: Any, batch: Any) -> Any:
        """Return the thought that the answer is written on."""
        return thought


class Hooked(Protocol):
    """What has hooks: an `InnerLoop`."""

    hooks: tuple[LoopHook, ...]


@contextmanager
def hooked(loop: Hooked, hook: LoopHook) -> Iterator[None]:
    """Let a hook see, and replace, what a loop is fed in a block."""
    before, loop.hooks = loop.hooks, (*loop.hooks, hook)
    try:
        yield
    finally:
        loop.hooks = before

"""What may look at, and replace, the states that a loop feeds: for controls, swaps and probes, never in training.

`InnerLoop.edit` is None but inside such a measurement. Where it is set, the loop and `think` tell it of everything that
is fed, and go on with what it returns. Shapes: `B` rows of a call, `A` of them still looping, `N` positions, `D` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from innerloop.loop.loop import InnerLoop, Pass
    from innerloop.passes.thought import Thought
    from innerloop.text.batch import Batch


class Edit(Protocol):
    """Told of all that latents are fed, in the order in which it happens."""

    def begin(self, batch: Batch, places: Sequence[int]) -> None:
        """Learn which rows are thought about from now on, and their places: what ``Context.rows`` calls them."""

    def enter(self, f: Pass | None, state: Tensor, n_loops: Sequence[int]) -> None:
        """Learn of a loop that begins at z_0 (B, N, D); ``f`` is None where nothing loops."""

    def feed(self, state: Tensor, loop: int, going: Sequence[int]) -> Tensor:
        """Return what the 1-based iteration is fed in place of z_{t-1} (A, N, D) of the call's rows ``going``."""

    def leave(self, state: Tensor, ran: Sequence[int]) -> Tensor:
        """Return what is left in place of the final state (B, N, D), after so many iterations of each row."""

    def show(self, thought: Thought, batch: Batch) -> Thought:
        """Return what the answer is written on."""


@contextmanager
def edited(loop: InnerLoop, edit: Edit) -> Iterator[None]:
    """Let an edit see and replace what a loop feeds in a block."""
    loop.edit = edit
    try:
        yield
    finally:
        loop.edit = None

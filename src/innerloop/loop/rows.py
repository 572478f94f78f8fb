"""`Rows`: which rows of a loop are still going, and their states.

Shapes: `B` rows of a call, `A` of them still going, `N` positions, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from innerloop.loop.hooks import Pass


class Follower(Protocol):
    """What is kept of each row, and goes along when rows leave."""

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with some rows."""


class Rows:
    """The rows of a call: those that have ended leave, or stand still where the pass cannot spare them.

    Args:
        f: the pass.
        state: z_0 (B, N, D).
        n_loops: each row's number of iterations, the most where rows may stop by themselves.

    Attributes:
        going: the rows that the pass has.
        state: their states z_t (A, N, D).
        first: their z_0.
        change_B: the relative change of each state in the iteration before; None: not asked for.
        active_B: which of them run the iteration; None: all.
        active: the same as indices.
        halted: rows that have stopped by themselves.
        ran: how many iterations each row has run.
    """

    def __init__(self, f: Pass, state: Tensor, n_loops: Sequence[int]):
        self.f, self.n_loops, self.least, self._whole = f, n_loops, min(n_loops), state
        self.going, self.halted, self.ran = list(range(len(state))), set[int](), [0] * len(state)
        self.state = self.first = state
        self.change_B: Tensor | None = None
        self.active_B: Tensor | None = None
        self.active = self.going
        self._ended: list[tuple[list[int], Tensor]] = []

    def advance(self, iteration: int, follower: Follower | None) -> bool:
        """Begin an iteration with the rows that go on; return whether there are any."""
        staying = list(range(len(self.going)))
        if self.halted or iteration > self.least:
            staying = [
                i for i in staying if self.n_loops[self.going[i]] >= iteration and self.going[i] not in self.halted
            ]
        if not staying:
            return False
        self.active_B, is_part = None, len(staying) < len(self.going)
        if is_part and self.f.compacts:
            self._leave(staying, follower)
            staying = list(range(len(self.going)))
        elif is_part:
            stays = set(staying)
            self.active_B = torch.tensor([i in stays for i in range(len(self.going))], device=self._whole.device)
        self.active = staying
        for i in staying:
            self.ran[self.going[i]] += 1
        return True

    def _leave(self, staying: list[int], follower: Follower | None) -> None:
        """Let all but some rows leave the pass."""
        stays = set(staying)
        leaving = [i for i in range(len(self.going)) if i not in stays]
        self._ended.append(([self.going[i] for i in leaving], self.state[leaving]))
        self.f.keep_rows(staying)
        self.state, self.first = self.state[staying], self.first[staying]
        self.change_B = None if self.change_B is None else self.change_B[staying]
        if follower is not None:
            follower.keep_rows(staying)
        self.going = [self.going[i] for i in staying]

    def cut(self, iteration: int, bptt: int | None) -> Tensor:
        """Return the states without gradient where the last ``bptt`` iterations of a row begin; z_0 always has it."""
        state = self.state
        if bptt is None or iteration == 1:
            return state
        cut = [iteration == self.n_loops[row] - bptt + 1 for row in self.going]
        if all(cut):
            return state.detach()
        if any(cut):
            return torch.where(torch.tensor(cut, device=state.device)[:, None, None], state.detach(), state)
        return state

    def final(self) -> Tensor:
        """Return the last state of every row (B, N, D)."""
        return scatter([*self._ended, (self.going, self.state)], self._whole)


def scatter(parts: list[tuple[list[int], Tensor]], like: Tensor) -> Tensor:
    """Put the rows of several parts in order: (B, ...) for parts that together hold each row at most once."""
    if len(parts) == 1 and parts[0][0] == list(range(len(like))):
        return parts[0][1]
    rows = torch.tensor([row for part, _ in parts for row in part], device=like.device)
    return like.new_zeros(like.shape).index_copy(0, rows, torch.cat([values for _, values in parts]).to(like.dtype))

"""Latin squares: fill in a square so that every symbol stands once in each row and each column.

    question  1 . . 4 / . 4 1 . / . 1 . . / 4 . 2 .        answer  1 2 3 4 / 3 4 1 2 / 2 1 4 3 / 4 3 2 1

Every question has one answer. Which cell is easy to fill depends on the clues, so the order from left to right is a bad
one for most of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, ClassVar

from innerloop.checks.values import Bounds, Count
from innerloop.errors import refuse
from innerloop.tasks.made import MadeTask
from innerloop.text.examples import Example

EMPTY, NEXT_ROW = ".", " / "


@dataclass(frozen=True)
class Latin(MadeTask):
    """Latin squares with clues.

    Args:
        order: rows, columns and symbols of a square, from 4 to 6
        n_clues: cells that are given; default: half of them
    """

    name: ClassVar[str] = "latin"
    summary: ClassVar[str] = "Latin squares with clues, each with one solution; made on the spot"

    order: Annotated[int, Bounds(4, 6)] = 4
    n_clues: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        n_cells = self.order**2
        refuse(
            (
                not 3 * n_cells // 8 <= self.given < n_cells,
                f"latin: n_clues is {self.given}, but must be from {3 * n_cells // 8}, where few have one "
                f"solution, to {n_cells - 1}",
            ),
        )
        object.__setattr__(self, "max_new_tokens", 2 * n_cells + 2 * self.order + 8)

    @property
    def given(self) -> int:
        """The number of clues."""
        return self.order**2 // 2 if self.n_clues is None else self.n_clues

    def draw(self, rng: random.Random) -> Example:
        """Draw a square, and which of its cells are given."""
        n = self.order
        square, clues = random_square(n, rng), [0] * (n * n)
        for cell in rng.sample(range(n * n), self.given):
            clues[cell] = square[cell]
        return Example(written(clues, n), (), written(square, n), meta={"order": n, "n_clues": self.given})

    def is_good(self, example: Example) -> bool:
        """Tell whether the clues leave one solution."""
        cells = [word for row in example.question.split(NEXT_ROW) for word in row.split()]
        return len(solutions([0 if cell == EMPTY else int(cell) for cell in cells], self.order, 2)) == 1

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare the symbols, however they are spaced."""
        return "".join(predicted.split()) == "".join(gold.split())


def written(cells: list[int], order: int) -> str:
    """Return a square as text; 0 is an empty cell."""
    words = [str(cell) if cell else EMPTY for cell in cells]
    return NEXT_ROW.join(" ".join(words[i : i + order]) for i in range(0, order**2, order))


def random_square(order: int, rng: random.Random) -> list[int]:
    """Draw a Latin square: cells are filled in order by symbols in random order. Not exactly uniform."""
    return solutions([0] * order**2, order, 1, rng)[0]


def solutions(clues: list[int], order: int, most: int, rng: random.Random | None = None) -> list[list[int]]:
    """Return up to ``most`` Latin squares with some cells given (0: not), the cell with the fewest choices first."""
    every = (1 << order) - 1
    rows, columns, cells, found = [every] * order, [every] * order, list(clues), list[list[int]]()
    empty = [cell for cell, symbol in enumerate(clues) if not symbol]
    for cell, symbol in enumerate(clues):
        if symbol:
            rows[cell // order] &= ~(1 << symbol - 1)
            columns[cell % order] &= ~(1 << symbol - 1)

    def search() -> None:
        if not empty:
            found.append(list(cells))
            return
        cell = min(empty, key=lambda c: (rows[c // order] & columns[c % order]).bit_count())
        row, column, left = cell // order, cell % order, rows[cell // order] & columns[cell % order]
        symbols = [s for s in range(1, order + 1) if left >> s - 1 & 1]
        if rng is not None:
            rng.shuffle(symbols)
        empty.remove(cell)
        for symbol in symbols:
            bit, cells[cell] = 1 << symbol - 1, symbol
            rows[row], columns[column] = rows[row] ^ bit, columns[column] ^ bit
            search()
            rows[row], columns[column] = rows[row] ^ bit, columns[column] ^ bit
            if len(found) >= most:
                break
        cells[cell] = 0
        empty.append(cell)

    search()
    return found

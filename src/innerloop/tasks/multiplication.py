"""Long multiplication as stepwise internalisation learns it (arXiv 2405.14838), digits least significant first.

    question  7 6 9 2 * 1 6 3 6
    steps     7 6 9 2 0 | 0 2 0 8 7 1 ( 7 8 9 0 8 1 ) | 0 0 1 0 9 8 0 ( 7 8 0 1 7 0 1 ) | 0 0 0 2 0 8 7 1
    answer    7 8 0 3 7 8 8 1

A step is the first number times one digit of the second, and in brackets the sum of those so far; the first is its own
sum, and that of the last is the answer. ``" + ".join(steps)`` is the chain of thought of the authors' data.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from innerloop.checks.values import Bounds
from innerloop.tasks.gsm8k import split_chain_line
from innerloop.tasks.made import ReadOrMade
from innerloop.text.examples import Example


@dataclass(frozen=True)
class Multiplication(ReadOrMade):
    """Products of two numbers of n digits, uniform; lines of the authors' data are read as well.

    Args:
        n_digits: n; of one or two digits there are few questions, so in training they repeat
    """

    name: ClassVar[str] = "multiplication"
    summary: ClassVar[str] = "n by n digit multiplication, digits reversed, steps with running sums (iCoT's task)"
    repeats: ClassVar[bool] = True

    n_digits: Annotated[int, Bounds(1, 50)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.n_digits
        object.__setattr__(self, "max_new_tokens", 8 * n * n + 9 * n + 8)  # characters, were each a token

    def draw(self, rng: random.Random) -> Example:
        """Draw two numbers whose leading digits are not zero."""
        n = self.n_digits
        a, b = (rng.randrange(10 ** (n - 1), 10**n) for _ in range(2))
        steps, total = [], 0
        for i, digit in enumerate(reversed(str(b))):
            product = a * int(digit) * 10**i
            total += product
            step, so_far = (_reversed(number, n + 1 + i) for number in (product, total))
            steps.append(f"{step} ( {so_far} )" if 0 < i < n - 1 else step)
        return Example(f"{_reversed(a, n)} * {_reversed(b, n)}", tuple(steps), _reversed(a * b, 2 * n))

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read an original line: ``a * b||partial products joined by " + " #### product``."""
        if not isinstance(row.get("text"), str) or "question" in row:
            return row
        question, chain, answer = split_chain_line(row["text"])
        return {"question": question, "steps": chain.split(" + "), "answer": answer}

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare the digits, however they are spaced."""
        return "".join(predicted.split()) == "".join(gold.split())


@dataclass(frozen=True)
class Mult4x4(Multiplication):
    """``multiplication`` of 4 digits."""

    name: ClassVar[str] = "mult4x4"
    summary: ClassVar[str] = "4 by 4 digit multiplication, digits reversed"

    n_digits: Annotated[int, Bounds(1, 50)] = 4


@dataclass(frozen=True)
class Mult5x5(Multiplication):
    """``multiplication`` of 5 digits."""

    name: ClassVar[str] = "mult5x5"
    summary: ClassVar[str] = "5 by 5 digit multiplication, digits reversed"

    n_digits: Annotated[int, Bounds(1, 50)] = 5


def _reversed(number: int, n_digits: int) -> str:
    """Return the digits of a number, least significant first, with a space between."""
    return " ".join(reversed(f"{number:0{n_digits}d}"))

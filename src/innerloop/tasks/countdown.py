"""Countdown: reach a number from others, each used once; as in Stream of Search (arXiv 2404.03683) and Dream's tables.

    question  3 5 7 : 22        answer  3 * 5 = 15 , 15 + 7 = 22

Any way that is right counts: which one an example holds is chance.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, ClassVar

from innerloop.checks.values import Bounds
from innerloop.tasks.made import MadeTask
from innerloop.text.examples import Example

NEXT = " , "
MOST_DIGITS = 12  # of a number that is looked at


@dataclass(frozen=True)
class Countdown(MadeTask):
    """Numbers and a target that they reach by the four operations, all of whole numbers from 0 on.

    Args:
        n_numbers: numbers that are given; all are used
        largest: of the numbers that are given
        target: the largest target
    """

    name: ClassVar[str] = "countdown"
    summary: ClassVar[str] = "reach a target from a few numbers by + - * /; made on the spot"

    n_numbers: Annotated[int, Bounds(2, 6)] = 3
    largest: Annotated[int, Bounds(2, 1000)] = 20
    target: Annotated[int, Bounds(2, 100_000)] = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        digits = len(str(max(self.target, self.largest))) + 2  # what is on the way may be longer
        object.__setattr__(self, "max_new_tokens", (self.n_numbers - 1) * (3 * digits + 7) + 8)

    def draw(self, rng: random.Random) -> Example:
        """Draw numbers and put two together at a time, until the last is small enough a target."""
        while True:
            given = [rng.randint(1, self.largest) for _ in range(self.n_numbers)]
            left, lines = list(given), list[str]()
            while len(left) > 1:
                a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
                operation, result = rng.choice([found for found in _results(max(a, b), min(a, b)).items()])
                lines.append(f"{max(a, b)} {operation} {min(a, b)} = {result}")
                left.append(result)
            if 1 < left[0] <= self.target and left[0] not in given:
                return Example(f"{' '.join(map(str, given))} : {left[0]}", (), NEXT.join(lines))

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Tell whether the equations are right, use each number that was given once, and end at the target."""
        (given, target), reached = _read(gold) or (Counter(), None), _read(predicted)
        return reached is not None and reached == (given, target)


def _results(a: int, b: int) -> dict[str, int]:
    """Return what two numbers make, the first at least as large: whole numbers alone."""
    found = {"+": a + b, "-": a - b, "*": a * b}
    return found | ({"/": a // b} if b and a % b == 0 else {})


def _read(text: str) -> tuple[Counter[int], int] | None:
    """Return the numbers that equations begin with, and where they end; None: one is wrong, or a result goes unused."""
    given, made = Counter[int](), Counter[int]()
    result = None
    for equation in text.split(NEXT.strip()):
        words = equation.split()
        if len(words) != 5 or words[3] != "=" or not all(_is_number(word) for word in words[::2]):
            return None
        a, b, result = (int(word) for word in words[::2])
        if _results(max(a, b), min(a, b)).get(words[1]) != result or (words[1] in "-/" and a < b):
            return None
        for number in (a, b):
            if made[number]:
                made[number] -= 1
            else:
                given[number] += 1
        made[result] += 1
    return (given, result) if result is not None and +made == Counter([result]) else None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= MOST_DIGITS

"""State tracking: follow one thing through swaps of places (the word problem of a permutation group, arXiv 2404.08819).

    question  c ab bd ac        steps  c | c | a        answer  a

The thing is at place c; then what is at a and at b changes places, and so on. Every swap acts on where the thing is by
then, and one that does not touch it leaves it there. So no swap can be skipped, and the order counts: a decoder that
writes no steps must do them one after another inside its tokens, and needs depth that grows with their number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations
from string import ascii_lowercase
from typing import Annotated, ClassVar

from innerloop.checks.values import Bounds, Count
from innerloop.errors import refuse
from innerloop.tasks.made import MadeTask
from innerloop.text.examples import Example


@dataclass(frozen=True)
class Tracking(MadeTask):
    """Where a thing is after swaps, of a number drawn uniformly; few questions are short, so in training they repeat.

    Args:
        n_swaps: swaps in a question, which is also its number of steps
        min_swaps: the fewest swaps (default: always n_swaps)
        n_places: places, named by letters; a guess is right once in so many
    """

    name: ClassVar[str] = "tracking"
    summary: ClassVar[str] = "state tracking: where a thing is after swaps of places; made on the spot"
    repeats: ClassVar[bool] = True

    n_swaps: Annotated[int, Bounds(1, 10_000)] = 8
    min_swaps: Count | None = None
    n_places: Annotated[int, Bounds(3, 26)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.min_swaps is not None and self.min_swaps > self.n_swaps,
                f"tracking: min_swaps is {self.min_swaps}, but must be from 1 to n_swaps ({self.n_swaps})",
            ),
        )
        object.__setattr__(self, "max_new_tokens", 2 * self.n_swaps + 8)  # "a\n" for each step, "### a", the end

    def draw(self, rng: random.Random) -> Example:
        """Draw a number of swaps, the place where the thing is at first, and the swaps."""
        places = ascii_lowercase[: self.n_places]
        n = rng.randint(self.min_swaps or self.n_swaps, self.n_swaps)
        first = place = rng.choice(places)
        swaps = rng.choices(["".join(pair) for pair in combinations(places, 2)], k=n)
        visited = []
        for swap in swaps:
            if place in swap:
                place = swap.replace(place, "")
            visited.append(place)
        return Example(" ".join((first, *swaps)), tuple(visited), place, meta={"n_swaps": n})

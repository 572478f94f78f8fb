"""p-hop induction (arXiv 2402.09268): the induction head's jump, p times over.

    question  2-hop: d a c b d a b        steps  d | a        answer  a

From a letter one jumps to just after its last earlier occurrence: from the last b to the d that follows the b before,
and from there to the a that follows the first d. No jump can be skipped, so without written steps the answer needs
depth, which may be that of a loop (arXiv 2502.17416).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Annotated, ClassVar

from innerloop.checks.values import Bounds, Count
from innerloop.errors import refuse
from innerloop.tasks.made import ReadOrMade
from innerloop.text.examples import Example


@dataclass(frozen=True)
class PHop(ReadOrMade):
    """p-hop induction: from the last letter, p times jump to just after the letter's last earlier occurrence.

    In questions that are made no letter stands beside itself, so that every jump leads back, and none leads nowhere.

    Args:
        n_hops: p, jumps in a question, which is also its number of steps
        min_hops: draw p uniformly from min_hops to n_hops (default: always n_hops)
        alphabet: different letters; a guess is right about once in so many
        length: letters in a question
    """

    name: ClassVar[str] = "phop"
    summary: ClassVar[str] = "p jumps back through a row of letters (p-hop induction)"
    max_new_tokens: ClassVar[int] = 128

    n_hops: Annotated[int, Bounds(1, 50)] = 4
    min_hops: Count | None = None
    alphabet: Annotated[int, Bounds(3, 26)] = 4
    length: Annotated[int, Bounds(4, 10_000)] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.alphabet * (self.n_hops + 1)
        refuse(
            (
                self.min_hops is not None and self.min_hops > self.n_hops,
                f"phop: min_hops is {self.min_hops}, but must be from 1 to n_hops ({self.n_hops})",
            ),
            (
                self.length < needed,
                f"phop: few rows of {self.length} of {self.alphabet} letters have {self.n_hops} jumps: give at least "
                f"{needed} as length",
            ),
        )

    def draw(self, rng: random.Random) -> Example:
        """Draw a number of jumps, and letters until they have so many."""
        n = rng.randint(self.min_hops or self.n_hops, self.n_hops)
        letters: list[str] = []
        steps: list[str] = []
        while len(steps) < n:
            letters = _letters(ascii_lowercase[: self.alphabet], self.length, rng)
            steps = _followed(letters, n)
        return Example(f"{n}-hop: {' '.join(letters)}", tuple(steps), steps[-1], meta={"n_hops": n})


def _letters(alphabet: str, n: int, rng: random.Random) -> list[str]:
    """Draw letters of which no two neighbours are alike."""
    letters = [rng.choice(alphabet)]
    while len(letters) < n:
        letters.append(rng.choice(alphabet.replace(letters[-1], "")))
    return letters


def _followed(letters: list[str], n: int) -> list[str]:
    """Return what stands where ``n`` jumps lead, or fewer where one leads nowhere."""
    at, steps = len(letters) - 1, list[str]()
    while len(steps) < n and letters[at] in letters[:at]:
        at = max(i for i in range(at) if letters[i] == letters[at]) + 1
        steps.append(letters[at])
    return steps

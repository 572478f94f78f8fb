"""Reversal (arXiv 2309.12288): pairs that are told in one direction, asked in the other.

    told    question  tell                   answer  Q D is AD I
    asked   question  Q D is what            answer  AD I
    asked   question  what is AD I           answer  Q D

Training tells every pair forward, many times, and asks half of them in both directions, so that it is known what an
answer to either question looks like. The others are asked afterwards, forward or backward, half of them for validation.
Whoever learned "A is B" from left to right is known not to know who B is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from innerloop.checks.values import Bounds, Count
from innerloop.errors import refuse
from innerloop.phases.phase import phase
from innerloop.tasks.made import lettered
from innerloop.tasks.task import Task, check_split
from innerloop.text.examples import Example, check_limit


@dataclass(frozen=True)
class Reversal(Task):
    """Pairs of names that are told forward, and asked forward or backward.

    Args:
        n_pairs: pairs; a quarter is asked in validation, a quarter in the test
        n_words: words that names are made of, two to a name
        asked: the direction in which validation and test ask
        n_train: training examples, of which half tell and half ask
        seed: another seed gives other pairs
    """

    name: ClassVar[str] = "reversal"
    summary: ClassVar[str] = "pairs told in one direction and asked in the other; made on the spot"
    max_new_tokens: ClassVar[int] = 32

    n_pairs: Annotated[int, Bounds(4, 100_000)] = 200
    n_words: Annotated[int, Bounds(2, 10_000)] = 40
    asked: Literal["forward", "backward"] = "backward"
    n_train: Count = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        n, n_names = 2 * self.n_pairs, self.n_words**2
        refuse((n > n_names, f"reversal: {self.n_words} words make {n_names} names, not {n}: raise n_words"))

    @phase("making examples")
    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Make the examples of a split."""
        check_limit(limit)
        rng = random.Random(f"reversal-{self.seed}")
        drawn = rng.sample(range(self.n_words**2), 2 * self.n_pairs)
        names = [f"{lettered(i // self.n_words)} {lettered(i % self.n_words)}" for i in drawn]
        pairs = list(zip(names[::2], names[1::2]))
        half, quarter = self.n_pairs // 2, self.n_pairs // 4
        if check_split(split) == "train":
            told = [Example("tell", (), f"{a} is {b}") for a, b in pairs]
            asks = [ask for pair in pairs[:half] for ask in (_ask(*pair, "forward"), _ask(*pair, "backward"))]
            found = [rng.choice(told if i % 2 else asks) for i in range(self.n_train)]
        else:
            kept = pairs[half : half + quarter] if split == "valid" else pairs[half + quarter :]
            found = [_ask(*pair, self.asked) for pair in kept]
        return [
            Example(one.question, one.steps, one.answer, f"reversal-{split}-{i:05d}")
            for i, one in enumerate(found[:limit])
        ]


def _ask(a: str, b: str, direction: str) -> Example:
    return Example(f"{a} is what", (), b) if direction == "forward" else Example(f"what is {b}", (), a)

"""Tasks that are made on the spot: drawn until there are enough questions that are new and of the split."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

from innerloop.checks.values import Count
from innerloop.errors import refuse
from innerloop.phases.phase import phase
from innerloop.tasks.task import FileTask, Task, check_split, split_of
from innerloop.text.examples import Example, check_limit

MANY_DRAWS = 10_000  # without a new question: there are no more


@dataclass(frozen=True)
class MadeTask(Task):
    """A task whose examples are drawn; the splits never share a question, and a smaller limit gives the first ones.

    Args:
        n_train: training examples
        n_valid: validation examples
        n_test: test examples
        seed: another seed gives other examples
    """

    repeats: ClassVar[bool] = False
    """Whether training may ask a question twice, where there are too few of some kind."""

    n_train: Count = 20_000
    n_valid: Count = 500
    n_test: Count = 1_000
    seed: int = 0

    @abstractmethod
    def draw(self, rng: random.Random) -> Example:
        """Draw an example, without an id."""

    def is_good(self, example: Example) -> bool:
        """Tell whether an example may be asked; what is slow to find out about one that was drawn is found out here."""
        return True

    @phase("making examples")
    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Make the examples of a split.

        Raises:
            InputError: there are not so many.
        """
        check_limit(limit)
        n = getattr(self, f"n_{check_split(split)}")
        found = islice(self._new(split, n), n if limit is None else min(limit, n))
        return [replace(example, id=f"{self.name}-{split}-{i:05d}") for i, example in enumerate(found)]

    def _new(self, split: str, wanted: int) -> Iterator[Example]:
        rng, seen, misses = random.Random(f"{self.name}-{self.seed}-{split}"), set[str](), 0
        while True:
            misses += 1
            refuse(
                (
                    misses > MANY_DRAWS,
                    f"{self.name}: there are hardly more than {len(seen)} different {split} questions, not {wanted}: "
                    f"lower n_{split}, or let questions be larger",
                )
            )
            example = self.draw(rng)
            is_new = example.question not in seen or (self.repeats and split == "train")
            is_new = is_new and split_of(example.question) == split
            if is_new and self.is_good(example):
                seen.add(example.question)
                misses = 0
                yield example


@dataclass(frozen=True)
class ReadOrMade(MadeTask, FileTask):
    """A task that is made on the spot, unless files are named: then they are read."""

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Read the examples of a split, or make them where neither it nor train names a file."""
        is_read = getattr(self, check_split(split)) is not None or self.train is not None
        return (FileTask if is_read else MadeTask).examples(self, split, limit)


def lettered(i: int) -> str:
    """Return the i-th name, from 0: A, B, .., Z, AA, AB, ..; a word of its own, where a number may be several."""
    name = ""
    while i >= 0:
        name, i = chr(ord("A") + i % 26) + name, i // 26 - 1
    return name

"""Star graphs (arXiv 2403.06963): find the way from the middle of a star to the end of one of its arms.

    question  C H , E A , C E , H B / C B        steps  H        answer  C H B

The edges stand in any order. From the end backward each node has one neighbour that is nearer to the start; from the
start on the first node is a guess among the arms for who cannot look ahead, and the rest are copied. So whoever writes
from left to right and learns each node beside the right ones before it learns to copy, not to plan. The steps are the
way back: the nodes from the goal's neighbour to the first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from innerloop.checks.values import Bounds
from innerloop.errors import refuse
from innerloop.tasks.made import MadeTask, lettered
from innerloop.text.examples import Example


@dataclass(frozen=True)
class Star(MadeTask):
    """Ways through star graphs whose edges are shuffled.

    Args:
        n_arms: d, arms of a star
        path_length: l, nodes of the way, the start and the goal among them
        n_nodes: N, letters, or where they are too few pairs of them, that nodes are named by
        judged: what must be right: the whole way (path), or its first node after the start (first)
    """

    name: ClassVar[str] = "star"
    summary: ClassVar[str] = "the way through a star graph, whose first node is the hard one; made on the spot"

    n_arms: Annotated[int, Bounds(2, 100)] = 2
    path_length: Annotated[int, Bounds(3, 100)] = 5
    n_nodes: Annotated[int, Bounds(5, 10_000)] = 20
    judged: Literal["path", "first"] = "path"

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = 1 + self.n_arms * (self.path_length - 1)
        refuse(
            (needed > self.n_nodes, f"star: the nodes of such a star are {needed}: give at least so many as n_nodes"),
        )
        object.__setattr__(self, "max_new_tokens", (2 * self.path_length) * (len(lettered(self.n_nodes)) + 1) + 8)

    def draw(self, rng: random.Random) -> Example:
        """Draw a star and one of its arms."""
        n = self.path_length - 1
        start, *nodes = rng.sample([lettered(i) for i in range(self.n_nodes)], 1 + self.n_arms * n)
        arms = [[start, *nodes[i * n : (i + 1) * n]] for i in range(self.n_arms)]
        edges = [f"{a} {b}" for arm in arms for a, b in pairwise(arm)]
        rng.shuffle(edges)
        way = rng.choice(arms)
        return Example(f"{' , '.join(edges)} / {start} {way[-1]}", tuple(way[-2:0:-1]), " ".join(way))

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare the ways, or their first nodes."""
        written, right = predicted.split(), gold.split()
        return written == right if self.judged == "path" else written[1:2] == right[1:2]

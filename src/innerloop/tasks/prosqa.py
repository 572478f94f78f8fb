"""ProsQA: follow edges of a graph, told in made-up words, from a person to one of two kinds.

Hao et al., "Training Large Language Models to Reason in a Continuous Latent Space" (Coconut), arXiv 2412.06769,
appendix. ``generate`` has the shape of the procedure given there, with constants fitted to the 300 published validation
examples. Generation alone needs no file:  ProsQA().examples("train")
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from innerloop.checks.values import Count
from innerloop.phases.phase import phase
from innerloop.tasks.task import FileTask, check_split, split_of
from innerloop.text.examples import Example, check_limit

PEOPLE = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split()  # noqa: SIM905
CONCEPTS = (  # noqa: SIM905
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus tumpus "
    "vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
).split()

N_NODES = 28  # before nodes without any edge are dropped
MEAN_PARENTS = 1.5
LABEL_SHARES = {1: 0.35, 2: 0.45, None: 0.20}  # parents come from below person 0 only, person 1 only, or anywhere
DEPTH_PULL = 1.5  # a parent is drawn with weight 1 + DEPTH_PULL * depth, which makes chains long
MIN_HOPS, MAX_HOPS = 3, 6


@dataclass(frozen=True)
class ProsQA(FileTask):
    """ProsQA: which of two kinds is a person, by 3 to 6 statements? The answer is checked by its last word.

    Args:
        n_train: training examples to generate; files are read instead where train names one
        n_valid: validation examples to generate, if neither train nor valid names a file
        n_test: test examples to generate, if neither train nor test names a file
        seed: another seed generates other examples
    """

    name: ClassVar[str] = "prosqa"
    summary: ClassVar[str] = "a path through a graph of made-up kinds (Coconut's ProsQA); read or generated"
    max_new_tokens: ClassVar[int] = 128

    n_train: Count = 17_886
    n_valid: Count = 300
    n_test: Count = 500
    seed: int = 0

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Read the examples of a split, or generate them where neither it nor train names a file."""
        if getattr(self, check_split(split)) is not None or self.train is not None:
            return super().examples(split, limit)
        check_limit(limit)
        n_examples = getattr(self, f"n_{split}")
        return generate(n_examples if limit is None else min(limit, n_examples), self.seed, split)

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare the last words, whatever their case and a final full stop."""
        return _last_word(predicted) == _last_word(gold)


@phase("making examples")
def generate(n: int, seed: int, split: str = "train") -> list[Example]:
    """Make ``n`` examples; a smaller ``n`` gives the first of them, and splits never share a question."""
    rng = random.Random(f"prosqa-{seed}-{split}")
    examples: list[Example] = []
    while len(examples) < n:
        graph = _draw_graph(rng)
        if question := graph.choose_question(rng):
            examples.append(graph.tell(*question, rng, split, f"prosqa-{split}-{len(examples):05d}"))
    return examples


@dataclass(frozen=True, slots=True)
class Graph:
    """Parents of each node, all of lower number; bit r of a label is set below person r (nodes 0 and 1)."""

    parents: list[list[int]]
    labels: list[int]

    def choose_question(self, rng: random.Random) -> tuple[int, int, int] | None:
        """Return a root, the kind it is and the kind it is not; None if the graph has no path of the wanted length."""
        inner = {parent for parents in self.parents for parent in parents}
        leaves = [node for node in range(2, N_NODES) if node not in inner]
        below = [[leaf for leaf in leaves if self.labels[leaf] == 1 << root] for root in (0, 1)]
        if not all(below):
            return None
        distances = [self.distances(root) for root in (0, 1)]
        farthest = [max(distances[root][leaf] for leaf in below[root]) for root in (0, 1)]
        root = rng.randrange(2) if farthest[0] == farthest[1] else farthest.index(max(farthest))
        if not MIN_HOPS <= farthest[root] <= MAX_HOPS:
            return None
        target = rng.choice([leaf for leaf in below[root] if distances[root][leaf] == farthest[root]])
        return root, target, rng.choice(below[1 - root])

    def distances(self, root: int) -> list[float]:
        """Return the number of edges on the shortest path from ``root`` to each node."""
        distances = [math.inf] * N_NODES
        distances[root] = 0
        for node in range(2, N_NODES):
            distances[node] = min((distances[parent] + 1 for parent in self.parents[node]), default=math.inf)
        return distances

    def draw_path(self, root: int, target: int, rng: random.Random) -> list[int]:
        """Draw one of the shortest paths, all equally likely."""
        distances = self.distances(root)
        n_paths = [0] * N_NODES
        n_paths[root] = 1
        for node in range(2, N_NODES):
            n_paths[node] = sum(n_paths[p] for p in self.parents[node] if distances[p] + 1 == distances[node])
        path = [target]
        while path[0] != root:
            steps_back = [p for p in self.parents[path[0]] if distances[p] + 1 == distances[path[0]]]
            path.insert(0, rng.choices(steps_back, [n_paths[p] for p in steps_back])[0])
        return path

    def tell(self, root: int, target: int, other: int, rng: random.Random, split: str, identity: str) -> Example:
        """Put the graph into words."""
        inner = {parent for parents in self.parents for parent in parents}
        kept = [node for node in range(N_NODES) if self.parents[node] or node in inner]
        people, concepts = rng.sample(PEOPLE, len(PEOPLE)), rng.sample(CONCEPTS, len(CONCEPTS))
        names = {node: concepts.pop() if self.parents[node] else people.pop() for node in kept}

        def statement(parent: int, child: int) -> str:
            subject = f"Every {names[parent]}" if self.parents[parent] else names[parent]
            return f"{subject} is a {names[child]}."

        edges = [(parent, child) for child in kept for parent in self.parents[child]]
        statements = [statement(*edge) for edge in edges]
        choices = rng.sample((names[target], names[other]), 2)
        question = ""
        while not question or split_of(question) != split:  # the order of statements decides on the split
            rng.shuffle(statements)
            question = " ".join([*statements, f"Is {names[root]} a {choices[0]} or {choices[1]}?"])
        path = self.draw_path(root, target, rng)
        index = {node: i for i, node in enumerate(kept)}
        return Example(
            question=question,
            steps=tuple(statement(*edge) for edge in pairwise(path)),
            answer=f"{names[root]} is a {names[target]}.",
            id=identity,
            meta={
                "idx_to_symbol": [names[node] for node in kept],
                "edges": [[index[parent], index[child]] for parent, child in edges],
                "root": index[root],
                "target": index[target],
                "neg_target": index[other],
            },
        )


def _draw_graph(rng: random.Random) -> Graph:
    parents: list[list[int]] = [[], []]
    labels = [1, 2]
    depths = [0, 0]
    for node in range(2, N_NODES):
        wanted = rng.choices(list(LABEL_SHARES), list(LABEL_SHARES.values()))[0]
        candidates = [p for p in range(node) if wanted is None or labels[p] == wanted]
        drawn = _draw_some(candidates, [1 + DEPTH_PULL * depths[p] for p in candidates], _draw_poisson(rng), rng)
        label = 0
        for parent in drawn:
            label |= labels[parent]
        parents.append(drawn)
        labels.append(label)
        depths.append(1 + min((depths[parent] for parent in drawn), default=-1))
    return Graph(parents, labels)


def _draw_some(candidates: Sequence[int], weights: Sequence[float], n: int, rng: random.Random) -> list[int]:
    """Draw ``n`` different candidates (all, if there are fewer) one after another, by weight."""
    drawn: list[int] = []
    while len(drawn) < min(n, len(candidates)):
        candidate = rng.choices(candidates, weights)[0]
        if candidate not in drawn:
            drawn.append(candidate)
    return drawn


def _draw_poisson(rng: random.Random) -> int:
    """Count how many uniform numbers can be multiplied before the product falls below exp(-MEAN_PARENTS)."""
    count, product = 0, rng.random()
    while product > math.exp(-MEAN_PARENTS):
        count += 1
        product *= rng.random()
    return count


def _last_word(text: str) -> str:
    words = text.rstrip(". \t\n").split()
    return words[-1].casefold() if words else ""

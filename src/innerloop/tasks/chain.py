"""The chain task: keep track of one number through a chain of operations modulo a small number.

    question  3 ; + 4 ; * 2 ; - 1        steps  3 + 4 = 2 | 2 * 2 = 4 | 4 - 1 = 3        answer  3        (modulus 5)

Every operation is applied to the number reached so far and is a bijection of it, so no part of a chain can be skipped.
Steps may be of unlike difficulty (ops_per_step): ``3 ; + 4 * 2 ; - 1`` has the steps ``3 + 4 = 2 * 2 = 4`` and
``4 - 1 = 3``. Written as results alone they are ``4`` and ``3``: what one latent is to hold is one token.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from typing import Annotated, ClassVar, Literal

from innerloop.checks.values import Bounds, Count
from innerloop.errors import InputError
from innerloop.phases.phase import phase
from innerloop.tasks.task import Task, check_split, split_of
from innerloop.text.examples import Example, check_limit

OPERATIONS = "+-*"
SPLIT_SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}

Written = Literal["equations", "results"]

Drawn = tuple[int, tuple[str, ...]]  # the first number, then clauses such as "+ 4"


@dataclass(frozen=True)
class Chain(Task):
    """State-tracking arithmetic made on the spot; the splits never share a question.

    Args:
        n_ops: operations in a chain, which is also its number of steps
        min_ops: draw the number of operations uniformly from min_ops to n_ops (default: always n_ops)
        ops_per_step: each of these is from 1 to so many operations in a row, drawn uniformly
        steps: how steps are written: equations, or their results alone
        modulus: all arithmetic is modulo this number
        operations: the operations to draw from, some of + - *
        n_train: training examples
        n_valid: validation examples
        n_test: test examples
        seed: another seed gives other examples
    """

    name: ClassVar[str] = "chain"
    summary: ClassVar[str] = "arithmetic modulo a small number, one step an operation; made on the spot"

    n_ops: Annotated[int, Bounds(1, 10_000)] = 5
    min_ops: Count | None = None
    ops_per_step: Annotated[int, Bounds(1, 100)] = 1
    steps: Written = "equations"
    modulus: Annotated[int, Bounds(2, 10**5)] = 5
    operations: str = "+-*"
    n_train: Count = 20_000
    n_valid: Count = 500
    n_test: Count = 1_000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_ops is not None and self.min_ops > self.n_ops:
            raise InputError(f"chain: min_ops is {self.min_ops}, but must be from 1 to n_ops ({self.n_ops})")
        if not self.operations or len(set(self.operations) & set(OPERATIONS)) != len(self.operations):
            raise InputError(f"chain: operations is '{self.operations}', but must be some of '{OPERATIONS}', each once")
        # One token a character is the worst a tokenizer can do: "a + b = c\n" for each step, with " * d = e" for each
        # further operation, then "### a" and the end.
        digits = len(str(self.modulus - 1))
        step = 7 + 3 * digits + (self.ops_per_step - 1) * (6 + 2 * digits)
        object.__setattr__(self, "max_new_tokens", self.n_ops * step + digits + 8)

    @phase("making examples")
    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Make the examples of a split; a smaller ``limit`` gives the first of them."""
        chains = enumerate(self._chains(split, limit))
        return [self._example(chain, f"chain-{split}-{i:05d}") for i, chain in chains]

    def check(self, split: str, limit: int | None = None) -> None:
        """Refuse more examples than there are."""
        next(self._chains(split, limit))

    def n_questions(self) -> int:
        """Count the different questions there are, over all splits."""
        n_clauses = sum(len(self._clauses()) ** n for n in range(1, self.ops_per_step + 1))
        return sum(self.modulus * n_clauses**length for length in self._lengths())

    def _chains(self, split: str, limit: int | None) -> Iterator[Drawn]:
        check_limit(limit)
        n_examples = getattr(self, f"n_{check_split(split)}")
        rng = random.Random(f"chain-{self.seed}-{split}")
        # With room to spare chains are drawn until enough are new; otherwise all are listed and then drawn from.
        has_room = self.n_questions() * SPLIT_SHARES[split] > 4 * n_examples + 100
        wanted = n_examples if limit is None else min(limit, n_examples)
        return islice(self._draw(split, rng) if has_room else self._draw_listed(split, rng, wanted), wanted)

    def _lengths(self) -> range:
        return range(self.min_ops or self.n_ops, self.n_ops + 1)

    def _clauses(self) -> list[str]:
        """List the clauses, leaving out those that ignore the number (* 0), keep it (+ 0, * 1) or merge two of it."""
        addends = range(1, self.modulus)
        factors = [k for k in addends if k > 1 and math.gcd(k, self.modulus) == 1] or [1]  # modulo 2 there is only 1
        return [f"{op} {k}" for op in self.operations for k in (factors if op == "*" else addends)]

    def _draw(self, split: str, rng: random.Random) -> Iterator[Drawn]:
        clauses, lengths = self._clauses(), self._lengths()
        seen = set()
        while True:
            number, drawn = rng.randrange(self.modulus), rng.choices(clauses, k=rng.choice(lengths))
            if self.ops_per_step > 1:
                drawn = [" ".join(rng.choices(clauses, k=rng.randint(1, self.ops_per_step))) for _ in drawn]
            chain = number, tuple(drawn)
            question = _question(chain)
            if question not in seen and split_of(question) == split:
                seen.add(question)
                yield chain

    def _draw_listed(self, split: str, rng: random.Random, wanted: int) -> Iterator[Drawn]:
        pools = []  # one for each length
        joined = [" ".join(c) for n in range(1, self.ops_per_step + 1) for c in product(self._clauses(), repeat=n)]
        for length in self._lengths():
            every = product(range(self.modulus), product(joined, repeat=length))
            pools.append([chain for chain in every if split_of(_question(chain)) == split])
            rng.shuffle(pools[-1])
        n_found = sum(map(len, pools))
        if n_found < wanted:
            raise InputError(
                f"chain: there are only {n_found} different {split} questions, not {wanted}: "
                f"raise n_ops or modulus, or lower n_{split}{'' if split == 'train' else ' or the limit'}"
            )
        while pools := [pool for pool in pools if pool]:
            yield rng.choice(pools).pop()

    def _example(self, chain: Drawn, identity: str) -> Example:
        number, clauses = chain
        steps = []
        for clause in clauses:
            words, step = clause.split(), str(number)
            for operation in zip(words[::2], words[1::2]):
                number = _apply(" ".join(operation), number) % self.modulus
                step += f" {' '.join(operation)} = {number}"
            steps.append(step if self.steps == "equations" else str(number))
        return Example(_question(chain), tuple(steps), str(number), identity, {"n_ops": len(clauses)})


def _question(chain: Drawn) -> str:
    first, clauses = chain
    return " ; ".join((str(first), *clauses))


def _apply(clause: str, number: int) -> int:
    operation, operand = clause[0], int(clause[2:])
    if operation == "+":
        return number + operand
    return number - operand if operation == "-" else number * operand

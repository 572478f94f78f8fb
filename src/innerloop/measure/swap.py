"""Does the answer follow the latents? Latents are exchanged between pairs of examples, all, one by one, loop by loop.

Each example lends its latents to another (`Record.donors`). Of the pairs that are answered otherwise without a swap, an
answer that becomes the donor's *follows* the latents, one that stays *keeps* to the question. A latent that is swapped
alone shows what it alone holds; in append the latents after it are made from what was swapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from innerloop.errors import InputError
from innerloop.measure.accuracy import Prediction
from innerloop.measure.latents import Fed, Key, Record, Replacement, answer_of, same_answer
from innerloop.measure.statistics import wilson
from innerloop.measure.subject import Subject

MOST_LATENTS = 16  # swapped one by one; of more, evenly spaced ones


@dataclass(frozen=True)
class Swap:
    """What a swap does.

    Attributes:
        latents: the latent that was swapped, counted from 1, or all.
        loop: all latents were swapped after this iteration, and the loop went on from them; None: what the answer sees.
        follows: the share of pairs now answered as the donor is.
        ci95: its Wilson interval.
        by_chance: the share that would be if each donor were any of the pairs' whose answer differs from the row's own.
        keeps: the share answered as without the swap.
        n: the pairs, whose answers differ without it.
    """

    latents: int | Literal["all"]
    loop: int | None
    follows: float
    ci95: tuple[float, float]
    by_chance: float
    keeps: float
    n: int


def evenly(n: int, most: int = MOST_LATENTS) -> list[int]:
    """Return at most ``most`` of 1 .. n, evenly spaced, the first and the last among them."""
    return list(range(1, n + 1)) if n <= most else sorted({1 + round(i * (n - 1) / (most - 1)) for i in range(most)})


def swaps(subject: Subject) -> list[Swap]:
    """Swap all latents, each one, and all after each iteration."""
    if (why := subject.why_unseen) is not None:
        raise InputError(f"there are no latents to swap: {why}")
    method, keys, donors = subject.model.method, subject.keys, subject.donors
    plain = dict(zip(keys, subject.rows[1]))
    n_latents, _ = subject.latents()
    wanted: dict[str, tuple[int | Literal["all"], int | None]] = {"swap all, and chance": ("all", None)}
    if n_latents > 1:
        wanted |= {f"swap latent {j} of {n_latents}, and chance": (j, None) for j in evenly(n_latents)}
    if method.plan.scope != "append":
        last = method.n_loops(subject.at) - (method.plan.answer_context == "kv_last")
        wanted |= {f"swap after loop {t}, and chance": ("all", t) for t in range(1, last)}
    subject.plan(list(wanted))

    def measure(latents: int | Literal["all"], loop: int | None) -> Swap:
        if loop is not None:
            table = _after_loop(subject.recorded, donors, loop)
        elif latents != "all":
            table = _with_one(subject.seen, donors, latents - 1)
        else:
            table = {key: list(subject.seen.blocks[donor]) for key, donor in donors.items()}
        pairs = [(now, plain[key], plain[donors[key]]) for key, now in zip(keys, subject.answer(Replacement(table)))]
        pairs = [(now, own, donor) for now, own, donor in pairs if not same_answer(own, donor)]
        n, n_follow = len(pairs), sum(same_answer(now, donor) for now, _, donor in pairs)
        keeps = sum(same_answer(now, own) for now, own, _ in pairs) / max(n, 1)
        return Swap(latents, loop, n_follow / max(n, 1), wilson(n_follow, n), by_chance(pairs), keeps, n)

    return [subject.cache.value(Swap, name, partial(measure, *what)) for name, what in wanted.items()]


def sentences(found: Sequence[Swap]) -> list[str]:
    """Say what the swaps show."""
    said = []
    for swap in found:
        if swap.latents == "all" and swap.loop is None:
            if swap.n == 0:
                return ["All examples are answered alike, so that no answer could follow another example's latents."]
            low, high = swap.ci95
            said.append(
                f"With another example's latents {swap.follows:.0%} of the answers become that example's (95 % "
                f"interval {low:.0%} to {high:.0%}, n = {swap.n}; {swap.by_chance:.0%} would by chance), and "
                f"{swap.keeps:.0%} stay as they were."
            )
    alone = [swap for swap in found if swap.latents != "all"]
    if alone:
        best = max(alone, key=lambda swap: swap.follows)
        said.append(f"Of single latents, latent {best.latents} is followed most: {best.follows:.0%} of the answers.")
    return said


def by_chance(pairs: Sequence[tuple[Prediction, Prediction, Prediction]]) -> float:
    """Return how many answers would be the donors' if these were dealt out anew, none to a row answered as it is."""
    dealt = Counter(answer_of(donor) for _, _, donor in pairs)
    shares = [
        0.0 if same_answer(now, own) else dealt[answer_of(now)] / (len(pairs) - dealt[answer_of(own)])
        for now, own, _ in pairs
    ]
    return sum(shares) / max(len(shares), 1)


def _with_one(seen: Record, donors: dict[Key, Key], latent: int) -> dict[Key, list[Fed]]:
    """Return replacements of one latent, 0-based, of each block; side by side or one after the other."""

    def change(key: Key, i: int, block: Fed) -> Fed:
        other = _lent(seen, donors[key], i)
        count, states = 0, list[Tensor | None]()
        for own, theirs in zip([*block.fed, block.left], [*other.fed, other.left], strict=False):
            if own is None or theirs is None:
                states.append(None)
                continue
            place, count = latent - count, count + len(own)
            if 0 <= place < len(own):
                mixed = own.clone()
                mixed[place] = theirs[place]
                states.append(mixed if len(own) > 1 else theirs)
            else:
                states.append(None)
        states += [None] * (len(block.fed) + 1 - len(states))
        return Fed(tuple(states[:-1]), states[-1])

    return seen.map(change)


def _after_loop(everything: Record, donors: dict[Key, Key], loop: int) -> dict[Key, list[Fed]]:
    """Return replacements of z_t, which is what iteration t + 1 is fed."""

    def change(key: Key, i: int, block: Fed) -> Fed:
        other = _lent(everything, donors[key], i)
        fed: list[Tensor | None] = [None] * len(block.fed)
        if loop < min(len(fed), len(other.fed)):
            fed[loop] = other.fed[loop]
        return Fed(tuple(fed), None)

    return everything.map(change)


def _lent(known: Record, donor: Key, i: int) -> Fed:
    """Return what a donor lends for the 0-based block: its own, or its last; nothing if it has none."""
    blocks = known.blocks[donor]
    return blocks[min(i, len(blocks) - 1)] if blocks else Fed((), None)

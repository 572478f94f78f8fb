"""Are the latents used? A model answers again while its latents are replaced, hidden, or refined more or less often.

found = controls(Subject(model, task, examples))
print(found.sentence)

Every control is compared with the unedited run on the same rows (McNemar, paired bootstrap). What is replaced, and
where, says `innerloop.measure.latents`; how to read the outcome, docs/measuring.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from innerloop.errors import InputError
from innerloop.measure.accuracy import Prediction
from innerloop.measure.control_verdict import TITLES, Controls, Effect
from innerloop.measure.latents import Fed, Key, Replacement, answer_of, same_answer, seen_in_words
from innerloop.measure.statistics import verdict
from innerloop.measure.subject import Subject
from innerloop.methods import Method

SHARES_KEPT = (0.25, 0.5, 0.75)
MOST_LOOPS = 13  # points of accuracy against T; beyond, every other one and so on
PERMUTATIONS = 2000  # of a test of whether answers follow the donor


def controls(subject: Subject) -> Controls:
    """Run all controls that make sense for a model's method, on the examples that it can answer."""
    if not subject.examples:
        raise InputError("controls need examples to answer")
    method, left_out = subject.model.method, _left_out(subject)
    trained, loops = (None, []) if "loops" in left_out else _loops(method, subject.at)
    examples, unedited = subject.rows
    commonest = max(Counter(example.answer for example in examples).values()) / len(examples)
    found = Controls(unedited, commonest, trained_loops=trained, left_out=left_out)
    names, kept = [name for name in TITLES if name not in left_out and "latents" not in left_out], list[int]()
    if names:
        (found.n_latents, found.spread), found.seen = subject.latents(), seen_in_words(method, subject.at)
        kept = sorted({round(share * found.n_latents) for share in SHARES_KEPT} - {0, found.n_latents})
    if "kept_latents" in left_out:
        kept = []
    others = [t for t in loops if t != trained]
    subject.plan([*names, *(f"loops {t}" for t in others), *(f"kept {k}" for k in kept)])
    edits = cache(partial(_edits, subject))

    def effect(name: str, edit: Replacement | None = None, loops: int | None = None) -> Effect:
        def measure() -> Effect:
            edited = subject.answer(edits()[name] if name in names else edit, loops)
            found = effect_of(edited, unedited, subject.seed)
            if name != "shuffled":
                return found
            plain = dict(zip(subject.keys, unedited))
            donors = [plain[subject.donors[key]] for key in subject.keys]
            share, p = following(edited, unedited, donors, subject.seed)
            return replace(found, donor_answers=share, donor_p=p)

        return subject.cache.value(Effect, name, measure)

    nothing = effect_of(unedited, unedited, subject.seed)
    found.effects = {name: effect(name) for name in names}
    found.loops = {t: nothing if t == trained else effect(f"loops {t}", loops=t) for t in loops}
    found.kept = {k: effect(f"kept {k}", Replacement(kept=k)) for k in kept}
    if "kept_latents" not in left_out and found.n_latents:
        found.kept |= {0: found.effects["hidden"], found.n_latents: nothing}
    return found


def effect_of(edited: Sequence[Prediction], unedited: Sequence[Prediction], seed: int) -> Effect:
    """Compare answers after an edit with those of the same questions without."""
    names, n = ("the edited run", "the unedited run"), max(len(edited), 1)
    compared = verdict([p.correct for p in edited], [p.correct for p in unedited], names, seed)
    same = sum(same_answer(a, b) for a, b in zip(edited, unedited, strict=True)) / n
    ours, theirs = (Counter(map(answer_of, side)) for side in (edited, unedited))
    by_chance = sum(count * theirs[given] for given, count in ours.items()) / n**2
    return Effect(compared, same, agreement=(same - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0)


def following(
    edited: Sequence[Prediction], unedited: Sequence[Prediction], donors: Sequence[Prediction], seed: int
) -> tuple[float | None, float]:
    """Return how many answers become the donor's where that is another, and the p-value of a permutation test.

    The test deals the donors' answers out anew: answers that have nothing to do with whose latents they were given are
    the donor's just as often. A share alone tells little: with two answers to choose from, guessing makes half of them
    the donor's.
    """
    told = [same_answer(now, d) for now, own, d in zip(edited, unedited, donors) if not same_answer(own, d)]
    numbers: dict[str, int] = {}
    now, theirs = (
        np.array([numbers.setdefault(answer_of(p), len(numbers)) for p in side]) for side in (edited, donors)
    )
    draw, found = np.random.default_rng(seed), int((now == theirs).sum())
    as_many = sum(int((now == draw.permutation(theirs)).sum()) >= found for _ in range(PERMUTATIONS))
    return sum(told) / len(told) if told else None, (1 + as_many) / (1 + PERMUTATIONS)


def _edits(subject: Subject) -> dict[str, Replacement]:
    """Return the edits, in the order in which they are shown."""
    seen, middle = subject.seen, subject.seen.mean()

    def mapped(change: Callable[[Key, int, Tensor, int], Tensor]) -> Replacement:
        """Replace each state, told its prompt, block and place among the block's states."""

        def of_block(key: Key, i: int, block: Fed) -> Fed:
            fed = tuple(None if z is None else change(key, i, z, t) for t, z in enumerate(block.fed))
            return Fed(fed, None if block.left is None else change(key, i, block.left, len(fed)))

        return Replacement(seen.map(of_block))

    def noise(key: Key, i: int, z: Tensor, t: int) -> Tensor:
        name = hashlib.blake2b(repr((subject.seed, key, i, t)).encode(), digest_size=7).digest()
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(int.from_bytes(name, "big")))
        return drawn * (z.float().square().mean(-1, keepdim=True) / drawn.square().mean(-1, keepdim=True)).sqrt()

    def start(key: Key, i: int, z: Tensor, t: int) -> Tensor:
        block = subject.recorded.blocks[key][i]
        first = block.fed[0] if block.fed else block.left
        assert first is not None
        return first

    return {
        "shuffled": Replacement({key: seen.blocks[donor] for key, donor in subject.donors.items()}),
        "zeroed": mapped(lambda key, i, z, t: torch.zeros_like(z)),
        "mean": Replacement({key: middle for key in seen.blocks}),
        "noise": mapped(noise),
        "frozen": mapped(start),
        "hidden": Replacement(kept=0),
        "question_hidden": Replacement(hides_question=True),
    }


def _left_out(subject: Subject) -> dict[str, str]:
    """Return the controls that make no sense for a method at a stage, and why."""
    model, method, why = subject.model, subject.model.method, dict[str, str]()
    if (reason := subject.why_unseen) is not None:
        why["latents"] = reason[0].upper() + reason[1:]
    if not _loops(method, subject.at)[1]:
        why["loops"] = f"'{method.name}' has no number of loops that could be set."
    if "latents" in why:
        return why
    if method.n_loops(subject.at) == 0:
        why["frozen"] = "nothing refines the latents, so that they are at z_0 anyway"
    if model.block() is not None:
        reason = "latents are opened while answering, and the text between them has read them"
    elif method.decoder.kind != "lm_head":
        reason = "a decoder of its own answers, which attends to nothing that could be hidden"
    elif not model.prompts(["?"], subject.stage)[0].suffix:
        reason = "the answer is predicted from the last latent itself"
    if reason is not None:
        why |= dict.fromkeys(("hidden", "question_hidden", "kept_latents"), reason)
    return why


def _loops(method: Method, stage: int) -> tuple[int | None, list[int]]:
    """Return the number of loops that a method was trained with, and those to try: 0 to twice as many."""
    try:
        wanted = method.depth() if hasattr(method, "depth") else method.n_loops(stage)
    except InputError:
        return None, []
    trained = next((t for t in range(wanted + 2) if _with(method, t, stage) == wanted), None) if wanted else None
    if not trained:
        return None, []
    possible = [t for t in range(2 * trained + 1) if _with(method, t, stage) is not None]
    stride = -(-len(possible) // MOST_LOOPS)
    return trained, sorted({*possible[::stride], trained, 2 * trained} & set(possible))


def _with(method: Method, loops: int, stage: int) -> int | None:
    """Return how often a method loops if told to loop so often; None where it cannot."""
    try:
        other = method.with_loops(loops)
        return other.depth() if hasattr(other, "depth") else other.n_loops(stage)
    except InputError:
        return None

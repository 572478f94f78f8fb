"""Which steps may be latent: those without whose text a model still goes on rightly.

A model that was trained with some steps in text and others in blocks, drawn at random, reads each training example
with step i in a block and the next one in text. Step i may be latent if every token of what follows it, the next step
or the answer, is the likeliest one there; then it stays latent while the steps after it are tried. So labels say what
this model can do, row by row, and a student that learns them (`pattern: labelled` of SpiralThinker) learns to write
what is hard and to think what is easy.

    examples = label_steps(model, examples)         # each with meta["latent"], a truth value for each step
    chosen_steps(model, answer.ids)                 # what a model chose when it answered

Like the oracle of Think-at-Hard (`depth/oracle.py`), but for steps instead of tokens, with the question reversed: not
where a reference errs, but where the model itself no longer needs the text.
Shapes: `U` written tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from innerloop.config.method import Labeller, Method
from innerloop.errors import InputError
from innerloop.text.examples import Example
from innerloop.text.row import BOL, BOT, Kind, Row

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

LATENT = "latent"  # the key of an example's meta


def label_steps(model: Labeller, examples: Sequence[Example], batch_size: int = 256) -> list[Example]:
    """Return examples with a label for each step, in ``meta``: whether it may be latent."""
    method = _one_after_another(model.method)
    bare = [replace(example, meta={}) for example in examples]
    masks = [0] * len(examples)
    for i in range(max((len(example.steps) for example in examples), default=0)):
        asked = [n for n, example in enumerate(examples) if len(example.steps) > i]
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            rows = [method.lay_out(bare[n], model.encoder, masks[n] | 1 << i) for n in part]
            for n, row, logits_UV in zip(part, rows, model.row_logits(rows)):
                if _goes_on(row, logits_UV, i, len(examples[n].steps)):
                    masks[n] |= 1 << i
    return [
        replace(example, meta={**example.meta, LATENT: [bool(mask >> i & 1) for i in range(len(example.steps))]})
        for example, mask in zip(examples, masks)
    ]


def _one_after_another(method: Method) -> Method:
    """Return the method as it lays out rows to be labelled: blocks are refined as when answering, nothing is taught."""
    if method.name != "spiralthinker" or getattr(method, "pattern", None) not in ("random", "labelled"):
        raise InputError(
            f"steps are labelled by a model that has seen each of them in text and in a block, not by '{method.name}' "
            "of another pattern: set labeller to a run of spiralthinker with pattern=random"
        )
    changes: dict[str, Any] = {"hid": replace(method.hid, weight=0.0)}  # type: ignore[type-var]
    changes |= {"pattern": "random", "labeller": None, "block_schedule": "sequential"}
    return replace(method, **changes)


def _goes_on(row: Row, logits_UV: Tensor, step: int, n_steps: int) -> bool:
    """Tell whether every token of the next step, or after the last of the answer, is the likeliest."""
    written = [span for segment in row.segments() for span in segment.spans if span.supervised]
    is_last = step + 1 == n_steps
    best, at = logits_UV.argmax(-1).tolist(), 0
    for span in written:
        if span.kind is Kind.ANSWER if is_last else span.kind is Kind.STEP and span.step == step + 1:
            return best[at : at + len(span.ids)] == list(span.ids)
        at += len(span.ids)
    raise AssertionError("a step is followed by another or by the answer")


def check_labels(examples: Sequence[Example]) -> list[Example]:
    """Return examples that bring their labels; refuse those whose labels are missing or of another number of steps."""
    for example in examples:
        found = example.meta.get(LATENT, [] if not example.steps else None)
        if not isinstance(found, Sequence) or len(found) != len(example.steps):
            raise InputError(
                f"example '{example.id}' has {len(example.steps)} steps, but its meta does not say for each whether it "
                "is latent: set labeller to a run of pattern random, or give meta.latent, a list of true and false"
            )
    return list(examples)


def latent_mask(example: Example, otherwise: int) -> int:
    """Return the number whose bit i tells whether step i is latent; ``otherwise`` for examples without labels."""
    labels = example.meta.get(LATENT)
    return otherwise if labels is None else sum(1 << i for i, is_latent in enumerate(labels) if is_latent)


def chosen_steps(model: Labeller, ids: Sequence[int]) -> list[bool]:
    """Return for each step of what was written whether it was latent; a block given with the question comes first."""
    bol, bot = model.tokenizer.convert_tokens_to_ids([BOL, BOT])
    given = [True] if getattr(model.method, "begins_with_block", False) else []
    return given + [token == bol for token in ids if token in (bol, bot)]

"""A model against its slow reference: the terms of its loss, and what it writes."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from innerloop import Example, LatentModel
from innerloop.text.row import Kind, Row, Span
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    gradients,
    lean_towards_end,
    logits_of,
    rows_at,
)


def assert_terms_of_the_reference(model: LatentModel, slow: Reference, *stages: list[int]) -> None:
    """Logits, every term of the loss and the gradient by every weight are the slow reference's, for MIXED."""
    rows = rows_at(model, MIXED, *stages) if stages else model.rows(MIXED)
    with torch.no_grad():
        for logits, example, stage in zip(logits_of(model, rows), MIXED, *stages or [[None] * len(MIXED)]):
            assert_close(logits, slow.answer_logits(example, stage), ROUNDED)
    out, terms = model(model.batch(rows)), slow.terms(list(MIXED), *stages)
    assert out.terms.keys() == terms.keys()
    for name, term in terms.items():
        assert_close(out.terms[name], term.detach())
    expected = sum(model.method.term_weights[name] * term for name, term in terms.items())
    assert_same_gradients(gradients(model, out.loss), gradients(model, expected))


def assert_logits_of_the_reference(
    model: LatentModel, examples: Sequence[Example] = MIXED, stage: int | None = None, tolerance: float | None = ROUNDED
) -> None:
    """The logits of every written token are the slow reference's."""
    slow = Reference(model)
    with torch.no_grad():
        for logits, example in zip(model.answer_logits(examples, stage), examples):
            assert_close(logits, slow.answer_logits(example, stage), tolerance)


def assert_thinks(
    model: LatentModel, think: Callable[[Reference, Example], Tensor], tolerance: float | None = None
) -> None:
    """The logits for MIXED are those after ``think(slow, example)``, the embeddings (L, D) that <eot> follows."""
    slow = Reference(model)
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            thought_LD = torch.cat([think(slow, example), slow.embed(slow.marker("<eot>"))])
            assert_close(logits, slow.logits_after(thought_LD, slow.written(example, 0)), tolerance)


def assert_batch_is_its_rows(model: LatentModel, rows: Sequence[Row], apart: Collection[str] = ()) -> None:
    """The logits of a batch are its rows' alone, and every term but those ``apart`` is the mean of theirs."""
    whole, alone = model(model.batch(rows)).terms, [model.batch([row]) for row in rows]
    for row, logits in zip(rows, logits_of(model, rows)):
        assert_close(logits, logits_of(model, [row])[0], ROUNDED)
    found = [(batch.counts(), model(batch).terms) for batch in alone]
    for name in whole.keys() - set(apart):
        known = [(counts[name], terms[name]) for counts, terms in found if name in terms]
        assert_close(whole[name], sum(n * term for n, term in known) / sum(n for n, _ in known), ROUNDED)


def assert_decodes_as_forced(model: LatentModel, slow: Reference, passes_before: int, n_tokens: int = 10) -> None:
    """Greedy decoding, batched == one row at a time == the slow reference == the likeliest tokens in training's layout.

    ``passes_before`` is the card's number of passes besides one for each written token.
    """
    expected, lengths, by = [], {n_tokens}, 2.0
    while len(lengths) == 1 and by > 0.05:  # let the rows end at different times
        lean_towards_end(model, by if lengths == {n_tokens} else -by)
        expected = [slow.write(question, n_tokens) for question in QUESTIONS]
        lengths, by = {len(ids) for ids in expected}, 0.7 * by
    assert len(lengths) > 1
    together = model.generate(QUESTIONS, max_new_tokens=n_tokens)
    alone = [model.generate([question], max_new_tokens=n_tokens)[0] for question in QUESTIONS]
    rows = model.prompts(QUESTIONS)
    for row, ids in zip(rows, expected):
        row.suffix.append(Span(tuple(ids), Kind.ANSWER, supervised=True))
    for one, other, ids, logits in zip(together, alone, expected, logits_of(model, rows)):
        assert one.text == other.text == model.tokenizer.decode(ids, skip_special_tokens=True)
        assert one.cost.passes == other.cost.passes == passes_before + len(ids)
        logits[:, model.suppressed_ids()] = -torch.inf
        assert logits.argmax(-1).tolist() == ids

"""A model against its slow reference: the terms of its loss, and what it writes."""

import torch

from innerloop import LatentModel
from innerloop.text.row import Kind, Piece
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
        row.suffix.append(Piece(tuple(ids), Kind.ANSWER, supervised=True))
    for one, other, ids, logits in zip(together, alone, expected, logits_of(model, rows)):
        assert one.text == other.text == model.tokenizer.decode(ids, skip_special_tokens=True)
        assert one.cost.passes == other.cost.passes == passes_before + len(ids)
        logits[:, model.suppressed_ids()] = -torch.inf
        assert logits.argmax(-1).tolist() == ids

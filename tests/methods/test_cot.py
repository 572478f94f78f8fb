"""Explicit CoT and No-CoT: the invariants of their card (cot.md, section 9).

I1 No-CoT == CoT without steps. I2 CoT with all steps removed == No-CoT. I3 ids == embeddings. I4 padding and batch
companions change nothing. I7 unsupervised positions. I5 cached == uncached decoding, I6, I8, I9 uniform logits give
log V, the slow reference and the number of passes: test_every_method.py.
"""

import dataclasses

import pytest
import torch

from innerloop import Cot, InputError, NoCot
from innerloop.text.batch import collate
from innerloop.text.row import IGNORE
from tests.methods.tools import (
    MIXED,
    assert_close,
    logits_of,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_backbone, tiny_model

METHODS = {"no_cot": NoCot(), "cot": Cot(), "cot with markers": Cot(with_markers=True)}
WITHOUT_STEPS = [dataclasses.replace(example, steps=()) for example in MIXED]


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


def test_a_row_is_question_steps_and_answer_and_all_but_the_question_is_supervised():
    model = tiny_model(Cot(with_markers=True))
    (row,) = model.rows(MIXED[:1])
    encode = model.tokenizer.encode
    question = encode("3 ; + 4 ; * 2 ; - 1\n")
    markers = model.tokenizer.convert_tokens_to_ids(["<bot>", "<eot>"])
    written = [*encode("3 + 4 = 2\n"), *encode("2 * 2 = 4\n"), *encode("4 - 1 = 3\n"), *encode("### 3")]
    written.append(model.tokenizer.eos_token_id)
    assert row.ids() == [*question, *markers, *written]
    assert row.labels() == [IGNORE] * len([*question, *markers]) + written


def test_i1_i2_no_cot_is_to_the_bit_cot_without_steps_or_with_all_of_them_removed():
    cot = sharp_model(Cot())
    no_cot = under(cot, NoCot())
    rows, others = cot.rows(WITHOUT_STEPS), no_cot.rows(MIXED)
    assert [(row.ids(), row.labels()) for row in rows] == [(row.ids(), row.labels()) for row in others]
    assert torch.equal(cot.loss(WITHOUT_STEPS).loss, no_cot.loss(MIXED).loss)


def test_i3_reading_ids_is_reading_their_embeddings(arch):
    backbone = tiny_backbone(arch)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        ours = backbone.head(backbone(backbone.embed(ids)))
        assert_close(ours, backbone.lm(input_ids=ids).logits, 1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_i4_padding_and_companions_leave_a_row_as_it_is(method, name):
    model = sharp_model(method, name)
    rows = model.rows(MIXED)
    alone = [logits_of(model, [row])[0] for row in rows]
    by_question, by_length = max(rows, key=lambda row: len(row.prefix[0].ids)), max(rows, key=len)
    for row, logits in zip(rows, alone):
        for companions in ([by_question], [by_length], rows):
            assert_close(logits_of(model, [row, *companions])[0], logits)
            assert_close(logits_of(model, [*companions, row])[-1], logits)


def test_i4_the_id_that_fills_padding_is_never_seen():
    model = sharp_model(Cot())
    rows = model.rows(MIXED)
    losses = {pad: model(collate(rows, pad)).loss.item() for pad in (0, 5, model.tokenizer.eos_token_id)}
    assert len(set(losses.values())) == 1


def test_i7_only_the_positions_that_predict_written_tokens_receive_a_gradient(method):
    model = sharp_model(method)
    batch = model.batch(model.rows(MIXED))
    with states(model) as seen:
        model(batch).loss.backward()
    touched = (seen[0].grad != 0).any(-1).flatten()
    expected = torch.zeros_like(touched)
    expected[batch.predict_at_U] = True
    assert torch.equal(touched, expected)
    assert len(batch.targets_U) == sum(label != IGNORE for row in model.rows(MIXED) for label in row.labels())


def test_micro_batches_divided_by_the_global_count_add_up_to_the_whole_batch(method):
    model = sharp_model(method)
    rows = model.rows(MIXED)
    whole = model.batch(rows)
    parts = [model(model.batch(part), n_items=whole.counts()).loss for part in (rows[:1], rows[1:4], rows[4:])]
    assert sum(parts).item() == pytest.approx(model(whole).loss.item(), rel=1e-5)


def test_a_row_longer_than_the_context_is_refused_with_the_way_to_mend_it():
    model = tiny_model(Cot(), max_position_embeddings=16)
    with pytest.raises(InputError, match=r"at most 16.*max_length"):
        model.loss(MIXED)


def test_a_batch_may_have_more_columns_than_the_context_has_positions():
    model = sharp_model(Cot(), max_position_embeddings=45)
    rows = model.rows([dataclasses.replace(MIXED[3], steps=()), dataclasses.replace(MIXED[3], question="2")])
    rows += model.rows([dataclasses.replace(MIXED[3], question="1 ; " * 15 + "+ 1", steps=())])
    batch = model.batch(rows)
    assert max(map(len, rows)) <= 45 < batch.ids_BS.shape[1]
    for logits, row in zip(logits_of(model, rows), rows):
        assert_close(logits, logits_of(model, [row])[0])

"""Pause tokens: they equal the slow reference at every stage, and the invariants of their card (pause.md, section 9).

P3 the gradient of the pause embedding is the sum over its positions. P4 nothing is supervised at pauses. P7 pauses
change the answer, and no state of the question. P1 M = 0 without markers == No-CoT, P5 equal to other methods:
tests/test_one_loop.py. P2 the number of passes does not depend on M, P6 cached == uncached: test_every_method.py.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import InputError, Pause
from innerloop.text.row import IGNORE
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    assert_close,
    assert_same_gradients,
    change_embedding,
    gradients,
    logits_of,
    rows_at,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_model

METHODS = {
    "default": Pause(),
    "without markers": Pause(n_pauses=3, with_markers=False),
    "steps kept": Pause(n_pauses=3, keep_steps=True),
    "prepended": Pause(n_pauses=3, placement="prepend"),
    "curriculum": Pause(n_pauses=4, curriculum={"max_stage": 2}, per_stage=2),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_p4_every_layout_equals_the_reference_at_every_stage_and_nothing_is_supervised_at_markers(method):
    """In mixed batches, too."""
    model = sharp_model(method)
    slow = Reference(model)
    stages = [i % (slow.last_stage + 1) for i in range(len(MIXED))]
    rows = rows_at(model, MIXED, stages)
    with torch.no_grad():
        for example, stage, logits in zip(MIXED, stages, logits_of(model, rows)):
            assert_close(logits, slow.answer_logits(example, stage))
    batch = model.batch(rows)
    expected = slow.loss(list(MIXED), stages)
    assert_same_gradients(gradients(model, model(batch).loss), gradients(model, expected))
    markers = set(model.tokenizer.convert_tokens_to_ids(["<bot>", "<lat>", "<eot>"]))
    assert not markers & {*batch.targets_U.tolist(), *(label for row in rows for label in row.labels())}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Pause(n_pauses=2), "Q<bot><lat><lat><eot>A"),
        (Pause(n_pauses=2, with_markers=False), "Q<lat><lat>A"),
        (Pause(n_pauses=2, keep_steps=True), "Q<bot><lat><lat><eot>TTTA"),
        (Pause(n_pauses=2, placement="prepend"), "<bot><lat><lat><eot>QA"),
        (Pause(n_pauses=2, placement="prepend", with_markers=False), "<lat><lat>QA"),
        (Pause(n_pauses=0), "Q<bot><eot>A"),
    ],
)
def test_pauses_stand_where_the_layout_says(method, expected):
    model = tiny_model(method)
    (row,) = model.rows(MIXED[:1])
    names = {"question": "Q", "step": "T", "answer": "A"}
    spelt = [names.get(p.kind) or "".join(model.tokenizer.convert_ids_to_tokens(list(p.ids))) for p in row.spans]
    assert "".join(spelt) == expected


def test_the_curriculum_trades_each_step_for_pauses():
    model = tiny_model(Pause(n_pauses=5, curriculum={"max_stage": 3}, per_stage=2))
    rows = [model.rows(MIXED[:1], stage)[0] for stage in range(5)]
    assert [row.ids().count(model.tokenizer.convert_tokens_to_ids("<lat>")) for row in rows] == [0, 2, 4, 5, 5]
    assert [[span.step for span in row.spans if span.step >= 0] for row in rows] == [[0, 1, 2], [1, 2], [2], [], []]


def test_answering_may_use_another_number_of_pauses_than_training():
    model = sharp_model(Pause(n_pauses=2, n_pauses_inference=7))
    longer = under(model, Pause(n_pauses=7))
    assert len(model.rows(MIXED[:1])[0]) == len(longer.rows(MIXED[:1])[0]) - 5
    assert [row.ids() for row in model.prompts(QUESTIONS)] == [row.ids() for row in longer.prompts(QUESTIONS)]
    assert model.generate(QUESTIONS[:1])[0].cost.thought_tokens >= 7


def test_p3_the_gradient_of_the_pause_embedding_is_the_sum_over_its_positions():
    model = sharp_model(Pause(n_pauses=3), "llama")  # input and output embeddings are separate tables
    assert not model.backbone.config.tie_word_embeddings
    table, lat = model.backbone.lm.get_input_embeddings().weight, model.tokenizer.convert_tokens_to_ids("<lat>")
    (row,) = model.rows(MIXED[:1])
    embeds = model.backbone.embed(torch.tensor([row.ids()])).detach().requires_grad_()
    written = torch.tensor(row.labels())[1:]
    cross_entropy(model.backbone.lm(inputs_embeds=embeds).logits[0, :-1], written, ignore_index=IGNORE).backward()
    at_pauses = embeds.grad[0, torch.tensor(row.ids()) == lat]
    assert len(at_pauses) == 3
    assert at_pauses.abs().amax(1).min() > 1e-6
    model.zero_grad()
    model.loss(MIXED[:1]).loss.backward()
    assert_close(table.grad[lat], at_pauses.sum(0), 1e-6)


def test_p7_pauses_change_the_answer_but_no_state_of_the_question():
    model = sharp_model(Pause())
    n_question = len(model.rows(MIXED[:1])[0].prefix[0].ids)
    with states(model) as seen:
        before = model.answer_logits(MIXED[:1])[0]
        change_embedding(model, "<lat>")
        after = model.answer_logits(MIXED[:1])[0]
    assert torch.equal(seen[0][:, :n_question], seen[1][:, :n_question])
    assert (before - after).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"n_pauses": -1}, "n_pauses is -1, but must be"),
        ({"n_pauses_inference": -1}, "n_pauses_inference is -1, but must be"),
        ({"curriculum": {"max_stage": 2}, "keep_steps": True}, "set keep_steps to false"),
        ({"curriculum": {"max_stage": 2}, "placement": "prepend"}, "placement to append"),
        ({"curriculum": {"first_stage": 1}}, "from 0 to 0"),
        ({"placement": "before"}, "placement"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(fields, mend):
    with pytest.raises(InputError, match=mend):
        Pause(**fields)

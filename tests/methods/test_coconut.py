"""Coconut: it equals the slow reference, and the invariants of its card (coconut.md, section 9).

C1 stage 0 == CoT, no thought == No-CoT: tests/test_one_loop.py. C2 cached passes == the whole prefix at every pass.
C3 without feed-back == pause tokens, and one pass == k + 1 passes. C4 mixed batches == single rows. C5 the gradient
runs through all k links, and `detach` cuts them. C6 == SLR in scope append: tests/test_one_loop.py. C7 Jacobi view.
C8 stage arithmetic.
"""

import dataclasses

import pytest
import torch

from innerloop import Coconut, InputError, Pause, Slr
from innerloop.text.row import IGNORE
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_causal,
    assert_close,
    assert_learns_by_heart,
    assert_rows_do_as_alone,
    assert_same_gradients,
    assert_writes_like_the_reference,
    change_embedding,
    exact,
    gradients,
    halting,
    lean_towards_end,
    logits_of,
    passes,
    rows_at,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_model

STAGES = [4, 0, 2, 3, 1, 4]  # of MIXED: 6, 0, 4, 6, 2 and 6 latents
FIVE_LATENTS = Coconut(max_stage=1, latents_per_step=5)


def test_c2_loss_logits_and_gradients_equal_the_reference(arch):
    model = under(exact(tiny_model(Slr(), arch)), Coconut())
    slow = Reference(model)
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(MIXED), MIXED):
            assert_close(fast, slow.answer_logits(example), ROUNDED)
    loss, expected = model.loss(MIXED).loss, slow.loss(list(MIXED))
    assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_c2_states_fed_back_before_the_final_norm_equal_the_reference(name):
    model = sharp_model(Coconut(feedback_site="pre_norm"), name)
    slow = Reference(model)
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(MIXED), MIXED):
            assert_close(fast, slow.answer_logits(example), 1e-10 if name == "gpt2" else 1e-5)
    expected = gradients(model, slow.loss(list(MIXED)))
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), expected, 1e-5)


@pytest.mark.parametrize("stage", range(5))
def test_c2_every_stage_equals_the_reference_in_double_precision(stage):
    model = sharp_model(Coconut())
    slow = Reference(model)
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(MIXED, stage), MIXED):
            assert_close(fast, slow.answer_logits(example, stage))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_c4_mixed_stages_in_one_batch_equal_the_reference_and_single_rows(name):
    model = sharp_model(Coconut(), name)
    slow = Reference(model)
    rows = rows_at(model, MIXED, STAGES)
    with torch.no_grad():
        for row, example, stage, fast in zip(rows, MIXED, STAGES, logits_of(model, rows)):
            assert_close(fast, logits_of(model, [row])[0])
            assert_close(fast, slow.answer_logits(example, stage))
    loss, expected = model(model.batch(rows)).loss, slow.loss(list(MIXED), STAGES)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 1e-5)


def test_c4_permuting_rows_permutes_results():
    model = sharp_model(Coconut())
    rows, order = rows_at(model, MIXED, STAGES), [3, 0, 5, 1, 4, 2]
    logits = logits_of(model, rows)
    for i, permuted in zip(order, logits_of(model, [rows[i] for i in order])):
        assert_close(permuted, logits[i])


@pytest.mark.parametrize("chosen", [range(6), [3, 4], [2, 2], [1, 5], [4]], ids=str)
def test_c4_examples_with_fewer_steps_may_have_fewer_latents(chosen):
    model = sharp_model(Coconut(max_stage=3, latents_per_step=2, pad_latent_to_max=False))
    slow, chosen = Reference(model), [MIXED[i] for i in chosen]
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(chosen), chosen):
            assert_close(fast, slow.answer_logits(example))
    loss, expected = model.loss(chosen).loss, slow.loss(chosen)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


def test_answering_always_uses_the_most_latents():
    padded, free = (tiny_model(Coconut(pad_latent_to_max=padded)) for padded in (True, False))
    assert [row.ids() for row in free.prompts(QUESTIONS)] == [row.ids() for row in padded.prompts(QUESTIONS)]
    assert [model.generate(["2"])[0].cost.thought_tokens >= 6 for model in (padded, free)] == [True, True]


def test_c3_latents_without_feedback_read_one_by_one_are_pause_tokens_read_at_once():
    # alpha = 0 puts <lat> into every latent, each read in a pass of its own
    one_by_one = sharp_model(Slr(loop_scope="append", max_loops=4, residual="A", alpha=0.0, time="none"))
    at_once = under(one_by_one, dataclasses.replace(FIVE_LATENTS, thought="pause"))
    with passes(one_by_one) as many, passes(at_once) as all_passes:
        left = one_by_one.answer_logits(MIXED)
        n_many = len(many)
        right = at_once.answer_logits(MIXED)
    assert (n_many, len(all_passes) - n_many) == (6, 1)
    pauses = under(one_by_one, Pause(n_pauses=5)).answer_logits(MIXED)
    for a, b, c in zip(left, right, pauses):
        assert_close(a, b)
        assert_close(b, c)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_c5_the_gradient_runs_through_every_link_from_the_last_token_alone(k):
    model = sharp_model(Coconut(max_stage=1, latents_per_step=k))
    assert all(link.abs().max() > 1e-9 for link in link_gradients(model))
    assert len(link_gradients(model)) == k


@pytest.mark.parametrize("k", [1, 2, 5])
def test_c5_detach_cuts_every_link(k):
    model = sharp_model(Coconut(max_stage=1, latents_per_step=k, detach=True))
    assert all(link.abs().max() == 0 for link in link_gradients(model))


def link_gradients(model):
    """The gradient of the last token's loss by each state that is fed back: at <bot> and at all but the last latent."""
    batch = model.batch(model.rows(MIXED[:1]))
    batch.predict_at_U, batch.targets_U = batch.predict_at_U[-1:], batch.targets_U[-1:]
    with states(model) as seen:
        model(batch).loss.backward()
    fed_back = [state for state in seen[:-1]]  # the last pass reads the last latent, <eot> and the text
    return [torch.zeros(1) if state.grad is None else state.grad[:, -1] for state in fed_back]


@pytest.mark.parametrize("detach", [False, True])
def test_c5_gradients_with_and_without_detach_equal_the_reference(detach):
    model = sharp_model(Coconut(detach=detach))
    slow = Reference(model)
    rows = rows_at(model, MIXED, STAGES)
    expected = gradients(model, slow.loss(list(MIXED), STAGES))
    assert_same_gradients(gradients(model, model(model.batch(rows)).loss), expected)


def test_c7_jacobi_iterations_make_the_same_latents():
    """k parallel passes x_j := h_{j-1}, x_1 fixed, give the k latents that sequential passes give, in order."""
    k, model = 5, sharp_model(FIVE_LATENTS)
    slow = Reference(model)
    with torch.no_grad():
        bot = [*slow.question(QUESTIONS[0]), *slow.marker("<bot>")]
        sequential = slow.coconut(slow.embed(bot), k)[len(bot) : -1]
        x_KD = slow.embed(slow.marker("<lat>") * k)
        for t in range(1, k + 1):
            h_LD = slow.read(torch.cat([slow.embed(bot), x_KD]))[0]
            x_KD = h_LD[len(bot) - 1 : -1]
            assert_close(x_KD[:t], sequential[:t])
            assert t == k or (x_KD[t:] - sequential[t:]).abs().amax(1).min() > 1e-3
        thought = torch.cat([slow.embed(bot), x_KD, slow.embed(slow.marker("<eot>"))])
        assert_close(slow.logits_after(thought, slow.written(MIXED[0], 2)), model.answer_logits(MIXED[:1])[0])


def test_c8_three_epochs_to_a_stage_give_the_published_schedule():
    method = Coconut(max_stage=3, latents_per_step=2, stage_length=3)
    model = tiny_model(method)
    example = dataclasses.replace(MIXED[3], steps=(*MIXED[3].steps, "0 + 1 = 1"))  # five steps
    stages = [method.stage_at(step=10 * epoch, steps_per_epoch=10) for epoch in range(25)]
    rows = [model.rows([example], stage)[0] for stage in stages]
    lat = model.tokenizer.convert_tokens_to_ids("<lat>")
    assert [row.ids().count(lat) for row in rows] == [0] * 3 + [2] * 3 + [4] * 3 + [6] * 16
    skipped = [5 - sum(piece.step >= 0 for piece in row.pieces) for row in rows]
    assert skipped == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [5] * 13
    published = dataclasses.replace(method, first_stage=1)  # from a CoT checkpoint: stage 0 is left out
    assert [published.stage_at(epoch, 1) for epoch in (0, 3, 6, 9, 30)] == [1, 2, 3, 4, 4]


def test_examples_with_fewer_steps_than_the_stage_still_have_all_latents():
    model = tiny_model(Coconut())
    lat = model.tokenizer.convert_tokens_to_ids("<lat>")
    assert [row.ids().count(lat) for row in model.rows(MIXED, 3)] == [6] * 6


def test_question_and_markers_are_not_supervised_and_the_first_text_is_predicted_by_eot():
    model = sharp_model(Coconut())
    for row in model.rows(MIXED, 2):
        after_eot = row.ids().index(model.tokenizer.convert_tokens_to_ids("<eot>")) + 1
        assert row.labels() == [IGNORE] * after_eot + row.ids()[after_eot:]


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_training_takes_k_plus_one_passes_and_reads_every_column_once(k):
    model = sharp_model(Coconut(max_stage=1, latents_per_step=k))
    batch = model.batch(model.rows(MIXED))
    with passes(model) as seen:
        model(batch)
    prefix, suffix = batch.bounds[0], batch.ids_BS.shape[1] - batch.bounds[1]
    expected = [prefix, *[1] * (k - 1), 1 + suffix] if k else [prefix + suffix]
    assert [embeds.shape[1] for embeds in seen] == expected


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_answering_takes_one_pass_k_latents_and_one_for_each_token(k):
    model = lean_towards_end(sharp_model(Coconut(max_stage=1, latents_per_step=k)), -100.0)
    with passes(model) as seen:
        costs = [generation.cost for generation in model.generate(QUESTIONS, max_new_tokens=4)]
    prefix = max(len(row) for row in model.prompts(QUESTIONS)) - k - 1
    assert [embeds.shape[1] for embeds in seen] == [prefix, *[1] * (k - 1), 2, 1, 1, 1] if k else [prefix + 1, 1, 1, 1]
    assert {cost.passes for cost in costs} == {k + 4}
    assert [cost.positions for cost in costs] == [len(row) + 3 for row in model.prompts(QUESTIONS)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_cached_and_batched_decoding_equals_uncached_decoding(k, name):
    model = sharp_model(Coconut(max_stage=1, latents_per_step=k), name)
    assert_writes_like_the_reference(model, passes_before=k)


def test_states_before_the_first_latent_do_not_depend_on_the_latents():
    model = sharp_model(dataclasses.replace(FIVE_LATENTS, thought="pause"))
    n_before = model.batch(model.rows(MIXED)).bounds[0]
    with states(model) as seen:
        before = model.answer_logits(MIXED)
        change_embedding(model, "<lat>")
        after = model.answer_logits(MIXED)
    real = model.batch(model.rows(MIXED)).mask_BS[:, :n_before].bool()
    assert torch.equal(seen[0][:, :n_before][real], seen[1][:, :n_before][real])
    assert all((a - b).abs().amax(1).min() > 1e-4 for a, b in zip(before, after))


def test_a_token_changes_no_logits_before_it():
    assert_causal(sharp_model(Coconut()), MIXED[0])


@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(examples):
    assert_learns_by_heart(Coconut(max_stage=2, latents_per_step=1), examples)


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"latents_per_step": -1}, "no thought"),
        ({"max_stage": 0}, "first_stage"),
        ({"first_stage": 5}, "from 0 to 4"),
        ({"alpha": 1.5}, "between 0 and 1"),
        ({"uniform_prob": -0.1}, "between 0 and 1"),
        ({"stage_length": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused_with_the_way_to_mend_them(fields, mend):
    with pytest.raises(InputError, match=mend):
        Coconut(**fields)


@pytest.mark.parametrize("field", ["thought", "stage_mix", "stage_unit", "reset_optimizer", "residual", "time"])
def test_an_unknown_choice_is_refused(field):
    with pytest.raises(InputError, match=field):
        Coconut(**{field: "nonsense"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents_per_step", 1),
        ("max_stage", 2),
        ("thought", "pause"),
        ("residual", "sum"),
        ("feedback_site", "pre_norm"),
    ],
)
def test_every_field_changes_the_answer(field, value):
    model = sharp_model(Coconut())
    other = under(model, dataclasses.replace(Coconut(), **{field: value}))
    assert (model.answer_logits(MIXED[:1])[0] - other.answer_logits(MIXED[:1])[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("mix", "weights"), [("uniform", [1, 1, 1, 1]), ("linear", [1, 2, 3, 4])])
def test_stage_mixing_draws_stages_with_the_stated_probability(mix, weights):
    method = Coconut(stage_mix=mix)
    drawn = [method.stage_of(3, 3, f"0/{i}") for i in range(4000)]
    for stage, weight in enumerate(weights):
        assert drawn.count(stage) / 4000 == pytest.approx(weight / sum(weights), abs=0.03)
    assert drawn == [method.stage_of(3, 3, f"0/{i}") for i in range(4000)]


def test_a_share_of_the_examples_may_use_any_of_their_own_stages():
    method = Coconut(uniform_prob=0.5)
    drawn = [method.stage_of(3, 2, f"0/{i}") for i in range(4000)]
    assert [round(drawn.count(stage) / 4000, 1) for stage in range(5)] == [0.2, 0.2, 0.2, 0.5, 0.0]


def test_mixed_stages_change_the_rows_of_a_batch_and_the_seed_fixes_them():
    model = tiny_model(Coconut(stage_mix="uniform"))
    rows = [[row.ids() for row in model.rows(MIXED, 4, seed)] for seed in ("0/7", "0/7", "1/7")]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("fields", [{"stop": "delta"}, {"stop": "kl"}, {"stop": "kl", "stop_site": "answer"}], ids=str)
def test_rows_that_stop_thinking_at_different_times_do_as_alone(fields):
    assert_rows_do_as_alone(halting("gpt2", Coconut(max_stage=3, latents_per_step=2, **fields)))

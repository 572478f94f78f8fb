"""Coconut: it equals the slow reference, and the invariants of its card (coconut.md, section 9).

C2 cached passes == the whole prefix at every pass. C4 mixed batches == single rows. C5 the gradient runs through all k
links, and `detach` cuts them. C8 stage arithmetic: tests/test_curriculum.py. C1, C3, C6 and C7, other methods and the
Jacobi view, are lines of tests/test_one_loop.py; its iterations are followed one by one in test_pccot.py.
"""

import pytest
import torch

from innerloop import Coconut, InputError, Slr
from tests.fields import make
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    assert_writes_like_the_reference,
    by_arch,
    change_embedding,
    exact,
    gradients,
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


def of_latents(k, **fields):
    """Coconut whose last stage has k latents."""
    return make(Coconut, **{"curriculum.max_stage": 1}, latents_per_step=k, **fields)


def assert_is_the_reference(model, stages=(4,) * 6, examples=MIXED, tolerance=None):
    """Logits of a batch are the slow reference's and those of single rows; loss and gradients are the reference's."""
    slow, rows = Reference(model), rows_at(model, examples, stages)
    with torch.no_grad():
        for row, example, stage, logits in zip(rows, examples, stages, logits_of(model, rows)):
            assert_close(logits, slow.answer_logits(example, stage), tolerance)
            assert_close(logits, logits_of(model, [row])[0], tolerance)
    loss, expected = model(model.batch(rows)).loss, slow.loss(list(examples), list(stages[: len(examples)]))
    assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


def test_c2_loss_logits_and_gradients_equal_the_reference(arch):
    assert_is_the_reference(under(exact(tiny_model(Slr(), arch)), Coconut()), tolerance=ROUNDED)


@pytest.mark.parametrize("stage", range(5))
def test_c2_every_stage_equals_the_reference_in_double_precision(stage):
    assert_is_the_reference(sharp_model(Coconut()), [stage] * 6)


@pytest.mark.parametrize("loop", [{}, {"site": "pre_norm"}, {"detach": True}], ids=str)
@by_arch
def test_c4_mixed_stages_in_one_batch_equal_the_reference_and_single_rows(loop, arch):
    model = under(exact(tiny_model(Slr(), arch)), Coconut(loop=loop))
    assert_is_the_reference(model, STAGES)


@pytest.mark.parametrize("chosen", [range(6), [3, 4], [2, 2], [1, 5], [4]], ids=str)
def test_c4_examples_with_fewer_steps_may_have_fewer_latents(chosen):
    assert_is_the_reference(sharp_model(Coconut(pad_latent_to_max=False)), examples=[MIXED[i] for i in chosen])


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_c5_the_gradient_runs_through_every_link_from_the_last_token_alone_unless_they_are_cut(k, detach):
    links = link_gradients(sharp_model(of_latents(k, loop={"detach": detach})))
    assert len(links) == k
    assert all(link.abs().max() == 0 if detach else link.abs().max() > 1e-9 for link in links)


def link_gradients(model):
    """The gradient of the last token's loss by each state that is fed back: at <bot> and at all but the last latent."""
    batch = model.batch(model.rows(MIXED[:1]))
    batch.predict_at_U, batch.targets_U = batch.predict_at_U[-1:], batch.targets_U[-1:]
    with states(model) as seen:
        model(batch).loss.backward()
    # the last pass reads the last latent, <eot> and the text
    return [torch.zeros(1) if state.grad is None else state.grad[:, -1] for state in seen[:-1]]


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_training_takes_k_plus_one_passes_and_reads_every_column_once(k):
    model = sharp_model(of_latents(k))
    batch = model.batch(model.rows(MIXED))
    with passes(model) as seen:
        model(batch)
    prefix, suffix = batch.bounds[0], batch.ids_BS.shape[1] - batch.bounds[1]
    expected = [prefix, *[1] * (k - 1), 1 + suffix] if k else [prefix + suffix]
    assert [embeds.shape[1] for embeds in seen] == expected


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_answering_takes_one_pass_k_latents_and_one_for_each_token(k):
    model = lean_towards_end(sharp_model(of_latents(k)), -100.0)
    with passes(model) as seen:
        costs = [generation.cost for generation in model.generate(QUESTIONS, max_new_tokens=4)]
    prefix = max(len(row) for row in model.prompts(QUESTIONS)) - k - 1
    assert [embeds.shape[1] for embeds in seen] == [prefix, *[1] * (k - 1), 2, 1, 1, 1] if k else [prefix + 1, 1, 1, 1]
    assert {cost.passes for cost in costs} == {k + 4}
    assert [cost.positions for cost in costs] == [len(row) + 3 for row in model.prompts(QUESTIONS)]


@pytest.mark.parametrize("k", [0, 1, 4])
@by_arch
def test_cached_and_batched_decoding_equals_uncached_decoding(k, arch):
    assert_writes_like_the_reference(sharp_model(of_latents(k), arch), passes_before=k)


def test_states_before_the_first_latent_do_not_depend_on_the_latents():
    model = sharp_model(of_latents(5, thought="pause"))
    n_before = model.batch(model.rows(MIXED)).bounds[0]
    with states(model) as seen:
        before = model.answer_logits(MIXED)
        change_embedding(model, "<lat>")
        after = model.answer_logits(MIXED)
    real = model.batch(model.rows(MIXED)).mask_BS[:, :n_before].bool()
    assert torch.equal(seen[0][:, :n_before][real], seen[1][:, :n_before][real])
    assert all((a - b).abs().amax(1).min() > 1e-4 for a, b in zip(before, after))


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"latents_per_step": -1}, "latents_per_step is -1, but must be"),
        ({"curriculum.max_stage": 0}, "first_stage"),
        ({"loop.alpha": 1.5}, "between 0 and 1"),
        ({"thought": "pause", "loop.detach": True}, "leave the loop's settings out"),
    ],
)
def test_impossible_settings_are_refused_with_the_way_to_mend_them(fields, mend):
    with pytest.raises(InputError, match=mend):
        make(Coconut, **fields)


def test_mixed_stages_change_the_rows_of_a_batch_and_the_seed_fixes_them():
    model = tiny_model(Coconut(curriculum={"mix": "uniform"}))
    rows = [[row.ids() for row in model.rows(MIXED, 4, seed)] for seed in ("0/7", "0/7", "1/7")]
    assert rows[0] == rows[1] != rows[2]

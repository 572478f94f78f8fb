"""Stable Latent Reasoning: it equals the slow reference, and the invariants of its card (slr.md, section 9).

Here: S2 each iteration has its row of the timestep table (past it: tests/test_stabilize.py). S9 rows with different
numbers of iterations == single rows. S10 cached == uncached, the passes of training. S12 `detach`. All of the card's:
test_slr_{equalities,batches,passes,gradients}.py; every setting: test_slr_settings.py.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import Slr
from innerloop.text.row import IGNORE
from tests.methods.reference import Reference
from tests.methods.slowly import assert_logits_of_the_reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    RAMP,
    RAMP_STAGES,
    SHOWN,
    SMALL,
    assert_close,
    assert_same_gradients,
    assert_writes_like_the_reference,
    change,
    choices,
    gradients,
    labels_by_loop,
    logits_of,
    passes,
    rows_at,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_model

BARE = change(SMALL, loop={"residual": "none", "rescale": "none", "time": "none"})
RESIDUALS, SITES = {"loop.residual": ["none", "sum", "A", "B"]}, ["post_norm", "pre_norm"]
ORDER = {"loop_scope": ["slots", "append"], "h0": ["embed", "forward"], "answer_from": ["refeed", "kv_last"]}


def assert_gradients_of_the_reference(model, examples, stages=None):
    """The gradient of the loss by every weight is the slow reference's, every example at its stage."""
    rows = model.rows(examples) if stages is None else rows_at(model, examples, stages)
    expected = gradients(model, Reference(model).loss(list(examples), stages))
    assert_same_gradients(gradients(model, model(model.batch(rows)).loss), expected, 1e-5)


@choices(**ORDER, **RESIDUALS)
def test_every_combination_equals_the_reference(settings):
    model = sharp_model(change(SMALL, **settings))
    assert_logits_of_the_reference(model, MIXED[:2])
    assert_gradients_of_the_reference(model, MIXED[:2])


@choices(loop_scope=["slots", "append"], **RESIDUALS, **{"loop.time": ["none", "lookup"], "loop.site": SITES})
def test_without_rescaling_the_reference_is_met_in_double_precision(settings):
    model = sharp_model(change(SMALL, **{"loop.rescale": "none", **settings}))
    assert_logits_of_the_reference(model, MIXED[:3], tolerance=None)


def test_s2_each_iteration_trains_its_own_row_of_the_timestep_table():
    model = sharp_model(change(SMALL, max_loops=3, curriculum={"max_stage": 1}, loops_per_stage=2))
    model.loss(MIXED, stage=1).loss.backward()  # two of three iterations
    used = model.loop.time.table.grad.abs().amax(1) > 0
    assert used.tolist() == [True, True, False]


def test_rescaling_brings_every_state_to_the_rms_of_the_embeddings():
    model = sharp_model(change(BARE, loop={"rescale": "rms"}))
    for entry in model.loss(MIXED, trace=True).trace.iterations:
        assert torch.allclose(entry.rms, model.backbone.embed_rms())


@choices(**ORDER)
def test_s9_rows_with_different_numbers_of_iterations_equal_single_rows(settings):
    """At a stage without an iteration the last pass over the latents, for kv_last, is the one that reads <lat>."""
    model = sharp_model(change(RAMP, loop={"rescale": "none"}, **settings))
    rows = rows_at(model, MIXED, RAMP_STAGES)
    assert [row.n_loops for row in rows] == [4, 0, 2, 4, 2, 0]
    for row, together in zip(rows, logits_of(model, rows)):
        assert_close(together, logits_of(model, [row])[0])


@choices(**ORDER)
def test_s9_rows_at_a_stage_without_iterations_equal_the_reference(settings):
    assert_logits_of_the_reference(sharp_model(change(RAMP, **settings)), MIXED, stage=0)


@choices(loop_scope=["slots", "append"], answer_from=["refeed", "kv_last"], **{"loop.time": ["none", "lookup"]})
def test_s9_gradients_of_rows_with_different_numbers_of_iterations_equal_the_reference(settings):
    assert_gradients_of_the_reference(sharp_model(change(RAMP, **settings)), MIXED, RAMP_STAGES)


@choices(loop_scope=["slots", "append"])
def test_s9_step_read_outs_of_such_rows_equal_the_reference(settings):
    shown = change(RAMP, step_weight=0.5, slots_per_step=1, **settings)
    assert_gradients_of_the_reference(sharp_model(shown), MIXED, RAMP_STAGES)


@choices(**ORDER, max_loops=[0, 1, 3])
def test_s10_training_reads_the_prefix_once_and_the_region_once_for_each_iteration(settings):
    method = change(SMALL, **settings)
    model = sharp_model(method)
    batch = model.batch(model.rows(MIXED))
    with passes(model) as seen:
        model(batch)
    prefix, suffix = batch.bounds[0], batch.ids_BS.shape[1] - batch.bounds[1]
    in_slots, n_loops = method.loop_scope == "slots", method.max_loops
    width = 4 if in_slots else 1
    n_region_passes = n_loops + (in_slots and method.h0 == "forward")
    fed = width if method.answer_from == "refeed" else 0
    expected = [prefix, *[width] * n_region_passes, fed + suffix]
    if n_loops == 0 and method.h0 == "embed":
        expected = [prefix + width + suffix]
    assert [embeds.shape[1] for embeds in seen] == expected


@choices(**ORDER, max_loops=[0, 2])
def test_s10_cached_and_batched_decoding_equals_uncached_decoding(settings):
    method = change(SMALL, **settings)
    loops = method.max_loops + (method.loop_scope == "slots" and method.h0 == "forward")
    is_one_pass = method.max_loops == 0 and method.h0 == "embed"
    assert_writes_like_the_reference(sharp_model(method), passes_before=0 if is_one_pass else 1 + loops)


def test_s10_cached_and_batched_decoding_equals_uncached_decoding_on_llama():
    assert_writes_like_the_reference(sharp_model(SMALL, "llama"), passes_before=4)


@choices(loop_scope=["slots", "append"])
def test_s12_detach_leaves_the_values_and_cuts_each_input_from_the_output_before_it(settings):
    model = sharp_model(change(BARE, **settings))
    cut = under(model, change(BARE, loop={"detach": True}, **settings))
    for left, right in zip(model.answer_logits(MIXED), cut.answer_logits(MIXED)):
        assert torch.equal(left, right)
    with states(cut) as seen:
        cut.loss(MIXED).loss.backward()
    *inner, last, _ = seen[1:]  # outputs u_1, .., u_T; the answer's pass
    assert len(inner) == 2
    assert all(state.grad is None or state.grad.abs().max() == 0 for state in inner)
    if settings["loop_scope"] == "slots":
        assert last.grad.abs().max() > 0  # u_T is fed to the answer, not to an iteration


# Step read-outs


@pytest.mark.parametrize(
    ("step_map", "n_loops", "slots_per_step", "shown"),
    [
        # (iteration, step, first slot): sigma(t) = ceil(4 t / T); blocks of c slots, round and round
        ("stretch", 3, 2, [(1, 2, 2), (2, 3, 0), (3, 4, 2)]),
        ("stretch", 4, 1, [(1, 1, 0), (2, 2, 1), (3, 3, 2), (4, 4, 3)]),
        ("stretch", 2, 0, [(1, 2, 0), (2, 4, 0)]),
        ("stretch", 6, 2, [(1, 1, 0), (2, 2, 2), (3, 2, 2), (4, 3, 0), (5, 4, 2), (6, 4, 2)]),
        ("one2one", 3, 2, [(1, 1, 0), (2, 2, 2), (3, 4, 2)]),
        ("one2one", 6, 2, [(1, 1, 0), (2, 2, 2), (3, 3, 0), (4, 4, 2)]),
        ("one2one", 1, 2, [(1, 4, 2)]),
    ],
)
def test_each_iteration_shows_the_step_and_slots_worked_out_by_hand(step_map, n_loops, slots_per_step, shown):
    n = 4 if slots_per_step else 8  # of which no step fills all
    method = Slr(n_slots=n, max_loops=n_loops, step_weight=1.0, slots_per_step=slots_per_step, step_map=step_map)
    model, example = sharp_model(method), MIXED[3]  # four steps
    steps = [model.tokenizer.encode(step + "\n") for step in example.steps]
    expected = [[IGNORE] * n for _ in range(n_loops)]
    for iteration, step, slot in shown:
        for j, token in enumerate(steps[step - 1][: slots_per_step or n]):
            expected[iteration - 1][slot + j] = token
    (row,) = model.rows([example])
    assert labels_by_loop(row) == expected

    # the term is the mean cross-entropy of the head on the states of those passes
    with states(model) as seen:
        out = model.loss([example])
    losses = []
    for iteration, labels in enumerate(expected, 1):
        logits = model.backbone.head(seen[iteration][0]).detach()  # pass 0 is the prefix
        losses += [cross_entropy(logits[j], torch.tensor(i)) for j, i in enumerate(labels) if i != IGNORE]
    assert out.terms["step"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert out.loss.item() == pytest.approx((out.terms["answer"] + out.terms["step"]).item(), rel=1e-5)


def test_only_steps_that_have_left_the_text_are_shown():
    model = tiny_model(Slr(n_slots=8, max_loops=2, curriculum={"max_stage": 3}, step_weight=1.0))
    one, two, three, four = (model.tokenizer.encode(step + "\n")[0] for step in MIXED[3].steps)
    rows = [model.rows([MIXED[3]], stage)[0] for stage in range(5)]
    firsts = [[labels[0] for labels in labels_by_loop(row)] for row in rows]
    assert firsts == [[IGNORE, IGNORE], [one, one], [one, two], [two, three], [two, four]]


def test_states_before_the_norm_are_shown_through_the_norm():
    model = sharp_model(change(SMALL, loop={"site": "pre_norm", "rescale": "none"}, **SHOWN))
    assert_gradients_of_the_reference(model, MIXED)
    top_ids = model.loss(MIXED[:1], trace=True).trace.iterations[-1].top_ids[0]
    assert torch.equal(top_ids, Reference(model).think(QUESTIONS[0], 0)[1][-1].topk(5).indices)


def test_step_read_outs_change_the_loss_by_their_weight_and_no_logits():
    model = sharp_model(SMALL)
    shown = under(model, change(SMALL, **SHOWN))
    for left, right in zip(model.answer_logits(MIXED), shown.answer_logits(MIXED)):
        assert torch.equal(left, right)
    out, stepless = shown.loss(MIXED), [MIXED[1], MIXED[5]]
    assert out.loss.item() == pytest.approx((model.loss(MIXED).loss + 0.5 * out.terms["step"]).item(), rel=1e-5)
    assert torch.equal(shown.loss(stepless).loss, model.loss(stepless).loss)


def test_the_trace_holds_every_iteration_with_its_change_and_read_out():
    model = sharp_model(SMALL)
    slow = Reference(model)
    iterations = model.loss(MIXED[:2], trace=True).trace.iterations
    assert [entry.loop for entry in iterations] == [1, 2, 3]
    with torch.no_grad():
        for row, example in enumerate(MIXED[:2]):
            _, shown = slow.think(example.question, 0)
            for entry, logits_NV in zip(iterations, shown):
                top = logits_NV.softmax(-1).topk(5)
                assert torch.equal(entry.top_ids[row], top.indices)
                assert torch.allclose(entry.top_probs[row].double(), top.values, atol=1e-5)
                assert entry.delta.shape == entry.cosine.shape == entry.rms.shape == (2,)

"""Stable Latent Reasoning: it equals the slow reference, and the invariants of its card (slr.md, section 9).

Those of what is built, in the card's order: S1 T = 0 == pause (tests/test_one_loop.py). S2 a timestep table of zeros
changes nothing. S3 residuals A, B, sum (also tests/test_one_loop.py). S4 h0 = forward == one iteration more, S5 kv_last
== refeed with one iteration less, S6 append == Coconut (all three: tests/test_one_loop.py). S7 sum == LOTUS. S8 the
linear toy. S9 rows with different numbers of iterations == single rows. S10 cached == uncached, passes counted.
S11 prefix states do not depend on t. S12 `detach`. All of the card's: test_slr_equalities.py,
test_slr_batches.py, test_slr_passes.py and test_slr_gradients.py; every setting: test_slr_settings.py.
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import Slr
from innerloop.config.loop import LoopSettings
from innerloop.loop.loop import InnerLoop
from innerloop.text.row import IGNORE
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    RAMP,
    RAMP_STAGES,
    ROUNDED,
    SHOWN,
    SMALL,
    assert_causal,
    assert_close,
    assert_learns_by_heart,
    assert_same_gradients,
    assert_writes_like_the_reference,
    change,
    change_embedding,
    choices,
    exact,
    gradients,
    iterate,
    labels_by_loop,
    lean_towards_end,
    logits_of,
    passes,
    rows_at,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_model

BARE = change(SMALL, residual="none", rescale="none", time="none")


# Equal to the reference


@pytest.mark.parametrize(
    "method",
    [change(SMALL, **SHOWN), change(SMALL, loop_scope="append", residual="B", h0="forward")],
    ids=["slots", "append"],
)
def test_loss_logits_and_gradients_equal_the_reference(method, arch):
    model = under(exact(tiny_model(Slr(), arch)), method)
    slow = Reference(model)
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(MIXED), MIXED):
            assert_close(fast, slow.answer_logits(example), ROUNDED)
    loss, expected = model.loss(MIXED).loss, slow.loss(list(MIXED))
    assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@choices(
    loop_scope=["slots", "append"],
    h0=["embed", "forward"],
    answer_from=["refeed", "kv_last"],
    residual=["none", "sum", "A", "B"],
)
def test_every_combination_equals_the_reference(settings):
    model = sharp_model(change(SMALL, rescale="rms", time="lookup", **settings))
    slow, chosen = Reference(model), list(MIXED[:2])
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(chosen), chosen):
            assert_close(fast, slow.answer_logits(example), ROUNDED)
    expected = gradients(model, slow.loss(chosen))
    assert_same_gradients(gradients(model, model.loss(chosen).loss), expected, 1e-5)


@choices(
    loop_scope=["slots", "append"],
    residual=["none", "sum", "A", "B"],
    time=["none", "lookup"],
    feedback_site=["post_norm", "pre_norm"],
)
def test_without_rescaling_the_reference_is_met_in_double_precision(settings):
    model = sharp_model(change(SMALL, rescale="none", **settings))
    slow = Reference(model)
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(MIXED[:3]), MIXED):
            assert_close(fast, slow.answer_logits(example))


# S2, S3: stabilisers


def test_s2_a_new_timestep_table_is_zero_and_changes_nothing():
    model = sharp_model(change(SMALL, time="none"))
    timed = under(model, SMALL)
    with torch.no_grad():
        timed.loop.time.table.zero_()
    assert tiny_model(SMALL).loop.time.table.abs().max() == 0
    assert tiny_model(SMALL).loop.time.table.shape == (3, 32)
    for left, right in zip(model.answer_logits(MIXED), timed.answer_logits(MIXED)):
        assert torch.equal(left, right)


def test_s2_each_iteration_trains_its_own_row_of_the_timestep_table():
    model = sharp_model(change(SMALL, max_loops=3, max_stage=1, loops_per_stage=2))
    model.loss(MIXED, stage=1).loss.backward()  # two of three iterations
    used = model.loop.time.table.grad.abs().amax(1) > 0
    assert used.tolist() == [True, True, False]


def test_s2_iterations_past_the_table_use_its_last_row():
    loop = InnerLoop(LoopSettings(time="lookup"), width=4, max_loops=2, tau=torch.ones(()))
    torch.nn.init.normal_(loop.time.table)
    inputs = []

    def note(x, t):
        inputs.append(x.detach())
        return torch.zeros_like(x)

    iterate(loop, note, torch.zeros(1, 1, 4), 4)
    rows = loop.time.table.detach()
    assert torch.equal(torch.stack(inputs)[:, 0, 0], rows[[0, 1, 1, 1]])


@choices(loop_scope=["slots", "append"])
def test_s3_with_alpha_zero_every_state_is_the_first(settings):
    for residual in "AB":
        model = sharp_model(change(SMALL, residual=residual, alpha=0.0, **settings))
        trace = model.loss(MIXED, trace=True).trace
        assert all(entry.delta.max() == 0 for entry in trace.iterations)


def test_s3_half_the_sum_is_residual_a_with_alpha_one_half_for_one_update():
    def f(x, t):
        return (3 * x).sin()

    state = torch.linspace(-1, 1, 24).view(2, 3, 4)
    run = {kind: InnerLoop(LoopSettings(residual=kind, alpha=0.5), 4, 1, torch.ones(())) for kind in ("A", "sum")}
    assert_close(iterate(run["sum"], f, state, 1).state / 2, iterate(run["A"], f, state, 1).state, 1e-7)


def test_rescaling_brings_every_state_to_the_rms_of_the_embeddings():
    model = sharp_model(change(BARE, rescale="rms"))
    for entry in model.loss(MIXED, trace=True).trace.iterations:
        assert torch.allclose(entry.rms, model.backbone.embed_rms())


def test_s7_sum_is_a_hand_written_lotus_loop():
    """refeed with T = R == kv_last with T = R + 1 == LOTUS, and h^(R) = z_T - E."""
    r, n = 3, 4
    refeed = sharp_model(change(BARE, residual="sum", max_loops=r))
    kv_last = under(refeed, change(BARE, residual="sum", max_loops=r + 1, answer_from="kv_last"))
    slow = Reference(refeed)
    with torch.no_grad():
        for example, left, right in zip(MIXED, refeed.answer_logits(MIXED), kv_last.answer_logits(MIXED)):
            expected = slow.logits_after(slow.lotus(example.question, n, r), slow.written(example, 0))
            assert_close(left, expected)
            assert_close(right, expected)
            with states(kv_last) as seen:
                kv_last.answer_logits([example])
            *_, h_last, _ = seen  # the pass before the suffix's
            x_LD = slow.lotus(example.question, n, r)
            last_pass = slow.read(x_LD[:-1])[0][-n:]
            assert_close(h_last[0], last_pass)


@pytest.mark.parametrize("eigenvalue", [0.9, -0.9, -1.2, 0.3])
def test_s8_residuals_move_the_linear_toy_to_the_fixed_points_of_theory(eigenvalue):
    j = torch.tensor([[eigenvalue, 0.2], [0.0, 0.5]], dtype=torch.float64)
    b, h0, one = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 1.0]).double(), torch.eye(2).double()

    def settle(residual, alpha):
        loop = InnerLoop(LoopSettings(residual=residual, alpha=alpha), 2, 1, torch.ones(()))
        return iterate(loop, lambda x, t: x @ j.T + b, h0.view(1, 1, 2), 500).state[0, 0]

    fixed = torch.linalg.solve(one - j, b)
    assert_close(settle("B", 0.5), fixed, 1e-8)
    assert_close(settle("A", 0.7), torch.linalg.solve(one - 0.7 * j, 0.7 * b + 0.3 * h0), 1e-8)
    undamped = settle("none", 1.0)
    assert (undamped - fixed).norm() > 1e3 if eigenvalue < -1 else (undamped - fixed).norm() < 1e-8


# S9: rows of a batch


@choices(loop_scope=["slots", "append"], h0=["embed", "forward"], answer_from=["refeed", "kv_last"])
def test_s9_rows_with_different_numbers_of_iterations_equal_single_rows(settings):
    """At a stage without an iteration the last pass over the latents, for kv_last, is the one that reads <lat>."""
    model = sharp_model(change(RAMP, rescale="none", **settings))
    rows = rows_at(model, MIXED, RAMP_STAGES)
    assert [row.n_loops for row in rows] == [4, 0, 2, 4, 2, 0]
    for row, together in zip(rows, logits_of(model, rows)):
        assert_close(together, logits_of(model, [row])[0])


@choices(loop_scope=["slots", "append"], h0=["embed", "forward"], answer_from=["refeed", "kv_last"])
def test_s9_rows_at_a_stage_without_iterations_equal_the_reference(settings):
    model = sharp_model(change(RAMP, **settings))
    slow = Reference(model)
    with torch.no_grad():
        for fast, example in zip(model.answer_logits(MIXED, stage=0), MIXED):
            assert_close(fast, slow.answer_logits(example, 0), ROUNDED)


@choices(loop_scope=["slots", "append"], answer_from=["refeed", "kv_last"], time=["none", "lookup"])
def test_s9_gradients_of_rows_with_different_numbers_of_iterations_equal_the_reference(settings):
    model = sharp_model(change(RAMP, **settings))
    slow = Reference(model)
    expected = gradients(model, slow.loss(list(MIXED), RAMP_STAGES))
    loss = model(model.batch(rows_at(model, MIXED, RAMP_STAGES))).loss
    assert_same_gradients(gradients(model, loss), expected, 1e-5)


def test_s9_step_read_outs_of_rows_with_different_numbers_of_iterations_equal_the_reference():
    model = sharp_model(change(RAMP, step_weight=0.5, slots_per_step=1))
    slow = Reference(model)
    expected = gradients(model, slow.loss(list(MIXED), RAMP_STAGES))
    out = model(model.batch(rows_at(model, MIXED, RAMP_STAGES)))
    assert out.terms["step"] > 0
    assert_same_gradients(gradients(model, out.loss), expected, 1e-5)


@choices(loop_scope=["slots", "append"])
def test_s9_permuting_rows_permutes_results(settings):
    model = sharp_model(change(SMALL, **settings))
    order = [3, 0, 5, 1, 4, 2]
    logits = model.answer_logits(MIXED)
    for i, permuted in zip(order, model.answer_logits([MIXED[i] for i in order])):
        assert_close(permuted, logits[i], ROUNDED)


# S10, S11: passes


@choices(
    loop_scope=["slots", "append"],
    h0=["embed", "forward"],
    answer_from=["refeed", "kv_last"],
    max_loops=[0, 1, 3],
)
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


@choices(
    loop_scope=["slots", "append"],
    h0=["embed", "forward"],
    answer_from=["refeed", "kv_last"],
    max_loops=[0, 2],
)
def test_s10_cached_and_batched_decoding_equals_uncached_decoding(settings):
    method = change(SMALL, **settings)
    loops = method.max_loops + (method.loop_scope == "slots" and method.h0 == "forward")
    is_one_pass = method.max_loops == 0 and method.h0 == "embed"
    assert_writes_like_the_reference(sharp_model(method), passes_before=0 if is_one_pass else 1 + loops)


def test_s10_cached_and_batched_decoding_equals_uncached_decoding_on_llama():
    assert_writes_like_the_reference(sharp_model(SMALL, "llama"), passes_before=4)


@choices(loop_scope=["slots", "append"], answer_from=["refeed", "kv_last"])
def test_s10_passes_and_positions_counted_by_a_hook_are_those_of_the_formula(settings):
    method = change(SMALL, **settings)
    model = lean_towards_end(sharp_model(method), -100.0)
    with passes(model) as seen:
        (generation,) = model.generate(QUESTIONS[:1], max_new_tokens=4)
    n_prefix = model.batch(model.prompts(QUESTIONS[:1])).bounds[0]
    width = 4 if method.loop_scope == "slots" else 1
    fed = width if method.answer_from == "refeed" else 0
    assert generation.cost.passes == len(seen) == 1 + 3 + 4
    positions = n_prefix + 3 * width + (fed + 1) + 3
    assert generation.cost.positions == sum(embeds.shape[1] for embeds in seen) == positions


def test_s11_prefix_states_depend_neither_on_the_latents_nor_on_the_timestep():
    model = sharp_model(SMALL)
    with states(model) as seen:
        model.answer_logits(MIXED[:1])
        n_passes = len(seen)
        change_embedding(model, "<lat>")
        torch.nn.init.normal_(model.loop.time.table)
        model.answer_logits(MIXED[:1])
    assert torch.equal(seen[0], seen[n_passes])
    assert (seen[1] - seen[n_passes + 1]).abs().max() > 1e-3


@choices(loop_scope=["slots", "append"])
def test_a_token_changes_no_logits_before_it(settings):
    assert_causal(sharp_model(change(SMALL, **settings)), MIXED[0])


@choices(loop_scope=["slots", "append"])
def test_s12_detach_leaves_the_values_and_cuts_each_input_from_the_output_before_it(settings):
    model = sharp_model(change(BARE, **settings))
    cut = under(model, change(BARE, detach=True, **settings))
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
    method = change(SMALL, max_loops=n_loops, step_weight=1.0, slots_per_step=slots_per_step, step_map=step_map)
    model, example = sharp_model(method), MIXED[3]  # four steps
    steps = [model.tokenizer.encode(step + "\n") for step in example.steps]
    expected = [[IGNORE] * 4 for _ in range(n_loops)]
    for iteration, step, slot in shown:
        for j, token in enumerate(steps[step - 1][: slots_per_step or 4]):
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


def test_a_step_shorter_than_its_block_leaves_the_rest_of_it_free():
    model = tiny_model(Slr(n_slots=8, max_loops=2, step_weight=1.0))
    (row,) = model.rows([MIXED[4]])
    ids = model.tokenizer.encode("0 + 3\n")
    assert len(ids) == 4
    assert labels_by_loop(row)[0] == ids + [IGNORE] * 4


def test_only_steps_that_have_left_the_text_are_shown():
    model = tiny_model(Slr(n_slots=8, max_loops=2, max_stage=3, step_weight=1.0))
    steps = [model.tokenizer.encode(step + "\n") for step in MIXED[3].steps]
    rows = [model.rows([MIXED[3]], stage)[0] for stage in range(5)]
    firsts = [[labels[0] for labels in labels_by_loop(row)] for row in rows]
    digit = [ids[0] for ids in steps]
    assert firsts == [
        [IGNORE, IGNORE],
        [digit[0], digit[0]],
        [digit[0], digit[1]],
        [digit[1], digit[2]],
        [digit[1], digit[3]],
    ]


def test_states_before_the_norm_are_shown_through_the_norm():
    model = sharp_model(change(SMALL, feedback_site="pre_norm", rescale="none", **SHOWN))
    slow = Reference(model)
    expected = gradients(model, slow.loss(list(MIXED)))
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), expected, 1e-5)
    top_ids = model.loss(MIXED[:1], trace=True).trace.iterations[-1].top_ids[0]
    assert torch.equal(top_ids, slow.think(QUESTIONS[0], 0)[1][-1].topk(5).indices)


def test_examples_without_steps_have_no_step_term():
    model = sharp_model(change(SMALL, **SHOWN))
    without = model.loss([MIXED[1], MIXED[5]])
    assert "step" not in without.terms or without.terms["step"] == 0
    assert torch.equal(without.loss, under(model, SMALL).loss([MIXED[1], MIXED[5]]).loss)


def test_step_read_outs_change_the_loss_by_their_weight_and_no_logits():
    model = sharp_model(SMALL)
    shown = under(model, change(SMALL, **SHOWN))
    for left, right in zip(model.answer_logits(MIXED), shown.answer_logits(MIXED)):
        assert torch.equal(left, right)
    out = shown.loss(MIXED)
    assert out.loss.item() == pytest.approx((model.loss(MIXED).loss + 0.5 * out.terms["step"]).item(), rel=1e-5)


def test_a_model_without_an_opinion_has_log_v_in_both_terms():
    model = sharp_model(change(SMALL, **SHOWN))
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.zero_()
    terms = {name: term.item() for name, term in model.loss(MIXED).terms.items()}
    assert terms == pytest.approx(dict.fromkeys(["answer", "step"], math.log(len(model.tokenizer))), rel=1e-5)


# The trace


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


# Learning


@choices(loop_scope=["slots", "append"])
@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(settings, examples):
    assert_learns_by_heart(Slr(n_slots=4, max_loops=2, **settings), examples)

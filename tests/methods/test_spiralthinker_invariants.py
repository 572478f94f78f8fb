"""SpiralThinker's invariants, in the order of its card (spiralthinker.md, section 9), on GPT-2 and Llama shapes.

1.  Pattern `none` is the explicit teacher; K = 0 is interleaved pauses (4); one block: tests/test_one_loop.py.
2.  g_phi: re-scaling when W_2 = 0, RMS tau always.
3.  v_k: alpha -> inf is `last`, alpha = 0 is `uniform`, K = 1 makes all equal; they sum to one and grow.
4.  lambda = 0 is iteration without alignment, K = 0 with pass 0 aligned is alignment without iteration.
5.  Answering equals training (test_spiralthinker_blocks.py).
6.  One block with the identity for an adapter is LOTUS `replace` with R = K: tests/test_one_loop.py.
7.  What comes before the first latent has the same states in all passes.
8.  No loss and no gradient where the student's states are the teacher's; the teacher learns nothing.
9.  <lat> is read in pass 0 alone.
10. A fixed point stays one.
"""

import itertools
import math

import pytest
import torch

from innerloop.methods import SpiralThinker
from innerloop.methods.latent.spiralthinker import pass_weights
from innerloop.model.losses import follow_loss
from tests.methods.reference import Reference
from tests.methods.spiralthinker_reference import ALIGNED, SPIRAL, Spiral, student
from tests.methods.tools import (
    MIXED,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    by_arch,
    change,
    change_embedding,
    gradients,
    passes,
    same_weights,
)

by_schedule = pytest.mark.parametrize("schedule", ["parallel", "sequential"])


def tolerance(arch):
    return 1e-10 if arch == "gpt2" else ROUNDED


@by_arch
def test_1_without_blocks_it_is_the_explicit_teacher(arch):
    model = student(arch, SpiralThinker(pattern="none"))
    slow = Reference(model)
    bot, eot = slow.marker("<bot>"), slow.marker("<eot>")
    with torch.no_grad(), passes(model) as seen:
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            written = [t for step in slow.steps(example) for t in (*bot, *step, *eot)] + slow.answer(example)
            assert_close(logits, slow.logits_after(slow.embed(slow.question(example.question)), written), ROUNDED)
    assert len(seen) == 1 + len(MIXED)  # one of ours, the rest are the reference's


@pytest.fixture
def states_ND():
    return 3 * torch.randn(7, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_2_without_w2_the_adapter_rescales(states_ND):
    g = student("gpt2", SPIRAL, stirred=False).loop.rescale
    assert g.outer.weight.abs().max() == 0  # as it begins
    rms = states_ND.square().mean(-1, keepdim=True).sqrt()
    assert_close(g(states_ND), g.tau * states_ND / rms)
    for scale in (0.01, 40.0):
        assert_close(g(scale * states_ND), g(states_ND))


@pytest.mark.parametrize("loop", [{}, {"width": 5}, {"gain": True}], ids=str)
def test_2_the_rms_of_what_is_written_back_is_tau_but_for_a_gain(states_ND, loop):
    model = student("gpt2", change(SPIRAL, loop=loop))
    g, width = model.loop.rescale, loop.get("width", 32)
    assert g.inner.weight.shape == (width, 32) and g.outer.weight.shape == (32, width)
    table = model.backbone.lm.get_input_embeddings().weight
    assert g.tau.item() == pytest.approx(table.square().mean().sqrt().item(), rel=1e-6)
    assert_close(g(states_ND), Spiral(model).g(states_ND), 1e-12)
    rms = g(states_ND).square().mean(-1).sqrt()
    if "gain" in loop:
        assert rms.std() > 1e-3
    else:
        assert_close(rms, g.tau.expand(7), 1e-12)
    assert (g(2 * states_ND) - g(states_ND)).abs().max() > 1e-3  # with W_2 it knows the scale


@pytest.mark.parametrize("first", [0, 1])
def test_3_the_weights_of_the_passes(first):
    for n in (1, 2, 5):
        v = pass_weights(n, first, "softmax", 1.0)
        raw = [math.exp(k) for k in range(first, n + 1)]
        assert v == pytest.approx([value / sum(raw) for value in raw])
        assert sum(v) == pytest.approx(1) and all(b > a for a, b in itertools.pairwise(v))
        assert pass_weights(n, first, "softmax", 0.0) == pass_weights(n, first, "uniform", 3.0)
        assert pass_weights(n, first, "softmax", 200.0) == pytest.approx(pass_weights(n, first, "last", 1.0))
    assert pass_weights(1, 1, "softmax", 0.7) == pass_weights(1, 1, "uniform", 0.7) == pass_weights(1, 1, "last", 0.7)
    assert pass_weights(400, first, "softmax", 2.0)[-1] > 0.8  # no overflow


@by_arch
@by_schedule
def test_4_without_alignment_only_text_is_learned(schedule, arch):
    model = student(arch, change(SPIRAL, max_loops=3, block_schedule=schedule))
    output, slow = model.loss(MIXED), Spiral(model)
    assert output.terms.keys() == {"answer"}
    assert_same_gradients(gradients(model, output.loss), gradients(model, slow.loss(MIXED)), 1e-5)
    aligned = student(arch, change(ALIGNED, block_schedule=schedule))
    assert output.loss.item() == pytest.approx(aligned.loss(MIXED).terms["answer"].item(), rel=1e-5)


@by_arch
@by_schedule
def test_4_alignment_without_iteration(schedule, arch):
    method = change(ALIGNED, max_loops=0, align_static_pass=True, block_schedule=schedule)
    model = student(arch, method)
    slow = Spiral(model)  # which reads interleaved pauses
    assert slow.weights() == [1.0]
    with passes(model) as seen:
        output = model.loss(MIXED)
    assert len(seen) == (1 if schedule == "parallel" else 2)  # the most blocks of a row
    expected = slow.loss(MIXED)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model, output.loss), gradients(model, expected), 1e-5)


@by_arch
@by_schedule
@pytest.mark.parametrize("pattern", ["odd", "even", "all"])
def test_7_what_comes_before_the_first_latent_never_changes(pattern, schedule, arch):
    """And the question is read once, however many passes there are."""
    model = student(arch, change(SPIRAL, pattern=pattern, block_schedule=schedule))
    slow, example = Spiral(model), MIXED[0]
    row, asked = slow.lay_out(example), slow.embed(slow.question(example.question))
    before, other = row.blocks[0][0], torch.randn(2, 32, dtype=torch.double)
    with torch.no_grad():
        x_LD = slow.embed(row.ids)
        z_LD = x_LD.index_copy(0, torch.tensor(row.blocks[0]), other)
        for one, two in zip(slow.run(x_LD)[1], slow.run(z_LD)[1]):
            assert torch.equal(one[:before], two[:before])
            assert (one - two)[before:].abs().max() > 1e-3
        with passes(model) as seen:
            model.answer_logits([example])
    assert len(seen) > 2
    assert sum(inputs.shape[1] >= len(asked) and torch.equal(inputs[0, : len(asked)], asked) for inputs in seen) == 1


@by_schedule
@pytest.mark.parametrize("distance", ["l1", "l1_sum", "l2", "smooth_l1"])
def test_8_states_that_are_the_teachers_have_no_loss_and_no_gradient(distance, schedule):
    model = student("gpt2", change(ALIGNED, hid={"distance": distance}, block_schedule=schedule))
    batch = model.batch(model.rows(MIXED))
    n, d = len(batch.teacher.ids_BS.flatten()), model.backbone.width
    targets = tuple(torch.randn(len(batch), n // len(batch), d, dtype=torch.double) for _ in range(3))
    context = None
    for segment in batch.segments():
        thought = model.think(segment, context=context)
        model.written_logits(segment, thought)
        context, found = thought.after, []
        assert follow_loss(model.loss_inputs(segment, thought), targets, model.method.hid) > 0.1
        for sites in segment.hidden_targets:  # every pass gets the states of a teacher at the sites, in all layers
            is_last = sites.iteration == 0
            passed = thought.answer if is_last else thought.layer_states[sites.iteration - 1]
            start = thought.first_column if is_last else segment.bounds[0]
            rows = list(range(len(segment))) if is_last else thought.loop.outputs[sites.iteration - 1][0]
            at = torch.tensor([rows.index(row) for row in sites.rows_F.tolist()]), sites.columns_F - start
            layers = tuple(state.detach().clone() for state in passed)
            for state, target in zip(layers, targets):
                state[at] = target.flatten(0, 1)[sites.targets_F]
                state.requires_grad_()
            found += layers
            if is_last:
                thought.answer = layers
            else:
                thought.layer_states[sites.iteration - 1] = layers
        loss = follow_loss(model.loss_inputs(segment, thought), targets, model.method.hid)
        assert loss.item() == 0
        loss.backward()
        assert all(state.grad is None or state.grad.abs().max() == 0 for state in found)


def test_8_the_teacher_learns_nothing():
    model = student("gpt2", ALIGNED)
    teacher = model._frozen["teacher"]
    assert all(p.requires_grad for p in teacher.parameters())
    teacher.zero_grad()
    model.loss(MIXED).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in name for name in model.state_dict())
    model.zero_grad()


@by_arch
@by_schedule
def test_9_lat_is_read_in_pass_0_alone(schedule, arch):
    model = student(arch, change(SPIRAL, max_loops=2, block_schedule=schedule), own=True)
    example, lat = MIXED[0], model.tokenizer.convert_tokens_to_ids("<lat>")
    before = model.answer_logits([example])[0]
    change_embedding(model, "<lat>")
    with torch.no_grad(), passes(model) as seen:
        after = model.answer_logits([example])[0]
    assert (before - after)[:, :lat].abs().max() > 1e-6  # the effect survives through h
    is_lat = [bool((inputs == model.backbone.embed(torch.tensor(lat))).all(-1).any()) for inputs in seen]
    assert sum(is_lat) == (1 if schedule == "parallel" else 2)  # pass 0, once for every block that is run by itself


@by_schedule
def test_9_without_the_way_through_h_lat_does_nothing(schedule, monkeypatch):
    """An adapter that forgets its input leaves no trace of <lat>."""
    model = student("gpt2", change(SPIRAL, max_loops=1, block_schedule=schedule), own=True)
    monkeypatch.setattr(model.loop.rescale, "forward", torch.ones_like)
    before, lat = model.answer_logits(MIXED), model.tokenizer.convert_tokens_to_ids("<lat>")
    change_embedding(model, "<lat>")
    for one, other in zip(before, model.answer_logits(MIXED)):
        assert (one - other)[:, lat].abs().max() > 1e-3  # the table is the head too
        one[:, lat] = other[:, lat]
        assert_close(one, other)


@by_schedule
def test_10_a_fixed_point_is_unchanged_by_more_iterations(schedule, monkeypatch):
    """With a contraction for an adapter Z = g(f(Z)) is reached, and stays."""
    model = student("gpt2", change(SPIRAL, block_schedule=schedule))
    center_D = torch.randn(32, dtype=torch.double)

    def contract(output):
        return center_D + 0.05 * output.tanh()

    def after(n):
        method = change(model.method, max_loops=n)
        twin, slow = same_weights(model, method), Spiral(model)
        slow.method, slow.g = method, contract
        monkeypatch.setattr(twin.loop.rescale, "forward", contract)
        with torch.no_grad():
            return twin.answer_logits(MIXED), slow.run_blocks(slow.lay_out(MIXED[0])).fed

    (early, _), (logits, fed), (later, still_fed) = after(2), after(40), after(45)
    for one, other in zip(fed, still_fed):
        assert_close(one, other)
    for one, other in zip(logits, later):
        assert_close(one, other)
    assert max((first - one).abs().max().item() for first, one in zip(early, logits)) > 1e-6

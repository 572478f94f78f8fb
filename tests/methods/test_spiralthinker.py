"""SpiralThinker against a slow twin written from its card's formulas (spiralthinker.md, sections 2 to 4)."""

import pytest
import torch

from tests.methods.slowly import assert_batch_is_its_rows
from tests.methods.spiralthinker_reference import ALIGNED, SPIRAL, Spiral, student
from tests.methods.tools import (
    MIXED,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    by_arch,
    change,
    choices,
    gradients,
    same_weights,
)

PATTERNS = ("odd", "even", "random_parity", "all", "none", "random")
PARITIES = [1, 0, 0, 1, 1, 0]
DRAWN = {"random_parity": PARITIES, "random": [0b101, 0, 0, 0b1011, 0b10, 0]}  # of random, bit i tells of step i
by_schedule = pytest.mark.parametrize("schedule", ["parallel", "sequential"])
by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def stages_of(pattern):
    return DRAWN.get(pattern, [0] * len(MIXED))


def rows_of(model):
    """Lay out each example at a parity of its own, as random_parity does, or with steps of its own in blocks."""
    stages = stages_of(model.method.pattern)
    return [model.method.lay_out(example, model.encoder, stage) for example, stage in zip(MIXED, stages)]


def tolerance(arch):
    return 1e-10 if arch == "gpt2" else ROUNDED


# The whole method against the card's formulas


@by_arch
@by_schedule
@by_pattern
def test_the_logits_of_the_last_pass_are_the_cards(pattern, schedule, arch):
    model = student(arch, change(SPIRAL, pattern=pattern, block_schedule=schedule))
    slow, rows = Spiral(model), rows_of(model)
    with torch.no_grad():
        expected = [slow.logits(example, stage) for example, stage in zip(MIXED, stages_of(pattern))]
    assert_close(model.row_logits(rows), expected, tolerance(arch))


@by_arch
@by_schedule
@pytest.mark.parametrize("pattern", ["odd", "even", "random_parity", "all", "random"])
def test_the_loss_and_its_gradient_are_the_cards(pattern, schedule, arch):
    model = student(arch, change(ALIGNED, pattern=pattern, block_schedule=schedule))
    slow, stages = Spiral(model), stages_of(pattern)
    output = model(model.batch(rows_of(model)))
    expected = slow.loss(MIXED, stages)
    assert output.terms["hid"].item() == pytest.approx(slow.progressive(MIXED, stages).item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model, output.loss), gradients(model, expected), 1e-5)


@by_arch
@by_schedule
@pytest.mark.parametrize("pattern", ["odd", "even", "all", "none"])
def test_text_may_be_learned_in_every_pass(pattern, schedule, arch):
    method = change(SPIRAL, pattern=pattern, block_schedule=schedule, ce_passes="all", max_loops=3)
    model = student(arch, method)
    loss, expected = model.loss(MIXED).loss, Spiral(model).loss(MIXED)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 1e-5)


@by_schedule
def test_all_passes_are_the_last_where_there_is_one(schedule):
    losses = [
        student("gpt2", change(SPIRAL, max_loops=0, block_schedule=schedule, ce_passes=which)).loss(MIXED).loss
        for which in ("last", "all")
    ]
    assert losses[0] == losses[1]


@by_arch
@by_schedule
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_each_pass_is_aligned_as_the_card_says(k, schedule, arch):
    """L_align of pass k alone: `last` of k updates, for passes are the same however many follow."""
    method = change(ALIGNED, max_loops=k, align_schedule="last", align_static_pass=True, block_schedule=schedule)
    model = student(arch, method)
    with torch.no_grad():
        align = Spiral(model).align(MIXED)[k]
        assert model.loss(MIXED).terms["hid"].item() == pytest.approx(align.item(), rel=1e-5)


@choices(distance=["l1", "l1_sum", "l2", "smooth_l1", "cosine"], layers=["last", "all", "all+emb"])
def test_alignment_by_any_distance_and_layers(settings):
    model = student("gpt2", change(ALIGNED, hid=settings))
    with torch.no_grad():
        expected = Spiral(model).progressive(MIXED).item()
        assert model.loss(MIXED).terms["hid"].item() == pytest.approx(expected, rel=1e-5)


@by_arch
def test_states_before_the_norm_may_be_written_back(arch):
    model = student(arch, change(ALIGNED, loop={"site": "pre_norm"}))
    slow = Spiral(model)
    assert model.loss(MIXED).loss.item() == pytest.approx(slow.loss(MIXED).item(), rel=1e-5)


@by_schedule
def test_gradients_flow_through_all_passes(schedule):
    """The back-propagation of K passes is not that of the last one, and reaches <lat> and the adapter."""
    model = student("gpt2", change(SPIRAL, block_schedule=schedule, max_loops=3))
    whole = gradients(model, model.loss(MIXED).loss)
    assert whole["loop.rescale.inner.weight"].abs().max() > 0
    lat = model.tokenizer.convert_tokens_to_ids("<lat>")
    assert whole["backbone.lm.transformer.wte.weight"][lat].abs().max() > 0
    cut = same_weights(model, change(model.method, loop={"bptt": 1}))
    shorter = gradients(cut, cut.loss(MIXED).loss)
    assert (whole["loop.rescale.inner.weight"] - shorter["loop.rescale.inner.weight"]).abs().max() > 1e-6


@by_arch
@by_schedule
@by_pattern
def test_rows_of_a_batch_do_as_alone(pattern, schedule, arch):
    """Rows with 0 to 4 blocks: the same logits, and losses that are means over tokens and over blocks with a step."""
    aligned = change(ALIGNED, hid={"distance": "cosine"})  # which knows no batch statistic
    model = student(arch, change(SPIRAL if pattern == "none" else aligned, pattern=pattern, block_schedule=schedule))
    rows = rows_of(model)
    assert_close(model.row_logits(rows), [model.row_logits([row])[0] for row in rows], tolerance(arch))
    assert_batch_is_its_rows(model, rows)
    if pattern == "odd":
        assert [round(model.batch([row]).counts()["hid"]) for row in rows] == [2, 0, 1, 2, 1, 0]


def test_parallel_and_sequential_differ_from_the_second_block_on():
    parallel = student("gpt2", SPIRAL)
    sequential = same_weights(parallel, change(SPIRAL, block_schedule="sequential"))
    for example, one, other in zip(MIXED, parallel.answer_logits(MIXED), sequential.answer_logits(MIXED)):
        is_same = (one - other).abs().max().item() < 1e-10
        assert is_same == (len(example.steps) < 3)  # two blocks from the third step on

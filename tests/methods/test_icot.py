"""Stepwise internalisation (icot.md): its rows against literal deletion, its schedule, and the invariants of section 9.

1. s = 0 without smoothing is CoT in this layout, 2. s = infinity is No-CoT. 3. The number of supervised tokens.
4. Removing is deleting from the list of tokens. 5. keep_position changes nothing at s = 0. 6. How the
offsets are spread. 7. s(t), exactly. The others are in test_icot_training.py.
"""

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from innerloop.config.curriculum import uniforms
from innerloop.methods import Icot
from innerloop.methods.text.icot import removal_offset
from innerloop.terminal.views import row_view
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    by_arch,
    change,
    gradients,
    on,
)
from tests.models import chain_examples

PLAIN = Icot(smoothing=None, max_removed=12)
ALL = PLAIN.max_removed
by_unit = pytest.mark.parametrize("unit", ["token", "step"])
by_side = pytest.mark.parametrize("side", ["left", "right"])


def tokens(model, example, s=0, unit="token", side="left"):
    """[Q][eos][t_s+1 .. t_n][eos][### A][eos] and what of it is supervised, by editing lists."""
    slow, end = Reference(model), [model.tokenizer.eos_token_id]
    chain = slow.steps(example) if unit == "step" else [[t] for step in slow.steps(example) for t in step]
    kept = chain[min(s, len(chain)) :] if side == "left" else chain[: max(len(chain) - s, 0)]
    asked = [*slow.question(example.question), *end]
    written = [t for one in kept for t in one] + end + slow.answer(example)
    return asked + written, range(len(asked), len(asked) + len(written))


def assert_is(row, expected):
    ids, supervised = expected
    assert row.ids() == ids
    assert [at for at, label in enumerate(row.labels()) if label >= 0] == list(supervised)


# Rows: 1 to 4


@by_unit
@by_side
@pytest.mark.parametrize("s", [0, 1, 2, 3, 7, 11])
def test_4_removing_is_deleting_from_the_list_of_tokens(s, unit, side):
    model = on("gpt2", change(PLAIN, unit=unit, side=side))
    for example, row in zip(MIXED, model.rows(MIXED, s)):
        assert_is(row, tokens(model, example, s, unit, side))


@by_unit
@by_side
def test_1_and_2_the_ends_of_the_schedule_are_cot_and_no_cot(unit, side):
    """In this layout: the same batch, bit for bit."""
    model = on("gpt2", change(PLAIN, unit=unit, side=side))
    bare = [dataclasses.replace(example, steps=()) for example in MIXED]
    for stage, examples in ((0, MIXED), (ALL, bare)):
        rows = model.rows(MIXED, stage)
        for example, row in zip(examples, rows):
            assert_is(row, tokens(model, example))
        batch, other = model.batch(rows), model.batch(model.rows(examples, 0))
        for name in ("ids_BS", "mask_BS", "predict_at_U", "targets_U"):
            assert torch.equal(getattr(batch, name), getattr(other, name))


@by_arch
@pytest.mark.parametrize("s", [0, 1, 4, 11, ALL])
def test_3_the_loss_is_that_of_plain_rows_one_by_one_and_so_is_the_number_of_supervised_tokens(s, arch):
    model = on(arch, PLAIN)
    slow, losses, logits = Reference(model), [], []
    for example, n_targets in zip(MIXED, model.batch(model.rows(MIXED, s)).n_targets):
        ids, supervised = tokens(model, example, 10**6 if s == ALL else s)
        n_chain = sum(map(len, slow.steps(example)))
        assert n_targets == n_chain - (n_chain if s == ALL else min(s, n_chain)) + 1 + len(slow.answer(example))
        logits.append(slow.read(slow.embed(ids))[1][[at - 1 for at in supervised]])
        losses.append(cross_entropy(logits[-1], torch.tensor([ids[at] for at in supervised]), reduction="none"))
    for one, other in zip(model.answer_logits(MIXED, s), logits):
        assert_close(one, other, ROUNDED)
    loss, expected = model.loss(MIXED, s).loss, torch.cat(losses).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 1e-5)


def test_the_longest_row_is_the_one_before_any_removal():
    model = on("gpt2", change(PLAIN, first_stage=2))
    for example in MIXED:
        assert PLAIN.longest(example, model.spell) == len(tokens(model, example)[0])
        assert model.method.longest(example, model.spell) == len(tokens(model, example, 2)[0])


# 5


@by_arch
@by_unit
@pytest.mark.parametrize("s", [0, 3, 7, ALL])
def test_5_kept_positions_are_those_before_the_removal(s, unit, arch):
    """Of the first separator too; rows of a batch, alone and by the bare model."""
    model = on(arch, change(PLAIN, unit=unit, keep_position=True))
    slow = Reference(model)
    for example, logits in zip(MIXED, model.answer_logits(MIXED, s)):
        whole, _ = tokens(model, example)
        ids, written = tokens(model, example, 10**6 if s == ALL else s, unit)
        n_asked, gone = len(slow.question(example.question)), len(whole) - len(ids)
        at = [*range(n_asked), *range(n_asked + gone, len(whole))]
        x = torch.tensor([ids])
        out = model.backbone.lm(x, attention_mask=torch.ones_like(x), position_ids=torch.tensor([at]), use_cache=False)
        assert_close(logits, out.logits[0, written.start - 1 : -1], ROUNDED)
        assert_close(logits, model.answer_logits([example], s)[0], ROUNDED)
        (row,) = model.rows([example], s)
        assert row.n_positions == len(whole)


@by_unit
def test_5_before_any_removal_kept_positions_are_the_same_bit_for_bit(unit):
    model = on("gpt2", change(PLAIN, unit=unit))
    keeping = on("gpt2", change(PLAIN, unit=unit, keep_position=True))
    for one, other in zip(model.answer_logits(MIXED, 0), keeping.answer_logits(MIXED, 0)):
        assert torch.equal(one, other)
    for one, other in zip(model.answer_logits(MIXED, 3), keeping.answer_logits(MIXED, 3)):
        assert (one - other).abs().max() > 1e-4 or one.shape[0] <= 4


def test_5_kept_positions_are_shown():
    model = on("gpt2", change(PLAIN, keep_position=True))
    (row,) = model.rows(MIXED[2:3], 3)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(row_view(row, model.tokenizer))
    positions = [int(word) for word in console.export_text().splitlines()[2].split()]
    n_asked = len(row.prefix[0].ids)
    assert positions == [*range(n_asked), *range(n_asked + 3, len(row) + 3)]


# 6


@pytest.mark.parametrize("smoothing", [0.5, 4.0])
def test_6_offsets_are_spread_as_the_card_says(smoothing):
    """Over a fine grid of numbers, and over those that seeds draw: P(o = k) = (1 - e^-lambda) e^(-lambda k)."""
    e = math.exp(-smoothing)
    grid = torch.tensor([removal_offset((i + 0.5) / 10**6, smoothing) for i in range(10**6)]).double()
    drawn = torch.tensor([removal_offset(uniforms(f"{smoothing}/{i}")[0], smoothing) for i in range(100_000)]).double()
    for offsets, error in ((grid, 0.0), (drawn, 5 / math.sqrt(len(drawn)))):  # in deviations
        assert offsets.mean().item() == pytest.approx(e / (1 - e), abs=error * math.sqrt(e) / (1 - e) + 2e-5)
        for k in range(4):
            p = (1 - e) * e**k
            assert (offsets == k).double().mean().item() == pytest.approx(p, abs=error * math.sqrt(p * (1 - p)) + 2e-6)
    assert removal_offset(0.0, smoothing) == 0


def test_6_offsets_at_their_edges():
    assert removal_offset(1 - 2**-53, 4.0) == 9  # the largest number gives a finite o
    assert removal_offset(1 - math.exp(-4.0) + 1e-12, 4.0) == 1


def removed(model, example, row):
    """How many tokens of the chain of thought a row lacks."""
    return len(tokens(model, example)[0]) - len(row)


def drawn_rows(model, stage, n=300, example=MIXED[3]):
    """What is removed of an example in n draws."""
    rows = model.rows([example] * n, stage, seed="3")
    return [removed(model, example, row) for row in rows]


def test_each_example_loses_a_few_tokens_more_now_and_then():
    model = on("gpt2", change(PLAIN, smoothing=0.7, max_removed=40))
    lost, n_chain = drawn_rows(model, 3), removed(model, MIXED[3], model.rows(MIXED[3:4], 40)[0])
    offsets = [removal_offset(uniforms(f"3/{i}")[0], 0.7) for i in range(300)]
    assert lost == [min(3 + o, n_chain) for o in offsets] and len(set(lost)) > 3
    assert lost == drawn_rows(model, 3)  # the seed and the place alone decide
    assert drawn_rows(model, 40) == [n_chain] * 300
    assert {removed(model, MIXED[3], row) for row in model.rows(MIXED[3:4] * 9, 3)} == {3}  # without a seed none
    assert set(drawn_rows(on("gpt2", PLAIN), 3)) == {3}


def test_an_offset_past_the_threshold_removes_only_what_it_says():
    """s_max is a threshold of s(t), not of s(t) + o."""
    model = on("gpt2", change(PLAIN, smoothing=0.7, max_removed=5))
    offsets = [removal_offset(uniforms(f"3/{i}")[0], 0.7) for i in range(300)]
    assert drawn_rows(model, 4) == [4 + o for o in offsets] and max(offsets) > 3


def test_nothing_more_is_removed_before_the_first_removal():
    model = on("gpt2", change(PLAIN, smoothing=0.5, removal_free_epochs=2.0, first_stage=2))
    assert set(drawn_rows(model, model.method.stage_at(0, 4))) == {2}
    assert len(set(drawn_rows(model, model.method.stage_at(8, 4)))) > 3


# 7


def counted(method, n_steps, steps_per_epoch):
    """s(t) by counting, as the authors' code does: one token more whenever n steps have passed since the last."""
    each, s, count, found = round(steps_per_epoch / method.removed_per_epoch), method.first_stage, 0, []
    for t in range(n_steps):
        if t >= round(method.removal_free_epochs * steps_per_epoch):
            if count == max(each, 1):
                s, count = s + 1, 0
            count += 1
        found.append(math.inf if s >= method.max_removed else s)
    return found


@pytest.mark.parametrize("steps_per_epoch", [1, 4, 7, 100])
@pytest.mark.parametrize("removed_per_epoch", [0.3, 1, 8, 13])
@pytest.mark.parametrize(("first", "free"), [(0, 0.0), (0, 2.0), (3, 0.0), (2, 0.5)])
def test_7_s_grows_as_counted(steps_per_epoch, removed_per_epoch, first, free):
    method = change(PLAIN, removed_per_epoch=removed_per_epoch, first_stage=first, removal_free_epochs=free)
    model = on("gpt2", method)
    example = chain_examples(1, 5)[0]  # more tokens than s_max
    everything = removed(model, example, model.rows([example], ALL)[0])
    assert everything > ALL
    at = {}
    stages = [method.stage_at(t, steps_per_epoch) for t in range(500)]
    for stage in set(stages):
        gone = removed(model, example, model.rows([example], stage)[0])
        at[stage] = math.inf if gone == everything else gone
    assert [at[stage] for stage in stages] == counted(method, 500, steps_per_epoch)
    assert stages == sorted(stages)


def test_7_the_cards_formula():
    method = Icot(removed_per_epoch=8, max_removed=39)
    n = round(1000 / 8)
    expected = [min(t // n, 39) for t in range(8000)]
    assert [method.stage_at(t, 1000) for t in range(8000)] == expected
    assert expected.index(39) == 39 * n and set(expected[39 * n :]) == {39} and method.last_stage == 39

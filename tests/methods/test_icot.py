"""Stepwise internalisation (icot.md): its rows against literal deletion, its schedule, and the invariants of section 9.

1. s = 0 without smoothing is CoT in this layout, 2. s = infinity is No-CoT. 3. The number of supervised tokens.
4. Removing is deleting from the list of tokens. 5. keep_position changes nothing at s = 0. 6. How the offsets are
spread. 7. s(t), exactly. 8. The optimizer is cleared at each increment, until nothing is left to remove. 9. One pass
more than No-CoT when answering.
"""

import copy
import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from innerloop import NoCot
from innerloop.config.curriculum import uniforms
from innerloop.errors import InputError
from innerloop.methods import Icot
from innerloop.methods.text.icot import removal_offset
from innerloop.terminal.views import row_view
from innerloop.text.examples import Example
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    base,
    by_arch,
    change,
    gradients,
    lean_towards,
    learn,
    on,
    under,
)
from tests.models import chain_examples, tiny_model
from tests.test_trainer import make_trainer

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
    return asked + written, list(range(len(asked), len(asked) + len(written)))


def told(row):
    """What ``tokens`` says of a row."""
    return row.ids(), [at for at, label in enumerate(row.labels()) if label >= 0]


@by_unit
@by_side
@pytest.mark.parametrize("s", [0, 1, 2, 3, 7, 11])
def test_4_removing_is_deleting_from_the_list_of_tokens(s, unit, side):
    model = on("gpt2", change(PLAIN, unit=unit, side=side))
    assert [told(row) for row in model.rows(MIXED, s)] == [tokens(model, one, s, unit, side) for one in MIXED]


@by_unit
@by_side
def test_1_and_2_the_ends_of_the_schedule_are_cot_and_no_cot(unit, side):
    """In this layout: the same batch, bit for bit."""
    model = on("gpt2", change(PLAIN, unit=unit, side=side))
    bare = [dataclasses.replace(example, steps=()) for example in MIXED]
    for stage, examples in ((0, MIXED), (ALL, bare)):
        rows = model.rows(MIXED, stage)
        assert [told(row) for row in rows] == [tokens(model, example) for example in examples]
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
        assert PLAIN.longest(example, model.encoder) == len(tokens(model, example)[0])
        assert model.method.longest(example, model.encoder) == len(tokens(model, example, 2)[0])


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
        assert_close(logits, out.logits[0, written[0] - 1 : -1], ROUNDED)
        assert_close(logits, model.answer_logits([example], s)[0], ROUNDED)
        (row,) = model.rows([example], s)
        assert row.n_positions == len(whole)


@by_unit
def test_5_before_any_removal_kept_positions_are_the_same_bit_for_bit(unit):
    models = [on("gpt2", change(PLAIN, unit=unit, keep_position=keeps)) for keeps in (False, True)]
    for one, other in zip(*(model.answer_logits(MIXED, 0) for model in models)):
        assert torch.equal(one, other)
    for one, other in zip(*(model.answer_logits(MIXED, 3) for model in models)):
        assert (one - other).abs().max() > 1e-4 or one.shape[0] <= 4


def test_5_kept_positions_are_shown():
    model = on("gpt2", change(PLAIN, keep_position=True))
    (row,) = model.rows(MIXED[2:3], 3)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(row_view(row, model.tokenizer))
    positions = [int(word) for word in console.export_text().splitlines()[2].split()]
    n_asked = len(row.prefix[0].ids)
    assert positions == [*range(n_asked), *range(n_asked + 3, len(row) + 3)]


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
    assert removal_offset(0.0, smoothing) == 0 and removal_offset(1 - e + 1e-12, smoothing) == 1
    assert removal_offset(1 - 2**-53, 4.0) == 9  # the largest number gives a finite o


def removed(model, example, row):
    """How many tokens of the chain of thought a row lacks."""
    return len(tokens(model, example)[0]) - len(row)


def drawn_rows(model, stage):
    """What is removed of an example in 300 draws."""
    return [removed(model, MIXED[3], row) for row in model.rows([MIXED[3]] * 300, stage, seed="3")]


def test_each_example_loses_a_few_tokens_more_now_and_then():
    model = on("gpt2", change(PLAIN, smoothing=0.7, max_removed=40))
    lost, n_chain = drawn_rows(model, 3), removed(model, MIXED[3], model.rows(MIXED[3:4], 40)[0])
    offsets = [removal_offset(uniforms(f"3/{i}")[0], 0.7) for i in range(300)]
    assert lost == [min(3 + o, n_chain) for o in offsets] and len(set(lost)) > 3
    assert lost == drawn_rows(model, 3)  # the seed and the place alone decide
    assert drawn_rows(model, 40) == [n_chain] * 300
    assert {removed(model, MIXED[3], row) for row in model.rows(MIXED[3:4] * 9, 3)} == {3}  # without a seed none
    assert set(drawn_rows(on("gpt2", PLAIN), 3)) == {3}
    past = on("gpt2", change(PLAIN, smoothing=0.7, max_removed=5))  # s_max is a threshold of s(t), not of s(t) + o
    assert drawn_rows(past, 4) == [4 + o for o in offsets] and max(offsets) > 3


def test_nothing_more_is_removed_before_the_first_removal():
    model = on("gpt2", change(PLAIN, smoothing=0.5, removal_free_epochs=2.0, first_stage=2))
    assert set(drawn_rows(model, model.method.stage_at(0, 4))) == {2}
    assert len(set(drawn_rows(model, model.method.stage_at(8, 4)))) > 3


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
    stages = [method.stage_at(t, steps_per_epoch) for t in range(500)]
    gone = {stage: removed(model, example, model.rows([example], stage)[0]) for stage in set(stages)}
    at = {stage: math.inf if n == everything else n for stage, n in gone.items()}
    assert [at[stage] for stage in stages] == counted(method, 500, steps_per_epoch)


class Watch(TrainerCallback):
    """At which steps the optimizer had no state, and how old it was after each."""

    def __init__(self):
        self.empty, self.ages = [], []

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        if not optimizer.state:
            self.empty.append(state.global_step)

    def on_step_end(self, args, state, control, optimizer=None, **_):
        self.ages.append(int(next(iter(optimizer.state.values()))["step"]))


SHORT = [Example(e.question, ("1", "2"), e.answer) for e in chain_examples(16, 3)]  # a chain of four tokens


@pytest.mark.parametrize(
    ("fields", "resets"),
    [
        ({"removed_per_epoch": 4}, [1, 2, 3, 4]),  # an epoch is four steps; after four tokens nothing is left
        ({"removed_per_epoch": 2}, [2, 4, 6]),
        ({"removed_per_epoch": 4, "max_removed": 2}, [1, 2]),  # the second increment removes all
        ({"removed_per_epoch": 4, "unit": "step"}, [1, 2]),
        ({"removed_per_epoch": 4, "removal_free_epochs": 0.5}, [3, 4, 5, 6]),
        ({"removed_per_epoch": 4, "first_stage": 3}, [1]),
        ({"removed_per_epoch": 4, "reset_optimizer": "never"}, []),
        ({"removed_per_epoch": 4, "reset_optimizer": "epoch"}, [4]),
    ],
    ids=str,
)
def test_8_the_optimizer_is_cleared_at_increments_until_nothing_is_left(tmp_path, fields, resets):
    model, watch = tiny_model(change(PLAIN, **fields)), Watch()
    make_trainer(tmp_path, model, SHORT, callbacks=[watch], max_steps=8, batch_size=4).train()
    assert watch.empty == [0, *resets]
    assert watch.ages == [step - max(at for at in watch.empty if at <= step) + 1 for step in range(8)]


def test_the_best_model_is_chosen_after_full_removal(tmp_path, monkeypatch):
    method, kept = change(PLAIN, removed_per_epoch=4, max_removed=3), []
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, tiny_model(method), SHORT, SHORT[:2], **settings)
    monkeypatch.setattr(trainer, "_keep_if_best", lambda accuracy, stage: kept.append(trainer.state.global_step))
    trainer.train()
    assert kept == [4, 5, 6]  # s = 0, 1, 2, all, ..


def slow_answer(model, question, n_ends):
    """Greedy decoding of the bare model, and how many tokens it reads first."""
    slow, end, written = Reference(model), model.tokenizer.eos_token_id, []
    ids = [*slow.question(question), *[end] * (3 - n_ends)]
    while len(written) < 14 and written.count(end) < n_ends:
        with torch.no_grad():
            written.append(slow.read(slow.embed(ids + written))[1][-1].argmax().item())
    return written, len(ids)


@by_arch
@pytest.mark.parametrize("force_empty", [False, True])
def test_9_answers_end_with_their_second_end(force_empty, arch, answers):
    """The first separates the answer; given with the question, there is one to write. Batched == alone == slow."""
    leaning = lean_towards(copy.deepcopy(base(arch)), {"<eos>": {"gpt2": 2.5, "llama": 2.0}[arch], "###": 1.0})
    model = under(leaning, change(PLAIN, force_empty=force_empty))
    n_ends, end = (1 if force_empty else 2), model.tokenizer.eos_token_id
    generations = answers(model)
    assert len({len(generation.ids) for generation in generations}) > 2
    for question, generation in zip(QUESTIONS, generations):
        ids, n_read = slow_answer(model, question, n_ends)
        alone = answers(model, [question])[0]
        assert generation.ids == ids == alone.ids and generation.text == alone.text
        assert generation.ended == (ids.count(end) == n_ends)
        for cost in (generation.cost, alone.cost):
            assert (cost.passes, cost.positions) == (len(ids), n_read + len(ids) - 1)


def taught(method, n_steps, stage):
    """A model that knows four examples at a stage, and their questions."""
    model, examples = tiny_model(method, "gpt2", num_hidden_layers=2, initializer_range=0.1), list(chain_examples(4, 2))
    lay_out = model.rows
    model.rows = lambda examples, *_: lay_out(examples, stage)
    learn(model, examples, n_steps)
    del model.rows
    return model, examples, [example.question for example in examples]


def test_9_an_internalised_model_needs_one_pass_more_than_no_cot(answers):
    """What it writes before the answer is the separator alone, which is no thought."""
    model, examples, questions = taught(change(PLAIN, first_stage=ALL), 100, ALL)
    silent, _, _ = taught(NoCot(), 100, 0)
    for example, one, other in zip(examples, answers(model, questions), answers(silent, questions)):
        assert one.answer == other.answer == example.answer
        assert one.ids == [model.encoder.eos_id, *other.ids]
        assert one.cost.passes == other.cost.passes + 1
        assert one.cost.thought_tokens == other.cost.thought_tokens == 0
    given = under(model, change(model.method, force_empty=True))
    for one, other in zip(answers(given, questions), answers(silent, questions)):
        assert one.ids == other.ids and one.cost.passes == other.cost.passes


def test_tokens_of_the_chain_that_are_still_written_are_counted(answers):
    model, examples, questions = taught(PLAIN, 150, 0)
    slow = Reference(model)
    for example, generation in zip(examples, answers(model, questions, n=40)):
        assert generation.answer == example.answer
        assert generation.cost.thought_tokens == sum(map(len, slow.steps(example)))


# Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"removed_per_epoch": 0}, "removed_per_epoch is 0, but must be"),
        ({"max_removed": 0}, "max_removed is 0, but must be"),
        ({"removal_free_epochs": -1.0}, "removal_free_epochs is -1.0, but must be"),
        ({"smoothing": 0.0}, "smoothing is 0.0, but must be"),
        ({"first_stage": 40}, "the stages run from 0 to 39"),
        ({"unit": "word"}, "must be one of token, step"),
        ({"side": "top"}, "must be one of left, right"),
        ({"side": "right", "keep_position": True}, "set side to left"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(fields, message):
    with pytest.raises(InputError, match=message) as refused:
        Icot(**fields)
    assert "\n" not in str(refused.value)


def test_every_setting_does_something_of_its_own():
    encoder = on("gpt2", PLAIN).encoder

    def results(method):
        laid_out = {s: method.rows(MIXED, encoder, s, "4") for s in (1, 4)}
        return {
            "stages": [method.stage_at(t, 6) for t in range(40)],
            "rows": [row.ids() for rows in laid_out.values() for row in rows],
            "skipped": [row.skipped for row in laid_out[4]],
            "prompt": method.prompt("2", encoder, 0).ids(),
            "ends": method.n_ends,
            "last": method.last_stage,
            "resets": method.curriculum.reset_optimizer,
        }

    moves = {
        "removed_per_epoch": (2, {"stages"}),
        "max_removed": (5, {"stages", "last"}),
        "unit": ("step", {"rows"}),
        "side": ("right", {"rows"}),
        "keep_position": (True, {"skipped"}),
        "smoothing": (0.3, {"rows"}),
        "removal_free_epochs": (1.5, {"stages"}),
        "force_empty": (True, {"prompt", "ends"}),
        "first_stage": (2, {"stages"}),
        "reset_optimizer": ("never", {"resets"}),
    }
    before = results(PLAIN)
    for name, (value, moved) in moves.items():
        after = results(change(PLAIN, **{name: value}))
        assert {key for key in before if before[key] != after[key]} == moved, name
    assert {field.name for field in dataclasses.fields(Icot)} == moves.keys()

"""Stepwise internalisation in training and when it answers (icot.md, sections 5, 6 and 9).

8. The optimizer is cleared at each increment, until nothing is left to remove. 9. One pass more than No-CoT when
answering. 10. It beats No-CoT on a toy task.
"""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from innerloop import NoCot
from innerloop.errors import InputError
from innerloop.methods import Icot
from innerloop.text.examples import Example
from tests.fields import make
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    assert_learns_by_heart,
    base,
    by_arch,
    change,
    lean_towards,
    learn,
    on,
    under,
)
from tests.models import chain_examples, tiny_model
from tests.test_trainer import make_trainer

PLAIN = Icot(smoothing=None, max_removed=12)


# 8


def trained(folder: Path, method: Icot, examples, n_steps=8, **settings):
    """Train and return at which steps the optimizer had no state, and how old it was after each."""
    empty, ages = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            if not optimizer.state:
                empty.append(state.global_step)

        def on_step_end(self, args, state, control, optimizer=None, **_):
            ages.append(int(next(iter(optimizer.state.values()))["step"]))

    trainer = make_trainer(
        folder, tiny_model(method), examples, callbacks=[Watch()], max_steps=n_steps, batch_size=4, **settings
    )
    trainer.train()
    return empty, ages


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
    empty, ages = trained(tmp_path, change(PLAIN, **fields), SHORT)
    assert empty == [0, *resets]
    expected = [step - max(at for at in empty if at <= step) + 1 for step in range(8)]
    assert ages == expected


def test_the_best_model_is_chosen_after_full_removal(tmp_path, monkeypatch):
    method, kept = change(PLAIN, removed_per_epoch=4, max_removed=3), []
    trainer = make_trainer(tmp_path, tiny_model(method), SHORT, SHORT[:2], max_steps=6, eval_strategy="steps",
                           eval_steps=1)  # fmt: skip
    monkeypatch.setattr(trainer, "_keep_if_best", lambda accuracy, stage: kept.append(trainer.state.global_step))
    trainer.train()
    assert kept == [4, 5, 6]  # s = 0, 1, 2, all, ..


# Answering: 9


def slow_answer(model, question, n_ends, n=14):
    """Greedy decoding of the bare model."""
    slow, end = Reference(model), model.tokenizer.eos_token_id
    ids = [*slow.question(question), *[end] * (3 - n_ends)]
    written = []
    while len(written) < n and written.count(end) < n_ends:
        with torch.no_grad():
            written.append(slow.read(slow.embed(ids + written))[1][-1].argmax().item())
    return written, len(ids)


@by_arch
@pytest.mark.parametrize("force_empty", [False, True])
def test_9_answers_end_with_their_second_end(force_empty, arch, answers):
    """The first separates the answer; given with the question, there is one to write. Batched == alone == slow."""
    lean = {"<eos>": {"gpt2": 2.5, "llama": 2.0}[arch], "###": 1.0}
    model = lean_towards(copy.deepcopy(base(arch)), lean)
    model = under(model, change(PLAIN, force_empty=force_empty))
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


def taught(method, n_steps, rows=None):
    """A model that knows four examples, and their questions."""
    model, examples = tiny_model(method, "gpt2", num_hidden_layers=2, initializer_range=0.1), list(chain_examples(4, 2))
    if rows is not None:
        lay_out = model.rows
        model.rows = lambda examples, *_: lay_out(examples, rows)
    learn(model, examples, n_steps)
    return model, examples, [example.question for example in examples]


def test_9_an_internalised_model_needs_one_pass_more_than_no_cot(answers):
    """What it writes before the answer is the separator alone, which is no thought."""
    model, examples, questions = taught(change(PLAIN, first_stage=PLAIN.max_removed), 100)
    silent, _, _ = taught(NoCot(), 100)
    for example, one, other in zip(examples, answers(model, questions), answers(silent, questions)):
        assert one.answer == other.answer == example.answer
        assert one.ids == [model.spell.eos_id, *other.ids]
        assert one.cost.passes == other.cost.passes + 1
        assert one.cost.thought_tokens == other.cost.thought_tokens == 0
    given = under(model, change(model.method, force_empty=True))
    for one, other in zip(answers(given, questions), answers(silent, questions)):
        assert one.ids == other.ids and one.cost.passes == other.cost.passes


def test_tokens_of_the_chain_that_are_still_written_are_counted(answers):
    model, examples, questions = taught(PLAIN, 150, rows=0)
    slow = Reference(model)
    for example, generation in zip(examples, answers(model, questions, n=40)):
        assert generation.answer == example.answer
        assert generation.cost.thought_tokens == sum(map(len, slow.steps(example)))


# Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"removed_per_epoch": 0}, "must be above 0"),
        ({"max_removed": 0}, "must be above 0"),
        ({"removal_free_epochs": -1.0}, "cannot be negative"),
        ({"smoothing": 0.0}, "smoothing must be above 0, or none"),
        ({"first_stage": 40}, "the stages run from 0 to 39"),
        ({"unit": "word"}, "choose one of token, step"),
        ({"side": "top"}, "choose one of left, right"),
        ({"side": "right", "keep_position": True}, "set side to left"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(fields, message):
    with pytest.raises(InputError, match=message) as refused:
        make(Icot, **fields)
    assert "\n" not in str(refused.value)


MOVES = {
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


def test_every_setting_does_something_of_its_own():
    spell = on("gpt2", PLAIN).spell

    def results(method):
        laid_out = {s: method.rows(MIXED, spell, s, "4") for s in (1, 4)}
        return {
            "stages": [method.stage_at(t, 6) for t in range(40)],
            "rows": [row.ids() for rows in laid_out.values() for row in rows],
            "skipped": [row.skipped for row in laid_out[4]],
            "prompt": method.prompt("2", spell, 0).ids(),
            "ends": method.n_ends,
            "last": method.last_stage,
            "resets": method.curriculum.reset_optimizer,
        }

    before = results(PLAIN)
    for name, (value, moved) in MOVES.items():
        after = results(change(PLAIN, **{name: value}))
        assert {key for key in before if before[key] != after[key]} == moved, name
    assert {field.name for field in dataclasses.fields(Icot)} == MOVES.keys()


@pytest.mark.slow
def test_it_learns_by_heart():
    assert_learns_by_heart(change(PLAIN, max_removed=1), list(chain_examples(8, 2)))

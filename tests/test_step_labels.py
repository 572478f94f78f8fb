"""Which steps may be latent: free patterns, labels against brute force, and what is refused."""

from pathlib import Path

import pytest
import torch
import yaml

from innerloop import Example, LatentModel
from innerloop.errors import InputError
from innerloop.methods import Cot, SpiralThinker
from innerloop.methods.latent.step_labels import check_labels, chosen_steps, label_steps
from innerloop.text.row import Kind
from innerloop.train.recipe import load_recipe
from innerloop.train.run import run_recipe
from tests.methods.tools import MIXED, change, learn
from tests.models import chain_examples, tiny_model
from tests.test_trainer import make_trainer

FREE = SpiralThinker(pattern="random", latents_per_block=2, max_loops=2)
LABELLED = change(FREE, pattern="labelled")


def steps_of(row) -> str:
    """Draw a row's steps: the number of one that is text, L for a block, A for the answer."""
    names = {Kind.LATENT: "L", Kind.ANSWER: "A"}
    spans = [span for segment in row.segments() for span in segment.spans]
    return "".join(names.get(p.kind, str(p.step + 1)) for p in spans if p.kind in (*names, Kind.STEP))


@pytest.fixture(scope="module")
def model() -> LatentModel:
    return tiny_model(FREE)


# Patterns


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
@pytest.mark.parametrize(("stage", "expected"), [(0, "123A"), (0b1, "L23A"), (0b110, "1LLA"), (0b111, "LLLA")])
def test_each_step_is_text_or_a_block_by_itself_and_both_are_learned(stage, expected, schedule, model):
    row = change(FREE, block_schedule=schedule).lay_out(MIXED[0], model.encoder, stage)
    assert steps_of(row) == expected
    labels = [label for segment in row.segments() for label in segment.labels()]
    bol, bot = model.tokenizer.convert_tokens_to_ids(["<bol>", "<bot>"])
    assert [label for label in labels if label in (bol, bot)] == [bol if c == "L" else bot for c in expected[:-1]]
    marked = Example(MIXED[0].question, MIXED[0].steps, "3", meta={"latent": [bool(stage >> i & 1) for i in range(3)]})
    assert change(LABELLED, block_schedule=schedule).lay_out(marked, model.encoder, 0) == row


def test_every_choice_of_steps_is_drawn_as_often_and_by_the_seed_alone(model):
    drawn = [steps_of(row) for row in FREE.rows([MIXED[0]] * 2000, model.encoder, seed="a")]
    assert drawn == [steps_of(row) for row in FREE.rows([MIXED[0]] * 2000, model.encoder, seed="a")]
    counts = [drawn.count(one) for one in set(drawn)]
    assert len(counts) == 8 and min(counts) > 190 and max(counts) < 310


def test_questions_are_asked_without_a_block_so_that_the_model_chooses_the_first_step(model):
    free, labelled, text = (
        method.prompt(MIXED[0].question, model.encoder, 0) for method in (FREE, LABELLED, change(FREE, pattern="none"))
    )
    assert free == labelled == text


@pytest.mark.parametrize("n", [1, 4, 9])
def test_the_longest_row_has_each_step_in_the_longer_of_its_forms(n, model):
    for method in (change(FREE, latents_per_block=n), change(LABELLED, latents_per_block=n)):
        for example in (MIXED[0], MIXED[4]):
            rows = [change(FREE, latents_per_block=n).lay_out(example, model.encoder, mask) for mask in range(8)]
            assert method.longest(example, model.encoder) == max(len(row) for row in rows)


# Labels


def test_labels_say_after_which_blocks_every_token_that_follows_is_the_likeliest(model, monkeypatch):
    """A model that can think some steps and not others, and never more than two of a row."""
    can = {example.question: [n == 3 or i % 3 != n for i in range(4)] for n, example in enumerate(MIXED)}
    seen = []

    def row_logits(rows):
        found = []
        for row in rows:
            text, drawn = model.tokenizer.decode(row.prefix[0].ids), steps_of(row)
            seen.append(drawn)
            (question,) = [q for q in can if text.strip() == q]
            after = next((i for i, step in enumerate(drawn[:-1]) if step == "L" and "L" not in drawn[i + 1 :]))
            wrong = not can[question][after] or drawn.count("L") > 2
            labels, kinds = [], []
            for span in (span for segment in row.segments() for span in segment.spans if span.supervised):
                labels += span.ids
                kinds += [span] * len(span.ids)
            logits = torch.nn.functional.one_hot(torch.tensor(labels), 64).float()
            for at, span in enumerate(kinds):  # wrong before the block, which must not matter, or once after it
                is_next = span.step == after + 1 or (span.kind is Kind.ANSWER and after + 2 == len(drawn))
                is_before = span.kind is Kind.STEP and span.step == after - 1
                if is_before or (wrong and is_next and at % 2):
                    logits[at] = -logits[at]
            found.append(logits)
        return found

    monkeypatch.setattr(model, "row_logits", row_logits, raising=False)
    labelled = label_steps(model, MIXED, batch_size=2)
    for example, one in zip(MIXED, labelled):
        expected = []
        for i in range(len(example.steps)):
            expected.append(can[example.question][i] and sum(expected) < 2)
        assert one.meta["latent"] == expected
        assert (one.question, one.steps, one.answer) == (example.question, example.steps, example.answer)
    assert {"L23A", "1L3A", "1LLA", "LLL4A", "LL3LA"} <= set(seen)
    assert label_steps(model, labelled) == labelled  # what is known already says nothing


@pytest.mark.slow
def test_a_model_that_has_learned_both_labels_steps_latent_and_answers_as_it_is_taught():
    """Labels in, choices out: each question is answered with the blocks that its example was labelled with."""
    examples = list(chain_examples(6, 3))
    free = tiny_model(FREE, "gpt2", num_hidden_layers=2, initializer_range=0.1)
    rows = [free.rows(examples, seed=str(i)) for i in range(8)]
    drawn = iter(rows * 100)
    free.rows = lambda *_: next(drawn)
    learn(free, examples, 300)
    found = [one.meta["latent"] for one in label_steps(free, examples)]
    assert sum(map(sum, found)) > 9  # of 18
    taught = [Example(e.question, e.steps, e.answer, meta={"latent": [i == n % 3 for i in range(3)]})
              for n, e in enumerate(examples)]  # fmt: skip
    student = tiny_model(LABELLED, "gpt2", num_hidden_layers=2, initializer_range=0.1)
    assert learn(student, taught, 300) < 0.05
    for example, answer in zip(taught, student.generate([e.question for e in taught], max_new_tokens=40)):
        assert answer.answer == example.answer
        assert chosen_steps(student, answer.ids) == example.meta["latent"]


def test_what_was_chosen_is_read_off_what_was_written(model):
    bol, bot, eot = model.tokenizer.convert_tokens_to_ids(["<bol>", "<bot>", "<eot>"])
    assert chosen_steps(model, [bot, 5, eot, bol, bol, bot, 7]) == [False, True, True, False]
    assert chosen_steps(tiny_model(SpiralThinker()), [bot, 5, eot, bol]) == [True, False, True]


# In training


def test_stages_of_a_recipe_label_by_the_stage_before(tmp_path: Path):
    stages = [{"method": {"pattern": "random"}}, {"method": {"pattern": "labelled", "labeller": "{out}/stages/1"}}]
    recipe = {
        "task": {"name": "chain", "n_ops": 2, "ops_per_step": 2, "n_train": 40},
        "backbone": {"scratch": {"type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}},
        "method": {"name": "spiralthinker", "latents_per_block": 1, "max_loops": 1},
        "train": {"max_steps": 2, "batch_size": 4, "use_cpu": True},
        "stages": stages,
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    model = LatentModel.from_pretrained(tmp_path / "run")
    assert model.method.labeller == str(tmp_path / "run/stages/1")
    assert model.generate(["3 ; + 4"], max_new_tokens=4)


def test_labels_that_are_missing_or_of_another_number_of_steps_are_refused_before_training(tmp_path: Path):
    brought = [Example("3 ; + 4", ("3 + 4 = 2",), "2", meta={"latent": [True]}), Example("2", (), "2")]
    assert check_labels(brought) == brought
    for meta in ({}, {"latent": [True, False]}, {"latent": True}):
        with pytest.raises(InputError, match="has 1 steps, but its meta does not say"):
            make_trainer(tmp_path, tiny_model(LABELLED), [Example("3 ; + 4", ("3 + 4 = 2",), "2", meta=meta)])


def test_a_labeller_that_has_not_seen_both_forms_of_each_step_is_refused(tmp_path: Path):
    for name, method in (("odd", SpiralThinker()), ("cot", Cot())):
        tiny_model(method).save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match="set labeller to a run of spiralthinker with pattern=random"):
            make_trainer(tmp_path / "run", tiny_model(change(LABELLED, labeller=str(tmp_path / name))))
    with pytest.raises(InputError, match="set pattern to labelled"):
        change(FREE, labeller="x")

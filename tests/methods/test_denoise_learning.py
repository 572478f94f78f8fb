"""Denoising as a whole: trained by the trainer and by hand, and answered where memory runs out."""

import pytest
import torch

from innerloop import BlockDiffusion, Dream, InputError, Llada
from innerloop.text.examples import Example
from tests.close import assert_close
from tests.methods.tools import learn
from tests.models import chain_examples, tiny_model
from tests.test_engine_limits import Scarce
from tests.test_trainer import copies, logged, make_trainer, trained_names, weights

G = 24
EIGHT = list(chain_examples(8))


def test_a_step_in_parts_is_the_step_of_the_whole(tmp_path):
    """Antithetic times are of a micro-batch, so parts are compared to the sum of what they draw."""
    model = tiny_model(Llada(gen_length=G, noise={"norm": "masked"}))
    trainer = make_trainer(tmp_path, model, EIGHT, batch_size=4, gradient_accumulation_steps=2, max_steps=1)
    given, _ = trainer.get_batch_samples(iter([EIGHT[:4], EIGHT[4:]]), 2, model.device)
    losses = [model(one["batch"], n_items=one["n_items"]).loss for one in given]
    rows = [row for i, part in enumerate((EIGHT[:4], EIGHT[4:])) for row in model.rows(part, seed=f"0/0/0/{i}")]
    assert_close(sum(losses), model(model.batch(rows)).loss, 1e-5)
    assert given[0]["n_items"]["answer"] == sum(len(row.noise.hidden) for row in rows)


@pytest.mark.parametrize("method", [Llada(gen_length=G), Dream(gen_length=G)])
def test_the_trainer_trains_it_validates_it_and_gives_the_same_again(method, tmp_path):
    found = []
    for folder in ("a", "b"):
        model = tiny_model(method)
        before = copies(model)
        settings = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 4, "gradient_accumulation_steps": 2}
        make_trainer(tmp_path / folder, model, EIGHT, EIGHT[:2], **settings).train()
        found.append((logged(tmp_path / folder, "loss_masked"), weights(model)))
        assert "backbone.lm.model.layers.0.self_attn.q_proj.weight" in trained_names(before, model)
    assert found[0][0] == found[1][0] and len(found[0][0]) == 4
    assert torch.equal(found[0][1], found[1][1])
    assert len(logged(tmp_path / "a", "eval_accuracy")) == 1


def test_an_answer_longer_than_the_canvas_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"has an answer of .* tokens, but the canvas has gen_length=8: raise it"):
        make_trainer(tmp_path, tiny_model(Llada(gen_length=8)), EIGHT)
    with pytest.raises(InputError, match="raise it to"):
        tiny_model(Llada(gen_length=8)).loss(EIGHT)
    short = [Example(example.question, (), example.answer, example.id, {}) for example in EIGHT]
    make_trainer(tmp_path, tiny_model(Llada(gen_length=8)), short)


@pytest.mark.parametrize(
    "method",
    [
        Llada(gen_length=G, sampler={"steps": 6}),
        BlockDiffusion(gen_length=G, block_length=8, sampler={"steps": 6}),
        Dream(gen_length=G, sampler={"steps": 6, "cache": "delayed", "refresh": 4}),
    ],
    ids=lambda method: method.name,
)
def test_where_memory_runs_out_fewer_canvases_run_together_and_nobody_notices(method, monkeypatch):
    model = tiny_model(method).double()
    questions = [example.question for example in EIGHT]
    alone = [model.generate([question], temperature=1.0, seed=0)[0].text for question in questions[:1]]
    whole = [one.ids for one in model.generate(questions, temperature=1.0)]
    longest = max(len(row) for row in model.prompts(questions)) + G
    memory = Scarce(monkeypatch, 3 * longest)
    assert [one.ids for one in model.generate(questions, temperature=1.0, batch_size=8)] == whole
    assert 0 < len(memory.failed) <= 3
    monkeypatch.undo()
    assert model.generate(questions, temperature=1.0)[0].text == alone[0]
    found = model.generate(questions, max_positions=2 * longest, batch_size=8, temperature=1.0)
    assert [one.ids for one in found] == whole


@pytest.mark.parametrize(
    "method", [Llada(gen_length=G), Llada(gen_length=G, sampler={"steps": 6}), Dream(gen_length=G)]
)
@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(method):
    model = tiny_model(method, "gpt2", num_hidden_layers=2, initializer_range=0.1)
    learn(model, EIGHT, 500, seed="{}")
    answers = [one.answer for one in model.generate([example.question for example in EIGHT])]
    assert answers == [example.answer for example in EIGHT]

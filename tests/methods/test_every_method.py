"""What the cards ask of every method: causality, the same answers when saved and loaded, eight examples learnt.

And of many: the slow reference's loss, logits and gradients on every architecture; where nothing loops, its answers, in
one pass for each token.
"""

import math

import pytest
import torch

from innerloop import Coconut, Codi, Cot, Icot, LatentModel, Lotus, NoCot, Pause, Pccot, Slr
from tests.fields import change
from tests.methods.reference import Reference
from tests.methods.slowly import assert_logits_of_the_reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    SHOWN,
    SMALL,
    assert_causal,
    assert_close,
    assert_learns_by_heart,
    assert_same_gradients,
    assert_writes_like_the_reference,
    by_arch,
    exact,
    gradients,
    lean_towards_end,
    passes,
    sharp_model,
    under,
)
from tests.models import answers_of, moved, saved, tiny_model

AT_ONCE = {
    "no_cot": NoCot(),
    "cot": Cot(),
    "cot with markers": Cot(with_markers=True),
    "pause": Pause(),
    "pause without markers": Pause(n_pauses=3, with_markers=False),
    "pause, steps kept": Pause(n_pauses=3, keep_steps=True),
    "pause, prepended": Pause(n_pauses=3, placement="prepend"),
    "pause, stages": Pause(n_pauses=4, curriculum={"max_stage": 2}, per_stage=2),
    "pause, none": Pause(n_pauses=0),
}
METHODS = {
    **AT_ONCE,
    "coconut": Coconut(),
    "codi": Codi(n_latents_total=3),
    "pccot": Pccot(n_slots=5, max_loops=2),
    "lotus": Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5),
    "slots": change(SMALL, **SHOWN),
    "append": change(SMALL, loop_scope="append", loop={"residual": "B"}, h0="forward"),
}
BY_REFERENCE = ["no_cot", "cot", "cot with markers", "pause", "pause without markers", "slots", "append"]
SAVED = {
    "codi": Codi(n_latents_total=3, loop={"width": 8}),
    "pccot": METHODS["pccot"],
    "lotus": METHODS["lotus"],
    "lotus, shifted": change(METHODS["lotus"], last_pass="refeed", loop={"shift": True}),
    "slr": change(Slr.presets["default"], loop={"lora_rank": 2, "shift": True}),
}
ALONE = {"hid": {"weight": 0.0}, "teacher_weight": 0.0}
LEARNING = {
    "no_cot": NoCot(),
    "cot": Cot(),
    "icot": Icot(smoothing=None, max_removed=1),
    "pause": Pause(n_pauses=4),
    "coconut": Coconut(curriculum={"max_stage": 2}, latents_per_step=1),
    "codi": Codi(n_latents_total=2, **ALONE),
    "pccot": Pccot(n_slots=3, max_loops=2, **ALONE),
    "lotus": Lotus(n_blocks=2, latents_per_block=1),
    "slots": Slr(n_slots=4, max_loops=2),
    "append": Slr(n_slots=4, max_loops=2, loop_scope="append"),
}


def named(methods):
    return pytest.mark.parametrize("method", methods.values(), ids=methods.keys())


@named({name: METHODS[name] for name in BY_REFERENCE})
def test_loss_logits_and_gradients_equal_the_reference(method, arch):
    model = under(exact(tiny_model(Slr(), arch)), method)
    assert_logits_of_the_reference(model)
    loss, expected = model.loss(MIXED).loss, Reference(model).loss(list(MIXED))
    assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@named({name: METHODS[name] for name in BY_REFERENCE})
def test_a_model_without_an_opinion_has_log_v_in_every_term(method, arch):
    model = under(tiny_model(Slr(), arch), method)
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.zero_()
    terms = {name: term.item() for name, term in model.loss(MIXED).terms.items()}
    expected = ["answer", "step"] if method.step_weight else ["answer"]
    assert terms == pytest.approx(dict.fromkeys(expected, math.log(len(model.tokenizer))), rel=1e-5)


@named(AT_ONCE)
@by_arch
def test_cached_and_batched_decoding_without_a_loop_equals_uncached_decoding(method, arch):
    assert_writes_like_the_reference(sharp_model(method, arch), passes_before=0)


@named(AT_ONCE)
def test_without_a_loop_training_is_one_pass_and_answering_one_for_each_token(method):
    """The first reads the question too; the number of pauses does not matter."""
    model = lean_towards_end(sharp_model(method), -100.0)
    with passes(model) as seen:
        model.loss(MIXED)
    assert len(seen) == 1
    with passes(model) as seen:
        costs = [generation.cost for generation in model.generate(QUESTIONS, max_new_tokens=5)]
    assert [embeds.shape[1] for embeds in seen[1:]] == [1] * 4
    assert {cost.passes for cost in costs} == {5}
    assert [cost.positions for cost in costs] == [len(row) + 4 for row in model.prompts(QUESTIONS)]


@named(METHODS)
def test_a_token_changes_no_logits_before_it(method):
    assert_causal(sharp_model(method), MIXED[0])


@named(SAVED)
@by_arch
def test_a_saved_model_gives_the_same_answers(method, arch, tmp_path):
    model = moved(tiny_model(method, arch))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == model.method
    assert torch.equal(answers_of(loaded), answers_of(model))
    assert loaded.loss(MIXED).terms == model.loss(MIXED).terms


@named(LEARNING)
@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(method, examples):
    assert_learns_by_heart(method, examples)

"""What the cards ask of every method: causality, the same answers when saved and loaded, eight examples learnt."""

import pytest
import torch

from innerloop import Coconut, Codi, Cot, LatentModel, Lotus, NoCot, Pause, Pccot, Slr
from tests.fields import change
from tests.methods.tools import MIXED, assert_causal, assert_learns_by_heart, by_arch, sharp_model
from tests.models import answers_of, moved, saved, tiny_model

METHODS = {
    "no_cot": NoCot(),
    "cot": Cot(),
    "cot with markers": Cot(with_markers=True),
    "pause": Pause(),
    "pause, steps kept": Pause(n_pauses=3, keep_steps=True),
    "pause, prepended": Pause(n_pauses=3, placement="prepend"),
    "coconut": Coconut(),
    "codi": Codi(n_latents_total=3),
    "pccot": Pccot(n_slots=5, max_loops=2),
    "lotus": Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5),
    "slots": Slr(n_slots=4, max_loops=3),
    "append": Slr(n_slots=4, max_loops=3, loop_scope="append"),
}
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

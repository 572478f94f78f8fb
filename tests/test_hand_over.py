"""What is handed over: transformers' own `generate` goes on from it as the engine does, or it is refused."""

import pytest
import torch

from innerloop import InputError
from innerloop.methods import Coconut, Codi, Cot, Llada, Looped, LoopRegularised, Lotus, Pause, Slr
from innerloop.serve import embeds, never_written
from tests.methods.tools import QUESTIONS, sharp_model
from tests.models import tiny_model

METHODS = [
    Cot(),
    Pause(),
    Coconut(latents_per_step=1, curriculum={"max_stage": 3}),
    Codi(),
    Slr(n_slots=3, max_loops=3),
    Slr(n_slots=3, max_loops=4, loop={"residual": "A", "time": "lookup"}, stop={"rule": "delta", "threshold": 0.5}),
    Lotus(n_blocks=2, latents_per_block=3),
]


CASES = [
    *((method, "llama") for method in (*METHODS, LoopRegularised(block_size=1))),
    (METHODS[4], "gpt2"),
    (METHODS[4], "gemma2"),
]


@pytest.mark.parametrize(("method", "arch"), CASES, ids=lambda one: one if isinstance(one, str) else one.name)
def test_transformers_goes_on_as_the_engine_does(method, arch):
    model = sharp_model(method, arch)
    for question in QUESTIONS:
        (expected,) = model.generate([question], max_new_tokens=8)
        given = embeds(model, question)
        options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": never_written(model)}
        found = model.backbone.lm.generate(inputs_embeds=given[None], pad_token_id=0, **options)
        assert found[0].tolist() == expected.ids


def test_a_folder_hands_over_what_its_model_does(tmp_path):
    model = tiny_model(Slr(n_slots=3, max_loops=2))
    model.save_pretrained(tmp_path / "run")
    torch.testing.assert_close(embeds(tmp_path / "run", QUESTIONS[0], loops=1), embeds(model, QUESTIONS[0], loops=1))
    assert not torch.equal(embeds(model, QUESTIONS[0], loops=1), embeds(model, QUESTIONS[0]))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Llada(gen_length=8), "it fills in a canvas of masks"),
        (Looped(max_loops=2), "it repeats or skips its layers"),
        (
            Slr(n_slots=2, max_loops=2, loop={"lora": "shared"}, decode_lora=True),
            "its answer is written with weights of",
        ),
        (
            Slr(n_slots=2, max_loops=2, loop={"lora": "shared"}, answer_from="kv_last"),
            "its latents are read with weights",
        ),
    ],
)
def test_what_is_more_than_embeddings_is_refused_in_a_sentence(method, reason):
    with pytest.raises(InputError, match=f"cannot hand over its thought: {reason}.*; answer with this library"):
        embeds(tiny_model(method, "llama"), QUESTIONS[0])

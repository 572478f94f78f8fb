"""LLaDA's released layout against a Llama written out from the authors' tensors, whose attention sees all."""

from dataclasses import replace

import pytest

from innerloop import LatentModel
from tests.formats import authors, plain
from tests.formats.proved import check_canvases, check_logits

pytestmark = pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")


def slow_logits(w, ids):
    x, sees = w["model.transformer.wte.weight"][ids], plain.sees_all(len(ids))
    for i in range(authors.LAYERS):
        at = lambda name, i=i: w[f"model.transformer.blocks.{i}.{name}.weight"]  # noqa: E731
        h = plain.rms(x, at("attn_norm"), 1e-5)
        q, k, v = ((h @ at(f"{n}_proj").T).unflatten(-1, (-1, authors.WIDTH // authors.HEADS)) for n in "qkv")
        x = x + plain.attend(plain.turned(q, 500.0), plain.turned(k, 500.0), v, sees) @ at("attn_out").T
        x = x + plain.gated(plain.rms(x, at("ff_norm"), 1e-5), at("ff_proj"), at("up_proj"), at("ff_out"))
    return plain.rms(x, w["model.transformer.ln_f.weight"], 1e-5) @ w["model.transformer.ff_out.weight"].T


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada") / "LLaDA-8B-Base"
    return folder, authors.llada(folder)


@pytest.fixture(scope="module")
def model(made):
    return LatentModel.from_pretrained(made[0], device="cpu")


def test_logits_are_those_of_the_authors_tensors(made, model):
    check_logits(model, lambda ids: slow_logits(made[1], ids), sees="all")


def test_the_method_has_the_masks_of_the_checkpoint_and_the_blocks_of_the_paper(model):
    assert (model.method.mask_token, model.method.gen_length) == ("<|mdm_mask|>", 256)
    assert model.method.sampler.block_length == 32


def test_answers_are_those_of_a_slow_sampler_alone_and_in_a_batch(made, model):
    short = replace(model.method, gen_length=16, sampler=replace(model.method.sampler, block_length=8))
    shorter = LatentModel.from_pretrained(made[0], method=short, device="cpu")
    check_canvases(
        shorter, lambda p, mask: plain.fill(lambda ids: slow_logits(made[1], ids), p, 16, mask, 8, "confidence")
    )

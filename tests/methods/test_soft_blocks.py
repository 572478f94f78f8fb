"""Soft masks inside blocks: training against one pass over both halves, the engine against plain samplers."""

import pytest
import torch

from innerloop import BlockDiffusion, LatentModel, Llada
from innerloop.measure.bound import bounds
from tests.close import assert_close
from tests.fields import change
from tests.methods import reference_blocks as reference
from tests.methods.test_block_sampling import LAYOUTS, RULES, K, by_layout
from tests.methods.test_block_training import UNLIKE
from tests.methods.test_denoise_sampling import QUESTIONS, G, assert_equal
from tests.methods.test_soft_masks import ON, closed, model_of
from tests.models import ARCHS, moved, saved
from tests.test_trainer import make_trainer

LONG, SIZE = 25, 5


def blocks(gen_length=G, block_length=K, **changes):
    return BlockDiffusion(**{"gen_length": gen_length, "block_length": block_length, "soft": ON, **changes})


def ids_of(model, **options):
    return [(one.ids, one.cost.passes, one.cost.positions) for one in model.generate(QUESTIONS, **options)]


# Training


@by_layout
@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_soft_passes_on_the_clean_half_are_those_of_both_halves_in_loss_and_gradient(arch, unroll, layout):
    """The first passes over the noised half predict, from the clean one as it was too, and feed the last."""
    method = blocks(LONG, SIZE, soft={**ON, "unroll": unroll}, **layout)
    model = model_of(method, arch)
    rows = method.rows(UNLIKE, model.encoder, seed="s")
    assert all(row.noise.soft for row in rows)
    loss = sum(reference.in_2l(model, row, method) for row in rows) / sum(row.noise.n_counted for row in rows)
    expected = gradients_of(model, loss)
    assert (expected[0].abs() > 0).all()
    for chunk in (None, 5):
        model.loss_chunk, model.checkpoint_passes = chunk, chunk is not None
        model.train(chunk is not None and arch == "llama")  # GPT-2 drops out
        found = model(model.batch(rows)).loss
        assert_close(found, loss, 1e-6)
        assert_close(gradients_of(model, found), expected, 1e-5)


def gradients_of(model, loss):
    """Return the gradients of the gate's numbers, as one tensor, and of all that the backbone has."""
    own = list(model.soft.parameters())
    found = torch.autograd.grad(loss, [*own, *model.backbone.parameters()], allow_unused=True)
    return [torch.stack(found[: len(own)]), *found[len(own) :]]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_one_block_as_long_as_the_row_is_soft_llada_bit_for_bit(arch):
    found = []
    for method in (Llada(gen_length=LONG, soft=ON), blocks(LONG, 64, block_origin="row")):
        model = model_of(method, arch)
        loss = model.loss(UNLIKE, seed="s").loss
        found.append([loss, *gradients_of(model, loss)])
    assert all(torch.equal(x, y) for x, y in zip(*found) if x is not None)


@pytest.mark.parametrize("method", [Llada(gen_length=LONG, soft=ON), blocks(LONG, SIZE)])
def test_passes_differ_in_what_masks_are_read_as_alone(method):
    """Card 9, 2: tokens are read as they are, to the last bit."""
    model, read = model_of(method), []
    batch, own = model.batch(model.rows(UNLIKE, seed="s")), model.backbone.forward
    model.backbone.forward = lambda embeds, **known: read.append(embeds) or own(embeds, **known)
    model(batch)
    hard, soft = read[-2:]
    is_mask = batch.ids_BS[:, -hard.shape[1] :] == method.mask_id(model.encoder)
    assert torch.equal((hard != soft).any(-1), is_mask) and is_mask.any() and not is_mask.all()


def test_steps_make_as_many_passes_as_the_share_says():
    """The clean half once, the noised one once more in a soft step."""
    model = model_of(blocks(LONG, SIZE, soft={"share": 0.5}))
    for step in range(6):
        rows, passes, own = model.rows(UNLIKE, seed=f"0/{step}/0/0"), [], model.backbone.forward
        model.backbone.forward = lambda *a, passes=passes, own=own, **k: passes.append(1) or own(*a, **k)
        model(model.batch(rows))
        model.backbone.forward = own
        assert len(passes) == 2 + rows[0].noise.soft


# Answering


@pytest.mark.parametrize("sampler", RULES.values(), ids=RULES)
def test_the_engine_equals_the_plain_sampler(sampler):
    """Without a cache, one row: the masks of the active block are fed, and a block that begins is read hard."""
    method = blocks(sampler=sampler)
    assert_equal(model_of(method), method, reference.counted, 0.7)


@by_layout
@pytest.mark.parametrize("size", [1, 3, G])
def test_it_does_so_for_every_layout_and_size(layout, size):
    method = blocks(block_length=size, **layout)
    assert_equal(model_of(method), method, reference.counted, 0.7)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_does_so_on_every_architecture(arch):
    method = blocks(sampler={"steps": 6}, shift=True)
    assert_equal(model_of(method, arch), method, reference.counted, 0.0)


@pytest.mark.parametrize("remasked, size, layout", [("raw", K, {}), ("drop", K, {}), ("carry", K, {}),
                                                    ("raw", 1, {}), ("carry", 1, {"shift": True}),
                                                    ("raw", K, {"block_origin": "row", "shift": True})])  # fmt: skip
def test_it_does_so_where_tokens_are_masked_again(remasked, size, layout):
    """A block of one token that no one would read is not read, soft or not."""
    sampler = {"commit": "remdm", "steps": 24 if size == K else 36, "remask": {"cap": 0.4}}
    method = blocks(block_length=size, soft={**ON, "remasked": remasked}, sampler=sampler, **layout)
    assert_equal(model_of(method), method, reference.remdm, 1.0)


def test_it_does_so_where_tokens_are_overwritten():
    method = blocks(sampler={"commit": "threshold", "threshold": 0.3, "edit": 0.2, "edit_passes": 3})
    assert_equal(model_of(method), method, reference.editing, 0.0)


@pytest.mark.parametrize("sampler", [{"steps": 6}, {"commit": "remdm", "steps": 12, "remask": {"cap": 0.3}}])
def test_a_block_as_long_as_the_row_answers_as_soft_llada_does(sampler):
    found = []
    for method in (Llada(gen_length=G, soft=ON, sampler=sampler), blocks(G, 64, block_origin="row", sampler=sampler)):
        found.append(ids_of(model_of(method), temperature=1.0))
    assert found[0] == found[1]


@pytest.mark.parametrize("sampler, layout", [({"steps": 6}, "of the row"), ({"guidance": 1.0}, "of the row, shift"),
                                             ({"commit": "threshold", "threshold": 0.4}, "")])  # fmt: skip
def test_passes_cost_what_hard_ones_do_and_answers_depend_on_no_company(sampler, layout):
    method = blocks(sampler={**sampler, "eos": "never"}, **LAYOUTS[layout])
    model = model_of(method)
    whole = ids_of(model, batch_size=5, temperature=1.0)
    assert ids_of(model, batch_size=1, temperature=1.0) == ids_of(model, batch_size=3, temperature=1.0) == whole
    hard = ids_of(model_of(change(method, **{"soft.share": 0.0})), temperature=1.0)
    assert [ids for ids, *_ in hard] != [ids for ids, *_ in whole]
    if "threshold" not in sampler:
        assert [cost for _, *cost in hard] == [cost for _, *cost in whole]
    shut = ids_of(closed(model_of(method)), temperature=1.0)
    assert shut == hard


# As a whole


def test_a_run_is_saved_bounded_and_trained(tmp_path):
    method = blocks(LONG, SIZE, sampler={"steps": 10})
    model = moved(model_of(method).float())
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.mul_(0.25)
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == method and torch.equal(loaded.loss(UNLIKE).loss, model.loss(UNLIKE).loss)
    found = [bounds(m, UNLIKE[:1], n_draws=4)[0].nll for m in (loaded, closed(model))]
    assert found[0] != pytest.approx(found[1], rel=1e-6)
    before = loaded.soft.raw_scale.item()
    make_trainer(tmp_path / "t", loaded, UNLIKE[:2], UNLIKE[:2], max_steps=2, batch_size=2).train()
    assert loaded.soft.raw_scale.item() != before

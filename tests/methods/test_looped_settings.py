"""Looped models made of pretrained ones, their folders, and settings that cannot be."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from innerloop import Cot, InputError, LatentModel, Looped
from innerloop.decoder.backbone import Backbone
from innerloop.methods import Method
from innerloop.methods.depth.tying import rebuild
from tests.close import assert_close
from tests.fields import make
from tests.methods.test_looped import assert_same, stirred, texts
from tests.methods.tools import by_arch
from tests.models import saved, tiny_model


def converted(original: LatentModel, method: Method) -> LatentModel:
    """Convert a copy of a model."""
    backbone = Backbone(copy.deepcopy(original.backbone.lm))
    assert method.convert(backbone, None) is None
    return LatentModel(backbone, original.tokenizer, method).eval()


def stack(model: LatentModel) -> list[Tensor]:
    """Return one matrix of each layer."""
    return [next(iter(model.backbone.matrices(i).values())).weight.detach() for i in range(model.backbone.n_layers)]


@by_arch
@pytest.mark.parametrize(
    ("init", "n_block", "layers"),
    [
        ("first_k", 2, [[0], [1], [2], [7]]),
        ("first_k", 6, [[i] for i in range(8)]),
        ("stepwise", 3, [[0], [1], [4], [6], [7]]),
        ("stepwise", 1, [[0], [1], [7]]),
        ("average", 2, [[0], [1, 3, 5], [2, 4, 6], [7]]),
        ("average", 1, [[0], [1, 2, 3, 4, 5, 6], [7]]),
    ],
)
def test_the_block_is_made_of_the_layers_between_the_ends(arch, init, n_block, layers):
    original = tiny_model(Cot(), arch, num_hidden_layers=8)
    model = converted(original, Looped(n_prelude=1, n_coda=1, max_loops=2, init=init, n_block=n_block))
    assert model.backbone.n_layers == model.backbone.config.num_hidden_layers == n_block + 2
    for got, group in zip(stack(model), layers, strict=True):
        assert_close(got, torch.stack([stack(original)[i] for i in group]).mean(0))
        assert len(group) > 1 or torch.equal(got, stack(original)[group[0]])
    attention = "self_attn" if arch == "llama" else "attn"
    assert [getattr(layer, attention).layer_idx for layer in model.backbone.layers] == [*range(n_block + 2)]
    assert texts(model, 3)


def test_a_model_whose_block_is_all_of_it_is_the_base_at_one_loop():
    original = tiny_model(Cot(), num_hidden_layers=4)
    for init, n_block in [("middle_dup", 0), ("first_k", 4), ("stepwise", 4), ("average", 4)]:
        model = converted(original, Looped(max_loops=1, init=init, n_block=n_block))
        assert_same(model, original, exactly=True)


def test_copies_are_the_model_that_they_were_copied_from():
    """Two copies of two layers, averaged, are again the two layers: looped twice they are the model of four."""
    original = tiny_model(Cot(), num_hidden_layers=2)
    rebuild(original.backbone, [[0], [1], [0], [1]])
    assert_same(converted(original, Looped(max_loops=2, init="average", n_block=2)), original, tolerance=1e-5)


@by_arch
def test_a_looped_model_is_saved_and_loaded_and_not_made_again(arch, tmp_path: Path):
    folder = saved(tiny_model(Cot(), arch, num_hidden_layers=6), tmp_path / "base")
    ends = {"n_prelude": 1, "n_coda": 1, "init": "average", "n_block": 2, "input_injection": True}
    method = Looped(**ends, loop={"time": "lookup"})
    model = stirred(LatentModel.from_pretrained(folder, method, device="cpu"))
    run = saved(model, tmp_path / "run")
    for given in (None, method):
        assert_same(LatentModel.from_pretrained(run, given, device="cpu"), model, exactly=True)
    more = LatentModel.from_pretrained(run, Looped(**ends, max_loops=3), device="cpu")
    assert more.backbone.n_layers == 4 and torch.equal(more.depth.gamma, model.depth.gamma)
    with pytest.raises(InputError, match="the model has 2 layers between prelude and coda, not n_block=1"):
        LatentModel.from_pretrained(run, Looped(**{**ends, "n_block": 1}), device="cpu")


def test_fresh_gpt2_weights_are_drawn_for_the_depth_that_they_will_have():
    plain, deep = tiny_model(Cot(), "gpt2"), tiny_model(Looped(n_prelude=1, max_loops=4), "gpt2")
    for theirs, ours in zip(plain.backbone.layers, deep.backbone.layers):  # 1 + 4 * 2 = 9 layers instead of 3
        assert_close(ours.attn.c_proj.weight, theirs.attn.c_proj.weight / 3**0.5)
        assert_close(ours.mlp.c_proj.weight, theirs.mlp.c_proj.weight / 3**0.5)
        assert torch.equal(ours.mlp.c_fc.weight, theirs.mlp.c_fc.weight)
    llama = tiny_model(Looped(max_loops=4)).state_dict()
    assert all(torch.equal(tensor, llama[name]) for name, tensor in tiny_model(Cot()).state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_prelude": 2, "n_coda": 1}, "the model has 3 layers, which leaves none to loop: lower n_prelude or n_coda"),
        ({"init": "first_k", "n_block": 4}, "3 layers between prelude and coda: lower n_block, which is 4"),
        ({"init": "average", "n_block": 2}, "3 layers cannot be tied to blocks of 2: choose a number that divides 3"),
    ],
)
def test_blocks_that_a_model_has_no_layers_for_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        converted(tiny_model(Cot()), make(Looped, **fields))

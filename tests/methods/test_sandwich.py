"""Norms behind attention and MLP: Ouro's of what is added, Huginn's of the sums; and Ouro's final norm in the loop.

That both compute what their authors' decoders do is in tests/formats/test_depth.py.
"""

import copy

import pytest
import torch

from innerloop import Looped, RecurrentDepth
from tests.close import assert_close
from tests.models import chain_examples, tiny_model

METHODS = {
    "outputs": Looped(max_loops=2, sandwich=True, loop={"site": "post_norm"}),
    "sums": RecurrentDepth(max_loops=2, sandwich=True, double_norm=True, n_prelude=1, n_coda=1, state_std=0.1),
}
EACH = pytest.mark.parametrize("name", METHODS)


@EACH
def test_rows_of_a_batch_are_as_alone(name):
    model, examples = tiny_model(METHODS[name]), chain_examples(3)
    together = model.answer_logits(examples)
    assert_close(together, [model.answer_logits([one])[0] for one in examples], 1e-4)


@EACH
def test_gains_are_learned(name):
    model = tiny_model(METHODS[name])
    model.loss(chain_examples(2)).loss.backward()
    assert all(gain.grad.abs().sum(-1).gt(0).all() for gain in model.depth.norms.parameters())


@EACH
def test_the_decoder_itself_is_as_it_was(name):
    plain, model = tiny_model(Looped(max_loops=1)), tiny_model(METHODS[name])
    embeds = torch.randn(1, 4, plain.backbone.width)
    assert torch.equal(model.backbone(embeds), plain.backbone(embeds))


@EACH
def test_a_copy_has_norms_of_its_own(name):
    model, examples = tiny_model(METHODS[name]), chain_examples(1)
    before = model.answer_logits(examples)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.depth.norms.after_mlp.mul_(2)
    assert_close(model.answer_logits(examples), before)
    assert not torch.allclose(twin.answer_logits(examples)[0], before[0])


def test_the_state_of_an_iteration_is_normed_once_where_it_ends_in_the_norm():
    model, examples = tiny_model(Looped(max_loops=1, loop={"site": "post_norm"})), chain_examples(2)
    assert_close(model.answer_logits(examples), tiny_model(Looped(max_loops=1)).answer_logits(examples))

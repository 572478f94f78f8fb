"""Losses made a few rows of logits at a time are those made at once, and so are their gradients."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import Coconut, Codi, Cot, LatentTrainer, LatentTrainingArguments, Lotus, SimCot, Slr
from innerloop.chunks import by_rows, shown_by, summed_loss, token_losses
from innerloop.methods import Looped, SpiralThinker
from tests.methods.tools import MIXED, assert_same_gradients, gradients, sharp_model
from tests.models import chain_examples, tiny_model

METHODS = {
    "cot": Cot(),
    "coconut": Coconut(max_stage=2),
    "slr": Slr(n_slots=3, max_loops=2, step_weight=0.5, deep_weight=0.3, slots_per_step=1),
    "halt": Slr(n_slots=2, max_loops=2, stop="halt", halt_weight=0.5),
    "separate": Slr(n_slots=2, max_loops=2, decoder="separate"),
    "lotus": Lotus(n_blocks=2, latents_per_block=2, max_loops=2),
    "codi": Codi(n_latents_total=2),
    "simcot": SimCot(),
    "spiral": SpiralThinker(pattern="odd", latents_per_block=2, max_loops=2),
    "exits": Looped(max_loops=2, exit_weight=0.5, exit_kd=0.5),
    "gate": Looped(max_loops=2, gate="distribution", stop="halt"),
}
CHUNK = 3


def loss_of(model, chunk):
    """Return the terms of a loss made so many rows at a time, its gradients, and the largest call of the head."""
    model.loss_chunk, seen = chunk, []

    def note(module, args, output):
        seen.append(output.numel() // output.shape[-1])

    handle = model.backbone.lm.get_output_embeddings().register_forward_hook(note)
    out = model.train()(model.batch(model.rows(MIXED)))
    grads = gradients(model, out.loss)
    handle.remove()
    return out, grads, max(seen)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_in_chunks_has_the_value_and_the_gradient_of_the_whole(name):
    model = tiny_model(METHODS[name]).double() if name in ("exits", "gate") else sharp_model(METHODS[name])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    whole, expected, largest = loss_of(model, None)
    found, grads, most = loss_of(model, CHUNK)
    assert most <= CHUNK < largest
    assert found.terms.keys() == whole.terms.keys()
    for term, value in whole.terms.items():
        torch.testing.assert_close(found.terms[term], value, rtol=1e-6, atol=1e-6)
    assert_same_gradients(grads, expected)


@pytest.mark.parametrize("at_once", [1, 3, 7, 8, 100, None])
def test_every_token_has_its_own_loss_whatever_the_chunks(at_once):
    weight, states = torch.randn(11, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    targets = torch.tensor([0, 3, -100, 10, 5, 5, 1, 2])
    show = shown_by(lambda x: x @ weight.T, states)
    found = token_losses(show, targets, at_once)
    expected = cross_entropy(states @ weight.T, targets, reduction="none")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(summed_loss(show, targets, at_once), expected.sum())
    mine, theirs = (torch.autograd.grad(one.sum(), (weight, states)) for one in (found, expected))
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(token_losses(show, targets, at_once), expected)


def test_no_tokens_have_no_losses():
    assert by_rows(lambda part: torch.zeros(0)[part], 0, 2).shape == (0,)


@contextmanager
def kept_for_the_gradient():
    """Count the elements that autograd keeps between the passes."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        yield sizes


def test_logits_are_not_kept_for_the_gradient():
    head, states = torch.nn.Linear(4, 1000), torch.randn(64, 4, requires_grad=True)
    most = []
    for at_once in (None, 8):
        with kept_for_the_gradient() as sizes:
            summed_loss(shown_by(head, states), torch.zeros(64, dtype=torch.long), at_once)
        most.append(sum(sizes))
    assert most[0] > 64 * 1000 and most[1] < 8 * 1000


def test_the_trainer_sets_it(tmp_path: Path):
    losses = []
    for chunk in (None, 5):
        model = tiny_model(Cot())
        args = LatentTrainingArguments(tmp_path / str(chunk), max_steps=2, batch_size=4, use_cpu=True, loss_chunk=chunk)
        trainer = LatentTrainer(model, args, chain_examples(8))
        assert model.loss_chunk == chunk
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

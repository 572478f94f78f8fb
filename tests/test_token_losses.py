"""Losses made a few rows of logits at a time are those made at once, and so are their gradients."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import Coconut, Codi, Cot, LatentTrainer, LatentTrainingArguments, Lotus, SimCot, Slr
from innerloop.decoder.fused_loss import check_fused, fused_loss
from innerloop.decoder.token_losses import HeadInputs, by_rows, summed_loss, token_losses
from innerloop.errors import InputError
from innerloop.methods import Looped, RelaxedRecursive, SpiralThinker
from tests.close import assert_close
from tests.methods.tools import MIXED, assert_same_gradients, gradients, sharp_model
from tests.models import chain_examples, tiny_model

METHODS = {
    "cot": Cot(),
    "coconut": Coconut(curriculum={"max_stage": 2}),
    "slr": Slr(n_slots=3, max_loops=2, step_weight=0.5, deep={"weight": 0.3}, slots_per_step=1),
    "halt": Slr(n_slots=2, max_loops=2, stop={"rule": "halt"}, halt={"weight": 0.5}),
    "separate": Slr(n_slots=2, max_loops=2, decoder={"kind": "separate"}),
    "lotus": Lotus(n_blocks=2, latents_per_block=2, max_loops=2),
    "codi": Codi(n_latents_total=2),
    "simcot": SimCot(),
    "spiral": SpiralThinker(pattern="odd", latents_per_block=2, max_loops=2),
    "exits": RelaxedRecursive(max_loops=3, exits={"weight": 0.5, "kd": 0.5}),
    "gate": Looped(max_loops=2, exits={"gate": "distribution"}, stop={"rule": "halt"}),
}
CHUNK = 3


def loss_of(model, chunk):
    """Return the terms of a loss made so many rows at a time, its gradients, and the largest call of the head."""
    model.loss_chunk, seen = chunk, []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def note(module, args, output):
        seen.append(output.numel() // output.shape[-1])

    handle = model.backbone.lm.get_output_embeddings().register_forward_hook(note)
    out = model.train()(model.batch(model.rows(MIXED)))
    grads = gradients(model, out.loss)
    handle.remove()
    return out, grads, max(seen, default=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_in_chunks_has_the_value_and_the_gradient_of_the_whole(name):
    model = tiny_model(METHODS[name]).double() if name in ("exits", "gate") else sharp_model(METHODS[name])
    whole, expected, largest = loss_of(model, None)
    found, grads, most = loss_of(model, CHUNK)
    assert most <= CHUNK < largest
    assert_close(found.terms, whole.terms)
    assert_same_gradients(grads, expected)


def plain_kernel(states, targets, head, cap=None):
    """What the fused kernel computes, in torch."""
    logits = head(states).float()
    return cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="sum")


@pytest.mark.parametrize("name", ["slr", "lotus", "codi", "spiral", "gate", "separate"])
def test_a_fused_loss_gets_what_the_head_gets(name, monkeypatch):
    model, asked = sharp_model(METHODS[name]), []
    monkeypatch.setattr("innerloop.decoder.backbone.fused_loss", lambda *a: asked.append(len(a[1])) or plain_kernel(*a))
    whole, expected, _ = loss_of(model, None)
    assert not asked
    found, grads, _ = loss_of(model, "fused")
    assert bool(asked) == (name != "separate")  # a decoder of its own has another head
    assert_close(found.terms, whole.terms)
    assert_same_gradients(grads, expected)


@pytest.mark.parametrize(
    ("arch", "fields"), [("llama", {"logit_scale": 0.25}), ("llama", {"logits_scaling": 2.0}), ("gemma2", {})]
)
def test_a_fused_loss_scales_and_caps_logits_as_the_head_does(arch, fields, monkeypatch):
    backbone = tiny_model(Cot(), arch).backbone
    for name, value in fields.items():
        setattr(backbone.config, name, value)
    monkeypatch.setattr("innerloop.decoder.backbone.fused_loss", plain_kernel)
    show, targets = backbone.head_inputs(5 * torch.randn(6, backbone.width)), torch.arange(6)
    assert_close(summed_loss(show, targets, "fused"), summed_loss(show, targets, None))


def test_ligers_kernel_gives_the_loss_and_the_gradient(monkeypatch):
    """Runs where liger-kernel is installed: on a GPU, or with TRITON_INTERPRET=1."""
    pytest.importorskip("liger_kernel")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_fused(device)
    except InputError as error:
        pytest.skip(str(error))
    for cap in (None, 2.0) if device.type == "cuda" else (None,):  # the interpreter takes no cap
        head = torch.nn.Linear(32, 300, bias=False, device=device)
        states = torch.randn(20, 32, device=device, requires_grad=True)
        targets = torch.randint(300, (20,), device=device)
        sides = [0.7 * kernel(states, targets, head, cap) for kernel in (plain_kernel, fused_loss)]
        assert_close(*sides)
        expected, found = (torch.autograd.grad(side, (states, head.weight)) for side in sides)
        assert_close(expected, found)


def test_a_fused_loss_is_refused_where_it_does_not_run(tmp_path, monkeypatch):
    find = "innerloop.errors.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    args = LatentTrainingArguments(tmp_path, max_steps=1, use_cpu=True, loss_chunk="fused")
    with pytest.raises(InputError, match="pip install"):
        LatentTrainer(tiny_model(Cot()), args, chain_examples(4))
    monkeypatch.setattr(find, lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="on a CPU"):
        check_fused(torch.device("cpu"))
    for options, message in (({"use_liger_kernel": True}, "loss_chunk"), ({"loss_chunk": "fuse"}, "or fused")):
        with pytest.raises(InputError, match=message):
            LatentTrainingArguments(tmp_path, **options)


@pytest.mark.parametrize("at_once", [1, 3, 7, 8, 100, None, "fused"])
def test_every_token_has_its_own_loss_whatever_the_chunks(at_once):
    weight, states = torch.randn(11, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    targets = torch.tensor([0, 3, -100, 10, 5, 5, 1, 2])
    show = HeadInputs(lambda x: x @ weight.T, states)
    found = token_losses(show, targets, at_once)
    expected = cross_entropy(states @ weight.T, targets, reduction="none")
    assert_close(found, expected)
    assert_close(summed_loss(show, targets, at_once), expected.sum())
    mine, theirs = (torch.autograd.grad(one.sum(), (weight, states)) for one in (found, expected))
    assert_close(mine, theirs)
    with torch.no_grad():
        assert_close(token_losses(show, targets, at_once), expected)
    assert by_rows(lambda part: torch.zeros(0)[part], 0, at_once).shape == (0,)


def test_logits_are_not_kept_for_the_gradient():
    head, states, most = torch.nn.Linear(4, 1000), torch.randn(64, 4, requires_grad=True), []
    for at_once in (None, 8):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            summed_loss(HeadInputs(head, states), torch.zeros(64, dtype=torch.long), at_once)
        most.append(sum(kept))
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

"""The cosine that draws blocks of layers to like weights (looped.md, sections 4 and 9)."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from innerloop import Cot, InputError, LatentModel, LatentTrainer, LoopRegularised
from innerloop.methods.depth.loop_regularised_forward import likeness
from innerloop.methods.depth.tying import rebuild
from innerloop.train.training_arguments import training_arguments
from tests.close import assert_close
from tests.fields import make
from tests.methods.test_every_depth_method import NO_DROPOUT
from tests.methods.test_looped import assert_same
from tests.methods.tools import MIXED, by_arch, gradients
from tests.models import chain_examples, tiny_model


def regularised(arch: str = "llama", n_layers: int = 4, **fields) -> LatentModel:
    method = make(LoopRegularised, **{"block_size": 2, **fields})
    return tiny_model(method, arch, num_hidden_layers=n_layers, **(NO_DROPOUT if arch == "gpt2" else {}))


def matrices(n: int = 6, width: int = 128, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(width, width, generator=generator) for _ in range(n)]


# R_G


@pytest.mark.parametrize(("n", "k"), [(6, 2), (6, 3), (8, 4), (4, 1)])
def test_the_sum_is_the_cards(n, k):
    weights = matrices(n, 16)
    pairs = [(i * k + j, (i + 1) * k + j) for i in range(n // k - 1) for j in range(k)]
    terms = [cosine_similarity(weights[a].flatten(), weights[b].flatten(), dim=0) for a, b in pairs]
    assert len(terms) == n - k
    assert_close(likeness(weights, k), sum(terms) / (n - k))


def test_likeness_is_one_of_copies_minus_one_of_turned_signs_and_nothing_of_random_matrices():
    one, two, three = matrices(3)
    for weights, k, expected in (
        ([one] * 6, 2, 1.0),
        ([one, two, three] * 2, 3, 1.0),
        ([one, two, -one, -two], 2, -1.0),
        ([one, two, one, two, -one, -two], 2, 0.0),
    ):
        assert likeness(weights, k) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert likeness([one, two, three] * 2, 2) < 0.9
    weights = matrices()
    assert abs(likeness(weights, 2)) < 0.05
    scaled = [weight * (i + 1) for i, weight in enumerate(weights)]
    assert abs(likeness(scaled, 2) - likeness(weights, 2)) < 1e-6


def test_without_pairs_there_is_nothing_to_draw_together():
    assert likeness(matrices(4), 4) == likeness(matrices(3), 2) == 1.0
    five = matrices(5, 16)
    assert likeness(five, 2) == likeness(five[:4], 2)  # layers after the last full block do not count


def test_a_matrix_of_zeros_has_no_direction():
    one, two = (weight.requires_grad_() for weight in matrices(2))
    zero = torch.zeros(128, 128, requires_grad=True)
    value = likeness([one, two, zero, two], 2)  # only two with itself is left
    assert value.item() == pytest.approx(1.0, rel=1e-5)
    value.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in (one, two, zero))
    assert likeness([zero, zero], 1) == 1.0


# As a method


def plain_of(model: LatentModel) -> LatentModel:
    return LatentModel(model.backbone, model.tokenizer, Cot()).eval()


def test_it_is_the_plain_decoder(arch: str):
    model = tiny_model(LoopRegularised(block_size=1), arch)
    plain = plain_of(model)
    assert_same(model, plain, exactly=True)
    ours, theirs = (m.generate([MIXED[0].question], max_new_tokens=2)[0] for m in (model, plain))
    assert (ours.text, ours.cost.flops) == (theirs.text, theirs.cost.flops)


@by_arch
def test_without_weight_training_is_bit_for_bit_that_of_the_plain_decoder(arch):
    model = regularised(arch, cosine_weight=0.0).train()
    outs = model.loss(MIXED), plain_of(model).train().loss(MIXED)
    assert torch.equal(outs[0].loss, outs[1].loss) and outs[0].terms.keys() == {"answer"}
    left, right = (gradients(model, out.loss) for out in outs)
    assert all(torch.equal(left[name], right[name]) for name in right)


@by_arch
def test_the_penalty_is_the_mean_over_kinds_of_matrix(arch):
    model = regularised(arch, cosine_weight=3.0)
    kinds = {
        "llama": [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")],
        "gpt2": ["attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    }[arch]
    layers = [model.backbone.matrices(layer) for layer in range(4)]
    assert list(layers[0]) == kinds
    shares = [1 - likeness([layer[kind].weight for layer in layers], 2) for kind in kinds]
    expected = sum(shares) / len(kinds)
    out, plain = model.loss(MIXED), plain_of(model).loss(MIXED)
    assert_close(out.terms["cosine"], expected.detach())
    assert_close(out.loss, plain.loss + 3.0 * expected)
    assert_close(model.loss(MIXED[:1]).terms["cosine"], out.terms["cosine"])  # whatever the number of rows


@by_arch
def test_a_step_down_the_penalty_makes_layers_more_alike(arch):
    model = regularised(arch)
    before = model.depth.penalty()
    grads = gradients(model, model.depth.penalty())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.5 * grads[name]
            assert parameter.ndim > 1 or grads[name].abs().max() == 0  # gains and biases are left alone
    assert model.depth.penalty() < before - 1e-3
    for layer in range(4):  # neither side is held fixed
        for matrix in model.backbone.matrices(layer).values():
            name = next(n for n, p in model.named_parameters() if p is matrix.module.weight)
            assert grads[name].abs().max() > 0


@by_arch
def test_copied_blocks_have_no_penalty(arch):
    model = regularised(arch, 2)
    rebuild(model.backbone, [[0], [1], [0], [1]])
    twin = LatentModel(model.backbone, model.tokenizer, LoopRegularised(block_size=2))
    assert twin.depth.penalty().item() == pytest.approx(0.0, abs=1e-6)
    alike = gradients(twin, twin.depth.penalty())
    assert max(grad.abs().max().item() for grad in alike.values()) < 1e-6
    assert regularised(arch, block_size=4).depth.penalty() == 0.0


def test_the_weight_grows_over_the_first_steps(tmp_path):
    model = regularised(cosine_weight=10.0, ramp_steps=4)
    full = model.loss(MIXED).terms["cosine"]
    for model.depth.step, share in [(0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)]:
        assert_close(model.loss(MIXED).terms["cosine"], share * full)
    settings = {"max_steps": 3, "logging_steps": 1, "use_cpu": True, "batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = LatentTrainer(model, training_arguments(tmp_path, settings), list(chain_examples(8)))
    trainer.train()
    logged = [entry["loss_cosine"] for entry in trainer.state.log_history if "loss_cosine" in entry]
    assert logged[0] == 0.0 and logged[1] == pytest.approx(0.25 * full.item(), rel=1e-2)  # not once a micro-batch
    assert logged[2] > logged[1]


def test_blocks_larger_than_the_model_are_refused():
    with pytest.raises(InputError, match="4 layers, fewer than block_size=5: lower block_size"):
        regularised(block_size=5)

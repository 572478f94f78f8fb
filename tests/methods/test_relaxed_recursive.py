"""Relaxed recursive transformers: tied layers, corrected by truncated SVD (relaxed_recursive.md, section 9)."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers.pytorch_utils import Conv1D

from innerloop import Cot, InputError, LatentModel, Looped, RelaxedRecursive
from innerloop.decoder.backbone import Backbone
from innerloop.methods.depth.residual_lora import key_of, truncated
from innerloop.methods.depth.tying import rebuild, stepwise
from innerloop.model.distillation import divergence
from tests.close import ROUNDED, assert_close
from tests.fields import make
from tests.methods.test_every_depth_method import NO_DROPOUT
from tests.methods.test_looped import assert_same, gap, stirred, texts
from tests.methods.tools import MIXED, QUESTIONS, by_arch, gradients, logits_of, with_token
from tests.models import saved, tiny_model

FULL = 1000  # more than any side of a matrix
INITS = ("stepwise", "average", "lower", "upper", "random")
by_init = pytest.mark.parametrize(
    ("arch", "init"), [*(("llama", init) for init in INITS), ("gpt2", "average"), ("gpt2", "random")]
)


def source(arch: str = "llama", n_layers: int = 4) -> LatentModel:
    """Make the model to be converted; its gains and biases are no constants."""
    model = tiny_model(Cot(), arch, num_hidden_layers=n_layers, **(NO_DROPOUT if arch == "gpt2" else {}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.backbone.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def converted(original: LatentModel, **fields) -> LatentModel:
    """Convert a copy of a model in memory, as loading it from a folder does."""
    backbone, method = Backbone(copy.deepcopy(original.backbone.lm)), make(RelaxedRecursive, **fields)
    start = method.convert(backbone, None)
    model = LatentModel(backbone, original.tokenizer, method)
    parts = torch.nn.ModuleDict(model.trained_modules())
    parts.load_state_dict({**parts.state_dict(), **start})
    return model.eval()


def weights(model: LatentModel) -> list[dict[str, Tensor]]:
    """Return the matrices of each layer."""
    each = map(model.backbone.matrices, range(model.backbone.n_layers))
    return [{name: matrix.weight.detach() for name, matrix in layer.items()} for layer in each]


def correction(model: LatentModel, depth: int, name: str) -> tuple[Tensor, Tensor]:
    """Return B_l and A_l of a depth."""
    k = len(model.depth.block)
    key = key_of(depth % k, name)
    return tuple(bank[key][depth // k].detach() for bank in (model.depth.lora.up, model.depth.lora.down))


# Equal to the original


def test_one_loop_is_the_original_bit_for_bit(arch: str):
    original = tiny_model(Cot(), arch)
    model = converted(original, max_loops=1, rank=3)
    assert_same(model, original, exactly=True)
    assert texts(model, 4) == texts(original, 4)


@by_init
def test_at_full_rank_the_model_is_the_original_whatever_is_shared(arch, init):
    original = source(arch)
    model = converted(original, init=init, rank=FULL)
    assert_same(model, original, tolerance=1e-4)
    assert texts(model, 4) == texts(original, 4)
    assert gap(converted(original, init=init, rank=FULL, tie_1d=True), original) > 0.1
    model.depth.lora.scale = 2.0  # as with alpha = 2 r
    assert gap(model, original) > 0.1


@pytest.mark.parametrize(
    ("arch", "n_layers", "n_loops", "lora_init"),
    [("gpt2", 6, 2, "svd"), ("qwen2", 6, 2, "split_sqrt"), ("qwen3", 5, 3, "svd")],
)
def test_layers_may_stay_untied_at_both_ends(arch, n_layers, n_loops, lora_init):
    original = source(arch, n_layers)
    model = converted(original, n_prelude=1, n_coda=1, max_loops=n_loops, lora_init=lora_init, rank=FULL)
    assert model.backbone.n_layers == model.backbone.config.num_hidden_layers == 2 + (n_layers - 2) // n_loops
    assert_same(model, original, tolerance=1e-4)


def test_sliding_layers_are_tied_to_their_like_and_those_that_cannot_be_shared_out_are_refused():
    kinds = ["sliding_attention", "full_attention"]
    original, odd = (tiny_model(Cot(), "gemma3", num_hidden_layers=2 * n, layer_types=kinds * n) for n in (2, 1))
    model = converted(original, rank=FULL)
    assert model.backbone.config.layer_types == kinds
    assert_same(model, original, tolerance=2e-4)
    with pytest.raises(InputError, match=r"layers 0, 1 differ in layer_types \(sliding_attention, full_attention\)"):
        converted(odd, rank=1)
    with pytest.raises(InputError, match=r"5 layers cannot be run as a block of 2 loops: choose a max_loops that"):
        converted(source(n_layers=5))


@pytest.mark.parametrize("init", ["average", "lower", "upper", "stepwise"])
def test_where_layers_are_tied_already_rank_does_not_matter(init):
    original = source("gpt2", 2)
    rebuild(original.backbone, [[0], [1], [0], [1]])
    for rank in (0, 3):
        assert_same(converted(original, init=init, rank=rank), original, tolerance=1e-4)


# Purely tied


@by_init
def test_without_corrections_it_is_the_looped_model_of_the_same_layers(arch, init):
    original = source(arch)
    tied = converted(original, init=init, rank=0, tie_1d=True)
    assert not list(tied.depth.parameters())
    assert_same(tied, LatentModel(tied.backbone, tied.tokenizer, Looped(max_loops=2)).eval(), exactly=True)
    zero = converted(original, init=init, rank=5, lora_init="zero", tie_1d=True)
    assert_same(zero, tied, exactly=True)
    apart = converted(original, init=init, rank=0)
    assert_same(converted(original, init=init, rank=5, lora_init="zero"), apart, exactly=True)
    assert gap(apart, tied) > 1e-3


@by_arch
def test_the_shared_layers_are_those_that_the_card_names(arch):
    original = source(arch, 6)
    layers = weights(original)
    name = next(iter(layers[0]))
    for init, chosen in [("lower", (0, 1, 2)), ("upper", (3, 4, 5)), ("stepwise", (0, 3, 5))]:
        for got, layer in zip(weights(converted(original, init=init, rank=0)), chosen):
            assert all(torch.equal(got[key], layers[layer][key]) for key in got)
    for j, got in enumerate(weights(converted(original, init="average", rank=0))):
        assert_close(got[name], (layers[j][name] + layers[3 + j][name]) / 2)
    drawn, again = (weights(converted(original, init="random", rank=0)) for _ in range(2))
    assert torch.equal(drawn[1][name], again[1][name])
    assert abs(drawn[0][name].std() / 0.2 - 1) < 0.1  # initializer_range of the tiny models
    assert stepwise(18, 9) == [0, 2, 4, 6, 9, 11, 13, 15, 17]  # halves are rounded up
    assert stepwise(6, 1) == [0] and stepwise(4, 4) == [0, 1, 2, 3] and stepwise(12, 2) == [0, 11]


# The corrections


@by_arch
@pytest.mark.parametrize("init", ["average", "stepwise"])
def test_corrections_are_the_best_of_their_rank(arch, init):
    original, errors = source(arch), {}
    for rank in (1, 4, FULL):
        model = converted(original, init=init, rank=rank)
        shared = weights(model)
        for depth, layer in enumerate(weights(original)):
            for name, wanted in layer.items():
                residual, (up, down) = wanted - shared[depth % 2][name], correction(model, depth, name)
                s = torch.linalg.svdvals(residual)
                error = (residual - up @ down).square().sum()
                assert abs(error - s[rank:].square().sum()) <= ROUNDED * residual.square().sum()
                assert error <= errors.get((depth, name), torch.inf) + 1e-6
                errors[depth, name] = error
                assert up.shape[1] == min(rank, *wanted.shape)
                assert_close(up.T @ up, torch.diag(s[:rank] ** 2))
                assert_close(down @ down.T, torch.eye(len(down)))


def test_a_product_may_be_split_evenly():
    residual = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    (b, a), (up, down) = truncated(residual, 4, "split_sqrt"), truncated(residual, 4, "svd")
    assert_close(b @ a, up @ down)
    for square in (b.T @ b, a @ a.T):
        assert_close(square, torch.diag(torch.linalg.svdvals(residual)[:4]))


def test_what_averaging_loses_adds_up_to_nothing_and_what_is_kept_needs_no_correction():
    original = source()
    averaged, spread = converted(original, rank=FULL), converted(original, init="stepwise", rank=FULL)
    for name in weights(original)[0]:
        for j in (0, 1):
            (up, down), (up_2, down_2) = correction(averaged, j, name), correction(averaged, 2 + j, name)
            assert_close(up @ down, -up_2 @ down_2)
            assert_close(up.norm(dim=0), up_2.norm(dim=0))
        sizes = [correction(spread, depth, name)[0].abs().max() for depth in range(4)]
        assert sizes[0] == sizes[3] == 0 < 0.1 < sizes[1]  # of 4 layers 0 and 3 are kept


@by_arch
def test_the_model_comes_nearer_to_the_original_with_rank(arch):
    original = source(arch)
    wanted, distances = torch.cat(original.answer_logits(MIXED)).log_softmax(-1), []
    for rank in (0, 4, 16, 28, 32):
        logits = torch.cat(converted(original, rank=rank).answer_logits(MIXED)).log_softmax(-1)
        distances.append(kl_div(logits, wanted, reduction="batchmean", log_target=True).item())
    assert distances[0] > distances[2] > distances[3] > distances[4]
    assert distances[1] > distances[3] and distances[4] < 1e-6


def test_parameters_and_corrections_are_counted():
    original, plain, model = source(), converted(source(), rank=0), converted(source(), rank=3)
    one = list(original.backbone.layers[0].parameters())
    sides = sum(sum(matrix.shape) for matrix in weights(original)[0].values())
    outside = sum(p.numel() for p in original.parameters()) - 4 * sum(p.numel() for p in one)
    per_depth = 3 * sides + sum(p.numel() for p in one if p.ndim == 1)
    n_weights = outside + 2 * sum(p.numel() for p in one) + 4 * per_depth
    assert sum(p.numel() for p in model.parameters()) == n_weights
    bare, none, more = (m.generate(QUESTIONS[:1], max_new_tokens=1)[0].cost for m in (original, plain, model))
    assert bare.flops == none.flops and more.flops - none.flops == 2 * none.positions * 4 * 3 * sides


def test_attention_and_mlp_may_have_ranks_of_their_own():
    def ranks(**fields) -> dict[str, int]:
        bank = converted(source("gpt2"), **fields).depth.lora
        return {key.removeprefix("0/"): down.shape[1] for key, down in bank.down.items() if key.startswith("0/")}

    names = ["attn/c_attn/q", "attn/c_attn/k", "attn/c_attn/v", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"]
    assert ranks(rank=3, mlp_rank=5) == dict(zip(names, [3, 3, 3, 3, 5, 5]))
    assert ranks(rank=4) == dict.fromkeys(names, 4)
    assert ranks(rank=4, mlp_rank=0) == dict.fromkeys(names[:4], 4)
    assert ranks(rank=0, mlp_rank=2) == dict.fromkeys(names[4:], 2)


# Reading, writing, learning


@by_arch
def test_decoding_is_reading_at_once_and_the_future_does_not_matter(arch):
    model = stirred(converted(source(arch, 5), n_prelude=1, rank=3), 0.05)
    (row,) = model.rows(MIXED[:1])
    logits, context = logits_of(model, [row])[0], model.new_context(model.batch(model.prompts(QUESTIONS[:1])))
    embeds = model.backbone.embed(torch.tensor([row.ids()[:-1]]))
    with torch.no_grad():
        states = [context.read(one) for one in embeds.split(1, dim=1)]
        assert_close(model.backbone.head(torch.cat(states, dim=1))[0, -len(logits) :], logits)
    assert sum(len(slot.keys) for slot in context.cache.slots.values()) == 5  # as many as the original has layers
    at = len(row) - 4
    changed = logits_of(model, [with_token(row, at, row.ids()[at] - 1)])[0]
    assert torch.equal(changed[:-3], logits[:-3]) and (changed - logits).abs().amax(1)[-3:].min() > 1e-6
    for example, one in zip(MIXED, model.answer_logits(MIXED)):
        assert_close(one, model.answer_logits([example])[0])


def untied(model: LatentModel) -> LatentModel:
    """Return a plain model with a layer for each depth: the shared matrices corrected, the depth's gains and biases."""
    backbone = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(backbone, [[0], [1], [0], [1]])
    with torch.no_grad():
        for depth in range(4) if model.depth.lora is not None else ():
            for name, matrix in backbone.matrices(depth).items():
                up, down = correction(model, depth, name)
                matrix.weight.add_(up @ down)
        for key, each in {} if model.depth.vectors is None else model.depth.vectors.copies.items():
            j, *rest = key.split("/")
            for b, values in enumerate(each):
                backbone.layers[2 * b + int(j)].get_parameter(".".join(rest)).copy_(values)
    return LatentModel(backbone, model.tokenizer, Cot()).eval()


@by_arch
def test_shared_weights_learn_from_all_depths_and_each_correction_from_its_own(arch):
    model = stirred(converted(source(arch), rank=3, tie_1d=True), 0.05)
    plain = untied(model)
    assert_same(model, plain)
    ours = gradients(model, model.loss(MIXED).loss)
    for one in (plain, model):
        one.loss(MIXED).loss.backward()

    def grad(one: LatentModel, layer: int, name: str) -> Tensor:
        matrix = one.backbone.matrices(layer)[name]
        whole = matrix.module.weight.grad
        return (whole.T if isinstance(matrix.module, Conv1D) else whole)[matrix.rows]

    for j in (0, 1):
        for name in model.backbone.matrices(j):
            per_depth = [grad(plain, depth, name) for depth in (j, 2 + j)]
            assert_close(grad(model, j, name), sum(per_depth))
            for b, own in enumerate(per_depth):
                down = correction(model, 2 * b + j, name)[1]
                assert_close(ours[f"depth.lora.up.{key_of(j, name)}"][b], own @ down.T)


@by_arch
def test_gains_and_biases_learn_from_their_own_depth(arch):
    model = converted(source(arch), rank=0)
    plain, own = untied(model), {name: p.detach().clone() for name, p in model.backbone.layers.named_parameters()}
    assert_same(model, plain)
    ours = gradients(model, model.loss(MIXED).loss)
    plain.loss(MIXED).loss.backward()
    for key in model.depth.vectors.copies:
        j, *rest = key.split("/")
        for b, grad in enumerate(ours[f"depth.vectors.copies.{key}"]):
            assert_close(grad, plain.backbone.layers[2 * b + int(j)].get_parameter(".".join(rest)).grad)
    for name, parameter in model.backbone.layers.named_parameters():  # the block's own are back in their place
        assert torch.equal(parameter, own[name]) and isinstance(parameter, torch.nn.Parameter)
        if parameter.ndim == 1:
            assert ours[next(n for n, p in model.named_parameters() if p is parameter)].abs().max() == 0


@by_arch
def test_exits_between_depths_learn_from_the_last(arch):
    """L = CE + 0.1 (CE_1 + KL(p_2 || p_1)), p_2 detached, the first exit after the first loop."""
    model = converted(source(arch), rank=3, exits={"weight": 0.1, "kd": 1.0})
    batch = model.batch(model.rows(MIXED))
    last = model.written_logits(batch, model.think(batch))
    short = LatentModel(model.backbone, model.tokenizer, RelaxedRecursive(max_loops=1, rank=3)).eval()
    for name in ("lora.up", "lora.down", "vectors.copies"):
        for bank, from_ in zip(short.depth.get_submodule(name).values(), model.depth.get_submodule(name).values()):
            bank.data = from_.data[:1]
    first = short.written_logits(batch, short.think(dataclasses.replace(batch, depth=1)))
    losses = [cross_entropy(logits, batch.targets_U) for logits in (first, last)]
    assert_close(model.train().loss(MIXED).loss, losses[1] + 0.1 * (losses[0] + kl(last, first)))


def kl(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p_wanted || p) per token."""
    return kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)


def test_it_learns_from_the_original(tmp_path):
    original = source()
    kd = {"teacher": str(saved(original, tmp_path / "original")), "weight": 0.5}
    model = converted(original, rank=2, kd=kd)
    out, batch = model.loss(MIXED), model.batch(model.rows(MIXED))
    logits, wanted = (one.written_logits(batch, one.think(batch)).detach() for one in (model, original))
    assert_close(out.terms["kd"], kl(wanted, logits))
    assert_close(out.loss, cross_entropy(logits, batch.targets_U) + 0.5 * kl(wanted, logits))
    assert out.loss.requires_grad and not any("original" in name for name, _ in model.named_parameters())
    assert converted(original, rank=FULL, kd=kd).loss(MIXED).terms["kd"] < 1e-6
    warm = converted(original, rank=2, kd={**kd, "temperature": 2.0}).loss(MIXED)
    assert_close(warm.terms["kd"], divergence(wanted, logits, 2.0).mean())
    assert model.method.with_loops(1).reference_source is None


def test_tokens_may_leave_between_loops_and_fewer_loops_may_be_run():
    model = converted(source(), rank=3, stop={"rule": "top_prob", "threshold": 0.3})
    depths = {depth for one in model.generate(QUESTIONS, max_new_tokens=4) for _, depth in one.depths}
    assert depths == {1, 2} and texts(model, 4, loops=1) != texts(model, 4, loops=2)
    with pytest.raises(InputError, match="corrections for 2 loops: ask for no more"):
        model.generate(QUESTIONS, loops=3)


# Folders


@by_arch
def test_a_model_is_converted_when_loaded_and_saved_with_each_shared_tensor_once(arch, tmp_path):
    original, method = source(arch, 5), RelaxedRecursive(n_prelude=1, rank=3)
    model = LatentModel.from_pretrained(saved(original, tmp_path / "original"), method, device="cpu")
    assert_same(model, converted(original, n_prelude=1, rank=3), exactly=True)
    run = saved(stirred(model, 0.05), tmp_path / "run")
    stored = {n: t for n, t in load_file(run / "model.safetensors").items() if ".layers." in n or ".h." in n}
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.backbone.layers.parameters())
    for given in (None, method):  # not converted again
        assert_same(LatentModel.from_pretrained(run, given, device="cpu"), model, exactly=True)


def test_from_scratch_depths_differ_by_corrections_that_are_zero():
    model = tiny_model(RelaxedRecursive(max_loops=2, rank=2), num_hidden_layers=2)
    tied = LatentModel(model.backbone, model.tokenizer, Looped(max_loops=2)).eval()
    assert_same(model, tied, exactly=True)
    assert gap(stirred(model), tied) > 1e-2

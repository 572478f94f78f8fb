"""Relaxed recursive transformers: tied layers, corrected by truncated SVD (relaxed_recursive.md, section 9)."""

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers.pytorch_utils import Conv1D

from innerloop import (
    Cot,
    InputError,
    LatentModel,
    LatentTrainer,
    LatentTrainingArguments,
    Looped,
    RelaxedRecursive,
)
from innerloop.decoder.backbone import Backbone
from innerloop.methods.depth.residual_lora import key_of, truncated
from innerloop.methods.depth.tying import rebuild, stepwise
from innerloop.model.distillation import divergence
from tests.close import ROUNDED, assert_close
from tests.methods.test_looped import NO_DROPOUT, assert_same, gap, stirred, texts
from tests.methods.tools import MIXED, QUESTIONS, by_arch, gradients, learn, logits_of, with_token
from tests.models import chain_examples, saved, tiny_model

FULL = 1000  # more than any side of a matrix
INITS = ("stepwise", "average", "lower", "upper", "random")
by_init = pytest.mark.parametrize(
    ("arch", "init"), [*(("llama", init) for init in INITS), ("gpt2", "average"), ("gpt2", "random")]
)


def source(arch: str = "llama", n_layers: int = 4, **changes) -> LatentModel:
    """Make the model to be converted; its gains and biases are no constants."""
    changes |= NO_DROPOUT if arch == "gpt2" else {}
    model, generator = tiny_model(Cot(), arch, num_hidden_layers=n_layers, **changes), torch.Generator().manual_seed(2)
    for parameter in model.backbone.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def converted(original: LatentModel, **fields) -> LatentModel:
    """Convert a copy of a model in memory, as loading it from a folder does."""
    backbone, method = Backbone(copy.deepcopy(original.backbone.lm)), RelaxedRecursive(**fields)
    start = method.convert(backbone, None)
    model = LatentModel(backbone, original.tokenizer, method)
    parts = torch.nn.ModuleDict(model.parts())
    parts.load_state_dict({**parts.state_dict(), **start})
    return model.eval()


def weights(model: LatentModel) -> list[dict[str, Tensor]]:
    """Return the matrices of each layer."""
    return [
        {name: matrix.weight.detach() for name, matrix in model.backbone.matrices(layer).items()}
        for layer in range(model.backbone.n_layers)
    ]


def correction(model: LatentModel, depth: int, name: str) -> Tensor:
    """Return B_l A_l of a depth."""
    k = len(model.depth.block)
    key = key_of(depth % k, name)
    return (model.depth.lora.up[key][depth // k] @ model.depth.lora.down[key][depth // k]).detach()


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
    model.depth.lora.scale = 2.0  # as with alpha = 2 r
    assert gap(model, original) > 0.1


@pytest.mark.parametrize(("arch", "lora_init"), [("gpt2", "svd"), ("qwen2", "split_sqrt"), ("qwen3", "svd")])
def test_layers_may_stay_untied_at_both_ends(arch, lora_init):
    original = source(arch, 6)
    model = converted(original, n_prelude=1, n_coda=1, lora_init=lora_init, rank=FULL)
    assert model.backbone.n_layers == model.backbone.config.num_hidden_layers == 4
    assert_same(model, original, tolerance=1e-4)
    three = converted(source(arch, 5), n_prelude=1, n_coda=1, max_loops=3, rank=FULL)
    assert_same(three, source(arch, 5), tolerance=1e-4)


def test_full_rank_needs_gains_and_biases_of_each_depth():
    for arch in ("llama", "gpt2"):
        original = source(arch)
        assert gap(converted(original, rank=FULL, tie_1d=True), original) > 0.1


@pytest.mark.parametrize("init", ["average", "lower", "upper", "stepwise"])
def test_where_layers_are_tied_already_rank_does_not_matter(init):
    original = source("gpt2", 2)
    rebuild(original.backbone, [[0], [1], [0], [1]])
    assert_same(converted(original, init=init, rank=0), original, tolerance=1e-5)
    assert_same(converted(original, init=init, rank=3), original, tolerance=1e-4)


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
    for init, chosen in [("lower", [[0], [1], [2]]), ("upper", [[3], [4], [5]]), ("stepwise", [[0], [3], [5]])]:
        for got, (layer,) in zip(weights(converted(original, init=init, rank=0)), chosen):
            assert all(torch.equal(got[key], layers[layer][key]) for key in got)
    for got, group in zip(weights(converted(original, init="average", rank=0)), [[0, 3], [1, 4], [2, 5]]):
        assert_close(got[name], (layers[group[0]][name] + layers[group[1]][name]) / 2)
    drawn = weights(converted(original, init="random", rank=0))
    assert torch.equal(drawn[1][name], weights(converted(original, init="random", rank=0))[1][name])
    assert abs(drawn[0][name].std() / 0.2 - 1) < 0.1  # initializer_range of the tiny models


def test_layers_are_spread_with_halves_rounded_up():
    assert stepwise(18, 9) == [0, 2, 4, 6, 9, 11, 13, 15, 17]
    assert stepwise(6, 1) == [0] and stepwise(4, 4) == [0, 1, 2, 3] and stepwise(12, 2) == [0, 11]


# The corrections


@by_arch
@pytest.mark.parametrize("init", ["average", "stepwise"])
def test_corrections_are_the_best_of_their_rank(arch, init):
    original = source(arch)
    layers, errors = weights(original), {}
    for rank in (1, 4, FULL):
        model = converted(original, init=init, rank=rank)
        shared = weights(model)
        for depth, layer in enumerate(layers):
            for name, wanted in layer.items():
                residual = wanted - shared[depth % 2][name]
                s = torch.linalg.svdvals(residual)
                error = (residual - correction(model, depth, name)).square().sum()
                assert abs(error - s[rank:].square().sum()) <= ROUNDED * residual.square().sum()
                assert error <= errors.get((depth, name), torch.inf) + 1e-6
                errors[depth, name] = error
                key = key_of(depth % 2, name)
                up, down = model.depth.lora.up[key][depth // 2], model.depth.lora.down[key][depth // 2]
                assert up.shape[1] == min(rank, *wanted.shape)
                assert_close(up.T @ up, torch.diag(s[:rank] ** 2))
                assert_close(down @ down.T, torch.eye(len(down)))


def test_a_product_may_be_split_evenly():
    residual = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    (b, a), (up, down) = truncated(residual, 4, "split_sqrt"), truncated(residual, 4, "svd")
    assert_close(b @ a, up @ down)
    s = torch.linalg.svdvals(residual)[:4]
    assert_close(b.T @ b, torch.diag(s))
    assert_close(a @ a.T, torch.diag(s))


def test_what_averaging_loses_adds_up_to_nothing_and_what_is_kept_needs_no_correction():
    original = source()
    averaged, spread = converted(original, rank=FULL), converted(original, init="stepwise", rank=FULL)
    for name in weights(original)[0]:
        for j in (0, 1):
            assert_close(correction(averaged, j, name), -correction(averaged, 2 + j, name))
            up = averaged.depth.lora.up[key_of(j, name)]
            assert_close(up[0].norm(dim=0), up[1].norm(dim=0))
        assert correction(spread, 0, name).abs().max() == 0  # of 4 layers 0 and 3 are kept
        assert correction(spread, 3, name).abs().max() == 0
        assert correction(spread, 1, name).abs().max() > 0.1


@by_arch
def test_the_model_comes_nearer_to_the_original_with_rank(arch):
    original = source(arch)
    wanted = torch.cat(original.answer_logits(MIXED)).log_softmax(-1)

    def distance(rank: int) -> float:
        logits = torch.cat(converted(original, rank=rank).answer_logits(MIXED)).log_softmax(-1)
        return kl_div(logits, wanted, reduction="batchmean", log_target=True).item()

    distances = [distance(rank) for rank in (0, 4, 16, 28, 32)]
    assert distances[0] > distances[2] > distances[3] > distances[4]
    assert distances[1] > distances[3] and distances[4] < 1e-6


def test_attention_and_mlp_may_have_ranks_of_their_own():
    def ranks(**fields) -> dict[str, int]:
        bank = converted(source("gpt2"), **fields).depth.lora
        return {key.removeprefix("0/"): down.shape[1] for key, down in bank.down.items() if key.startswith("0/")}

    names = ["attn/c_attn/q", "attn/c_attn/k", "attn/c_attn/v", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"]
    assert ranks(rank=3, mlp_rank=5) == dict(zip(names, [3, 3, 3, 3, 5, 5]))
    assert ranks(rank=4) == dict.fromkeys(names, 4)
    assert ranks(rank=4, mlp_rank=0) == dict.fromkeys(names[:4], 4)
    assert ranks(rank=0, mlp_rank=2) == dict.fromkeys(names[4:], 2)


def test_parameters_are_counted():
    original = source()
    model = converted(original, rank=3)
    layers = sum(p.numel() for p in original.backbone.layers[0].parameters())
    sides = sum(sum(matrix.shape) for matrix in weights(original)[0].values())
    vectors = sum(p.numel() for p in original.backbone.layers[0].parameters() if p.ndim == 1)
    outside = sum(p.numel() for p in original.parameters()) - 4 * layers
    assert sum(p.numel() for p in model.parameters()) == outside + 2 * layers + 4 * 3 * sides + 4 * vectors


def test_corrections_are_counted():
    def spent(**fields) -> tuple[float, int]:
        cost = converted(source(), **fields).generate(QUESTIONS[:1], max_new_tokens=1)[0].cost
        return cost.flops, cost.positions

    (plain, n), (more, _) = spent(rank=0), spent(rank=3)
    sides = sum(sum(matrix.shape) for matrix in weights(source())[0].values())
    assert more - plain == 2 * n * 4 * 3 * sides
    assert plain == source().generate(QUESTIONS[:1], max_new_tokens=1)[0].cost.flops


# Reading, writing, learning


@by_arch
def test_decoding_is_reading_at_once_and_the_future_does_not_matter(arch):
    model = stirred(converted(source(arch, 5), n_prelude=1, rank=3), 0.05)
    (row,) = model.rows(MIXED[:1])
    ids, logits = torch.tensor([row.ids()]), logits_of(model, [row])[0]
    context = model.new_context(model.batch(model.prompts(QUESTIONS[:1])))
    with torch.no_grad():
        states = [context.read(model.backbone.embed(ids[:, i : i + 1])) for i in range(ids.shape[1] - 1)]
        assert_close(model.backbone.head(torch.cat(states, dim=1))[0, -len(logits) :], logits)
    assert sum(len(slot.keys) for slot in context.cache.slots.values()) == 5  # as many as the original has layers
    n = len(row)
    changed = logits_of(model, [with_token(row, n - 4, row.ids()[n - 4] - 1)])[0]
    assert torch.equal(changed[:-3], logits[:-3]) and (changed - logits).abs().amax(1)[-3:].min() > 1e-6
    for example, one in zip(MIXED, model.answer_logits(MIXED)):
        assert_close(one, model.answer_logits([example])[0])


@by_arch
def test_shared_weights_learn_from_all_depths_and_each_correction_from_its_own(arch):
    model = stirred(converted(source(arch), rank=3, tie_1d=True), 0.05)
    untied = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(untied, [[0], [1], [0], [1]])
    with torch.no_grad():
        for depth in range(4):
            for name, matrix in untied.matrices(depth).items():
                matrix.weight.add_(correction(model, depth, name))
    plain = LatentModel(untied, model.tokenizer, Cot()).eval()
    assert_same(model, plain, tolerance=2e-5)
    ours = gradients(model, model.loss(MIXED).loss)
    plain.loss(MIXED).loss.backward()
    model.loss(MIXED).loss.backward()
    for j in (0, 1):
        for name in model.backbone.matrices(j):
            per_depth = [_grad(untied, depth, name) for depth in (j, 2 + j)]
            assert_close(_grad(model.backbone, j, name), sum(per_depth))
            key = key_of(j, name)
            for b, grad in enumerate(per_depth):
                down = model.depth.lora.down[key][b].detach()
                assert_close(ours[f"depth.lora.up.{key}"][b], grad @ down.T)


def _grad(backbone: Backbone, layer: int, name: str) -> Tensor:
    matrix = backbone.matrices(layer)[name]
    grad = matrix.module.weight.grad
    return (grad.T if isinstance(matrix.module, Conv1D) else grad)[matrix.rows]


@by_arch
def test_gains_and_biases_learn_from_their_own_depth(arch):
    model = converted(source(arch), rank=0)
    untied = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(untied, [[0], [1], [0], [1]])
    with torch.no_grad():
        for key, each in model.depth.vectors.copies.items():
            j, *rest = key.split("/")
            for b, values in enumerate(each):
                untied.layers[2 * b + int(j)].get_parameter(".".join(rest)).copy_(values)
    plain = LatentModel(untied, model.tokenizer, Cot()).eval()
    assert_same(model, plain, tolerance=2e-5)
    own = {name: p.detach().clone() for name, p in model.backbone.layers.named_parameters()}
    ours = gradients(model, model.loss(MIXED).loss)
    plain.loss(MIXED).loss.backward()
    for key in model.depth.vectors.copies:
        j, *rest = key.split("/")
        for b, grad in enumerate(ours[f"depth.vectors.copies.{key}"]):
            expected = untied.layers[2 * b + int(j)].get_parameter(".".join(rest)).grad
            assert_close(grad, expected)
    for name, parameter in model.backbone.layers.named_parameters():  # the block's own are back in their place
        assert torch.equal(parameter, own[name]) and isinstance(parameter, torch.nn.Parameter)
        if parameter.ndim == 1:
            assert ours[next(n for n, p in model.named_parameters() if p is parameter)].abs().max() == 0


def test_activation_checkpointing_changes_no_gradient():
    model = converted(source("gpt2"), rank=3, exit_weight=0.1, exit_kd=1.0).train()
    plain = gradients(model, model.loss(MIXED).loss)
    model.activation_checkpointing_enable()
    kept = gradients(model, model.loss(MIXED).loss)
    for name in plain:
        assert_close(kept[name], plain[name])


@by_arch
def test_exits_between_depths_learn_from_the_last(arch):
    """L = CE + 0.1 (CE_1 + KL(p_2 || p_1)), p_2 detached, the first exit after the first loop."""
    model = converted(source(arch), rank=3, exit_weight=0.1, exit_kd=1.0)
    batch = model.batch(model.rows(MIXED))
    last = model.written_logits(batch, model.think(batch))
    short = LatentModel(model.backbone, model.tokenizer, RelaxedRecursive(max_loops=1, rank=3)).eval()
    for name in ("lora.up", "lora.down", "vectors.copies"):
        for bank, from_ in zip(short.depth.get_submodule(name).values(), model.depth.get_submodule(name).values()):
            bank.data = from_.data[:1]
    first = short.written_logits(batch, short.think(dataclasses.replace(batch, depth=1)))
    with torch.no_grad():
        kept = kl_div(first.log_softmax(-1), last.log_softmax(-1), reduction="batchmean", log_target=True)
        losses = [cross_entropy(logits, batch.targets_U) for logits in (first, last)]
    model.train()
    assert_close(model.loss(MIXED).loss, losses[1] + 0.1 * (losses[0] + kept))


def test_the_gate_may_be_trained_alone():
    model = converted(source(), rank=2, stop="halt", gate="improvement").train()
    model.loss(MIXED).loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"loop.stop.gate.weight", "loop.stop.gate.bias"}


def test_it_learns_from_the_original(tmp_path):
    original = source()
    folder = saved(original, tmp_path / "original")
    model = converted(original, rank=2, teacher=str(folder), kd_weight=0.5)
    out = model.loss(MIXED)
    batch = model.batch(model.rows(MIXED))
    logits = model.written_logits(batch, model.think(batch))
    wanted = original.written_logits(batch, original.think(batch)).detach()
    kept = kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    assert_close(out.terms["kd"], kept.detach())
    assert_close(out.loss, cross_entropy(logits, batch.targets_U) + 0.5 * kept)
    assert model.loss(MIXED[:1]).loss.requires_grad and not any("original" in n for n, _ in model.named_parameters())
    full = converted(original, rank=FULL, teacher=str(folder), kd_weight=0.5)
    assert full.loss(MIXED).terms["kd"] < 1e-6
    assert divergence(wanted, wanted).abs().max() == 0
    warm = converted(original, rank=2, teacher=str(folder), kd_weight=0.5, kd_temperature=2.0).loss(MIXED)
    assert_close(warm.terms["kd"], divergence(wanted, logits, 2.0).mean().detach())
    assert model.method.with_loops(1).teacher is None


def test_tokens_may_leave_between_loops_and_fewer_loops_may_be_run():
    model = converted(source(), rank=3, stop="top_prob", stop_threshold=0.3)
    assert {depth for generation in model.generate(QUESTIONS, max_new_tokens=4) for _, depth in generation.depths} == {
        1,
        2,
    }
    assert texts(model, 4, loops=1) != texts(model, 4, loops=2)
    with pytest.raises(InputError, match="corrections for 2 loops: ask for no more"):
        model.generate(QUESTIONS, loops=3)


# Folders


@by_arch
def test_a_model_is_converted_when_loaded_and_saved_with_each_shared_tensor_once(arch, tmp_path):
    original = source(arch, 5)
    folder = saved(original, tmp_path / "original")
    method = RelaxedRecursive(n_prelude=1, rank=3)
    model = LatentModel.from_pretrained(folder, method, device="cpu")
    assert_same(model, converted(original, n_prelude=1, rank=3), exactly=True)
    run = saved(stirred(model, 0.05), tmp_path / "run")
    stored = load_file(run / "model.safetensors")
    assert sum(t.numel() for n, t in stored.items() if ".layers." in n or ".h." in n) == sum(
        p.numel() for p in model.backbone.layers.parameters()
    )
    again = LatentModel.from_pretrained(run, device="cpu")
    assert_same(again, model, exactly=True)
    assert_same(LatentModel.from_pretrained(run, method, device="cpu"), model, exactly=True)  # not converted again


def test_training_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    folder = saved(source(), tmp_path / "original")
    method = RelaxedRecursive(rank=2, teacher=str(folder), kd_weight=1.0)

    def trainer(name: str, max_steps: int) -> LatentTrainer:
        fields = {"save_steps": 1, "use_cpu": True, "batch_size": 4, "learning_rate": 1e-3}
        args = LatentTrainingArguments(output_dir=str(tmp_path / name), max_steps=max_steps, **fields)
        return LatentTrainer(LatentModel.from_pretrained(folder, method, device="cpu"), args, list(chain_examples(8)))

    whole, part, again = trainer("whole", 2), trainer("part", 1), trainer("part", 2)
    whole.train()
    part.train()
    again.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name]), name
    kept = LatentModel.from_pretrained(tmp_path / "whole", device="cpu")
    assert_same(kept, whole.model.eval(), exactly=True)


def test_sliding_layers_are_tied_to_their_like():
    original = tiny_model(Cot(), "gemma3", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    model = converted(original, rank=FULL)
    assert model.backbone.config.layer_types == ["sliding_attention", "full_attention"]
    assert_same(model, original, tolerance=2e-4)
    odd = tiny_model(Cot(), "gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(InputError, match=r"layers 0, 1 differ in layer_types \(sliding_attention, full_attention\)"):
        converted(odd, rank=1)


def test_from_scratch_depths_differ_by_corrections_that_are_zero():
    model = tiny_model(RelaxedRecursive(max_loops=2, rank=2), num_hidden_layers=2)
    tied = LatentModel(model.backbone, model.tokenizer, Looped(max_loops=2)).eval()
    assert_same(model, tied, exactly=True)
    assert gap(stirred(model), tied) > 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "rank and mlp_rank cannot be negative"),
        ({"lora": "per_iter"}, "LoRA of its own for each depth: leave lora out"),
        ({"rank": 0, "lora_init": "zero"}, "set rank, or leave lora_init out"),
        ({"teacher": "runs/x"}, "give both teacher and kd_weight, or neither"),
        ({"kd_weight": 1.0}, "give both teacher and kd_weight, or neither"),
        ({"kd_weight": -1.0}, "cannot be negative"),
        ({"kd_temperature": 0.0}, "kd_temperature divides logits"),
        (
            {"kd_weight": 1.0, "teacher": "x", "stop": "halt", "gate": "improvement"},
            "leave teacher and kd_weight out",
        ),
        ({"max_loops": 0}, "relaxed_recursive needs max_loops >= 1"),
        ({"init": "first_k"}, "init is 'first_k'"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        RelaxedRecursive(**fields)


def test_layers_that_cannot_be_shared_out_are_refused():
    with pytest.raises(InputError, match=r"5 layers cannot be run as a block of 2 loops: choose a max_loops that"):
        converted(source(n_layers=5))


@pytest.mark.slow
def test_a_converted_model_learns_by_heart():
    examples = chain_examples(4)
    original = tiny_model(Cot(), num_hidden_layers=2, initializer_range=0.1)
    model = converted(original, rank=2)
    before = model.loss(examples).loss.item()
    assert learn(model, examples, 100) < 0.05 < before

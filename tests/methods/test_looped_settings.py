"""Looped models made of pretrained ones, their folders, and settings that cannot be."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from innerloop import Cot, InputError, LatentModel, LatentTrainer, LatentTrainingArguments, Looped
from innerloop.decoder.backbone import Backbone
from innerloop.methods import Method
from innerloop.methods.depth.tying import rebuild
from tests.close import assert_close
from tests.methods.test_looped import assert_same, gap, looped, stirred, texts
from tests.methods.tools import MIXED, by_arch
from tests.models import chain_examples, saved, tiny_model


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
    assert [
        layer.self_attn.layer_idx if arch == "llama" else layer.attn.layer_idx for layer in model.backbone.layers
    ] == [*range(n_block + 2)]
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
    method = Looped(n_prelude=1, n_coda=1, max_loops=2, init="average", n_block=2, input_injection=True, time="lookup")
    model = stirred(LatentModel.from_pretrained(folder, method, device="cpu"))
    run = saved(model, tmp_path / "run")
    assert_same(LatentModel.from_pretrained(run, device="cpu"), model, exactly=True)
    assert_same(LatentModel.from_pretrained(run, method, device="cpu"), model, exactly=True)
    more = LatentModel.from_pretrained(
        run, Looped(n_prelude=1, n_coda=1, max_loops=3, init="average", n_block=2, input_injection=True), device="cpu"
    )
    assert more.backbone.n_layers == 4 and torch.equal(more.depth.gamma, model.depth.gamma)


def test_a_saved_run_cannot_be_given_another_block(tmp_path: Path):
    run = saved(looped(max_loops=2), tmp_path / "run")
    with pytest.raises(InputError, match="the model has 3 layers between prelude and coda, not n_block=2"):
        LatentModel.from_pretrained(run, Looped(init="first_k", n_block=2), device="cpu")


def test_training_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path):
    def trainer(name: str, max_steps: int) -> LatentTrainer:
        method = Looped(
            max_loops=2,
            loop_sampling="uniform",
            input_injection=True,
            stop="halt",
            gate="distribution",
            lora="per_iter",
        )
        args = LatentTrainingArguments(
            output_dir=str(tmp_path / name), max_steps=max_steps, save_steps=2, logging_steps=1, use_cpu=True,
            batch_size=4, learning_rate=1e-3, activation_checkpointing=True,
        )  # fmt: skip
        return LatentTrainer(tiny_model(method), args, list(chain_examples(8)))

    whole, part = trainer("whole", 4), trainer("part", 2)
    whole.train()
    part.train()
    again = trainer("part", 4)
    again.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name]), name


def test_fresh_gpt2_weights_are_drawn_for_the_depth_that_they_will_have():
    plain, deep = tiny_model(Cot(), "gpt2"), tiny_model(Looped(n_prelude=1, max_loops=4), "gpt2")
    for theirs, ours in zip(plain.backbone.layers, deep.backbone.layers):  # 1 + 4 * 2 = 9 layers instead of 3
        assert_close(ours.attn.c_proj.weight, theirs.attn.c_proj.weight / 3**0.5)
        assert_close(ours.mlp.c_proj.weight, theirs.mlp.c_proj.weight / 3**0.5)
        assert torch.equal(ours.mlp.c_fc.weight, theirs.mlp.c_fc.weight)
    llama = tiny_model(Looped(max_loops=4)).state_dict()
    assert all(torch.equal(tensor, llama[name]) for name, tensor in tiny_model(Cot()).state_dict().items())


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_noise_is_of_training_alone(noise):
    model = looped(max_loops=2, noise=noise)
    assert_same(model, looped(max_loops=2), exactly=True)
    torch.manual_seed(0)
    left = model.train().loss(MIXED).loss
    assert torch.equal(left, model.loss(MIXED).loss) == (noise == 0)


def test_every_other_setting_of_the_loop_does_something():
    plain = looped(max_loops=3)
    for fields in (
        {"rescale": "rms"},
        {"rescale": "adapter"},
        {"residual": "sum"},
        {"residual": "C"},
        {"feedback_scale": 0.5},
        {"time": "sinusoidal", "time_inject": "concat"},
        {"lora": "shared", "lora_targets": ("q_proj",)},
    ):
        model = LatentModel(plain.backbone, plain.tokenizer, Looped(max_loops=3, **fields)).eval()
        assert gap(stirred(model), plain) > 1e-3, fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_prelude": -1}, "n_prelude and n_coda cannot be negative"),
        ({"max_loops": 0}, "looped needs max_loops >= 1"),
        ({"shift": True}, "are for latents: leave them out with looped"),
        ({"time": "lookup", "time_inject": "token"}, "are for latents"),
        ({"stop": "kl", "stop_site": "answer"}, "are for latents"),
        ({"solver": "plain"}, "set solver to none"),
        ({"time": "lookup", "noise_level": "delta"}, "set it to none or injected"),
        ({"stop": "kl", "stop_agg": "last"}, "leave stop_agg out"),
        ({"kv_missing": "restrict"}, "kv_missing is for tokens that stop: set a stop score"),
        ({"stop": "kl", "kv_share": "mean"}, "set stop or kv_share to none"),
        ({"gate": "distribution"}, "set stop to halt"),
        ({"stop": "halt", "gate": "improvement", "max_loops": 1}, "set max_loops to at least 2"),
        ({"stop": "halt", "gate": "improvement", "loop_sampling": "uniform"}, "loop_sampling to fixed"),
        ({"stop": "halt", "gate": "improvement", "spectral_weight": 1.0}, "set spectral_weight to 0"),
        ({"stop": "halt", "gate": "distribution", "exit_weight": 1.0}, "set exit_weight to 0, or gate to none"),
        ({"exit_kd": 1.0}, "set exit_weight above 0"),
        ({"exit_schedule": "linear"}, "set exit_weight above 0"),
        ({"exit_weight": -1.0}, "weights of the loss cannot be negative"),
        ({"init": "average"}, "give both init and n_block, or neither"),
        ({"n_block": 2}, "give both init and n_block, or neither"),
        ({"kv_share": "middle"}, "kv_share is 'middle'"),
        ({"init": "midle_dup"}, "did you mean 'middle_dup'"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        Looped(**fields)
    assert "\n" not in str(caught.value)


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
        converted(tiny_model(Cot()), Looped(**fields))

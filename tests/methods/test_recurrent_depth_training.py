"""Recurrent depth in training: numbers of iterations, truncated back-propagation, the trainer (recurrent_depth.md)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from innerloop import LatentModel, LatentTrainer, LatentTrainingArguments, Looped, RecurrentDepth, Slr
from innerloop.loop.sampling import draw_loops
from innerloop.methods.depth.initial_state import Ramp
from tests.methods.reference_recurrence import PLAIN, recurrent, with_settings
from tests.methods.tools import (
    MIXED,
    assert_learns_by_heart,
    assert_same_gradients,
    by_arch,
    gradients,
)
from tests.models import answers_of, chain_examples, tiny_model

ZERO = replace(PLAIN, state_std=0.0, bptt=2)  # training draws no state, so that gradients can be compared


def doubled(method: RecurrentDepth, arch: str = "llama") -> LatentModel:
    """Make a model in double precision, in training."""
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if arch == "gpt2" else {}
    return recurrent(method, arch, **still).double().train()


def grads(model: LatentModel) -> dict[str, torch.Tensor]:
    """Return the gradient of the loss of a few examples by every weight."""
    return gradients(model, model.loss(MIXED[:3]).loss)


# How many iterations


@pytest.mark.parametrize("mean", [4, 8, 32])
def test_the_drawn_iterations_have_mean_rbar_plus_one(mean):
    method = replace(PLAIN, max_loops=mean, loop_sampling="lognormal_poisson")
    model = recurrent(method, num_hidden_layers=4)
    drawn = [draw_loops("lognormal_poisson", mean, f"0/{step}/0") for step in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean + 1, rel=0.01)
    assert min(drawn) >= 1 and len(set(drawn)) > mean
    for step in range(5):  # and the rows of a batch have these
        rows = model.rows(MIXED, seed=f"0/{step}/0/0")
        assert {row.depth for row in rows} == {drawn[step]}
    assert [row.depth for row in model.rows(MIXED)] == [mean] * len(MIXED)  # without a seed nothing is drawn


def test_iterations_may_be_drawn_evenly_or_not_at_all():
    for sampling, expected in (("uniform", {1, 2, 3}), ("fixed", {3})):
        model = recurrent(replace(PLAIN, max_loops=3, loop_sampling=sampling))
        assert {model.rows(MIXED[:1], seed=f"0/{step}/0/0")[0].depth for step in range(30)} == expected


@pytest.mark.parametrize("method", [PLAIN, Looped(), Slr(n_slots=2)], ids=lambda method: method.name)
def test_all_processes_draw_the_same_and_every_micro_batch_its_own(method):
    model = tiny_model(replace(method, max_loops=16, loop_sampling="lognormal_poisson"), num_hidden_layers=4)

    def drawn(step: int, process: int, micro: int) -> int:
        (row,) = model.rows(MIXED[:1], seed=f"3/{step}/{process}/{micro}")
        return row.n_loops or row.depth

    assert all(drawn(step, 0, 1) == drawn(step, 5, 1) for step in range(20))
    assert [drawn(step, 0, 0) for step in range(20)] != [drawn(step, 0, 1) for step in range(20)]
    assert len({drawn(step, 0, 0) for step in range(20)}) > 5


@pytest.mark.parametrize("kind", ["linear", "1-sqrt"])
def test_the_mean_grows_from_one_to_rbar_as_the_card_says(kind):
    ramp = Ramp(mean=8, kind=kind, n_steps=40)
    means = [ramp.stage_at(step) for step in range(60)]
    shape = (lambda u: u) if kind == "linear" else (lambda u: 1 - math.sqrt(1 - u))
    assert means[:40] == [max(1, math.ceil(round(8 * shape(t / 40), 9))) for t in range(40)]
    assert means[0] == 1 and set(means[40:]) == {8} and means == sorted(means)
    assert set(means) == set(range(1, 9))


def test_k_is_at_most_the_mean_of_the_ramp():
    model = recurrent(replace(PLAIN, max_loops=8, bptt=3, ramp="linear", ramp_steps=8))
    assert model.depth.n_free(10) == 7  # no step is known: k
    free = []
    for model.depth.step in (0, 2, 3, 8):
        free.append(model.depth.n_free(10))
    assert free == [9, 8, 7, 7]  # 10 - min(k, m_t), m_t = 1, 2, 3, 8
    assert [model.depth.n_free(r) for r in (1, 3, 4)] == [0, 0, 1]  # r - min(r, k)
    assert recurrent(replace(PLAIN, bptt=None)).depth.n_free(50) == 0


def test_a_ramp_is_a_curriculum_whose_stage_is_the_mean():
    method = replace(PLAIN, max_loops=6, ramp="1-sqrt", ramp_steps=10)
    model = recurrent(method)
    assert [model.rows(MIXED[:1], stage)[0].depth for stage in (0, 1, 4, 6, None)] == [1, 1, 4, 6, 6]
    assert [row.depth for row in model.prompts(["1 ; + 2"], stage=3)] == [3]
    assert [row.depth for row in model.prompts(["1 ; + 2"], stage=3, loops=9)] == [9]
    assert list(method.stages()) == [6] and not method.needs_steps


# Gradients


@by_arch
def test_up_to_k_iterations_the_gradient_is_the_full_one(arch):
    model = doubled(replace(ZERO, max_loops=3, bptt=3), arch)
    full = with_settings(model, bptt=None).train()
    left, right = grads(model), grads(full)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@by_arch
def test_past_k_it_is_that_of_a_model_started_at_the_detached_state(arch):
    model = doubled(replace(ZERO, max_loops=5), arch)
    start = with_settings(model, max_loops=3, bptt=None)
    seen: list[torch.Tensor] = []
    start.depth.remember = lambda reading, state: seen.append(state)
    with torch.no_grad():
        start.loss(MIXED[:3])
    rest = with_settings(model, max_loops=2, bptt=None).train()
    rest.depth.first_state = lambda reading, told: seen[0]
    truncated = grads(model)
    assert_same_gradients(truncated, grads(rest), 1e-9)
    full = grads(with_settings(model, bptt=None).train())
    assert max((full[name] - truncated[name]).abs().max().item() for name in full) > 1e-4
    prelude = [g for name, g in truncated.items() if ".layers.0." in name or ".h.0." in name]
    assert len(prelude) > 4 and all(g.abs().max() > 0 for g in prelude)  # through e, which is never cut off


@pytest.mark.parametrize(("n_loops", "learns"), [(2, True), (3, False)])
def test_the_first_state_is_out_of_reach_past_k(n_loops, learns):
    model = doubled(replace(ZERO, max_loops=n_loops))
    leaves: list[torch.Tensor] = []

    def first_state(reading, told):
        leaves.append(torch.zeros_like(told).requires_grad_())
        return leaves[-1]

    model.depth.first_state = first_state
    model.loss(MIXED[:3]).loss.backward()
    assert (leaves[0].grad is not None) == learns


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Count the bytes kept for the backward pass, each tensor once."""
    kept: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(kept.values()))


@pytest.mark.parametrize("bptt", [2, None])
def test_what_is_kept_for_the_backward_pass_does_not_grow_past_k(bptt):
    kept, cached = [], []
    for r in (3, 8):
        model = doubled(replace(ZERO, max_loops=r, bptt=bptt))
        batch = model.batch(model.rows(MIXED))
        with saved_bytes() as total:
            thought = model.think(batch)
            model.written_logits(batch, thought)
        kept.append(total[0])
        cached.append(len(thought.after.cache.slots))
    assert (kept[0] == kept[1]) == (bptt is not None)
    assert cached == ([4, 4] if bptt else [5, 10])  # prelude, coda and the iterations that learn


def test_passes_that_are_run_again_for_their_gradient_begin_with_the_same_noise():
    model = doubled(replace(PLAIN, bptt=2, max_loops=5))
    torch.manual_seed(0)
    plain = grads(model)
    model.activation_checkpointing_enable()
    torch.manual_seed(0)
    again = grads(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


# Training

TRAINED = replace(PLAIN, max_loops=3, bptt=2, loop_sampling="lognormal_poisson", ramp="linear", ramp_steps=4)


def trained(model: LatentModel, folder, n_steps: int, resume: bool = False, **options) -> list[dict]:
    """Train for some steps; return what was logged."""
    settings = {"learning_rate": 1e-3, "batch_size": 4, "save_steps": 3, "logging_steps": 1, "use_cpu": True, **options}
    args = LatentTrainingArguments(output_dir=str(folder), max_steps=n_steps, **settings)
    trainer = LatentTrainer(model, args, list(chain_examples(8)))
    trainer.train(resume_from_checkpoint=resume)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_resumed_run_draws_as_an_uninterrupted_one(tmp_path):
    whole = trained(recurrent(TRAINED), tmp_path / "whole", 6)
    trained(recurrent(TRAINED), tmp_path / "halves", 3)
    halves = trained(recurrent(TRAINED), tmp_path / "halves", 6, resume=True)
    assert [entry["loss"] for entry in whole] == [entry["loss"] for entry in halves]
    assert [entry["stage"] for entry in whole] == [1, 1, 2, 3, 3, 3]


def test_a_trained_model_comes_back(tmp_path):
    model = recurrent(TRAINED)
    trained(model, tmp_path, 2, parts_learning_rate=1e-2, activation_checkpointing=True)
    again = LatentModel.from_pretrained(tmp_path / "checkpoint")
    assert again.method == TRAINED
    assert torch.equal(again.depth.adapter.weight, model.depth.adapter.weight)
    assert (again.depth.adapter.weight - recurrent(TRAINED).depth.adapter.weight).abs().max() > 5e-3
    assert torch.equal(answers_of(again), answers_of(model.eval()))


def test_a_state_that_is_ignored_at_first_is_learned_from():
    """pass_e: A_s is zero, but has a gradient; s itself has none until A_s has left zero (pitfall 7)."""
    model = doubled(replace(PLAIN, adapter_init="pass_e", max_loops=2))
    weight, width = model.depth.adapter.weight, model.backbone.width
    gradient = grads(model)["depth.adapter.weight"]
    assert torch.equal(weight[:, :width], torch.zeros_like(weight[:, :width]))
    assert gradient[:, :width].abs().max() > 1e-6 and gradient[:, width:].abs().max() > 1e-6


@pytest.mark.slow
def test_it_learns_by_heart(examples):
    assert_learns_by_heart(RecurrentDepth(n_prelude=1, n_coda=0, max_loops=3, adapter_init="default"), examples)

"""Recurrent depth in training: numbers of iterations, truncated back-propagation, the trainer (recurrent_depth.md)."""

import math
from dataclasses import replace

import pytest
import torch

from innerloop import LatentModel, Looped, RecurrentDepth, Slr
from innerloop.loop.sampling import draw_loops
from tests.methods.reference_recurrence import PLAIN, recurrent, with_settings
from tests.methods.test_every_depth_method import NO_DROPOUT
from tests.methods.tools import MIXED, assert_same_gradients, by_arch, gradients
from tests.models import tiny_model

ZERO = replace(PLAIN, state_std=0.0, bptt=2)  # training draws no state, so that gradients can be compared


def doubled(method: RecurrentDepth, arch: str = "llama") -> LatentModel:
    """Make a model in double precision, in training."""
    return recurrent(method, arch, **(NO_DROPOUT if arch == "gpt2" else {})).double().train()


def grads(model: LatentModel) -> dict[str, torch.Tensor]:
    """Return the gradient of the loss of a few examples by every weight."""
    return gradients(model, model.loss(MIXED[:3]).loss)


# How many iterations


@pytest.mark.parametrize("mean", [4, 8, 32])
def test_the_drawn_iterations_have_mean_rbar_plus_one(mean):
    model = recurrent(replace(PLAIN, max_loops=mean, loop_sampling="lognormal_poisson"))
    drawn = [draw_loops("lognormal_poisson", mean, f"0/{step}/0") for step in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean + 1, rel=0.01)
    assert min(drawn) >= 1 and len(set(drawn)) > mean
    for step in range(5):  # and the rows of a batch have these
        assert {row.depth for row in model.rows(MIXED, seed=f"0/{step}/0/0")} == {drawn[step]}
    assert {row.depth for row in model.rows(MIXED)} == {mean}  # without a seed nothing is drawn


@pytest.mark.parametrize(("sampling", "expected"), [("uniform", {1, 2, 3}), ("fixed", {3})])
def test_iterations_may_be_drawn_evenly_or_not_at_all(sampling, expected):
    model = recurrent(replace(PLAIN, max_loops=3, loop_sampling=sampling))
    assert {model.rows(MIXED[:1], seed=f"0/{step}/0/0")[0].depth for step in range(30)} == expected


@pytest.mark.parametrize("method", [PLAIN, Looped(), Slr(n_slots=2)], ids=lambda method: method.name)
def test_all_processes_draw_the_same_and_every_micro_batch_its_own(method):
    model = tiny_model(replace(method, max_loops=16, loop_sampling="lognormal_poisson"), num_hidden_layers=4)

    def drawn(process: int, micro: int) -> list[int]:
        rows = [model.rows(MIXED[:1], seed=f"3/{step}/{process}/{micro}")[0] for step in range(20)]
        return [row.n_loops or row.depth for row in rows]

    assert drawn(0, 1) == drawn(5, 1) and drawn(0, 0) != drawn(0, 1) and len(set(drawn(0, 0))) > 5


@pytest.mark.parametrize("kind", ["linear", "1-sqrt"])
def test_the_mean_grows_from_one_to_rbar_as_the_card_says(kind):
    method = replace(PLAIN, max_loops=8, ramp=kind, ramp_steps=40)
    means = [method.stage_at(step, 1) for step in range(60)]
    shape = (lambda u: u) if kind == "linear" else (lambda u: 1 - math.sqrt(1 - u))
    assert means[:40] == [max(1, math.ceil(round(8 * shape(t / 40), 9))) for t in range(40)]
    assert means[0] == 1 and set(means[40:]) == {8} and set(means) == set(range(1, 9)) and means == sorted(means)
    assert list(method.stages()) == [8] and not method.needs_steps
    model = recurrent(method)  # the stage is the mean
    assert [model.rows(MIXED[:1], stage)[0].depth for stage in (0, 1, 4, 8, None)] == [1, 1, 4, 8, 8]
    assert [model.prompts(["1 ; + 2"], stage=3, loops=loops)[0].depth for loops in (None, 9)] == [3, 9]


def test_k_is_at_most_the_mean_of_the_ramp():
    model = recurrent(replace(PLAIN, max_loops=8, bptt=3, ramp="linear", ramp_steps=8))
    free = []
    for model.depth.step in (None, 0, 2, 3, 8):  # no step is known: k
        free.append(model.depth.n_free(10))
    assert free == [7, 9, 8, 7, 7]  # 10 - min(k, m_t), m_t = 1, 2, 3, 8
    assert [model.depth.n_free(r) for r in (1, 3, 4)] == [0, 0, 1]  # r - min(r, k)
    assert recurrent(replace(PLAIN, bptt=None)).depth.n_free(50) == 0


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
    model, leaves = doubled(replace(ZERO, max_loops=n_loops)), []
    model.depth.first_state = lambda reading, told: leaves.append(torch.zeros_like(told).requires_grad_()) or leaves[-1]
    model.loss(MIXED[:3]).loss.backward()
    assert (leaves[0].grad is not None) == learns


@pytest.mark.parametrize("bptt", [2, None])
def test_what_is_kept_for_the_backward_pass_does_not_grow_past_k(bptt):
    kept, cached = [], []
    for r in (3, 8):
        model, sizes = doubled(replace(ZERO, max_loops=r, bptt=bptt)), {}

        def pack(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()  # each tensor once
            return tensor

        batch = model.batch(model.rows(MIXED))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            thought = model.think(batch)
            model.written_logits(batch, thought)
        kept.append(sum(sizes.values()))
        cached.append(len(thought.after.cache.slots))
    assert (kept[0] == kept[1]) == (bptt is not None)
    assert cached == ([4, 4] if bptt else [5, 10])  # prelude, coda and the iterations that learn


def test_a_state_that_is_ignored_at_first_is_learned_from():
    """pass_e: A_s is zero, but has a gradient; s itself has none until A_s has left zero (pitfall 7)."""
    model = doubled(replace(PLAIN, adapter_init="pass_e", max_loops=2))
    weight, width = model.depth.adapter.weight, model.backbone.width
    gradient = grads(model)["depth.adapter.weight"]
    assert torch.equal(weight[:, :width], torch.zeros_like(weight[:, :width]))
    assert gradient[:, :width].abs().max() > 1e-6 and gradient[:, width:].abs().max() > 1e-6

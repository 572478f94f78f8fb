"""Packed weights multiply as the plain ones do, for as long as a run of the engine lasts and no longer."""

from functools import partial

import psutil
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from innerloop.decoder import memory, packed
from innerloop.decoder.packed import PackedWeights
from innerloop.engine.engine import Engine
from innerloop.engine.options import EngineOptions
from innerloop.methods import Cot, Lotus, Method, RelaxedRecursive, Slr
from tests.close import assert_close
from tests.methods.tools import lean_towards_end
from tests.models import moved, tiny_model

QUESTIONS = ["3 ; + 4 ; * 2", "1 ; + 1", "2 ; * 3 ; - 1 ; + 2", "4 ; - 1 ; - 1"]
METHODS = {
    "cot": Cot(),
    "slr": Slr(n_slots=2, max_loops=3, lora="per_iter", stop="delta"),
    "lotus": Lotus(n_blocks=2, latents_per_block=2, max_loops=3),
}

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch comes without oneDNN, so that nothing is packed"
)


@pytest.fixture(autouse=True)
def packs_small_ones(monkeypatch) -> None:
    """Let the tests' tiny matrices be packed too."""
    monkeypatch.setattr(packed, "FEWEST_WEIGHTS", 1)


def packed_in(model) -> set[str]:
    """Return the names of the modules that multiply by packed weights now."""
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.mark.parametrize("make", [partial(nn.Linear, 20, 12), partial(Conv1D, 12, 20)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", [(20,), (1, 20), (5, 20), (2, 3, 20), (0, 4, 20)])
def test_products_are_those_of_the_plain_weights(make, shape):
    module, states = make(), torch.randn(shape)
    spread = torch.randn(*shape[:-1], 40)[..., ::2]  # not side by side in memory
    with torch.no_grad():
        for given in (states, spread):
            plain = module(given)
            with PackedWeights([module]).used():
                assert "forward" in module.__dict__
                assert_close(module(given), plain)
    assert "forward" not in module.__dict__


def test_hooks_run_as_they_do_otherwise():
    module, seen = nn.Linear(20, 12), []
    module.register_forward_hook(lambda *args: seen.append(args[2]) or args[2] + 1)
    states = torch.randn(3, 20)
    with torch.no_grad():
        plain = module(states)
        with PackedWeights([module]).used():
            assert_close(module(states), plain)
    assert len(seen) == 2


def test_where_something_is_learned_the_weights_themselves_are_used():
    module, states = nn.Linear(20, 12), torch.randn(3, 20)
    with PackedWeights([module]).used():
        module(states).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.abs().sum() > 0


def test_linears_of_another_kind_or_size_or_type_stay_as_they_are(monkeypatch):
    class Quantized(nn.Linear):
        pass

    patched = nn.Linear(20, 12)
    patched.forward = lambda states: states  # as libraries do that move weights about
    assert not PackedWeights([Quantized(20, 12), nn.Linear(20, 12).double(), nn.LayerNorm(20), patched]).products
    assert not PackedWeights([nn.Linear(20, 12, device="meta")]).products
    monkeypatch.setattr(packed, "FEWEST_WEIGHTS", 300)
    assert len(PackedWeights([nn.Linear(20, 14), nn.Linear(20, 15)]).products) == 1


def test_modules_that_share_a_weight_share_a_packed_one():
    one, other = nn.Linear(20, 12), nn.Linear(20, 12)
    other.weight = one.weight
    n_packed = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w: n_packed.append(1) or reorder(w))
        found = PackedWeights([one, other])
    assert (len(found.products), len(n_packed)) == (2, 1)


@pytest.mark.parametrize("limit", ["size", "memory"])
def test_a_copy_that_would_not_fit_is_not_made(limit, monkeypatch):
    module = nn.Linear(20, 12)
    if limit == "size":
        monkeypatch.setattr(packed, "MOST_BYTES", 4 * 20 * 12 - 1)
    else:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2 * 4 * 20 * 12 - 1}))
    assert not PackedWeights([module]).products


def test_half_precision_is_packed_where_the_cpu_multiplies_in_it():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no products in bf16")
    module, states = nn.Linear(40, 12).bfloat16(), torch.randn(3, 40).bfloat16()
    with torch.no_grad():
        plain = module(states)
        with PackedWeights([module]).used():
            assert_close(module(states), plain, 0.02)
            with pytest.raises(RuntimeError):
                module(states.float())  # refused as ever


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("name", METHODS)
def test_the_engine_writes_the_same_tokens(name, arch, monkeypatch):
    model = tiny_for(METHODS[name], arch)
    seen = list[set[str]]()
    model.backbone.layers[0].register_forward_hook(lambda *_: seen.append(packed_in(model)))
    found = []
    for fewest in (1, 2**40):
        monkeypatch.setattr(packed, "FEWEST_WEIGHTS", fewest)
        answers = model.generate(QUESTIONS, max_new_tokens=9, batch_size=2)
        found.append([(g.ids, g.cost.passes, g.cost.positions) for g in answers])
    assert found[0] == found[1]
    assert seen[0] == {name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    assert not seen[-1]


def tiny_for(method: Method, arch: str):
    return lean_towards_end(tiny_model(method, arch), 2.0)


def test_between_two_answers_the_model_is_as_it_was():
    model = tiny_for(Cot(), "llama")
    for _ in Engine(model, EngineOptions(max_new_tokens=9, batch_size=1)).run(QUESTIONS):
        assert not packed_in(model)
    assert not packed_in(model)


def test_a_run_that_fails_leaves_the_model_as_it_was():
    model = tiny_for(Cot(), "llama")

    def fail(*_) -> None:
        assert packed_in(model)
        raise RuntimeError("a pass fails")

    handle = model.backbone.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a pass fails"):
        model.generate(QUESTIONS, max_new_tokens=3)
    handle.remove()
    assert not packed_in(model)


def test_weights_that_change_between_two_runs_are_seen():
    """Even a change that torch does not count, as `.data` makes it."""
    model, other = tiny_for(Cot(), "llama"), tiny_for(Cot(), "llama")
    before = [g.ids for g in model.generate(QUESTIONS, max_new_tokens=9)]
    for one in (model, other):
        for parameter in one.backbone.layers.parameters():
            parameter.data.mul_(-1.5)
    after = [g.ids for g in model.generate(QUESTIONS, max_new_tokens=9)]
    assert after == [g.ids for g in other.generate(QUESTIONS, max_new_tokens=9)] != before


def test_biases_of_the_moment_are_added():
    """Relaxed recursive models have biases of their own at each depth, put in the modules' place during a pass."""
    for arch in ("gpt2", "qwen2"):
        model, found = moved(tiny_model(RelaxedRecursive(max_loops=3, rank=2), arch), 1), []
        for fewest in (1, 2**40):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(packed, "FEWEST_WEIGHTS", fewest)
                answers = model.generate(QUESTIONS, max_new_tokens=5, likelihoods=True)
            found.append([(g.ids, pytest.approx(g.log_likelihood, abs=1e-3)) for g in answers])
        assert found[0] == found[1]


def test_weights_that_change_between_two_answers_are_seen():
    models = [tiny_for(Cot(), "llama") for _ in range(2)]
    found = []
    for model, most in zip(models, (packed.MOST_BYTES, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed, "MOST_BYTES", most)
            answers = Engine(model, EngineOptions(max_new_tokens=9, batch_size=1)).run(QUESTIONS)
            first = next(answers)
            with torch.no_grad():
                for parameter in model.backbone.layers.parameters():
                    parameter.mul_(-1.5)
            found.append([g.ids for _, g in (first, *answers)])
    assert found[0] == found[1]


def test_a_weight_that_is_made_in_each_call_is_not_packed():
    made = torch.nn.utils.parametrizations.weight_norm(nn.Linear(20, 12))
    pruned = nn.Linear(20, 12)
    prune.l1_unstructured(pruned, "weight", 0.5)
    assert not PackedWeights([made, pruned]).products


def test_under_autocast_the_plain_weights_are_cast():
    module, states = nn.Linear(20, 12), torch.randn(3, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), PackedWeights([module]).used():
        assert module(states).dtype == torch.bfloat16


def test_modules_may_be_called_by_keyword():
    module, states = nn.Linear(20, 12), torch.randn(3, 20)
    with torch.no_grad(), PackedWeights([module]).used():
        assert_close(module(input=states), module(states))


def test_where_memory_runs_out_in_packing_the_plain_weights_are_used(monkeypatch):
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", full)
    assert not PackedWeights([nn.Linear(20, 12)]).products


def test_blocks_may_end_in_any_order_and_what_is_left_behind_is_replaced():
    module, states = nn.Linear(20, 12), torch.randn(3, 20)
    with torch.no_grad():
        plain = module(states)
        first, second = PackedWeights([module]).used(), PackedWeights([module]).used()
        for step in (first.__enter__, second.__enter__):
            step()
        for block in (first, second):  # as engines of two threads may end their steps
            block.__exit__(None, None, None)
            assert_close(module(states), plain)
        assert "forward" not in module.__dict__
        PackedWeights([module]).used().__enter__()  # interrupted before it could end
        module.weight.mul_(2.0)
        assert_close(module(states) - module.bias, 2 * (plain - module.bias))
        with PackedWeights([module]).used():
            assert_close(module(states) - module.bias, 2 * (plain - module.bias))
        assert "forward" not in module.__dict__


@pytest.mark.parametrize(("limit", "left"), [("1000", 400), ("max", 5000), ("9000", 5000), ("500", 0)])
def test_a_container_has_no_more_memory_than_its_limit(limit, left, tmp_path, monkeypatch):
    (tmp_path / "max").write_text(limit + "\n")
    (tmp_path / "current").write_text("600\n")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000}))
    monkeypatch.setattr(memory, "LIMITS", ((str(tmp_path / "max"), str(tmp_path / "current")), ("/no", "/such")))
    assert memory.free_bytes() == left


def test_compiled_passes_find_plain_modules():
    model = tiny_for(Cot(), "llama")
    model.backbone.compile_passes("eager")
    seen = []
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: seen.append(packed_in(model)))
    model.generate(QUESTIONS[:1], max_new_tokens=3)
    handle.remove()
    assert seen and not any(seen)

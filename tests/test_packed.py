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
    "slr": Slr(n_slots=2, max_loops=3, loop={"lora": "per_iter"}, stop={"rule": "delta"}),
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


def tiny_for(method: Method, arch: str):
    return lean_towards_end(tiny_model(method, arch), 2.0)


def n_packed(*modules: nn.Module) -> int:
    return len(PackedWeights(modules).products)


def ids_of(model) -> list[list[int]]:
    return [g.ids for g in model.generate(QUESTIONS, max_new_tokens=9)]


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


def test_hooks_and_keywords_work_as_they_do_otherwise_and_under_autocast_the_plain_weights_are_cast():
    module, seen, states = nn.Linear(20, 12), [], torch.randn(3, 20)
    module.register_forward_hook(lambda *args: seen.append(args[2]) or args[2] + 1)
    with torch.no_grad():
        plain = module(states)
        with PackedWeights([module]).used():
            assert_close(module(states), plain)
            assert_close(module(input=states), plain)
            with torch.autocast("cpu", torch.bfloat16):
                assert module(states).dtype == torch.bfloat16
    assert len(seen) == 4


def test_where_something_is_learned_the_weights_themselves_are_used():
    module, states = nn.Linear(20, 12), torch.randn(3, 20)
    with PackedWeights([module]).used():
        module(states).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.abs().sum() > 0


def test_linears_of_another_kind_or_size_or_type_stay_as_they_are(monkeypatch):
    class Quantized(nn.Linear):
        pass

    patched, pruned = nn.Linear(20, 12), nn.Linear(20, 12)
    patched.forward = lambda states: states  # as libraries do that move weights about
    prune.l1_unstructured(pruned, "weight", 0.5)  # a weight that is made in each call, as is the normed one's
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(20, 12))
    assert not n_packed(Quantized(20, 12), nn.Linear(20, 12).double(), nn.LayerNorm(20), patched, normed, pruned)
    assert not n_packed(nn.Linear(20, 12, device="meta"))
    monkeypatch.setattr(packed, "FEWEST_WEIGHTS", 300)
    assert n_packed(nn.Linear(20, 14), nn.Linear(20, 15)) == 1


def test_modules_that_share_a_weight_share_a_packed_one(monkeypatch):
    one, other, made = nn.Linear(20, 12), nn.Linear(20, 12), []
    other.weight = one.weight
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w: made.append(1) or reorder(w))
    assert (n_packed(one, other), len(made)) == (2, 1)


@pytest.mark.parametrize("limit", ["size", "memory", "packing"])
def test_a_copy_that_would_not_fit_is_not_made(limit, monkeypatch):
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    if limit == "size":
        monkeypatch.setattr(packed, "MOST_BYTES", 4 * 20 * 12 - 1)
    elif limit == "memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2 * 4 * 20 * 12 - 1}))
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", full)
    assert not n_packed(nn.Linear(20, 12))


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


def test_between_two_answers_and_after_a_failure_the_model_is_as_it_was():
    model = tiny_for(Cot(), "llama")
    for _ in Engine(model, EngineOptions(max_new_tokens=9, batch_size=1)).run(QUESTIONS):
        assert not packed_in(model)

    def fail(*_) -> None:
        assert packed_in(model)
        raise RuntimeError("a pass fails")

    model.backbone.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a pass fails"):
        model.generate(QUESTIONS, max_new_tokens=3)
    assert not packed_in(model)


def test_weights_that_change_between_two_runs_are_seen():
    """Even a change that torch does not count, as `.data` makes it."""
    model, other = tiny_for(Cot(), "llama"), tiny_for(Cot(), "llama")
    before = ids_of(model)
    for one in (model, other):
        for parameter in one.backbone.layers.parameters():
            parameter.data.mul_(-1.5)
    assert ids_of(model) == ids_of(other) != before


def test_packed_weights_are_kept_until_a_weight_changes(monkeypatch):
    made, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w: made.append(1) or reorder(w))
    monkeypatch.setattr(packed, "_pays_for_one_row", lambda *_: True)
    model = tiny_for(Cot(), "llama")
    ids_of(model)
    n = len(made)
    assert n > 0 and ids_of(model) and len(made) == n
    head = model.backbone.lm.get_output_embeddings()
    for change in (lambda: head.weight.data[5].zero_(), lambda: head.weight.data[:, 3].mul_(2)):  # torch counts neither
        before = len(made)
        change()
        ids_of(model)
        assert len(made) == before + 1
    model.train()
    ids_of(model)
    assert not any(module in packed._kept for module in model.modules())


def test_queries_keys_and_values_are_one_product_however_they_are_asked_for(monkeypatch):
    layer = tiny_model(Cot(), "qwen2").backbone.layers[0]
    attention, states = layer.self_attn, torch.randn(2, 3, layer.self_attn.q_proj.in_features)
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        for part in parts:
            part.bias.normal_()
        plain, other = [part(states) for part in parts], parts[1](states + 1)
        weights = PackedWeights(layer.modules())
        assert len({id(product.packed) for _, product in weights.products}) == len(weights.products) - 3
        with weights.used():
            for order in ((0, 1, 2), (2, 1, 0), (0, 0, 1, 1)):
                for i in order:
                    assert_close(parts[i](states), plain[i])
            parts[0](states)
            assert_close(parts[1](states + 1), other)
            changed = states.clone()
            parts[0](changed)
            changed += 1
            assert_close(parts[1](changed), other)


def test_one_row_multiplies_by_plain_weights_where_these_are_faster(monkeypatch):
    asked = []
    monkeypatch.setattr(packed, "_pays_for_one_row", lambda *_: False)
    module = nn.Linear(20, 12)
    kept = PackedWeights([module])
    part = packed.Packed.part
    monkeypatch.setattr(packed.Packed, "part", lambda *args: asked.append(1) or part(*args))
    with torch.no_grad(), kept.used():
        module(torch.randn(1, 1, 20))
        assert not asked
        module(torch.randn(2, 1, 20))
    assert asked


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
def test_biases_of_the_moment_are_added(arch, monkeypatch):
    """Relaxed recursive models have biases of their own at each depth, put in the modules' place during a pass."""
    model, found = moved(tiny_model(RelaxedRecursive(max_loops=3, rank=2), arch), 1), []
    for fewest in (1, 2**40):
        monkeypatch.setattr(packed, "FEWEST_WEIGHTS", fewest)
        answers = model.generate(QUESTIONS, max_new_tokens=5, likelihoods=True)
        found.append([(g.ids, pytest.approx(g.log_likelihood, abs=1e-3)) for g in answers])
    assert found[0] == found[1]


def test_weights_that_change_between_two_answers_are_seen(monkeypatch):
    found = []
    for most in (packed.MOST_BYTES, 0):
        model = tiny_for(Cot(), "llama")
        monkeypatch.setattr(packed, "MOST_BYTES", most)
        answers = Engine(model, EngineOptions(max_new_tokens=9, batch_size=1)).run(QUESTIONS)
        first = next(answers)
        with torch.no_grad():
            for parameter in model.backbone.layers.parameters():
                parameter.mul_(-1.5)
        found.append([g.ids for _, g in (first, *answers)])
    assert found[0] == found[1]


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
    model, seen = tiny_for(Cot(), "llama"), []
    model.backbone.compile_passes("eager")
    model.backbone.layers[0].register_forward_hook(lambda *_: seen.append(packed_in(model)))
    model.generate(QUESTIONS[:1], max_new_tokens=3)
    assert seen and not any(seen)

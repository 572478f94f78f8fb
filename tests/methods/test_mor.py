"""Mixture-of-Recursions: it equals a dense reference, and the invariants of its card (mor.md, section 9)."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from innerloop import Cot, LatentModel, Mor
from innerloop.decoder.cost import CostMeter
from tests.methods.reference_routing import (
    IDS,
    LENGTH,
    dense_mor,
    masked_layer,
    on_same,
    read,
    scattered,
    some_ids,
    stepwise,
)
from tests.methods.tools import MIXED, QUESTIONS, ROUNDED, assert_close, by_arch
from tests.models import answers_of, tiny_model

NEUTRAL = Mor(n_recursions=1, gate="st", gate_target="delta")
TIED = Mor(n_recursions=3, gate="st", gate_target="delta", capacities=(1.0, 1.0, 1.0))
CAUSAL = Mor()
TOP_K = Mor(routing_mode="topk")
TOKENS = Mor(routing="token")
WISE, SHARED = "recursion_wise", "recursive_sharing"
ORDERS = {
    "cycle": [0, 1, 2, 3] * 3,
    "sequence": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "middle_cycle": [0, *[1, 2] * 3, 3],
    "middle_sequence": [0, 1, 1, 1, 2, 2, 2, 3],
}


def recursive(method: Mor, arch: str = "llama", scale: float = 1.0) -> LatentModel:
    """Make a model of four kept layers whose routers tell tokens apart."""
    return scattered(tiny_model(method, arch, num_hidden_layers=4), scale)


@pytest.mark.parametrize("sharing", ORDERS)
def test_one_recursion_with_a_gate_of_one_is_the_base_model_bit_for_bit(arch, sharing):
    base, model = tiny_model(Cot(), arch), tiny_model(dataclasses.replace(NEUTRAL, sharing=sharing), arch)
    assert torch.equal(answers_of(model), answers_of(base))
    texts = [[g.text for g in m.generate(QUESTIONS, max_new_tokens=8)] for m in (base, model)]
    assert texts[0] == texts[1]


def test_ties_fill_every_recursion_exactly_and_the_earlier_tokens_go_on():
    model = recursive(TOP_K, scale=0.0)
    assert read(model, some_ids(1, 10))[2].depths_BL.tolist() == [[3, 3, 3, 2, 2, 2, 1, 1, 1, 1]]
    assert read(model, some_ids(1, 2))[2].depths_BL.tolist() == [[3, 1]]  # max(1, int(2/3 * 2)) = 1


def test_memory_of_linear_capacities_is_that_of_the_card():
    """(N_r + 1) / (2 N_r) of an untied model's shared layers, or with sharing 1 / N_r."""
    ids = some_ids(1, 24, seed=1)
    for n in (1, 2, 3, 4):
        for kv, ratio in (("recursion_wise", (n + 1) / (2 * n)), ("recursive_sharing", 1 / n)):
            model = recursive(Mor(n_recursions=n, routing_mode="topk", kv=kv))
            slots = read(model, ids)[1].cache.slots
            kept = sum(slot.keys[0].shape[2] for key, slot in slots.items() if isinstance(key, tuple))
            assert kept == ratio * n * 24


@by_arch
def test_sharing_keys_with_one_recursion_changes_nothing(arch):
    model = recursive(dataclasses.replace(NEUTRAL, gate="sigmoid"), arch)
    assert torch.equal(answers_of(on_same(model, kv=SHARED)), answers_of(model))


def test_the_number_of_weights_does_not_depend_on_the_recursions_but_for_their_routers():
    def count(method: Mor) -> int:
        return sum(p.numel() for p in tiny_model(method).parameters())

    plain = count(Cot())
    assert [count(Mor(n_recursions=n)) - plain for n in (1, 2, 5)] == [32, 64, 160]
    assert [count(dataclasses.replace(TOKENS, n_recursions=n)) - plain for n in (1, 2, 5)] == [32, 64, 160]


@by_arch
@pytest.mark.parametrize("sharing", ORDERS)
def test_with_full_capacity_and_a_gate_of_one_it_is_an_untied_model_with_copied_weights(arch, sharing):
    """The gradient of a shared layer is the sum of those of its copies."""
    model = recursive(dataclasses.replace(TIED, sharing=sharing), arch, scale=0.0).double()
    order = ORDERS[sharing]
    untied = tiny_model(Cot(), arch, num_hidden_layers=len(order)).double()
    untied.backbone.lm.load_state_dict(model.backbone.lm.state_dict(), strict=False)
    for layer, source in zip(untied.backbone.layers, order):
        layer.load_state_dict(model.backbone.layers[source].state_dict())
    assert torch.equal(answers_of(model), answers_of(untied))
    for one in (model, untied):  # nothing flows back through the routers' scores, which are zero
        one.loss(MIXED).loss.backward()
    for shared, layer in enumerate(model.backbone.layers):
        copies = [untied.backbone.layers[place] for place, source in enumerate(order) if source == shared]
        for name, parameter in layer.named_parameters():
            assert_close(parameter.grad, sum(one.get_parameter(name).grad for one in copies))


def run_slowly(model: LatentModel, *plan: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | int) -> torch.Tensor:
    """Return the logits of IDS after layers and mixtures (of the present state and that after layer 0), in order."""
    backbone, everyone = model.backbone, torch.ones(1, LENGTH, dtype=torch.bool)
    state = backbone.enter(backbone.embed(IDS), torch.arange(LENGTH)[None])
    start = state = masked_layer(model, state, 0, everyone)
    for step in plan:
        state = masked_layer(model, state, step, everyone) if isinstance(step, int) else step(state, start)
    return backbone.head(backbone.norm(state))


@by_arch
def test_a_gate_of_one_on_the_whole_output_adds_the_stack_to_the_state(arch):
    model = tiny_model(dataclasses.replace(NEUTRAL, gate_target="full"), arch)  # three layers: one is shared
    assert_close(read(model, IDS)[0], run_slowly(model, 1, lambda now, start: start + now, 2), ROUNDED)
    assert (answers_of(model) - answers_of(tiny_model(Cot(), arch))).abs().max() > 1e-2


@by_arch
@pytest.mark.parametrize("method", [CAUSAL, TOP_K], ids=["causal", "topk"])
def test_a_gate_of_zero_leaves_the_first_and_the_last_layer(arch, method):
    """sigmoid(z) underflows to zero at z = -1e4; with causal routing tokens then leave after recursion 1."""
    model = recursive(dataclasses.replace(method, gate="sigmoid"), arch)
    for router in model.depth.routers:
        router.forward = lambda states: torch.full((*states.shape[:2], 1), -1e4)
    logits, _, deep = read(model, IDS)
    assert_close(logits, run_slowly(model, 3), ROUNDED)
    assert deep.depths_BL.float().mean() == (1 if method is CAUSAL else (9 + 6 + 3) / 9)


@by_arch
@pytest.mark.parametrize("depth", [1, 3])
def test_tokens_that_all_choose_one_depth_end_with_the_gated_stack_applied_so_often_and_the_first_state(arch, depth):
    model = recursive(dataclasses.replace(TOKENS, alpha=0.6), arch)
    scores = 5.0 * torch.nn.functional.one_hot(torch.tensor(depth - 1), 3)
    model.depth.routers[0].forward = lambda states: scores.expand(*states.shape[:2], -1)
    gate = 0.6 * scores.softmax(-1).max()
    expected = run_slowly(model, *[1, 2] * depth, lambda now, start: start + gate * now, 3)
    assert_close(read(model, IDS)[0], expected, ROUNDED)


@by_arch
@pytest.mark.parametrize(
    ("sharing", "kv", "gate", "target"),
    [
        ("middle_cycle", WISE, "scaled_sigmoid", "full"),
        ("middle_cycle", WISE, "sigmoid", "delta"),
        ("middle_cycle", SHARED, "st", "full"),
        ("cycle", WISE, "st", "delta"),
        ("cycle", SHARED, "scaled_sigmoid", "full"),
        ("sequence", WISE, "sigmoid", "full"),
    ],
)
def test_expert_choice_equals_full_length_attention_with_a_mask(arch, sharing, kv, gate, target):
    model = recursive(dataclasses.replace(TOP_K, kv=kv, sharing=sharing, gate=gate, gate_target=target), arch)
    for one in (model, on_same(model, routing_mode="causal")):
        expected, chosen = dense_mor(one, IDS, sees_later=one is model)
        logits, context, deep = read(one, IDS)
        assert_close(logits, expected, ROUNDED)
        assert torch.equal(deep.depths_BL, sum(c.long() for c in chosen))
        assert deep.measured["selected"].tolist() == pytest.approx([c.float().mean().item() for c in chosen])
        assert one is not model or [int(c.sum()) for c in chosen] == [9, 6, 3]
        for r, is_in in enumerate(chosen, 1):
            kept = torch.nonzero(is_in[0])[:, 0].tolist()  # in their order
            slots = [slot for key, slot in context.cache.slots.items() if key[0] == r]
            if kv == WISE:
                assert bool(slots) == bool(kept)
                assert all(slot.positions_BP[slot.real_BP].tolist() == kept for slot in slots)
            else:
                assert [slot.length for slot in slots] == ([LENGTH] if r == 1 else [])


@by_arch
@pytest.mark.parametrize(
    ("sharing", "kv", "weighting", "gate", "target", "alpha"),
    [
        ("middle_cycle", WISE, "last_only", "scaled_sigmoid", "full", None),
        ("middle_cycle", WISE, "every", "scaled_sigmoid", "full", 0.7),
        ("middle_cycle", SHARED, "every", "sigmoid", "delta", None),
        ("middle_sequence", WISE, "last_only", "st", "full", None),
        ("cycle", SHARED, "last_only", "scaled_sigmoid", "delta", 0.7),
    ],
)
def test_token_choice_equals_full_length_attention_with_a_mask(arch, sharing, kv, weighting, gate, target, alpha):
    fields = {"kv": kv, "sharing": sharing, "gate": gate, "gate_target": target, "alpha": alpha}
    model = recursive(dataclasses.replace(TOKENS, tc_weighting=weighting, **fields), arch)
    expected, chosen = dense_mor(model, IDS)
    assert [int(c.sum()) for c in chosen] != [9, 9, 9]
    logits, _, deep = read(model, IDS)
    assert_close(logits, expected, ROUNDED)
    assert torch.equal(deep.depths_BL, sum(c.long() for c in chosen))


@by_arch
@pytest.mark.parametrize("method", [CAUSAL, TOP_K, TOKENS], ids=["causal", "topk", "token"])
def test_a_token_that_has_left_keeps_its_state_bit_for_bit_and_sets_are_nested(arch, method, monkeypatch):
    model = recursive(dataclasses.replace(method, capacities=(0.8, 0.5, 0.2) if method is TOP_K else ()), arch)
    states, step = [], type(model.loop).step

    def noted(self, f, state, *args, **kwargs):
        out = step(self, f, state, *args, **kwargs)
        states.extend([out[0]] if states else [state, out[0]])
        return out

    monkeypatch.setattr(type(model.loop), "step", noted)
    depths = read(model, IDS)[2].depths_BL
    assert len(states) == 4 and len(depths.unique()) > 1
    for r in (1, 2, 3):
        assert torch.equal((states[r] == states[r - 1]).all(-1), depths < r)
    if method is TOP_K:
        assert [(depths >= r).sum().item() for r in (1, 2, 3)] == [7, 4, 1]  # max(1, int(c S))


@by_arch
def test_later_recursions_make_no_keys_where_they_are_shared(arch, monkeypatch):
    model, calls = recursive(dataclasses.replace(TIED, kv=SHARED), arch), dict[str, int]()
    layer, shared, wise = model.backbone.layers[1], *(CostMeter(1, torch.device("cpu")) for _ in range(2))
    maps = ["attn.c_attn", "attn.c_proj"] if arch == "gpt2" else [f"self_attn.{name}_proj" for name in "kvq"]
    for name in maps:
        module = layer.get_submodule(name)

        def counted(states, run=module.forward, name=name):
            calls[name] = calls.get(name, 0) + 1
            return run(states)

        monkeypatch.setattr(module, "forward", counted)
    read(model, IDS, meter=shared)
    assert [calls[name] for name in maps] == [*[1] * (len(maps) - 1), 3]
    read(on_same(model, kv=WISE), IDS, meter=wise)
    spared = sum(p.numel() for name in maps[:-1] for p in layer.get_submodule(name).parameters())
    spared = spared * 2 // 3 if arch == "gpt2" else spared  # of the fused map the queries are made
    gap = wise.costs(model.backbone)[0].flops - shared.costs(model.backbone)[0].flops
    assert gap == 2 * spared * LENGTH * 2 * 2  # two layers, twice


@pytest.mark.parametrize(
    ("arch", "method"),
    [
        *(
            ("gpt2", method)
            for method in (CAUSAL, TOKENS, Mor(kv=SHARED), Mor(causality="aux_router", sharing="cycle"))
        ),
        *(("llama", method) for method in (CAUSAL, TOKENS, Mor(sharing="sequence"))),
        *(("mistral", method) for method in (CAUSAL, Mor(kv=SHARED))),  # with a window, which positions reach past
    ],
)
def test_reading_token_by_token_is_reading_at_once(arch, method):
    model, ids = recursive(method, arch), some_ids(2, 14, seed=5)
    whole, _, deep = read(model, ids)
    assert len(deep.depths_BL.unique()) > 1
    assert_close(stepwise(model, ids, n_first=6)[0], whole, ROUNDED)


def test_flops_are_those_of_the_tokens_that_ran():
    model, meter, stepped = recursive(CAUSAL), *(CostMeter(1, torch.device("cpu")) for _ in range(2))
    width, weights = 32, sum(p.numel() for p in model.backbone.layers.parameters()) / 4
    counts = [c.sum().item() for c in dense_mor(model, IDS)[1]]
    assert counts[0] == LENGTH > counts[1] > 0
    read(model, IDS, meter=meter)
    linear = 2 * weights * (2 * LENGTH + 2 * sum(counts))
    attention = 4 * width * (2 * LENGTH * (LENGTH + 1) / 2 + 2 * sum(k * (k + 1) / 2 for k in counts))
    routers = 3 * LENGTH * 2 * width
    assert meter.costs(model.backbone)[0].flops == pytest.approx(linear + attention + routers, rel=1e-12)
    stepwise(model, IDS, meter=stepped)
    assert stepped.costs(model.backbone)[0].flops == meter.costs(model.backbone)[0].flops


def test_the_answer_may_be_written_alone():
    alone, (row,) = recursive(Mor(write_steps=False)), recursive(CAUSAL).rows(MIXED[:1])
    assert [span.kind.value for span in alone.rows(MIXED[:1])[0].spans] == ["question", "answer"]
    assert [span.kind.value for span in row.spans] == ["question", "step", "step", "step", "answer"]

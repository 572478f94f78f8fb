"""Mixture-of-Recursions: it equals a dense reference, and the invariants of its card (mor.md, section 9)."""

import copy
import dataclasses

import pytest
import torch
from pytest import MonkeyPatch

from innerloop import Cot, LatentModel, Mor
from innerloop.decoder.cost import Meter
from tests.methods.reference_routing import (
    IDS,
    LENGTH,
    dense_mor,
    displaces,
    leak,
    masked_layer,
    read,
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
SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")
by_sharing = pytest.mark.parametrize("sharing", SHARINGS)
WISE, SHARED = "recursion_wise", "recursive_sharing"


def recursive(method: Mor, arch: str = "llama", seed: int = 0, scale: float = 1.0, **changes) -> LatentModel:
    """Make a model of four kept layers whose routers tell tokens apart."""
    model = tiny_model(method, arch, seed, **{"num_hidden_layers": 4, **changes})
    generator = torch.Generator().manual_seed(1)
    for router in model.depth.routers:
        with torch.no_grad():
            router.weight.copy_(scale * torch.randn(router.weight.shape, generator=generator))
    return model


def on_same(model: LatentModel, **fields) -> LatentModel:
    """Put other settings on the weights of a model."""
    twin = LatentModel(model.backbone, model.tokenizer, dataclasses.replace(model.method, **fields))
    twin.depth.load_state_dict(model.depth.state_dict())
    return twin.eval()


@by_sharing
def test_one_recursion_with_a_gate_of_one_is_the_base_model_bit_for_bit(arch, sharing):
    base, model = tiny_model(Cot(), arch), tiny_model(dataclasses.replace(NEUTRAL, sharing=sharing), arch)
    assert torch.equal(answers_of(model), answers_of(base))
    texts = [[g.text for g in m.generate(QUESTIONS, max_new_tokens=8)] for m in (base, model)]
    assert texts[0] == texts[1]


@by_arch
@by_sharing
def test_with_full_capacity_and_a_gate_of_one_it_is_an_untied_model_with_copied_weights(arch, sharing):
    model = recursive(dataclasses.replace(TIED, sharing=sharing), arch)
    order = {
        "cycle": [0, 1, 2, 3] * 3,
        "sequence": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
        "middle_cycle": [0, *[1, 2] * 3, 3],
        "middle_sequence": [0, 1, 1, 1, 2, 2, 2, 3],
    }[sharing]
    untied = tiny_model(Cot(), arch, num_hidden_layers=len(order))
    untied.backbone.lm.load_state_dict(model.backbone.lm.state_dict(), strict=False)
    for layer, source in zip(untied.backbone.layers, order):
        layer.load_state_dict(model.backbone.layers[source].state_dict())
    assert torch.equal(answers_of(model), answers_of(untied))


@by_arch
def test_a_gate_of_one_on_the_whole_output_adds_the_stack_to_the_state(arch):
    model = tiny_model(dataclasses.replace(NEUTRAL, gate_target="full"), arch)  # three layers: one is shared
    backbone, positions = model.backbone, torch.arange(LENGTH)[None]
    everyone = torch.ones(1, LENGTH, dtype=torch.bool)
    state = masked_layer(model, backbone.enter(backbone.embed(IDS), positions), 0, everyone)
    state = state + masked_layer(model, state, 1, everyone)
    expected = backbone.head(backbone.norm(masked_layer(model, state, 2, everyone)))
    assert_close(read(model, IDS)[0], expected, ROUNDED)
    assert (answers_of(model) - answers_of(tiny_model(Cot(), arch))).abs().max() > 1e-2


@by_arch
@pytest.mark.parametrize("method", [CAUSAL, TOP_K], ids=["causal", "topk"])
def test_a_gate_of_zero_leaves_the_first_and_the_last_layer(arch, method):
    """sigmoid(z) underflows to zero at z = -1e4; with causal routing tokens then leave after recursion 1."""
    model = recursive(dataclasses.replace(method, gate="sigmoid"), arch)
    for router in model.depth.routers:
        router.forward = lambda states: torch.full((*states.shape[:2], 1), -1e4)
    backbone, everyone = model.backbone, torch.ones(1, LENGTH, dtype=torch.bool)
    state = masked_layer(model, backbone.enter(backbone.embed(IDS), torch.arange(LENGTH)[None]), 0, everyone)
    expected = backbone.head(backbone.norm(masked_layer(model, state, 3, everyone)))
    logits, _, deep = read(model, IDS)
    assert_close(logits, expected, ROUNDED)
    assert deep.depths_BL.float().mean() == (1 if method is CAUSAL else (9 + 6 + 3) / 9)


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
        ("middle_sequence", WISE, "scaled_sigmoid", "delta"),
    ],
)
def test_expert_choice_equals_full_length_attention_with_a_mask(arch, sharing, kv, gate, target):
    fields = {"kv": kv, "sharing": sharing, "gate": gate, "gate_target": target, "temperature": 1.5}
    model = recursive(dataclasses.replace(TOP_K, **fields), arch)
    for one in (model, on_same(model, routing_mode="causal")):
        expected, chosen = dense_mor(one, IDS, sees_later=one is model)
        logits, context, deep = read(one, IDS)
        assert_close(logits, expected, ROUNDED)
        assert torch.equal(deep.depths_BL, sum(c.long() for c in chosen))
        assert deep.measured["selected"].tolist() == pytest.approx([c.float().mean().item() for c in chosen])
        if one is model:
            assert [int(c.sum()) for c in chosen] == [9, 6, 3]
        for r, is_in in enumerate(chosen, 1):
            kept = torch.nonzero(is_in[0])[:, 0].tolist()  # in their order
            slots = [slot for key, slot in context.cache.slots.items() if key[0] == r]
            if kv == "recursion_wise":
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
    model = recursive(dataclasses.replace(TOKENS, tc_weighting=weighting, temperature=0.8, **fields), arch)
    expected, chosen = dense_mor(model, IDS)
    assert [int(c.sum()) for c in chosen] != [9, 9, 9]
    logits, _, deep = read(model, IDS)
    assert_close(logits, expected, ROUNDED)
    assert torch.equal(deep.depths_BL, sum(c.long() for c in chosen))


def states_by_recursion(model: LatentModel, ids: torch.Tensor, monkeypatch) -> list[torch.Tensor]:
    """Return the state before the recursions and after each of them."""
    seen: list[torch.Tensor] = []
    step = type(model.loop).step

    def noted(self, f, state, *args, **kwargs):
        out = step(self, f, state, *args, **kwargs)
        seen[:] = seen or [state]
        seen.append(out[0])
        return out

    monkeypatch.setattr(type(model.loop), "step", noted)
    read(model, ids)
    return seen


@by_arch
@pytest.mark.parametrize("method", [CAUSAL, TOP_K, TOKENS], ids=["causal", "topk", "token"])
def test_a_token_that_has_left_keeps_its_state_bit_for_bit_and_sets_are_nested(arch, method, monkeypatch):
    model = recursive(dataclasses.replace(method, capacities=(0.8, 0.5, 0.2) if method is TOP_K else ()), arch)
    depths, states = read(model, IDS)[2].depths_BL, states_by_recursion(model, IDS, monkeypatch)
    assert len(states) == 4 and len(depths.unique()) > 1
    for r in (1, 2, 3):
        same = (states[r] == states[r - 1]).all(-1)
        assert torch.equal(same, depths < r)
    if method is TOP_K:
        assert [(depths >= r).sum().item() for r in (1, 2, 3)] == [7, 4, 1]  # max(1, int(c S))


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


@by_arch
def test_later_recursions_make_no_keys_where_they_are_shared(arch):
    model = recursive(dataclasses.replace(TIED, kv="recursive_sharing"), arch)
    meter, ids, calls = Meter(1, torch.device("cpu")), some_ids(1, LENGTH), dict[str, int]()
    layer = model.backbone.layers[1]
    llama = [f"self_attn.{name}_proj" for name in ("k", "v", "q")]
    maps = ["attn.c_attn", "attn.c_proj"] if arch == "gpt2" else llama
    with MonkeyPatch.context() as patch:
        for name in maps:
            module = layer.get_submodule(name)
            run = module.forward

            def counted(states, run=run, name=name):
                calls[name] = calls.get(name, 0) + 1
                return run(states)

            patch.setattr(module, "forward", counted)
        read(model, ids, meter=meter)
    assert [calls[name] for name in maps] == [*[1] * (len(maps) - 1), 3]
    wise = Meter(1, torch.device("cpu"))
    read(on_same(model, kv="recursion_wise"), ids, meter=wise)
    spared = sum(p.numel() for name in maps[:-1] for p in layer.get_submodule(name).parameters())
    spared = spared * 2 // 3 if arch == "gpt2" else spared  # of the fused map the queries are made
    gap = wise.costs(model.backbone)[0].flops - meter.costs(model.backbone)[0].flops
    assert gap == 2 * spared * LENGTH * 2 * 2  # two layers, twice


@pytest.mark.parametrize(
    ("arch", "method"),
    [
        ("gpt2", CAUSAL),
        ("llama", CAUSAL),
        ("mistral", CAUSAL),  # with a window, which positions reach past
        ("gpt2", TOKENS),
        ("llama", TOKENS),
        ("gpt2", Mor(kv=SHARED)),
        ("mistral", Mor(kv=SHARED)),
        ("llama", Mor(sharing="sequence")),
        ("gpt2", Mor(causality="aux_router", sharing="cycle")),
    ],
)
def test_reading_token_by_token_is_reading_at_once(arch, method):
    model, ids = recursive(method, arch), some_ids(2, 14, seed=5)
    whole, _, deep = read(model, ids)
    assert len(deep.depths_BL.unique()) > 1
    assert_close(stepwise(model, ids, n_first=6)[0], whole, ROUNDED)


@by_arch
@pytest.mark.parametrize("method", [CAUSAL, TOKENS, TOP_K], ids=["causal", "token", "topk"])
def test_a_batch_is_its_rows_whatever_the_padding(arch, method):
    model = recursive(method, arch)
    for example, logits in zip(MIXED, model.answer_logits(MIXED)):
        assert_close(logits, model.answer_logits([example])[0], ROUNDED)
    ids = some_ids(1, 7, seed=8)
    alone = read(model, ids)[0]
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded = torch.nn.functional.pad(ids, (left, right), value=5)
        mask = torch.tensor([[0] * left + [1] * 7 + [0] * right])
        assert_close(read(model, padded, mask)[0][:, left : left + 7], alone, ROUNDED)
    for question, one in zip(
        QUESTIONS[:3], model.generate(QUESTIONS[:3], max_new_tokens=5) if method is not TOP_K else ()
    ):
        other = model.generate([question], max_new_tokens=5)[0]
        assert (one.text, one.depths, one.cost.flops) == (other.text, other.depths, other.cost.flops)


@by_arch
def test_choosing_by_top_k_leaks_the_future_and_choosing_causally_does_not(arch):
    model, ids = recursive(TOP_K, arch), some_ids(1, 12, seed=4)
    share, most = leak(model, ids)
    assert share > 0.1 and most > 1e-2  # measured: a tenth and more of the tokens would be scored otherwise
    for method in ({"routing_mode": "causal"}, {"routing_mode": "causal", "kv": "recursive_sharing"}):
        share, most = leak(on_same(model, **method), ids)
        assert share == 0.0 and most <= ROUNDED
    assert leak(recursive(TOKENS, arch), ids)[0] == 0.0
    for one in (model, on_same(model, routing_mode="causal")):
        early = read(one, ids)[2].depths_BL[:, :-1]
        assert displaces(one, ids, one.depth.routers[1].weight, early) == (one is model)


@by_arch
def test_tokens_that_all_choose_one_recursion_run_one_gated_recursion(arch):
    model = recursive(dataclasses.replace(TOKENS, alpha=0.6), arch)
    force(model, 0)
    backbone, everyone = model.backbone, torch.ones(1, LENGTH, dtype=torch.bool)
    start = masked_layer(model, backbone.enter(backbone.embed(IDS), torch.arange(LENGTH)[None]), 0, everyone)
    state = masked_layer(model, masked_layer(model, start, 1, everyone), 2, everyone)
    share = torch.tensor([5.0, 0.0, 0.0]).softmax(-1)[0]
    state = masked_layer(model, start + 0.6 * share * state, 3, everyone)
    assert_close(read(model, IDS)[0], backbone.head(backbone.norm(state)), ROUNDED)


@by_arch
def test_tokens_that_all_run_every_recursion_end_with_the_stack_applied_each_time_and_the_first_state(arch):
    model = recursive(dataclasses.replace(TOKENS, gate="st"), arch)
    force(model, 2)
    backbone, everyone = model.backbone, torch.ones(1, LENGTH, dtype=torch.bool)
    start = state = masked_layer(model, backbone.enter(backbone.embed(IDS), torch.arange(LENGTH)[None]), 0, everyone)
    for _ in range(3):
        state = masked_layer(model, masked_layer(model, state, 1, everyone), 2, everyone)
    expected = backbone.head(backbone.norm(masked_layer(model, start + state, 3, everyone)))
    assert_close(read(model, IDS)[0], expected, ROUNDED)


def force(model: LatentModel, depth: int) -> None:
    """Let the router of token choice give every token the scores 5 for one depth and 0 for the others."""
    scores = 5.0 * torch.nn.functional.one_hot(torch.tensor(depth), model.method.n_recursions)
    model.depth.routers[0].forward = lambda states: scores.expand(*states.shape[:2], -1)


def test_flops_are_those_of_the_tokens_that_ran():
    model, meter = recursive(CAUSAL), Meter(1, torch.device("cpu"))
    width, weights = 32, sum(p.numel() for p in model.backbone.layers.parameters()) / 4
    counts = [c.sum().item() for c in dense_mor(model, IDS)[1]]
    assert counts[0] == LENGTH > counts[1] > 0
    read(model, IDS, meter=meter)
    linear = 2 * weights * (2 * LENGTH + 2 * sum(counts))
    attention = 4 * width * (2 * LENGTH * (LENGTH + 1) / 2 + 2 * sum(k * (k + 1) / 2 for k in counts))
    routers = 3 * LENGTH * 2 * width
    assert meter.costs(model.backbone)[0].flops == pytest.approx(linear + attention + routers, rel=1e-12)
    stepped = Meter(1, torch.device("cpu"))
    stepwise(model, IDS, meter=stepped)
    assert stepped.costs(model.backbone)[0].flops == meter.costs(model.backbone)[0].flops


def test_the_number_of_weights_does_not_depend_on_the_recursions_but_for_their_routers():
    def count(method: Mor) -> int:
        return sum(p.numel() for p in tiny_model(method).parameters())

    plain = count(Cot())
    assert [count(Mor(n_recursions=n)) - plain for n in (1, 2, 5)] == [32, 64, 160]
    assert [count(dataclasses.replace(TOKENS, n_recursions=n)) - plain for n in (1, 2, 5)] == [32, 64, 160]


@by_arch
def test_the_gradient_of_a_shared_layer_is_the_sum_of_those_of_its_untied_copies(arch):
    model = recursive(TIED, arch, scale=0.0).double()  # nothing flows back through the routers' scores
    untied = tiny_model(Cot(), arch, num_hidden_layers=8).double()
    untied.backbone.lm.load_state_dict(model.backbone.lm.state_dict(), strict=False)
    for layer, source in zip(untied.backbone.layers, [0, 1, 2, 1, 2, 1, 2, 3]):
        layer.load_state_dict(copy.deepcopy(model.backbone.layers[source].state_dict()))
    for one in (model, untied):
        one.loss(MIXED).loss.backward()
    for shared, copies in ((0, [0]), (1, [1, 3, 5]), (2, [2, 4, 6]), (3, [7])):
        for name, parameter in model.backbone.layers[shared].named_parameters():
            parts = [dict(untied.backbone.layers[i].named_parameters())[name].grad for i in copies]
            assert_close(parameter.grad, sum(parts))

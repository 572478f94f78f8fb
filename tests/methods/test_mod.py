"""Mixture-of-Depths: it equals a dense reference, and the invariants of its card (mod.md, section 9)."""

import dataclasses

import pytest
import torch

from innerloop import Cot, LatentModel, Mod
from innerloop.decoder.cost import Meter
from innerloop.methods.depth.mod import ModDepth
from innerloop.methods.depth.router import mixed
from innerloop.passes.context import Context
from innerloop.passes.tokens import PassInput, Tokens
from tests.methods.reference_routing import IDS, LENGTH, dense_mod, displaces, leak, read, some_ids, stepwise
from tests.methods.tools import MIXED, QUESTIONS, ROUNDED, assert_close, by_arch
from tests.models import answers_of, left_pad, tiny_model

NEUTRAL = Mod(capacity=1.0, gate="st")
TOP_K = Mod(capacity=0.4, gate="sigmoid", routing_mode="topk")
CAUSAL = dataclasses.replace(TOP_K, routing_mode="causal")
ALL_GATES = [
    dataclasses.replace(TOP_K, gate=gate, gate_target=target, alpha=0.3 if gate == "scaled_sigmoid" else None)
    for gate in ("identity", "sigmoid", "scaled_sigmoid", "st")
    for target in ("delta", "full", "replace")
]


def routed(method: Mod, arch: str = "llama", seed: int = 0, **changes) -> LatentModel:
    """Make a model whose routers tell tokens apart, with routed layers 1 and 3 of 4 unless said otherwise."""
    model = tiny_model(method, arch, seed, **{"num_hidden_layers": 4, **changes})
    return with_scores(model, 1.0)


def with_scores(model: LatentModel, scale: float) -> LatentModel:
    """Draw the routers anew."""
    generator = torch.Generator().manual_seed(1)
    for router in model.depth.routers:
        with torch.no_grad():
            router.weight.copy_(scale * torch.randn(router.weight.shape, generator=generator))
    return model


def chosen_in(model: LatentModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return which tokens ran the one routed layer of a model (B, L)."""
    assert len(model.depth.routed) == 1
    return read(model, ids, mask)[2].depths_BL - (model.backbone.n_layers - 1) == 1


def keys_of(context: Context) -> list[torch.Tensor]:
    """Return the keys of each layer."""
    slots = sorted(context.cache.slots.values(), key=lambda slot: slot.layers.start)
    return [keys for slot in slots for keys in slot.keys]


def test_full_capacity_with_a_gate_of_one_is_the_base_model_bit_for_bit(arch):
    base, model = tiny_model(Cot(), arch), tiny_model(NEUTRAL, arch)
    assert torch.equal(answers_of(model), answers_of(base))
    whole = Context(base.backbone, 1)
    states = whole.read(base.backbone.embed(IDS))
    logits, context, deep = read(model, IDS)
    assert torch.equal(logits, base.backbone.head(states))
    for ours, theirs in zip(keys_of(context), (layer.keys for layer in whole.cache.layers), strict=True):
        assert torch.equal(ours[:, :, -theirs.shape[2] :], theirs)  # a sliding layer of theirs keeps its window
    assert (deep.depths_BL == base.backbone.n_layers).all()
    texts = [[g.text for g in m.generate(QUESTIONS[:2], max_new_tokens=8)] for m in (base, model)]
    assert texts[0] == texts[1]


@by_arch
def test_a_gate_of_one_leaves_replace_as_it_is_and_adds_x_once_more_in_full(arch):
    base = tiny_model(Cot(), arch)
    replaced = tiny_model(dataclasses.replace(NEUTRAL, gate_target="replace"), arch)
    assert torch.equal(answers_of(replaced), answers_of(base))
    full = tiny_model(dataclasses.replace(NEUTRAL, gate_target="full", routed_layers=(2,)), arch)
    backbone, positions = base.backbone, torch.arange(LENGTH)[None]
    before = backbone(backbone.embed(IDS), positions_BL=positions, layers=range(2))
    delta = backbone(before, positions_BL=positions, layers=range(2, 3)) - before
    assert_close(read(full, IDS)[0], backbone.head(backbone.norm(2 * before + delta)), ROUNDED)
    assert (answers_of(full) - answers_of(base)).abs().max() > 1e-2


def test_the_three_targets_of_a_gate_and_their_value_at_one():
    x, y, g = torch.randn(3, 4, 8).double(), torch.randn(3, 4, 8).double(), torch.rand(3, 4).double()
    assert torch.equal(mixed(x, y, g, "delta"), x + g[..., None] * (y - x))
    assert torch.equal(mixed(x, y, g, "full"), x + g[..., None] * y)
    assert torch.equal(mixed(x, y, g, "replace"), g[..., None] * y)
    for target, value in (("delta", y), ("full", x + y), ("replace", y)):
        assert torch.equal(mixed(x, y, g, target, straight=True), value)


@by_arch
@pytest.mark.parametrize("target", ["delta", "full"])
def test_a_gate_of_zero_makes_routed_layers_the_identity(arch, target):
    """Scores are zero, so that ties choose the first tokens; no layer of their own may change them."""
    model = with_scores(routed(dataclasses.replace(TOP_K, gate="identity", gate_target=target), arch), 0.0)
    backbone, positions = model.backbone, torch.arange(LENGTH)[None]
    state = backbone(backbone.embed(IDS), positions_BL=positions, layers=range(1))
    state = backbone(state, positions_BL=positions, layers=range(2, 3))
    assert torch.equal(read(model, IDS)[0], backbone.head(backbone.norm(state)))


@by_arch
def test_where_the_causal_rule_chooses_nobody_the_layer_is_the_identity_and_keeps_nothing(arch):
    model = with_scores(routed(CAUSAL, arch), 0.0)
    logits, context = stepwise(model, IDS, n_first=4)
    nobody = with_scores(routed(dataclasses.replace(TOP_K, gate="identity"), arch), 0.0)
    assert_close(logits, read(nobody, IDS)[0], ROUNDED)
    assert {key: slot.length for key, slot in context.cache.slots.items()} == {0: LENGTH, 2: LENGTH}


@pytest.mark.parametrize("tied", [False, True])
def test_exactly_k_tokens_are_chosen_in_each_row_and_of_equal_scores_the_first(tied):
    model = routed(dataclasses.replace(TOP_K, routed_layers=(1,)))
    if tied:
        with_scores(model, 0.0)
    ids, mask = left_pad([some_ids(1, n, seed=n)[0] for n in (1, 4, 7, 10)])
    chosen = chosen_in(model, ids, mask)
    assert chosen.sum(1).tolist() == [1, 2, 3, 4]  # ceil(0.4 n)
    assert not chosen[mask == 0].any()
    if tied:
        assert [row[m.bool()].nonzero()[:, 0].tolist() for row, m in zip(chosen, mask)] == [
            list(range(k)) for k in (1, 2, 3, 4)
        ]


@by_arch
def test_tokens_that_are_not_chosen_are_left_alone_bit_for_bit(arch):
    model = routed(dataclasses.replace(TOP_K, routed_layers=(3,)), arch)
    logits, _, deep = read(model, IDS)
    backbone = model.backbone
    before = backbone(backbone.embed(IDS), positions_BL=torch.arange(LENGTH)[None], layers=range(3))
    left, chosen = backbone.head(backbone.norm(before)), deep.depths_BL == 4
    assert torch.equal(logits[~chosen], left[~chosen])
    assert ((logits - left)[chosen].abs().amax(-1) > 1e-3).all()


@by_arch
def test_a_token_that_is_not_chosen_has_no_say_in_those_that_are(arch):
    model = routed(dataclasses.replace(TOP_K, routed_layers=(1,)), arch)
    depth, chosen = model.depth, chosen_in(model, IDS)
    assert isinstance(depth, ModDepth)
    state, scores = torch.randn(1, LENGTH, model.backbone.width), torch.randn(1, LENGTH)

    def after(changed: torch.Tensor) -> torch.Tensor:
        tokens = Tokens(changed, torch.arange(LENGTH)[None])
        reading = PassInput(tokens, depth.empty_cache())
        with torch.no_grad():
            return depth._run_routed(reading, tokens, 1, chosen, scores)

    moved = torch.where(chosen[..., None], state, state + torch.randn_like(state))
    assert torch.equal(after(moved)[chosen], after(state)[chosen])
    first = chosen & (chosen.cumsum(1) == 1)
    seen = torch.where(first[..., None], state + torch.randn_like(state), state)
    assert ((after(seen) - after(state))[chosen].abs().amax(-1) > 1e-3).all()  # they do see each other


@by_arch
@pytest.mark.parametrize("method", ALL_GATES, ids=lambda m: f"{m.gate}-{m.gate_target}")
def test_it_equals_full_length_attention_with_a_mask_and_a_choice_afterwards(arch, method):
    model = routed(method, arch)
    expected, chosen = dense_mod(model, IDS, k=4)  # ceil(0.4 * 9)
    logits, context, deep = read(model, IDS)
    assert_close(logits, expected, ROUNDED)
    assert torch.equal(deep.depths_BL, 2 + sum(c.long() for c in chosen))
    assert [context.cache.slots[layer].positions_BP[0].tolist() for layer in (1, 3)] == [
        torch.nonzero(c[0])[:, 0].tolist() for c in chosen
    ]
    causal = under_causal(model)
    expected, chosen = dense_mod(causal, IDS)
    assert 0 < sum(int(c.sum()) for c in chosen) < 2 * LENGTH
    assert_close(read(causal, IDS)[0], expected, ROUNDED)


def under_causal(model: LatentModel) -> LatentModel:
    """Put the causal rule on a model."""
    twin = LatentModel(model.backbone, model.tokenizer, dataclasses.replace(model.method, routing_mode="causal"))
    twin.depth.load_state_dict(model.depth.state_dict())
    return twin.eval()


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mistral"])  # the last with a window, which positions reach past
def test_reading_token_by_token_is_reading_at_once(arch):
    model = routed(CAUSAL, arch)
    ids = some_ids(2, 14, seed=5)
    whole, context, deep = read(model, ids)
    assert 0 < (deep.depths_BL - 2).sum() < 2 * deep.depths_BL.numel()
    logits, grown = stepwise(model, ids, n_first=6)
    assert_close(logits, whole, ROUNDED)
    for layer in (1, 3):
        kept, kept_too = (c.cache.slots[layer].real_BP.sum(1) for c in (context, grown))
        assert torch.equal(kept, kept_too)


def test_a_slot_that_missed_a_pass_still_knows_how_far_apart_its_tokens_are():
    """A window of 5 counts positions, not the columns that a ragged slot has."""
    model = with_scores(routed(dataclasses.replace(CAUSAL, routed_layers=(1,)), "mistral"), 0.0)
    ids, router = some_ids(1, 12, seed=2), model.depth.routers[0]
    states = model.backbone(model.backbone.embed(ids), positions_BL=torch.arange(12)[None], layers=range(1))
    with torch.no_grad():  # only the tokens 1 and 10 are chosen: whole passes of one token each
        targets = torch.full((12,), -1.0)
        targets[[1, 10]] = 1.0
        router.weight.copy_(torch.linalg.lstsq(states[0], targets[:, None]).solution.T)
    assert_close(stepwise(model, ids)[0], dense_mod(model, ids)[0], ROUNDED)


@by_arch
def test_choosing_by_top_k_leaks_the_future_and_choosing_causally_does_not(arch):
    model = routed(dataclasses.replace(TOP_K, routed_layers=(1,)), arch)
    ids = some_ids(1, 12, seed=4)
    share, most = leak(model, ids)
    assert share > 0.1 and most > 0.1  # measured: a tenth and more of the tokens would be scored otherwise
    share, most = leak(under_causal(model), ids)
    assert share == 0.0 and most <= ROUNDED
    for one in (model, under_causal(model)):
        early = read(one, ids)[2].depths_BL[:, :-1]
        assert displaces(one, ids, one.depth.routers[0].weight, early) == (one is model)


@by_arch
def test_a_batch_is_its_rows_whatever_the_padding(arch):
    for method in (CAUSAL, TOP_K):
        model = routed(method, arch)
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            assert_close(logits, model.answer_logits([example])[0], ROUNDED)
        ids = some_ids(1, 7, seed=8)
        alone = read(model, ids)[0]
        for left, right in ((3, 0), (0, 3), (2, 1)):
            padded = torch.nn.functional.pad(ids, (left, right), value=5)
            mask = torch.tensor([[0] * left + [1] * 7 + [0] * right])
            assert_close(read(model, padded, mask)[0][:, left : left + 7], alone, ROUNDED)
    model = routed(CAUSAL, arch)
    for question, one in zip(QUESTIONS[:3], model.generate(QUESTIONS[:3], max_new_tokens=5)):
        other = model.generate([question], max_new_tokens=5)[0]
        assert (one.text, one.depths, one.cost.flops) == (other.text, other.depths, other.cost.flops)


@by_arch
def test_flops_are_those_of_the_tokens_that_ran(arch):
    base, ids = tiny_model(Cot(), arch), some_ids(1, LENGTH, seed=3)
    n, width = base.backbone.n_layers, base.backbone.width
    plain, full = Meter(1, ids.device), Meter(1, ids.device)
    with torch.no_grad():
        Context(base.backbone, 1, plain).read(base.backbone.embed(ids))
    read(tiny_model(NEUTRAL, arch), ids, meter=full)
    routers = 2 * LENGTH * width  # one routed layer of three
    assert full.costs(base.backbone)[0].flops == plain.costs(base.backbone)[0].flops + routers

    model, meter = routed(dataclasses.replace(CAUSAL, routed_layers=(1,)), arch), Meter(1, ids.device)
    deep = read(model, ids, meter=meter)[2]
    k, n = int((deep.depths_BL == 4).sum()), 4
    assert 1 < k < LENGTH and deep.measured["selected"].tolist() == pytest.approx([k / LENGTH])
    weights = sum(p.numel() for p in model.backbone.layers.parameters()) / n
    linear = 2 * weights * ((n - 1) * LENGTH + k)
    attention = 4 * width * ((n - 1) * LENGTH * (LENGTH + 1) / 2 + k * (k + 1) / 2)
    assert meter.costs(model.backbone)[0].flops == pytest.approx(linear + attention + routers, rel=1e-12)
    stepped = Meter(1, ids.device)
    stepwise(model, ids, meter=stepped)
    assert stepped.costs(model.backbone)[0].flops == meter.costs(model.backbone)[0].flops

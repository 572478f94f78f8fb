"""Mixture-of-Depths: it equals a dense reference, and the invariants of its card (mod.md, section 9)."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from innerloop import Cot, InputError, LatentModel, Mod
from innerloop.calibrate.router_thresholds import calibrate_routers
from innerloop.decoder.cost import CostMeter
from innerloop.passes.context import Context
from innerloop.passes.tokens import PassInput, Tokens
from tests.methods.reference_routing import IDS, LENGTH, dense_mod, on_same, read, scattered, some_ids, stepwise
from tests.methods.tools import QUESTIONS, ROUNDED, assert_close, by_arch, learn
from tests.models import answers_of, chain_examples, left_pad, tiny_model

NEUTRAL = Mod(capacity=1.0, gate="st")
TOP_K = Mod(capacity=0.4, gate="sigmoid", routing_mode="topk")
CAUSAL = dataclasses.replace(TOP_K, routing_mode="causal")


def routed(method: Mod, arch: str = "llama", scale: float = 1.0) -> LatentModel:
    """Make a model whose routers tell tokens apart, with routed layers 1 and 3 of 4 unless said otherwise."""
    return scattered(tiny_model(method, arch, num_hidden_layers=4), scale)


def chosen_in(model: LatentModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return which tokens ran the one routed layer of a model (B, L)."""
    return read(model, ids, mask)[2].depths_BL - (model.backbone.n_layers - 1) == 1


def states_after(model: LatentModel, layers: Sequence[int]) -> list[torch.Tensor]:
    """Return the states of IDS before and after some layers, run by all tokens one after the other."""
    backbone, at = model.backbone, torch.arange(LENGTH)[None]
    states = [backbone.enter(backbone.embed(IDS), at)]
    for layer in layers:
        states.append(backbone(states[-1], positions_BL=at, layers=range(layer, layer + 1), inner=True))
    return states


def says(model: LatentModel, states: torch.Tensor) -> torch.Tensor:
    return model.backbone.head(model.backbone.norm(states))


def test_full_capacity_with_a_gate_of_one_is_the_base_model_bit_for_bit(arch):
    base, model = tiny_model(Cot(), arch), tiny_model(NEUTRAL, arch)
    assert torch.equal(answers_of(model), answers_of(base))
    whole = Context(base.backbone, 1)
    states = whole.read(base.backbone.embed(IDS))
    logits, context, deep = read(model, IDS)
    assert torch.equal(logits, base.backbone.head(states))
    slots = sorted(context.cache.slots.values(), key=lambda slot: slot.layers.start)
    for ours, layer in zip((keys for slot in slots for keys in slot.keys), whole.cache.layers, strict=True):
        theirs = layer.keys
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
    *_, before, after = states_after(base, (0, 1, 2))
    assert_close(read(full, IDS)[0], says(base, before + after), ROUNDED)
    assert (answers_of(full) - answers_of(base)).abs().max() > 1e-2


@by_arch
@pytest.mark.parametrize("target", ["delta", "full"])
def test_a_gate_of_zero_and_a_rule_that_chooses_nobody_make_routed_layers_the_identity(arch, target):
    """Scores are zero, so that ties choose the first tokens; no layer of their own may change them."""
    expected = None
    for mode in ("topk", "causal"):
        method = dataclasses.replace(TOP_K, gate="identity", gate_target=target, routing_mode=mode)
        model = routed(method, arch, scale=0.0)
        expected = says(model, states_after(model, (0, 2))[-1])
        assert torch.equal(read(model, IDS)[0], expected)
    logits, context = stepwise(model, IDS, n_first=4)
    assert_close(logits, expected, ROUNDED)
    assert {key: slot.length for key, slot in context.cache.slots.items()} == {0: LENGTH, 2: LENGTH}  # none is kept


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["tied", "unlike"])
def test_exactly_k_tokens_are_chosen_in_each_row_and_of_equal_scores_the_first(scale):
    model = routed(dataclasses.replace(TOP_K, routed_layers=(1,)), scale=scale)
    ids, mask = left_pad([some_ids(1, n, seed=n)[0] for n in (1, 4, 7, 10)])
    chosen = chosen_in(model, ids, mask)
    assert chosen.sum(1).tolist() == [1, 2, 3, 4]  # ceil(0.4 n)
    assert not chosen[mask == 0].any()
    if scale == 0:
        assert all(row[m.bool()][:k].all() for k, row, m in zip((1, 2, 3, 4), chosen, mask))


@by_arch
def test_tokens_that_are_not_chosen_are_left_alone_bit_for_bit_and_have_no_say_in_those_that_are(arch):
    model = routed(dataclasses.replace(TOP_K, routed_layers=(3,)), arch)
    logits, chosen = read(model, IDS)[0], chosen_in(model, IDS)
    left = says(model, states_after(model, (0, 1, 2))[-1])
    assert torch.equal(logits[~chosen], left[~chosen])
    assert ((logits - left)[chosen].abs().amax(-1) > 1e-3).all()
    state, scores = torch.randn(1, LENGTH, model.backbone.width), torch.randn(1, LENGTH)

    @torch.no_grad()
    def after(is_changed: torch.Tensor) -> torch.Tensor:
        changed = torch.where(is_changed[..., None], state + torch.randn_like(state), state)
        reading = PassInput(Tokens(changed, torch.arange(LENGTH)[None]), model.depth.empty_cache())
        return model.depth._run_routed(reading, reading.tokens, 3, chosen, scores)[chosen]

    alone = after(torch.zeros_like(chosen))
    assert torch.equal(after(~chosen), alone)
    first = chosen & (chosen.cumsum(1) == 1)
    assert ((after(first) - alone).abs().amax(-1) > 1e-3).all()  # they do see each other


@by_arch
@pytest.mark.parametrize("target", ["delta", "full", "replace"])
@pytest.mark.parametrize("gate", ["identity", "sigmoid", "scaled_sigmoid", "st"])
def test_it_equals_full_length_attention_with_a_mask_and_a_choice_afterwards(arch, gate, target):
    alpha = 0.3 if gate == "scaled_sigmoid" else None
    model = routed(dataclasses.replace(TOP_K, gate=gate, gate_target=target, alpha=alpha), arch)
    expected, chosen = dense_mod(model, IDS, k=4)  # ceil(0.4 * 9)
    logits, context, deep = read(model, IDS)
    assert_close(logits, expected, ROUNDED)
    assert torch.equal(deep.depths_BL, 2 + sum(c.long() for c in chosen))
    for layer, is_in in zip((1, 3), chosen):
        assert torch.equal(context.cache.slots[layer].positions_BP[0], torch.nonzero(is_in[0])[:, 0])
    causal = on_same(model, routing_mode="causal")
    expected, chosen = dense_mod(causal, IDS)
    assert 0 < sum(int(c.sum()) for c in chosen) < 2 * LENGTH
    assert_close(read(causal, IDS)[0], expected, ROUNDED)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "mistral"])  # the last with a window, which positions reach past
def test_reading_token_by_token_is_reading_at_once(arch):
    model, ids = routed(CAUSAL, arch), some_ids(2, 14, seed=5)
    whole, context, deep = read(model, ids)
    assert 0 < (deep.depths_BL - 2).sum() < 2 * deep.depths_BL.numel()
    logits, grown = stepwise(model, ids, n_first=6)
    assert_close(logits, whole, ROUNDED)
    for layer in (1, 3):
        kept, kept_too = (c.cache.slots[layer].real_BP.sum(1) for c in (context, grown))
        assert torch.equal(kept, kept_too)


def test_a_slot_that_missed_a_pass_still_knows_how_far_apart_its_tokens_are():
    """A window of 5 counts positions, not the columns that a ragged slot has."""
    model, ids = routed(dataclasses.replace(CAUSAL, routed_layers=(1,)), "mistral"), some_ids(1, 12, seed=2)
    states = model.backbone(model.backbone.embed(ids), positions_BL=torch.arange(12)[None], layers=range(1))
    targets = torch.full((12, 1), -1.0)
    targets[[1, 10]] = 1.0  # only these are chosen: whole passes of one token each
    model.depth.routers[0].weight.data = torch.linalg.lstsq(states[0].detach(), targets).solution.T
    assert_close(stepwise(model, ids)[0], dense_mod(model, ids)[0], ROUNDED)


@by_arch
def test_flops_are_those_of_the_tokens_that_ran(arch):
    base, model = tiny_model(Cot(), arch), routed(dataclasses.replace(CAUSAL, routed_layers=(1,)), arch)
    width, n, plain, full, meter, stepped = base.backbone.width, 4, *(CostMeter(1, IDS.device) for _ in range(4))
    with torch.no_grad():
        Context(base.backbone, 1, plain).read(base.backbone.embed(IDS))
    read(tiny_model(NEUTRAL, arch), IDS, meter=full)
    routers = 2 * LENGTH * width  # of one routed layer
    assert full.costs(base.backbone)[0].flops == plain.costs(base.backbone)[0].flops + routers
    deep = read(model, IDS, meter=meter)[2]
    k = int((deep.depths_BL == n).sum())
    assert 1 < k < LENGTH and deep.measured["selected"].tolist() == pytest.approx([k / LENGTH])
    weights = sum(p.numel() for p in model.backbone.layers.parameters()) / n
    linear = 2 * weights * ((n - 1) * LENGTH + k)
    attention = 4 * width * ((n - 1) * LENGTH * (LENGTH + 1) / 2 + k * (k + 1) / 2)
    assert meter.costs(model.backbone)[0].flops == pytest.approx(linear + attention + routers, rel=1e-12)
    stepwise(model, IDS, meter=stepped)
    assert stepped.costs(model.backbone)[0].flops == meter.costs(model.backbone)[0].flops


EXAMPLES = list(chain_examples(8))
PREDICTED = Mod(capacity=0.4, causality="predictor", routed_layers=(1,), gate="sigmoid")
CALIBRATED = Mod(capacity=0.3, causality="calibrated", routed_layers=(1, 2), gate="sigmoid")


def measured(model: LatentModel, examples=EXAMPLES) -> dict[str, torch.Tensor]:
    """Read whole rows; return what the pass measured."""
    batch = model.batch(model.rows(examples))
    with torch.no_grad():
        thought = model.think(batch)
        model.written_logits(batch, thought)
    return thought.deep[0].measured


def test_every_second_layer_is_routed_unless_others_are_named():
    assert [tiny_model(Mod(), num_hidden_layers=n).depth.routed for n in (2, 5, 6)] == [[1], [1, 3], [1, 3, 5]]
    assert tiny_model(Mod(routed_layers=(2, 1))).depth.routed == [1, 2]


def test_with_a_gate_of_one_the_scale_of_the_scores_does_not_matter():
    for gate in ("st", "sigmoid"):
        method = Mod(capacity=0.4, gate=gate, routing_mode="topk")
        small, large = (answers_of(routed(method, scale=scale)) for scale in (0.5, 4.0))
        assert torch.equal(small, large) == (gate == "st")


def test_a_predictor_chooses_when_answering_and_the_router_only_weighs():
    model, meter, plain = routed(PREDICTED), *(CostMeter(1, IDS.device) for _ in range(2))
    backbone, (predictor,), (router,) = model.backbone, model.depth.predictors, model.depth.routers
    assert (predictor.inner.out_features, predictor.outer.in_features) == (8, 8)  # a quarter of the width
    state = backbone(backbone.embed(IDS), positions_BL=torch.arange(LENGTH)[None], layers=range(1))
    says, (logits, _, deep) = predictor(state) > 0, read(model, IDS, meter=meter)
    assert 0 < says.sum() < LENGTH and torch.equal(deep.depths_BL == 4, says)
    router.weight.data.mul_(-1.0)
    turned, _, again = read(model, IDS)
    assert torch.equal(again.depths_BL, deep.depths_BL) and not torch.equal(turned, logits)
    without = routed(dataclasses.replace(PREDICTED, causality="aux_bce"))
    solution = torch.linalg.lstsq(state[0].detach(), says.float().T - 0.5).solution
    without.depth.routers[0].weight.data.copy_(solution.T)  # a router that chooses the same tokens
    assert torch.equal(read(without, IDS, meter=plain)[2].depths_BL, deep.depths_BL)
    extra = 2 * LENGTH * sum(p.numel() for p in predictor.parameters())
    assert meter.costs(backbone)[0].flops == plain.costs(backbone)[0].flops + extra


def test_thresholds_follow_the_quantiles_of_the_training_batches():
    model = routed(CALIBRATED).train()
    quantiles = [measured(model, part)["quantile"] for part in (EXAMPLES[:4], EXAMPLES[4:])]
    assert model.depth.thresholds.tolist() == [0.0, 0.0]
    model.loss(EXAMPLES[:4])
    assert_close(model.depth.thresholds, quantiles[0])
    model.loss(EXAMPLES[4:])
    model.eval().loss(EXAMPLES)
    assert_close(model.depth.thresholds, sum(quantiles) / 2)


def test_calibrated_thresholds_let_the_share_through_that_was_asked_for():
    model = routed(CALIBRATED).train()
    calibrate_routers(model, EXAMPLES, batch_size=3)
    assert model.training
    found = measured(model.eval())
    assert found["selected"][0].item() == pytest.approx(0.3, abs=0.05) and "quantile" not in found
    with pytest.raises(InputError, match="calibrated for mod with causality=calibrated"):
        calibrate_routers(tiny_model(Mod()), EXAMPLES)


def test_a_retrofit_starts_at_the_base_model_while_the_capacity_is_one():
    base = tiny_model(Cot(), num_hidden_layers=4).train().loss(EXAMPLES).terms["answer"]
    model = routed(Mod(capacity=0.2, gate="st", capacity_warmup=5)).train()
    for model.depth.step in (0, 5):
        assert torch.equal(base, model.loss(EXAMPLES).terms["answer"]) == (model.depth.step == 0)


@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("causality", ["aux_bce", "predictor", "calibrated"])
def test_models_in_half_precision_are_routed_in_fp32(causality, part):
    model = tiny_model(Mod(capacity=0.4, causality=causality, gate="sigmoid"), num_hidden_layers=4)
    (model if part == "model" else model.backbone).bfloat16()
    assert read(model, some_ids(2, 8))[0].dtype == torch.bfloat16
    assert model.depth.routers[0](torch.randn(1, 2, 32).bfloat16()).dtype == torch.float32
    model.train().loss(EXAMPLES).loss.backward()
    for parameter in model.depth.parameters():
        assert parameter.dtype == parameter.grad.dtype == (torch.bfloat16 if part == "model" else torch.float32)
        assert parameter.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [Mod(capacity=0.25, aux_weight=0.1), Mod(capacity=0.25, causality="predictor", gate="st")],
    ids=["aux_bce", "predictor"],
)
def test_it_learns_by_heart_and_the_causal_rule_chooses_as_many_as_the_capacity(method):
    model = tiny_model(method, num_hidden_layers=2, initializer_range=0.1).train()
    assert learn(model, EXAMPLES) < 0.05
    generations = model.eval().generate([example.question for example in EXAMPLES], max_new_tokens=40)
    assert [generation.answer for generation in generations] == [example.answer for example in EXAMPLES]
    assert measured(model)["selected"].item() == pytest.approx(0.25, abs=0.05)
    model.depth.sees_later = True
    assert measured(model)["selected"].item() == pytest.approx(0.25, abs=0.02)
    assert measured(model)["agreement"].item() > 0.95

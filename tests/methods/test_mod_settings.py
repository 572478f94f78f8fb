"""Mixture-of-Depths: what its settings do, and that the causal rule learns to choose as many as in training."""

import dataclasses

import pytest
import torch

from innerloop import Cot, InputError, LatentModel, Mod
from innerloop.calibrate.router_thresholds import calibrate_routers
from innerloop.decoder.cost import Meter
from tests.close import assert_close
from tests.methods.reference_routing import IDS, LENGTH, read, some_ids
from tests.methods.tools import learn
from tests.models import answers_of, chain_examples, tiny_model

EXAMPLES = list(chain_examples(8))
PREDICTED = Mod(capacity=0.4, causality="predictor", routed_layers=(1,), gate="sigmoid")
CALIBRATED = Mod(capacity=0.3, causality="calibrated", routed_layers=(1, 2), gate="sigmoid")


def scattered(method: Mod, scale: float = 1.0, **changes) -> LatentModel:
    """Make a model whose routers and predictors tell tokens apart."""
    model = tiny_model(method, num_hidden_layers=4, **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.depth.parameters():
        with torch.no_grad():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def test_every_second_layer_is_routed_unless_others_are_named():
    assert [tiny_model(Mod(), num_hidden_layers=n).depth.routed for n in (2, 5, 6)] == [[1], [1, 3], [1, 3, 5]]
    assert tiny_model(Mod(routed_layers=(2, 1))).depth.routed == [1, 2]


def test_with_a_gate_of_one_the_scale_of_the_scores_does_not_matter():
    small, large = (scattered(Mod(capacity=0.4, gate="st", routing_mode="topk"), scale) for scale in (0.5, 4.0))
    assert torch.equal(answers_of(small), answers_of(large))
    other = scattered(Mod(capacity=0.4, gate="sigmoid", routing_mode="topk"), 0.5)
    assert not torch.equal(answers_of(other), answers_of(scattered(other.method, 4.0)))


def test_a_predictor_chooses_when_answering_and_the_router_only_weighs():
    model = scattered(PREDICTED)
    backbone, (predictor,), (router,) = model.backbone, model.depth.predictors, model.depth.routers
    assert (predictor.inner.out_features, predictor.outer.in_features) == (8, 8)  # a quarter of the width
    state = backbone(backbone.embed(IDS), positions_BL=torch.arange(LENGTH)[None], layers=range(1))
    says, meter = predictor(state) > 0, Meter(1, IDS.device)
    logits, _, deep = read(model, IDS, meter=meter)
    assert 0 < says.sum() < LENGTH and torch.equal(deep.depths_BL == 4, says)
    with torch.no_grad():
        router.weight.mul_(-1.0)
    turned, _, again = read(model, IDS)
    assert torch.equal(again.depths_BL, deep.depths_BL) and not torch.equal(turned, logits)
    plain, without = Meter(1, IDS.device), scattered(dataclasses.replace(PREDICTED, causality="aux_bce"))
    with torch.no_grad():  # a router that chooses the same tokens
        without.depth.routers[0].weight.copy_(torch.linalg.lstsq(state[0], says.float().T - 0.5).solution.T)
    assert torch.equal(read(without, IDS, meter=plain)[2].depths_BL, deep.depths_BL)
    extra = 2 * LENGTH * sum(p.numel() for p in predictor.parameters())
    assert meter.costs(backbone)[0].flops == plain.costs(backbone)[0].flops + extra


def test_thresholds_follow_the_quantiles_of_the_training_batches():
    model = scattered(CALIBRATED).train()
    with torch.no_grad():
        seen = [model.think(model.batch(model.rows(part))) for part in (EXAMPLES[:4], EXAMPLES[4:])]
        for part, thought in zip((EXAMPLES[:4], EXAMPLES[4:]), seen):
            model.written_logits(model.batch(model.rows(part)), thought)
    quantiles = [thought.deep[0].measured["quantile"] for thought in seen]
    assert model.depth.thresholds.tolist() == [0.0, 0.0]
    model.loss(EXAMPLES[:4])
    assert_close(model.depth.thresholds, quantiles[0])
    model.loss(EXAMPLES[4:])
    assert_close(model.depth.thresholds, sum(quantiles) / 2)
    before = model.depth.thresholds.clone()
    model.eval().loss(EXAMPLES)
    assert torch.equal(model.depth.thresholds, before)


def test_calibrated_thresholds_let_the_share_through_that_was_asked_for():
    model = scattered(CALIBRATED).train()
    calibrate_routers(model, EXAMPLES, batch_size=3)
    assert model.training
    model.eval()
    thought = model.think(model.batch(model.rows(EXAMPLES)))
    model.written_logits(model.batch(model.rows(EXAMPLES)), thought)
    assert thought.deep[0].measured["selected"][0].item() == pytest.approx(0.3, abs=0.05)
    assert "quantile" not in thought.deep[0].measured
    with pytest.raises(InputError, match="calibrated for mod with causality=calibrated"):
        calibrate_routers(tiny_model(Mod()), EXAMPLES)


def test_a_retrofit_starts_at_the_base_model_while_the_capacity_is_one():
    base, model = tiny_model(Cot(), num_hidden_layers=4), scattered(Mod(capacity=0.2, gate="st", capacity_warmup=5))
    model.train().depth.step = 0
    plain, ours = base.train().loss(EXAMPLES), model.loss(EXAMPLES)
    assert torch.equal(plain.terms["answer"], ours.terms["answer"])
    model.depth.step = 5
    assert not torch.equal(plain.terms["answer"], model.loss(EXAMPLES).terms["answer"])


@pytest.mark.parametrize("causality", ["aux_bce", "predictor", "calibrated"])
def test_routers_in_half_precision_too_score_in_fp32(causality):
    model = tiny_model(Mod(causality=causality)).bfloat16()
    model.train().loss(list(chain_examples(4, 2))).loss.backward()
    assert model.depth.routers[0](torch.randn(1, 2, 32).bfloat16()).dtype == torch.float32


def test_half_precision_models_are_routed_in_fp32():
    model = tiny_model(Mod(capacity=0.4, routing_mode="topk"), num_hidden_layers=4)
    model.backbone.bfloat16()
    assert read(model, some_ids(2, 8))[0].dtype == torch.bfloat16
    assert {p.dtype for p in model.depth.parameters()} == {torch.float32}
    model.train()
    model.loss(EXAMPLES).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.depth.parameters())


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
    batch = model.batch(model.rows(EXAMPLES))
    shares = {}
    for mode in ("causal", "topk"):
        model.depth.sees_later = mode == "topk"
        thought = model.think(batch)
        model.written_logits(batch, thought)
        shares[mode] = thought.deep[0].measured["selected"].item()
    assert shares["topk"] == pytest.approx(0.25, abs=0.02)
    assert shares["causal"] == pytest.approx(0.25, abs=0.05)
    assert thought.deep[0].measured["agreement"].item() > 0.95

"""Mixture-of-Depths: what its settings do, and that the causal rule learns to choose as many as in training."""

import dataclasses

import pytest
import torch

from innerloop import Cot, InputError, LatentModel, Mod
from innerloop.calibrate.router_thresholds import calibrate_routers
from innerloop.decoder.cost import Meter
from tests.close import assert_close
from tests.methods.reference_routing import IDS, LENGTH, read, scattered, some_ids
from tests.methods.tools import learn
from tests.models import answers_of, chain_examples, tiny_model

EXAMPLES = list(chain_examples(8))
PREDICTED = Mod(capacity=0.4, causality="predictor", routed_layers=(1,), gate="sigmoid")
CALIBRATED = Mod(capacity=0.3, causality="calibrated", routed_layers=(1, 2), gate="sigmoid")


def scattered_model(method: Mod, scale: float = 1.0) -> LatentModel:
    """Make a model whose routers and predictors tell tokens apart."""
    return scattered(tiny_model(method, num_hidden_layers=4), scale)


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
        small, large = (answers_of(scattered_model(method, scale)) for scale in (0.5, 4.0))
        assert torch.equal(small, large) == (gate == "st")


def test_a_predictor_chooses_when_answering_and_the_router_only_weighs():
    model, meter, plain = scattered_model(PREDICTED), *(Meter(1, IDS.device) for _ in range(2))
    backbone, (predictor,), (router,) = model.backbone, model.depth.predictors, model.depth.routers
    assert (predictor.inner.out_features, predictor.outer.in_features) == (8, 8)  # a quarter of the width
    state = backbone(backbone.embed(IDS), positions_BL=torch.arange(LENGTH)[None], layers=range(1))
    says, (logits, _, deep) = predictor(state) > 0, read(model, IDS, meter=meter)
    assert 0 < says.sum() < LENGTH and torch.equal(deep.depths_BL == 4, says)
    router.weight.data.mul_(-1.0)
    turned, _, again = read(model, IDS)
    assert torch.equal(again.depths_BL, deep.depths_BL) and not torch.equal(turned, logits)
    without = scattered_model(dataclasses.replace(PREDICTED, causality="aux_bce"))
    solution = torch.linalg.lstsq(state[0].detach(), says.float().T - 0.5).solution
    without.depth.routers[0].weight.data.copy_(solution.T)  # a router that chooses the same tokens
    assert torch.equal(read(without, IDS, meter=plain)[2].depths_BL, deep.depths_BL)
    extra = 2 * LENGTH * sum(p.numel() for p in predictor.parameters())
    assert meter.costs(backbone)[0].flops == plain.costs(backbone)[0].flops + extra


def test_thresholds_follow_the_quantiles_of_the_training_batches():
    model = scattered_model(CALIBRATED).train()
    quantiles = [measured(model, part)["quantile"] for part in (EXAMPLES[:4], EXAMPLES[4:])]
    assert model.depth.thresholds.tolist() == [0.0, 0.0]
    model.loss(EXAMPLES[:4])
    assert_close(model.depth.thresholds, quantiles[0])
    model.loss(EXAMPLES[4:])
    model.eval().loss(EXAMPLES)
    assert_close(model.depth.thresholds, sum(quantiles) / 2)


def test_calibrated_thresholds_let_the_share_through_that_was_asked_for():
    model = scattered_model(CALIBRATED).train()
    calibrate_routers(model, EXAMPLES, batch_size=3)
    assert model.training
    found = measured(model.eval())
    assert found["selected"][0].item() == pytest.approx(0.3, abs=0.05) and "quantile" not in found
    with pytest.raises(InputError, match="calibrated for mod with causality=calibrated"):
        calibrate_routers(tiny_model(Mod()), EXAMPLES)


def test_a_retrofit_starts_at_the_base_model_while_the_capacity_is_one():
    base = tiny_model(Cot(), num_hidden_layers=4).train().loss(EXAMPLES).terms["answer"]
    model = scattered_model(Mod(capacity=0.2, gate="st", capacity_warmup=5)).train()
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

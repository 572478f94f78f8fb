"""What MoD and MoR share: training, saving, resuming, checkpointed passes, frozen backbones, errors in one sentence."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from innerloop import Cot, InputError, LatentModel, Mod, Mor
from innerloop.decoder.adapters import freeze
from innerloop.methods import METHODS, Method
from innerloop.methods.depth import mod as mod_module
from innerloop.methods.depth import recursion
from innerloop.passes.context import Context
from innerloop.passes.depth_run import DepthRun
from innerloop.tasks import Chain
from innerloop.train.recipe import parse_recipe
from innerloop.train.run import run_recipe
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_arguments import training_arguments
from tests.methods.reference_routing import some_ids
from tests.methods.tools import MIXED, assert_close, gradients
from tests.models import answers_of, chain_examples, moved, saved, tiny_model

METHODS_HERE = {
    "mod": Mod(capacity=0.4, gate="sigmoid"),
    "mod st": Mod(capacity=0.4, gate="st"),
    "mod predictor": Mod(capacity=0.4, causality="predictor"),
    "mod calibrated": Mod(capacity=0.4, causality="calibrated"),
    "mor": Mor(),
    "mor aux router": Mor(causality="aux_router", kv="recursive_sharing"),
    "mor token": Mor(routing="token", balancing="loss_free"),
}
by_method = pytest.mark.parametrize("method", METHODS_HERE.values(), ids=METHODS_HERE.keys())
EXAMPLES = list(chain_examples(8))


def training(method: Method, arch: str = "llama", seed: int = 0) -> LatentModel:
    """Make a model in training mode, whose routers tell tokens apart."""
    model = tiny_model(method, arch, seed, num_hidden_layers=4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.depth.named_parameters():
        if "router" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.train()


def one_pass(model: LatentModel):
    """Read some tokens in training mode with gradients; return what the pass gave."""
    context = Context(model.backbone, 2, depth=DepthRun(model.depth))
    context.read(model.backbone.embed(some_ids(2, 10, seed=1)))
    return context.depth.passes[0]


def trainer_of(model: LatentModel, folder: Path, **settings) -> LatentTrainer:
    settings = {"batch_size": 4, "max_steps": 4, "logging_steps": 1, "use_cpu": True, "save_strategy": "no"} | settings
    args = training_arguments(folder, settings)
    return LatentTrainer(model, args, list(chain_examples(32)), None, Chain(n_ops=3))


def losses(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("loss")} for line in lines if "loss" in line]


def test_they_are_listed():
    assert METHODS["mod"] is Mod and METHODS["mor"] is Mor


@by_method
def test_the_terms_of_the_loss_are_weighted_and_divided_by_the_rows(method):
    model = training(method)
    out = model.loss(EXAMPLES)
    weights = model.method.term_weights
    assert out.loss.item() == pytest.approx(sum(weights[name] * term.item() for name, term in out.terms.items()))
    if method.name == "mod" and method.causality == "calibrated":
        assert set(out.terms) == {"answer"}
        return
    assert len(out.terms) > 1
    halves = [model.loss(EXAMPLES[:4]).terms, model.loss(EXAMPLES[4:]).terms]
    for name in set(out.terms) - {"answer"}:
        if name in ("router", "predictor", "aux_router", "router_z"):
            assert out.terms[name].item() == pytest.approx(sum(half[name].item() for half in halves) / 2, rel=1e-5)
    assert set(model.eval().loss(EXAMPLES).terms) == {"answer"}


@by_method
def test_a_saved_model_answers_as_before_and_needs_no_method_to_be_told(method, tmp_path: Path):
    model = moved(training(method)).eval()
    for buffer in model.depth.buffers():
        buffer += 0.1
    again = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert again.method == method
    assert torch.equal(answers_of(again), answers_of(model))


@pytest.mark.parametrize("name", ["mod calibrated", "mor", "mor token"])
def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_one(name, tmp_path: Path):
    method = METHODS_HERE[name]
    if name != "mor token":
        method = dataclasses.replace(method, capacity_warmup=5)
    whole, cut, resumed = training(method), training(method), training(method, seed=1)
    trainer_of(whole, tmp_path / "whole").train()
    trainer_of(cut, tmp_path / "cut", max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer_of(resumed, tmp_path / "cut").train(resume_from_checkpoint=True)
    assert len(losses(tmp_path / "whole")) == 4
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for (name, ours), theirs in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("name", "arch"), [*((name, "llama") for name in METHODS_HERE), ("mod", "gpt2"), ("mor aux router", "gpt2")]
)
def test_checkpointed_passes_give_the_same_gradients_and_choose_once(name, arch, monkeypatch):
    method = METHODS_HERE[name]
    model, calls = training(method, arch).double(), []
    for module in (mod_module, recursion):
        top_k = module.top_k
        monkeypatch.setattr(module, "top_k", lambda *args, top_k=top_k: calls.append(1) or top_k(*args))
    torch.manual_seed(0)
    plain = gradients(model, model.loss(MIXED).loss)
    n_choices = len(calls)
    if isinstance(method, Mor) and method.routing == "token":
        model.depth.bias.zero_()
    model.activation_checkpointing_enable()
    torch.manual_seed(0)  # GPT-2 drops out
    again = gradients(model, model.loss(MIXED).loss)
    assert len(calls) == 2 * n_choices
    for name, grad in plain.items():
        assert_close(again[name], grad)


def test_a_checkpointed_pass_run_again_finds_its_choices_even_if_the_rule_has_moved():
    """The bias of loss-free balancing moves between the pass and its gradient."""
    model = training(dataclasses.replace(METHODS_HERE["mor token"], bias_rate=5.0))
    plain = gradients(model, model.loss(MIXED).loss)
    model.depth.bias.zero_()
    model.activation_checkpointing_enable()
    again = gradients(model, model.loss(MIXED).loss)
    assert model.depth.bias.abs().max() == 5.0
    for name, grad in plain.items():
        assert_close(again[name], grad)


@pytest.mark.parametrize("gate", ["identity", "sigmoid", "scaled_sigmoid", "st"])
@pytest.mark.parametrize("cls", [Mod, Mor])
def test_a_router_learns_from_the_answer_through_its_gate_alone(cls, gate, monkeypatch):
    if cls is Mor and gate == "identity":
        return
    model = training(cls(gate=gate, aux_weight=0.0))

    def of_routers() -> list[torch.Tensor]:
        found = gradients(model, model.loss(EXAMPLES).loss)
        return [grad for name, grad in found.items() if "router" in name]

    assert all(grad.abs().max() > 1e-6 for grad in of_routers())
    module = mod_module if cls is Mod else recursion
    gate_of = module.gate_of
    monkeypatch.setattr(module, "gate_of", lambda *args: gate_of(*args).detach())
    assert all(grad.abs().max() == 0 for grad in of_routers())


def test_a_router_of_a_recursion_learns_from_the_answer_by_its_own_tokens_alone(monkeypatch):
    """d CE / d w_r = sum_i (d CE / d z_i) H_i over the tokens of recursion r."""
    model, seen = training(Mor(aux_weight=0.0)), []
    router = model.depth.routers[1]
    forward = router.forward

    def watched(states):
        scores = forward(states)
        scores.retain_grad()
        seen.append(scores)
        return scores

    monkeypatch.setattr(router, "forward", watched)
    batch = model.batch(model.rows(EXAMPLES))
    thought = model.think(batch)
    torch.nn.functional.cross_entropy(model.written_logits(batch, thought), batch.targets_U).backward()
    learns, is_in = seen[0].grad[..., 0] != 0, thought.deep[0].depths_BL >= 2
    assert not learns[~is_in].any()
    assert learns[is_in].float().mean() > 0.9  # the last token of a row is followed by nothing


@pytest.mark.parametrize(
    ("name", "term", "part"),
    [("mod predictor", "predictor", "predictors"), ("mor aux router", "aux_router", "aux_routers")],
)
def test_what_learns_on_the_side_has_no_say_in_anything_else(name, term, part):
    model = training(METHODS_HERE[name])
    for name, grad in gradients(model, one_pass(model).sums[term]).items():
        assert (grad.abs().max() > 0) == name.startswith(f"depth.{part}"), name


@pytest.mark.parametrize("method", [METHODS_HERE["mod"], METHODS_HERE["mor"]], ids=["mod", "mor"])
def test_the_auxiliary_loss_is_that_of_the_card_and_reaches_the_backbone(method, monkeypatch):
    model, scores = training(method), []
    for router in model.depth.routers:
        forward = router.forward
        monkeypatch.setattr(router, "forward", lambda s, forward=forward: scores.append(forward(s)) or scores[-1])
    deep = one_pass(model)
    among, expected = torch.ones(2, 10, dtype=torch.bool), []
    for r, score in enumerate(scores):
        score = score[..., 0]
        k = 4 if isinstance(method, Mod) else (10, 6, 3)[r]
        kth = score.masked_fill(~among, -torch.inf).sort(descending=True).values[:, k - 1 : k]
        chosen = among & (score >= kth)
        for row in range(2):
            z, target = score[row][among[row]], chosen[row][among[row]].float()
            assert target.mean() == k / among[row].sum()
            expected.append(binary_cross_entropy_with_logits(z, target))
        among = chosen if isinstance(method, Mor) else among
    total = sum(expected) / (len(scores) if isinstance(method, Mod) else 1)
    assert deep.sums["router"].item() == pytest.approx(total.item(), rel=1e-5)
    found = gradients(model, deep.sums["router"])
    assert found["backbone.lm.model.embed_tokens.weight"].abs().max() > 0


def test_weights_of_routers_do_not_decay_and_all_others_decay_as_before(tmp_path: Path):
    settings = training_arguments(tmp_path, {"use_cpu": True})
    decaying = {}
    for method in (Cot(), *METHODS_HERE.values()):
        trainer = LatentTrainer(tiny_model(method), settings, EXAMPLES)
        decaying[method] = set(trainer.get_decay_parameter_names(trainer.model))
    plain = decaying.pop(Cot())
    for method, names in decaying.items():
        assert plain <= names
        side = {"depth.predictors.0.inner.weight", "depth.predictors.0.outer.weight"}
        assert names - plain == (side if getattr(method, "causality", "") == "predictor" else set())


@pytest.mark.parametrize("method", [METHODS_HERE["mod st"], Mor(gate="st", gate_target="delta")], ids=["mod", "mor"])
def test_a_frozen_backbone_trains_routers_alone(method, tmp_path: Path):
    model = training(method)
    freeze(model.backbone, model.marker_ids())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, tmp_path, learning_rate=0.01).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("depth.routers"), name


def test_a_pretrained_model_is_retrofitted_by_a_recipe_and_saved_as_one(tmp_path: Path):
    scratch = {"type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    raw = {
        "task": {"name": "chain", "n_ops": 2, "n_train": 16, "n_valid": 4, "n_test": 4},
        "backbone": {"scratch": scratch | {"intermediate_size": 48}},
        "train": {"max_steps": 2, "batch_size": 4, "use_cpu": True, "save_strategy": "no"},
        "stages": [
            {"method": {"name": "cot"}},
            {"method": {"name": "mod", "gate": "st", "capacity_warmup": 2}, "backbone": {"freeze": True}},
        ],
        "out": str(tmp_path / "mod"),
    }
    run = run_recipe(parse_recipe(raw))
    first, last = LatentModel.from_pretrained(run / "stages" / "1"), LatentModel.from_pretrained(run)
    assert isinstance(last.method, Mod) and last.depth is not None
    theirs = first.backbone.lm.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in last.backbone.lm.state_dict().items())
    raw["stages"][1] = {"method": {"name": "mor", "n_recursions": 2, "init": "upper"}}
    run = run_recipe(parse_recipe(raw | {"out": str(tmp_path / "mor")}))
    last = LatentModel.from_pretrained(run)
    assert last.backbone.n_layers == last.backbone.config.num_hidden_layers == 3
    assert isinstance(last.method, Mor) and last.generate(["1 ; + 2"], max_new_tokens=3)[0].depths is not None


WARMUPS = [
    (Mod(capacity=0.2, capacity_warmup=4, routed_layers=(1,)), [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
    (Mor(n_recursions=2, capacity_warmup=4), [1.0, 0.9, 0.7, 0.5, 0.5, 0.5]),  # floor of 10 x a cosine from 1 to 1/2
]


@pytest.mark.parametrize(("method", "shares"), WARMUPS, ids=["mod", "mor"])
def test_capacity_falls_with_the_steps_of_training_alone(method, shares, tmp_path: Path):
    model = training(method)
    assert one_pass(model).measured["selected"][-1].item() == pytest.approx(shares[-1])  # nothing counts steps
    for step, share in enumerate(shares):
        model.depth.step = step
        assert one_pass(model).measured["selected"][-1].item() == pytest.approx(share)
    model.depth.step = 0
    at_once = one_pass(model.eval()).measured["selected"][-1].item()
    model.depth.step = 5
    assert one_pass(model).measured["selected"][-1].item() == at_once
    trainer_of(model, tmp_path, max_steps=3).train()
    assert model.depth.step == 2  # the last of three, counted from 0


@pytest.mark.parametrize("method", [Mod(capacity=0.5, routed_layers=(1,)), Mor(n_recursions=2)], ids=["mod", "mor"])
def test_a_static_capacity_is_a_share_of_the_columns(method):
    found = {}
    for base in ("valid", "static"):
        model = training(dataclasses.replace(method, capacity_base=base))
        context = Context(model.backbone, 2, depth=DepthRun(model.depth))
        mask = torch.tensor([[0] * 6 + [1] * 4, [1] * 10])
        context.read(model.backbone.embed(some_ids(2, 10)), mask)
        deep = context.depth.passes[0]
        found[base] = ((deep.depths_BL == deep.depths_BL.amax()) & mask.bool()).sum(1).tolist()
    assert found == {"valid": [2, 5], "static": [4, 5]}  # there are no more than 4 in the first row


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Mod, {"capacity": 0.0}, "capacity is 0.0, but it is a share: set it above 0"),
        (Mod, {"capacity": 1.5}, "capacity is 1.5, but it is a share"),
        (Mod, {"capacity_warmup": -1}, "capacity_warmup is a number of steps"),
        (Mod, {"aux_weight": -1.0}, "aux_weight cannot be negative"),
        (Mod, {"alpha": 0.1}, "alpha is for gate=scaled_sigmoid"),
        (Mod, {"routed_layers": (1, 1)}, "routed_layers lists a layer twice"),
        (Mod, {"gate": "soft"}, "gate is 'soft'"),
        (Mor, {"n_recursions": 0}, "n_recursions >= 1"),
        (Mor, {"capacities": (1.0, 0.5)}, "capacities must list 3 shares"),
        (Mor, {"capacities": (1.0, 0.5, 0.0)}, "capacities must list 3 shares"),
        (Mor, {"capacities": (1.0, 0.5, 0.6)}, "list capacities that never rise"),
        (Mor, {"capacity_warmup": -1}, "capacity_warmup is a number of steps"),
        (Mor, {"temperature": 0.0}, "temperature must be above 0"),
        (Mor, {"z_weight": -1.0}, "weights and rates cannot be negative"),
        (Mor, {"alpha": 0.1, "gate": "st"}, "alpha is for gate=scaled_sigmoid"),
        (Mor, {"routing": "token", "routing_mode": "topk"}, "are for routing=expert"),
        (Mor, {"tc_weighting": "every"}, "are for routing=token"),
        (Mor, {"kv": "recursive_sharing", "sharing": "sequence"}, "set sharing to cycle or middle_cycle"),
        (Mor, {"kv": "recursive_sharing", "capacities": (0.9, 0.5, 0.2)}, "the first of capacities to 1"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(cls, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        cls(**fields)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_the_model_are_refused():
    for layers in ((0, 1), (3,)):
        with pytest.raises(InputError, match="the model has 3 layers, of which 1 to 2 may be routed"):
            tiny_model(Mod(routed_layers=layers))
    with pytest.raises(InputError, match="the model has 2 layers, which leaves none to share"):
        tiny_model(Mor(), num_hidden_layers=2)


def test_two_models_of_other_settings_give_other_answers():
    """The default of every setting that changes answers is not that of its neighbour."""
    base = training(Mod(capacity=0.4)).eval()
    for fields in ({"gate": "sigmoid"}, {"gate_target": "full"}, {"routed_layers": (2,)}, {"routing_mode": "topk"}):
        model = training(dataclasses.replace(base.method, **fields)).eval()
        with pytest.raises(AssertionError):
            assert_close(answers_of(model), answers_of(base), 1e-4)

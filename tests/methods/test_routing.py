"""What MoD and MoR share: terms of the loss, what routers learn from, checkpointed passes, capacities."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from innerloop import Cot, InputError, LatentModel, Mod, Mor
from innerloop.decoder.adapters import freeze
from innerloop.methods import Method
from innerloop.methods.depth import mod_forward, recursion
from innerloop.passes.tokens import PassOutput
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_arguments import training_arguments
from tests.methods.reference_routing import displaces, leak, on_same, only_pass, read, scattered, some_ids
from tests.methods.tools import MIXED, QUESTIONS, ROUNDED, assert_close, by_arch, gradients
from tests.models import answers_of, chain_examples, saved, tiny_model

EXAMPLES = list(chain_examples(8))


METHODS_HERE = {
    "mod": Mod(capacity=0.4, gate="sigmoid"),
    "mod st": Mod(capacity=0.4, gate="st"),
    "mod predictor": Mod(capacity=0.4, causality="predictor"),
    "mod calibrated": Mod(capacity=0.4, causality="calibrated"),
    "mor": Mor(),
    "mor aux router": Mor(causality="aux_router", kv="recursive_sharing"),
    "mor token": Mor(routing="token", balancing="loss_free"),
}


def of(*names: str):
    """Try some of the methods, by their names."""
    cases = [pytest.param(METHODS_HERE[name], id=name) for name in names or METHODS_HERE]
    return pytest.mark.parametrize("method", cases)


def training(method: Method, arch: str = "llama", seed: int = 0) -> LatentModel:
    """Make a model in training mode, whose routers tell tokens apart."""
    return scattered(tiny_model(method, arch, seed, num_hidden_layers=4)).train()


def one_pass(model: LatentModel, mask: torch.Tensor | None = None) -> PassOutput:
    """Read some tokens with gradients; return what the pass gave."""
    return only_pass(model, some_ids(2, 10, seed=1), mask)


def trainer_of(model: LatentModel, folder: Path, **settings) -> LatentTrainer:
    settings = {"batch_size": 4, "use_cpu": True, "save_strategy": "no"} | settings
    return LatentTrainer(model, training_arguments(folder, settings), list(chain_examples(32)))


@of()
def test_the_terms_of_the_loss_are_weighted_and_divided_by_the_rows(method):
    model = training(method)
    out = model.loss(EXAMPLES)
    assert out.loss.item() == pytest.approx(sum(method.term_weights[name] * t.item() for name, t in out.terms.items()))
    assert (set(out.terms) == {"answer"}) == (method == METHODS_HERE["mod calibrated"])
    halves = [model.loss(EXAMPLES[:4]).terms, model.loss(EXAMPLES[4:]).terms]
    for name in set(out.terms) & {"router", "predictor", "aux_router", "router_z"}:
        assert out.terms[name].item() == pytest.approx(sum(half[name].item() for half in halves) / 2, rel=1e-5)
    assert set(model.eval().loss(EXAMPLES).terms) == {"answer"}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@of("mod", "mod predictor", "mod calibrated", "mor", "mor aux router", "mor token")
def test_checkpointed_passes_give_the_same_gradients_and_choose_once(method, arch, monkeypatch):
    """Even if the rule has moved, as the bias of loss-free balancing does between a pass and its gradient."""
    method = dataclasses.replace(method, bias_rate=5.0) if method == METHODS_HERE["mor token"] else method
    model, calls = training(method, arch).double(), []
    for module in (mod_forward, recursion):
        top_k = module.top_k
        monkeypatch.setattr(module, "top_k", lambda *args, top_k=top_k: calls.append(1) or top_k(*args))
    torch.manual_seed(0)
    plain = gradients(model, model.loss(MIXED).loss)
    n_choices = len(calls)
    if method.name == "mor" and method.routing == "token":
        assert model.depth.bias.abs().max() == 5.0
        model.depth.bias.zero_()
    model.activation_checkpointing_enable()
    torch.manual_seed(0)  # GPT-2 drops out
    again = gradients(model, model.loss(MIXED).loss)
    assert len(calls) == 2 * n_choices
    for name, grad in plain.items():
        assert_close(again[name], grad)


@pytest.mark.parametrize(
    ("cls", "gate"),
    [(Mod, "identity"), *((cls, gate) for cls in (Mod, Mor) for gate in ("sigmoid", "scaled_sigmoid", "st"))],
)
def test_a_router_learns_from_the_answer_through_its_gate_alone(cls, gate, monkeypatch):
    model, module = training(cls(gate=gate, aux_weight=0.0)), mod_forward if cls is Mod else recursion

    def of_routers() -> list[float]:
        found = gradients(model, model.loss(EXAMPLES).loss)
        return [grad.abs().max().item() for name, grad in found.items() if "router" in name]

    assert min(of_routers()) > 1e-6
    gate_of = module.gate_of
    monkeypatch.setattr(module, "gate_of", lambda *args: gate_of(*args).detach())
    assert max(of_routers()) == 0


def scores_of(router: nn.Module, monkeypatch) -> list[torch.Tensor]:
    """Return the list to which a router's scores are added from now on; they keep their gradients."""
    seen, forward = [], router.forward

    def watched(states):
        seen.append(forward(states))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(router, "forward", watched)
    return seen


def test_a_router_of_a_recursion_learns_from_the_answer_by_its_own_tokens_alone(monkeypatch):
    """d CE / d w_r = sum_i (d CE / d z_i) H_i over the tokens of recursion r."""
    model = training(Mor(aux_weight=0.0))
    seen, batch = scores_of(model.depth.routers[1], monkeypatch), model.batch(model.rows(EXAMPLES))
    thought = model.think(batch)
    nn.functional.cross_entropy(model.written_logits(batch, thought), batch.targets_U).backward()
    learns, is_in = seen[0].grad[..., 0] != 0, thought.deep[0].depths_BL >= 2
    assert not learns[~is_in].any()
    assert learns[is_in].float().mean() > 0.9  # the last token of a row is followed by nothing


@of("mod predictor", "mor aux router")
def test_what_learns_on_the_side_has_no_say_in_anything_else(method):
    model = training(method)
    term, part = ("predictor", "predictors") if isinstance(method, Mod) else ("aux_router", "aux_routers")
    for name, grad in gradients(model, one_pass(model).sums[term]).items():
        assert (grad.abs().max() > 0) == name.startswith(f"depth.{part}"), name


@of("mod", "mor")
def test_the_auxiliary_loss_is_that_of_the_card_and_reaches_the_backbone(method, monkeypatch):
    model, is_mod = training(method), isinstance(method, Mod)
    scores = [scores_of(router, monkeypatch) for router in model.depth.routers]
    deep, among, expected = one_pass(model), torch.ones(2, 10, dtype=torch.bool), []
    for k, (found,) in zip((4, 4) if is_mod else (10, 6, 3), scores):
        score = found[..., 0]
        kth = score.masked_fill(~among, -torch.inf).sort(descending=True).values[:, k - 1 : k]
        chosen = among & (score >= kth)
        for row in range(2):
            z, target = score[row][among[row]], chosen[row][among[row]].float()
            assert target.mean() == k / among[row].sum()
            expected.append(nn.functional.binary_cross_entropy_with_logits(z, target))
        among = among if is_mod else chosen
    total = sum(expected) / (2 if is_mod else 1)
    assert deep.sums["router"].item() == pytest.approx(total.item(), rel=1e-5)
    found = gradients(model, deep.sums["router"])
    assert found["backbone.lm.model.embed_tokens.weight"].abs().max() > 0


def test_weights_of_routers_do_not_decay_and_all_others_decay_as_before(tmp_path: Path):
    def decaying(method: Method) -> set[str]:
        trainer = trainer_of(tiny_model(method), tmp_path)
        return set(trainer.get_decay_parameter_names(trainer.model))

    plain, side = decaying(Cot()), {f"depth.predictors.0.{part}.weight" for part in ("inner", "outer")}
    for name, method in METHODS_HERE.items():
        assert decaying(method) == plain | (side if name == "mod predictor" else set())


@pytest.mark.parametrize("method", [METHODS_HERE["mod st"], Mor(gate="st", gate_target="delta")], ids=["mod", "mor"])
def test_a_frozen_backbone_trains_routers_alone(method, tmp_path: Path):
    model = training(method)
    freeze(model.backbone, model.marker_ids())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, tmp_path, learning_rate=0.01, max_steps=4).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("depth.routers"), name


def test_a_pretrained_model_is_retrofitted_and_saved_as_one(tmp_path: Path):
    plain, method = tiny_model(Cot(), num_hidden_layers=4), Mod(gate="st", capacity=1.0)
    model = LatentModel.from_pretrained(saved(plain, tmp_path / "plain"), method)
    again = LatentModel.from_pretrained(saved(model, tmp_path / "mod"))
    assert again.method == method and torch.equal(answers_of(again), answers_of(plain))


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        (Mod(capacity=0.2, capacity_warmup=4, routed_layers=(1,)), [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (Mor(n_recursions=2, capacity_warmup=4), [1.0, 0.9, 0.7, 0.5, 0.5, 0.5]),  # 10 x a cosine from 1 to 1/2
    ],
    ids=["mod", "mor"],
)
def test_capacity_falls_with_the_steps_of_training_alone(method, shares, tmp_path: Path):
    model = training(method)

    def selected(step: int | None) -> float:
        model.depth.step = step
        return one_pass(model).measured["selected"][-1].item()

    assert [selected(step) for step in (None, *range(6))] == pytest.approx([shares[-1], *shares])
    model.eval()
    assert selected(0) == selected(5)
    trainer_of(model, tmp_path, max_steps=3).train()
    assert model.depth.step == 2  # the last of three, counted from 0


@pytest.mark.parametrize("method", [Mod(capacity=0.5, routed_layers=(1,)), Mor(n_recursions=2)], ids=["mod", "mor"])
def test_a_static_capacity_is_a_share_of_the_columns(method):
    mask, found = torch.tensor([[0] * 6 + [1] * 4, [1] * 10]), {}
    for base in ("valid", "static"):
        depths_BL = one_pass(training(dataclasses.replace(method, capacity_base=base)), mask).depths_BL
        found[base] = ((depths_BL == depths_BL.amax()) & mask.bool()).sum(1).tolist()
    assert found == {"valid": [2, 5], "static": [4, 5]}  # there are no more than 4 in the first row


TOP_K = {"mod": Mod(capacity=0.4, gate="sigmoid", routing_mode="topk"), "mor": Mor(routing_mode="topk")}
CAUSAL = {name: dataclasses.replace(method, routing_mode="causal") for name, method in TOP_K.items()}
CHOOSING = {**{f"{name} topk": method for name, method in TOP_K.items()}, **CAUSAL}
CHOOSING["mor token"] = Mor(routing="token")


@by_arch
@pytest.mark.parametrize("method", CHOOSING.values(), ids=CHOOSING)
def test_a_batch_is_its_rows_whatever_the_padding(arch, method):
    model, ids = training(method, arch).eval(), some_ids(1, 7, seed=8)
    for example, logits in zip(MIXED, model.answer_logits(MIXED)):
        assert_close(logits, model.answer_logits([example])[0], ROUNDED)
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded = nn.functional.pad(ids, (left, right), value=5)
        mask = torch.tensor([[0] * left + [1] * 7 + [0] * right])
        assert_close(read(model, padded, mask)[0][:, left : left + 7], read(model, ids)[0], ROUNDED)
    for question, one in zip(QUESTIONS[:3], model.generate(QUESTIONS[:3], max_new_tokens=5)):
        if method.routing_mode == "causal":
            (other,) = model.generate([question], max_new_tokens=5)
            assert (one.text, one.depths, one.cost.flops) == (other.text, other.depths, other.cost.flops)


@by_arch
@pytest.mark.parametrize("name", TOP_K)
def test_choosing_by_top_k_leaks_the_future_and_choosing_causally_does_not(arch, name):
    fields = {"routed_layers": (1,)} if name == "mod" else {}
    model, ids = training(dataclasses.replace(TOP_K[name], **fields), arch).eval(), some_ids(1, 12, seed=4)
    causal = on_same(model, routing_mode="causal")
    share, most = leak(model, ids)
    assert share > 0.1 and most > 1e-2  # measured: a tenth and more of the tokens would be scored otherwise
    for one in (causal,) if name == "mod" else (causal, on_same(causal, kv="recursive_sharing")):
        share, most = leak(one, ids)
        assert share == 0.0 and most <= ROUNDED
    assert leak(training(CHOOSING["mor token"], arch).eval(), ids)[0] == 0.0
    for one in (model, causal):
        early, router = read(one, ids)[2].depths_BL[:, :-1], one.depth.routers[int(name == "mor")]
        assert displaces(one, ids, router.weight, early) == (one is model)


def test_settings_that_do_not_fit_the_model_are_refused():
    for layers in ((0, 1), (3,)):
        with pytest.raises(InputError, match="the model has 3 layers, of which 1 to 2 may be routed"):
            tiny_model(Mod(routed_layers=layers))
    with pytest.raises(InputError, match="the model has 2 layers, which leaves none to share"):
        tiny_model(Mor(), num_hidden_layers=2)

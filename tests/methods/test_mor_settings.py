"""Mixture-of-Recursions: what its settings do, how a pretrained model is rebuilt, and that it learns."""

import dataclasses
from pathlib import Path

import pytest
import torch

from innerloop import Cot, InputError, LatentModel, Mor
from innerloop.decoder.backbone import Backbone
from innerloop.methods.depth.recursion import TokenChoicePass
from innerloop.methods.depth.router import Notes
from innerloop.passes.context import Context
from innerloop.passes.depth_run import DepthRun
from innerloop.passes.tokens import PassInput, Tokens
from tests.methods.reference_routing import IDS, dense_mor, read, some_ids
from tests.methods.test_mor import TOKENS, recursive
from tests.methods.tools import ROUNDED, assert_close, learn
from tests.models import answers_of, chain_examples, chain_tokenizer, from_scratch, saved, tiny_backbone, tiny_model

EXAMPLES = list(chain_examples(8))


def training_pass(model: LatentModel, ids: torch.Tensor = IDS):
    """Read ids in training mode; return what the pass gave."""
    model.train()
    context = Context(model.backbone, len(ids), depth=DepthRun(model.depth))
    context.read(model.backbone.embed(ids))
    return context.depth.passes[0]


def scored(model: LatentModel, scores: torch.Tensor) -> LatentModel:
    """Let the router of token choice give these scores (L, N_r)."""
    model.depth.routers[0].forward = lambda states: scores.expand(*states.shape[:2], -1).clone()
    return model


def test_balance_is_one_when_depths_are_equally_chosen_and_n_when_one_takes_all():
    model = recursive(TOKENS)
    even = scored(model, 100.0 * torch.eye(3).repeat(3, 1))
    deep = training_pass(even)
    assert deep.sums["balance"].item() == pytest.approx(1.0)
    assert deep.measured["load"].tolist() == [3, 3, 3]
    one = scored(model, torch.tensor([[0.0, 100.0, 0.0]]).expand(9, -1))
    assert training_pass(one).sums["balance"].item() == pytest.approx(3.0)
    assert model.method.term_weights["balance"] == 0.1


def test_balance_multiplies_loads_with_mean_probabilities_of_real_tokens():
    model = recursive(TOKENS).train()
    mask, seen = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), []
    router = model.depth.routers[0].forward
    model.depth.routers[0].forward = lambda states: seen.append(router(states)) or seen[-1]
    context = Context(model.backbone, 2, depth=DepthRun(model.depth))
    context.read(model.backbone.embed(some_ids(2, 7)), mask)
    shares = seen[0][mask.bool()].softmax(-1)
    chosen = torch.nn.functional.one_hot(shares.argmax(-1), 3).float()
    expected = (3 * chosen.mean(0) * shares.mean(0)).sum()
    assert context.depth.passes[0].sums["balance"].item() == pytest.approx(2 * expected.item(), rel=1e-5)  # of two rows
    squares = [seen[0][row][mask[row].bool()].logsumexp(-1).square().mean() for row in (0, 1)]
    assert context.depth.passes[0].sums["router_z"].item() == pytest.approx(sum(squares).item(), rel=1e-5)


def test_loss_free_balancing_moves_the_bias_against_the_load_and_has_no_term():
    method = dataclasses.replace(TOKENS, balancing="loss_free", bias_rate=0.01)
    model = scored(recursive(method).train(), torch.eye(3)[:1])
    out = model.loss(EXAMPLES)
    assert "balance" not in out.terms
    assert model.depth.bias.tolist() == pytest.approx([-0.01, 0.01, 0.01])
    model.loss(EXAMPLES)
    assert model.depth.bias.tolist() == pytest.approx([-0.02, 0.02, 0.02])
    model.eval().loss(EXAMPLES)
    assert model.depth.bias.tolist() == pytest.approx([-0.02, 0.02, 0.02])


def test_a_bias_chooses_and_does_not_weigh_and_a_constant_one_does_nothing():
    model = recursive(dataclasses.replace(TOKENS, balancing="loss_free"))
    logits, _, deep = read(model, IDS)
    model.depth.bias += 0.25
    assert torch.equal(read(model, IDS)[0], logits)
    model.depth.bias.copy_(torch.tensor([0.0, 10.0, 0.0]))
    now = read(model, IDS)[2]
    assert (now.depths_BL == 2).all() and not (deep.depths_BL == 2).all()
    (chose, share), (_, biased) = (choice_of(model, torch.tensor([0.0, bias, 0.0])) for bias in (0.0, 10.0))
    assert 0 < (chose == 2).sum() < chose.numel()
    assert torch.equal(share[chose == 2], biased[chose == 2])  # g = P_2 is what it was, whatever the bias


def choice_of(model: LatentModel, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the depth that each token chooses and its weight P_i, both (1, L)."""
    model.depth.bias.copy_(bias)
    tokens = Tokens(model.backbone.embed(IDS), torch.arange(IDS.shape[1])[None])
    one = TokenChoicePass(model.depth, PassInput(tokens, model.depth.empty_cache()), Notes())
    one.choose(tokens.states_RND, 1)
    return one.wanted_BL, one.shares_BL


def test_squared_scores_are_a_term_where_they_have_a_weight():
    assert Mor().term_weights["router_z"] == 0.0
    assert TOKENS.term_weights["router_z"] == 1e-5
    model = recursive(Mor(z_weight=0.5)).train()
    out = model.loss(EXAMPLES)
    assert out.loss.item() == pytest.approx(
        (out.terms["answer"] + 0.001 * out.terms["router"] + 0.5 * out.terms["router_z"]).item(), rel=1e-6
    )
    constant = recursive(Mor(z_weight=0.5))
    for router in constant.depth.routers:
        router.forward = lambda states: torch.full((*states.shape[:2], 1), 3.0)
    assert training_pass(constant).sums["router_z"].item() == pytest.approx(9.0)


def test_an_auxiliary_router_decides_when_answering_and_the_router_only_weighs():
    model = recursive(Mor(causality="aux_router"))
    generator = torch.Generator().manual_seed(3)
    for router in model.depth.aux_routers:
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    logits, _, deep = read(model, IDS)
    assert len(deep.depths_BL.unique()) > 1
    with torch.no_grad():
        model.depth.aux_routers[0].weight.mul_(-1.0)  # recursion 1 is run by all, whatever it says
    assert torch.equal(read(model, IDS)[0], logits)
    with torch.no_grad():
        model.depth.aux_routers[1].weight.mul_(-1.0)
    assert torch.equal(read(model, IDS)[2].depths_BL == 1, deep.depths_BL > 1)


def test_a_fused_map_makes_its_queries_alone_where_keys_are_shared():
    """Phi-3 makes queries, keys and values by one map, with fewer heads of keys than of queries."""
    settings = {"type": "phi3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    model = from_scratch(settings, chain_tokenizer(), Mor(kv="recursive_sharing")).eval()
    expected, chosen = dense_mor(model, IDS)
    assert any(c.any() for c in chosen[1:])
    assert_close(read(model, IDS)[0], expected, ROUNDED)
    assert model.backbone.n_key_weights(range(1, 2)) == 32 * (8 + 8) * 2


def test_alpha_is_a_tenth_with_expert_choice_and_one_with_token_choice():
    def logits(method: Mor) -> torch.Tensor:
        return read(recursive(method), IDS)[0]

    for method, alpha in ((Mor(), 0.1), (TOKENS, 1.0)):
        assert torch.equal(logits(method), logits(dataclasses.replace(method, alpha=alpha)))
        assert not torch.equal(logits(method), logits(dataclasses.replace(method, alpha=0.5)))


def test_a_recursion_that_all_run_asks_no_rule():
    """With equal capacities every candidate goes on, also when answering, even if its score is below zero."""
    model = recursive(Mor(n_recursions=2, capacities=(1.0, 1.0)))
    for router in model.depth.routers:
        router.forward = lambda states: torch.full((*states.shape[:2], 1), -3.0)
    assert (read(model, IDS)[2].depths_BL == 2).all()
    assert (training_pass(model).depths_BL == 2).all()


def test_the_recursions_are_seen_in_a_trace_through_norm_and_head():
    model = recursive(Mor())
    (generation,) = model.generate([EXAMPLES[0].question], max_new_tokens=2, trace=True)
    assert [entry.loop for entry in generation.trace.iterations][:3] == [1, 2, 3]
    depths = [depth for _, depth in generation.depths]
    assert generation.trace.iterations[2].top_ids.shape[1] <= len(depths)
    state = torch.randn(1, 2, 32)
    assert torch.equal(model.read_out(state), model.backbone.head(model.backbone.norm(state)))


# Rebuilding a pretrained decoder


def rebuilt(init: str, n: int = 2, sharing: str = "middle_cycle", arch: str = "llama") -> tuple[Backbone, list]:
    backbone = tiny_backbone(arch, num_hidden_layers=8)
    old = list(backbone.layers)
    Mor(n_recursions=n, sharing=sharing, init=init).convert(backbone, None)
    return backbone, old


def same(layer: torch.nn.Module, *sources: torch.nn.Module) -> bool:
    """Tell whether a layer has the mean weights of others."""
    states = [source.state_dict() for source in sources]
    means = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    return all(torch.allclose(tensor, means[name], atol=1e-6) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("init", "sources"),
    [
        ("stepwise", [[1], [4], [6]]),
        ("lower", [[1], [2], [3]]),
        ("upper", [[4], [5], [6]]),
        ("average", [[1, 4], [2, 5], [3, 6]]),
    ],
)
def test_the_shared_layers_of_a_pretrained_model_are_those_that_init_says(arch, init, sources):
    """Six middle layers become three, run twice; the first and the last stay."""
    backbone, old = rebuilt(init, arch=arch)
    assert backbone.n_layers == backbone.config.num_hidden_layers == 5
    for layer, group in zip(backbone.layers, [[0], *sources, [7]], strict=True):
        assert same(layer, *(old[i] for i in group))


def test_layers_in_a_row_are_tied_in_a_sequence():
    backbone, old = rebuilt("average", 3, "middle_sequence")
    assert all(same(layer, *old[i : i + 3]) for layer, i in zip(list(backbone.layers)[1:-1], (1, 4)))
    backbone, old = rebuilt("average", 4, "sequence")
    assert all(same(layer, *old[i : i + 4]) for layer, i in zip(backbone.layers, (0, 4)))
    backbone, old = rebuilt("average", 4, "cycle")
    assert all(same(layer, *old[i::2]) for layer, i in zip(backbone.layers, (0, 1)))


def test_fresh_layers_are_like_none_of_the_old_ones():
    torch.manual_seed(7)  # other draws than the old ones
    backbone, old = rebuilt("random")
    assert same(backbone.layers[0], old[0]) and same(backbone.layers[-1], old[-1])
    for layer in list(backbone.layers)[1:-1]:
        weight = layer.self_attn.q_proj.weight
        assert not any(torch.equal(weight, other.self_attn.q_proj.weight) for other in old)
        assert weight.std().item() == pytest.approx(0.2, rel=0.1)  # the tiny models' initializer_range


@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper"])
def test_with_one_recursion_a_pretrained_model_is_left_as_it_was(init, tmp_path: Path):
    base = tiny_model(Cot(), num_hidden_layers=4)
    method = Mor(n_recursions=1, init=init, gate="st", gate_target="delta")
    model = LatentModel.from_pretrained(saved(base, tmp_path / "base"), method)
    assert torch.equal(answers_of(model), answers_of(base))


def test_a_model_that_cannot_be_shared_evenly_is_refused_with_what_would_fit():
    with pytest.raises(InputError, match=r"6 layers cannot be shared by 4 recursions.* 1, 2, 3, 6"):
        rebuilt("upper", 4)
    with pytest.raises(InputError, match="differ in layer_types"):
        Mor(n_recursions=3, sharing="cycle").convert(tiny_backbone("gemma3"), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        Mor(),
        Mor(kv="recursive_sharing", gate="st", gate_target="delta", aux_weight=0.1),
        dataclasses.replace(TOKENS, balance_weight=0.01),  # the term itself never falls below 1
    ],
    ids=["expert", "shared keys", "token"],
)
def test_it_learns_by_heart(method):
    model = tiny_model(method, num_hidden_layers=3, initializer_range=0.1).train()
    assert learn(model, EXAMPLES) < 0.05
    generations = model.eval().generate([example.question for example in EXAMPLES], max_new_tokens=40)
    assert [generation.answer for generation in generations] == [example.answer for example in EXAMPLES]
    assert 1.0 <= sum(d for g in generations for _, d in g.depths) / sum(len(g.depths) for g in generations) < 3.0

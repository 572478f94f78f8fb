"""Mixture-of-Recursions: what its settings do, how a pretrained model is rebuilt, and that it learns."""

import dataclasses
from pathlib import Path

import pytest
import torch

from innerloop import Cot, InputError, LatentModel, Mor
from innerloop.decoder.backbone import Backbone
from innerloop.methods.depth.recursion import TokenChoicePass
from innerloop.methods.depth.router import Notes
from innerloop.passes.tokens import PassInput, Tokens
from tests.methods.reference_routing import IDS, dense_mor, only_pass, read, some_ids
from tests.methods.test_mor import TOKENS, recursive
from tests.methods.tools import ROUNDED, assert_close
from tests.models import answers_of, chain_examples, chain_tokenizer, from_scratch, saved, tiny_backbone, tiny_model

EXAMPLES = list(chain_examples(8))


def scored(model: LatentModel, scores: torch.Tensor) -> LatentModel:
    """Let routers give these scores (L, N_r)."""
    for router in model.depth.routers:
        router.forward = lambda states: scores.expand(*states.shape[:2], -1).clone()
    return model


def test_balance_multiplies_loads_with_mean_probabilities_of_real_tokens():
    """It is one when depths are equally chosen, and N_r when one takes all."""
    model = recursive(TOKENS).train()
    mask, seen, router = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]), [], model.depth.routers[0].forward
    model.depth.routers[0].forward = lambda states: seen.append(router(states)) or seen[-1]
    deep = only_pass(model, some_ids(2, 7), mask)
    shares = seen[0][mask.bool()].softmax(-1)
    chosen = torch.nn.functional.one_hot(shares.argmax(-1), 3).float()
    expected = (3 * chosen.mean(0) * shares.mean(0)).sum()
    assert deep.sums["balance"].item() == pytest.approx(2 * expected.item(), rel=1e-5)  # of two rows
    squares = [seen[0][row][mask[row].bool()].logsumexp(-1).square().mean() for row in (0, 1)]
    assert deep.sums["router_z"].item() == pytest.approx(sum(squares).item(), rel=1e-5)
    even = only_pass(scored(model, 100.0 * torch.eye(3).repeat(3, 1)), IDS)
    assert even.sums["balance"].item() == pytest.approx(1.0) and even.measured["load"].tolist() == [3, 3, 3]
    one = only_pass(scored(model, torch.tensor([[0.0, 100.0, 0.0]]).expand(9, -1)), IDS)
    assert one.sums["balance"].item() == pytest.approx(3.0)


def test_loss_free_balancing_moves_the_bias_against_the_load_and_has_no_term():
    method = dataclasses.replace(TOKENS, balancing="loss_free", bias_rate=0.01)
    model = scored(recursive(method).train(), torch.eye(3)[:1])
    for n_steps in (1, 2):
        assert "balance" not in model.loss(EXAMPLES).terms
        assert model.depth.bias.tolist() == pytest.approx([-0.01 * n_steps, 0.01 * n_steps, 0.01 * n_steps])
    model.eval().loss(EXAMPLES)
    assert model.depth.bias.tolist() == pytest.approx([-0.02, 0.02, 0.02])


def test_a_bias_chooses_and_does_not_weigh_and_a_constant_one_does_nothing():
    model = recursive(dataclasses.replace(TOKENS, balancing="loss_free"))
    logits, _, deep = read(model, IDS)
    model.depth.bias += 0.25
    assert torch.equal(read(model, IDS)[0], logits)
    chose = []
    for bias in (0.0, 10.0):
        model.depth.bias.copy_(torch.tensor([0.0, bias, 0.0]))
        tokens = Tokens(model.backbone.embed(IDS), torch.arange(IDS.shape[1])[None])
        one = TokenChoicePass(model.depth, PassInput(tokens, model.depth.empty_cache()), Notes())
        one.choose(tokens.states_RND, 1)
        chose.append((one.wanted_BL == 2, one.shares_BL))
    assert (read(model, IDS)[2].depths_BL == 2).all() and not (deep.depths_BL == 2).all()
    ((is_in, shares), (_, biased)) = chose
    assert is_in.any() and torch.equal(shares[is_in], biased[is_in])  # g = P_2 is what it was, whatever the bias


def test_squared_scores_are_a_term_where_they_have_a_weight():
    assert [method.term_weights["router_z"] for method in (Mor(), TOKENS)] == [0.0, 1e-5]
    model = recursive(Mor(z_weight=0.5)).train()
    out = model.loss(EXAMPLES)
    total = out.terms["answer"] + 0.001 * out.terms["router"] + 0.5 * out.terms["router_z"]
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-6)
    squares = only_pass(scored(model, torch.tensor([[3.0]])), IDS).sums["router_z"]
    assert squares.item() == pytest.approx(3 * 9.0)  # of three recursions, added up as the authors do


def test_an_auxiliary_router_decides_when_answering_and_the_router_only_weighs():
    model = recursive(Mor(causality="aux_router"))
    logits, _, deep = read(model, IDS)
    assert len(deep.depths_BL.unique()) > 1
    model.depth.aux_routers[0].weight.data.mul_(-1.0)  # recursion 1 is run by all, whatever it says
    assert torch.equal(read(model, IDS)[0], logits)
    model.depth.aux_routers[1].weight.data.mul_(-1.0)
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


@pytest.mark.parametrize(("method", "alpha"), [(Mor(), 0.1), (TOKENS, 1.0)], ids=["expert", "token"])
def test_alpha_is_a_tenth_with_expert_choice_and_one_with_token_choice(method, alpha):
    usual, same, other = (
        read(recursive(dataclasses.replace(method, alpha=value)), IDS)[0] for value in (None, alpha, 0.5)
    )
    assert torch.equal(usual, same) and not torch.equal(usual, other)


def test_a_recursion_that_all_run_asks_no_rule():
    """With equal capacities every candidate goes on, also when answering, even if its score is below zero."""
    model = scored(recursive(Mor(n_recursions=2, capacities=(1.0, 1.0))), torch.tensor([[-3.0]]))
    assert (read(model, IDS)[2].depths_BL == 2).all()
    assert (only_pass(model.train(), IDS).depths_BL == 2).all()


def test_the_recursions_are_seen_in_a_trace():
    (generation,) = recursive(Mor()).generate([EXAMPLES[0].question], max_new_tokens=2, trace=True)
    assert [entry.loop for entry in generation.trace.iterations][:3] == [1, 2, 3]


# Rebuilding a pretrained decoder


def rebuilt(init: str, n: int = 2, sharing: str = "middle_cycle", arch: str = "llama") -> tuple[Backbone, list]:
    backbone = tiny_backbone(arch, num_hidden_layers=8)
    old = list(backbone.layers)
    Mor(n_recursions=n, sharing=sharing, init=init).convert(backbone, None)
    return backbone, old


SIX = [  # middle layers become three, run twice; the first and the last stay
    ("stepwise", 2, "middle_cycle", [[0], [1], [4], [6], [7]]),
    ("lower", 2, "middle_cycle", [[0], [1], [2], [3], [7]]),
    ("upper", 2, "middle_cycle", [[0], [4], [5], [6], [7]]),
    ("average", 2, "middle_cycle", [[0], [1, 4], [2, 5], [3, 6], [7]]),
]
TIED = [
    ("average", 3, "middle_sequence", [[0], [1, 2, 3], [4, 5, 6], [7]]),
    ("average", 4, "sequence", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("average", 4, "cycle", [[0, 2, 4, 6], [1, 3, 5, 7]]),
]


@pytest.mark.parametrize(
    ("arch", "init", "n", "sharing", "sources"),
    [*(("gpt2", *case) for case in SIX), *(("llama", *case) for case in SIX + TIED)],
)
def test_the_shared_layers_of_a_pretrained_model_are_those_that_init_says(arch, init, n, sharing, sources):
    backbone, old = rebuilt(init, n, sharing, arch)
    assert backbone.n_layers == backbone.config.num_hidden_layers == len(sources)
    for layer, group in zip(backbone.layers, sources, strict=True):
        states = [old[i].state_dict() for i in group]
        for name, tensor in layer.state_dict().items():
            assert_close(tensor, sum(state[name] for state in states) / len(states), 1e-6)


def test_fresh_layers_are_like_none_of_the_old_ones():
    torch.manual_seed(7)  # other draws than the old ones
    backbone, old = rebuilt("random")
    weights, others = ([layer.self_attn.q_proj.weight for layer in one] for one in (backbone.layers, old))
    assert torch.equal(weights[0], others[0]) and torch.equal(weights[-1], others[-1])
    for weight in weights[1:-1]:
        assert not any(torch.equal(weight, other) for other in others)
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

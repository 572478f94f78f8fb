"""Learned orders of filling canvases: section 9 of dcolt.md and unmasking_policy.md."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from innerloop import Dcolt, InputError, LatentModel, Llada, UnmaskingPolicy
from innerloop.engine.canvas_policies import CoinsPolicy, RankingPolicy
from innerloop.engine.generate import generate
from innerloop.engine.learned_canvases import predicted, ranked
from innerloop.methods.denoise.choices import coins_log_prob, ranking_log_prob
from innerloop.methods.denoise.commits import canvases_of
from tests.models import chain_examples, saved, tiny_model

close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
QUESTIONS = ["3 ; + 4", "1 ; * 2 ; - 1 ; + 3", "2 ; + 1 ; - 4"]
G = 8
DCOLT = {
    "random": Dcolt(gen_length=G, sampler={"steps": 4}),
    "confidence": Dcolt(gen_length=G, upm_init="confidence", sampler={"steps": 3}),
    "blocks": Dcolt(gen_length=G, sampler={"block_length": 4, "steps": 4, "eos": "never"}),
    "shift": Dcolt(gen_length=G, shift=True, upm_time_scale=1.0),
}
COINS = {
    "whole": UnmaskingPolicy(gen_length=G, hidden=16),
    "blocks": UnmaskingPolicy(gen_length=G, hidden=16, tau=0.5, sampler={"block_length": 4}),
    "zeros": UnmaskingPolicy(gen_length=G, hidden=16, fallback="zeros", shift=True),
}
EVERY = [(RankingPolicy, method) for method in DCOLT.values()] + [(CoinsPolicy, method) for method in COINS.values()]
NAMES = [f"dcolt {name}" for name in DCOLT] + [f"coins {name}" for name in COINS]


def rolled_out(cls, method, samples=3, seed=1, arch="llama"):
    model = tiny_model(method, arch)
    stir(model)
    policy = cls(model, batch_size=4)
    return model, policy, policy.roll_out(QUESTIONS, samples, seed, 64)


def stir(model):
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for p in model.scorer.parameters():
            p += 0.1 * torch.randn(p.shape)


@pytest.mark.parametrize("cls, method", EVERY, ids=NAMES)
def test_replayed_log_probabilities_are_those_of_the_rollout_with_and_without_padding(cls, method):
    """dcolt.md 9: recomputed log pi equals rollout log pi."""
    model, policy, rollouts = rolled_out(cls, method)
    kept = torch.tensor([value for one in rollouts for value in one.log_probs])
    replayed = policy.replay(model, policy.batch(rollouts))
    close(replayed, kept)
    close(torch.cat([policy.replay(model, policy.batch([one])) for one in rollouts]), replayed)
    assert kept.lt(0).any() and kept.isfinite().all()
    replayed.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(bool(p.grad.any()) for p in model.scorer.parameters() if p.grad is not None)
    learns = any(p.grad is not None for p in model.backbone.parameters())
    assert learns == (cls is RankingPolicy)


def test_the_order_teaches_the_predictor_too():
    """dcolt.md 3: h is not detached."""
    model, policy, rollouts = rolled_out(RankingPolicy, DCOLT["random"], samples=1)
    stage = policy.batch(rollouts).stage(slice(None))
    states, logits = predicted(model, stage, model.suppressed_ids())
    ranked(model, stage, states, logits, policy.mask_id).square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.backbone.lm.model.layers.parameters())


def test_checkpointed_passes_have_the_same_gradient():
    model, policy, rollouts = rolled_out(RankingPolicy, DCOLT["confidence"])
    batch, found = policy.batch(rollouts), []
    for model.checkpoint_passes in (False, True):
        model.zero_grad()
        policy.replay(model, batch).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls, method", EVERY, ids=NAMES)
def test_canvases_are_filled_whole_and_depend_on_nothing_else(cls, method):
    """unmasking_policy.md 9: masks shrink, committed tokens are never visited again."""
    _, policy, rollouts = rolled_out(cls, method)
    mask_id = policy.mask_id
    for one in rollouts:
        places = [at for commit in one.commits for at in commit.places]
        assert len(set(places)) == len(places)
        assert all(set(commit.places) <= set(commit.asked) and commit.places for commit in one.commits)
        assert list(canvases_of(one.commits, G, mask_id))[-1][: len(one.ids)].tolist() == list(one.ids)
    policy.batch_size = 1
    assert [one.ids for one in policy.roll_out(QUESTIONS, 3, 1, 64)] == [one.ids for one in rollouts]
    assert len({one.ids for one in rollouts}) > 1 or cls is CoinsPolicy


# Plackett-Luce


def ranking(scores, order, may=None):
    scores = torch.as_tensor(scores, dtype=torch.float32)[None]
    may = torch.ones_like(scores, dtype=torch.bool) if may is None else torch.tensor([may])
    order = torch.tensor([order])
    return ranking_log_prob(scores, may, order, torch.ones_like(order, dtype=torch.bool))[0]


def by_definition(scores, order):
    left, total = dict(enumerate(scores)), 0.0
    for at in order:
        top = max(left.values())
        total += left[at] - top - math.log(sum(math.exp(value - top) for value in left.values()))
        del left[at]
    return total


SCORES = [0.3, -1.2, 2.0, 0.1]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_rankings_are_a_distribution(k):
    """dcolt.md 9: probabilities sum to 1 over ordered selections."""
    total = sum(ranking(SCORES, list(order)).exp() for order in itertools.permutations(range(4), k))
    close(total, torch.tensor(1.0))


@pytest.mark.parametrize("scores", [SCORES, [100.0, -100.0, 99.0, 0.0], [-100.0, -100.0, -100.0, 100.0]])
@pytest.mark.parametrize("order", [(0,), (1, 3), (3, 2, 1, 0)])
def test_the_ranking_is_the_definition_with_large_scores_too(scores, order):
    """dcolt.md 9: reverse cumulative logsumexp; scores of +-100; invariant to a constant."""
    close(ranking(scores, order), torch.tensor(by_definition(scores, order)))
    close(ranking([value + 7 for value in scores], order), ranking(scores, order))
    own = torch.tensor(scores, requires_grad=True)
    ranking(own, order).backward()
    assert own.grad.isfinite().all()


def test_one_place_is_a_softmax_over_those_that_may_be_filled():
    """dcolt.md 9: K = 1."""
    expected = torch.tensor([SCORES[0], SCORES[2], SCORES[3]]).log_softmax(0)[1]
    close(ranking(SCORES, [2], [True, False, True, True]), expected)


def test_the_order_in_which_a_block_ends_is_no_choice():
    """dcolt.md 9: K = |U| has a likelihood, which is dropped at the end of a block."""
    assert ranking(SCORES, [0, 1, 2, 3]) < -1
    model, policy, rollouts = rolled_out(RankingPolicy, Dcolt(gen_length=G, sampler={"steps": 1}))
    policy.replay(model, policy.batch(rollouts)).sum().backward()
    assert not any(bool(p.grad.any()) for p in model.scorer.parameters() if p.grad is not None)
    assert any(bool(p.grad.any()) for p in model.backbone.parameters() if p.grad is not None)


def test_orders_of_equal_scores_are_uniform():
    """dcolt.md 9: with zero UPM the order is uniform random."""
    model = tiny_model(Dcolt(gen_length=3, sampler={"eos": "never"}))
    torch.nn.init.zeros_(model.scorer.score.weight)
    found = RankingPolicy(model, batch_size=600).roll_out(["3 ; + 4"], 600, 0, 64)
    counts = {}
    for one in found:
        order = tuple(at for commit in one.commits for at in commit.places)
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(n - 100) < 4 * math.sqrt(600 * 5 / 36) for n in counts.values())


def test_it_starts_as_llada_where_it_starts_sure():
    """dcolt.md 8: upm_init."""
    plain = tiny_model(Llada(gen_length=G, sampler={"steps": 4}))
    model = tiny_model(Dcolt(gen_length=G, upm_init="confidence", sampler={"steps": 4}))
    assert [one.ids for one in generate(model, QUESTIONS)] == [one.ids for one in generate(plain, QUESTIONS)]


# Coins


def test_coins_are_a_distribution():
    """unmasking_policy.md 9: the sum over all patterns is 1."""
    logits, may = torch.tensor([SCORES]), torch.tensor([[True, True, False, True]])
    patterns = [[a, b, False, c] for a, b, c in itertools.product([True, False], repeat=3)]
    total = sum(coins_log_prob(logits, may, torch.tensor([one])).exp() for one in patterns)
    close(total, torch.ones(1))


class Constant(torch.nn.Module):
    """A policy that is given."""

    def __init__(self, logit):
        super().__init__()
        self.logit = logit

    def forward(self, confidence_RG, is_mask_RG, time_R):
        return self.logit(confidence_RG, is_mask_RG)


def answered(logit, method=COINS["whole"], **options):
    model = tiny_model(method)
    model.scorer = Constant(logit)
    return generate(model, QUESTIONS, temperature=1.0, replayable=True, **options)


def test_a_chance_of_one_takes_one_pass():
    found = answered(lambda c, m: torch.full_like(c, 1e4))
    assert [len(one.commits) for one in found] == [1] * 3
    assert all(one.commits[0].log_prob == 0 for one in found)


def test_a_chance_of_nothing_fills_the_likeliest_to_be_filled():
    """unmasking_policy.md 9: s = 0, one position a pass by the largest s."""
    method = UnmaskingPolicy(gen_length=G, hidden=16, sampler={"eos": "never"})
    found = answered(lambda c, m: -20 + torch.arange(G) / G + torch.zeros_like(c), method)
    assert all([commit.places for commit in one.commits] == [(G - 1 - i,) for i in range(G)] for one in found)
    assert all(one.cost.loops == G for one in found)
    assert all(commit.log_prob == 0 for one in found for commit in one.commits)


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5])
def test_a_threshold_is_such_a_policy(threshold):
    """unmasking_policy.md 9: b = large * (c - threshold) reproduces threshold decoding."""
    rule = {"commit": "threshold", "threshold": threshold}
    plain = generate(tiny_model(Llada(gen_length=G, sampler=rule)), QUESTIONS)
    model = tiny_model(COINS["whole"])
    model.scorer = Constant(lambda c, m: 1e6 * (c.double() - threshold))
    found = generate(model, QUESTIONS)
    assert [(one.ids, one.cost.loops) for one in found] == [(one.ids, one.cost.loops) for one in plain]


def test_about_two_places_are_filled_at_first():
    """unmasking_policy.md 8: mean s ~ 2 / Lr."""
    torch.manual_seed(0)
    scorer = tiny_model(UnmaskingPolicy(gen_length=64, hidden=64)).scorer
    chances = scorer(torch.rand(4, 64), torch.ones(4, 64).bool(), torch.ones(4)).sigmoid()
    assert abs(chances.mean() - 2 / 64) < 0.01


def test_beta_makes_answers_faster_and_is_not_of_rollouts():
    fast = UnmaskingPolicy(gen_length=G, hidden=16, beta=1e6)
    assert [one.cost.loops for one in generate(tiny_model(fast), QUESTIONS)] == [1] * 3
    _, _, slow = rolled_out(CoinsPolicy, fast)
    assert [one.ids for one in slow] == [one.ids for one in rolled_out(CoinsPolicy, COINS["whole"])[2]]


# Both


@pytest.mark.parametrize("method", [DCOLT["confidence"], COINS["whole"]], ids=["dcolt", "coins"])
def test_a_saved_scorer_answers_alike(method, tmp_path):
    model = tiny_model(method)
    stir(model)
    again = LatentModel.from_pretrained(saved(model, tmp_path))
    assert [one.ids for one in generate(again, QUESTIONS)] == [one.ids for one in generate(model, QUESTIONS)]
    start = LatentModel.from_pretrained(tmp_path, Llada(gen_length=G))
    assert start.scorer is None


@pytest.mark.parametrize("method", [DCOLT["random"], COINS["whole"]], ids=["dcolt", "coins"])
def test_a_trace_shows_every_pass(method):
    (one,) = generate(tiny_model(method), QUESTIONS[:1], trace=True)
    assert len(one.trace.frames) == one.cost.loops
    assert one.trace.frames[-1].after[: len(one.ids)] == one.ids


def test_the_number_of_passes_is_that_of_loops_where_no_policy_chooses_it():
    assert generate(tiny_model(DCOLT["random"]), QUESTIONS[:1], loops=2)[0].cost.loops == 2
    with pytest.raises(InputError, match=r"leave sampler.steps and loops out"):
        generate(tiny_model(COINS["whole"]), QUESTIONS[:1], loops=2)


@pytest.mark.parametrize("method", [DCOLT["random"], COINS["whole"]], ids=["dcolt", "coins"])
def test_without_reinforcement_it_is_llada(method):
    examples = list(chain_examples(4, 1))
    model, plain = (tiny_model(replace(one, gen_length=20)) for one in (method, Llada()))
    model.loss(examples, seed="0/0").loss.backward()
    close(model.loss(examples, seed="0/0").loss, plain.loss(examples, seed="0/0").loss)
    assert all(p.grad is None for p in model.scorer.parameters())


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Llada(sampler={"commit": "learned"}), "'llada' has no policy that is learned"),
        (lambda: Dcolt(sampler={"guidance": 1.0}), "leave guidance, top_p, eos=last and cache out"),
        (lambda: Dcolt(noise={"filler": "random"}), "commit=learned looks at masks"),
        (lambda: UnmaskingPolicy(sampler={"steps": 4}), "leave sampler.steps and loops out"),
        (lambda: UnmaskingPolicy(hidden=6), "give a multiple of 4"),
        (lambda: CoinsPolicy(tiny_model(COINS["whole"]), 0.5), "temperature has no effect"),
    ],
)
def test_what_makes_no_sense_is_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()

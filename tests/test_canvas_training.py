"""Reinforcement of how canvases are filled: what is rewarded, what learns, and what an oracle gains."""

import pytest
import torch

from innerloop import Cot, Dcolt, InputError, Llada, UnmaskingPolicy
from innerloop.engine import learned_canvases
from innerloop.engine.canvas_policies import CoinsPolicy, LearnedRollout, RankingPolicy
from innerloop.engine.generate import generate
from innerloop.methods.denoise.commits import Commit
from innerloop.text.row import Row
from innerloop.train.policies import policy_for
from innerloop.train.rewards import RewardError, Rewards
from tests.close import assert_close
from tests.models import chain_examples, tiny_model
from tests.test_grpo import EXAMPLE, RIGHT, TASK, WRONG, Written, arguments, make_trainer, rewarded
from tests.test_trainer import logged, stop_at

G = 8
RANKING = Dcolt(gen_length=G, sampler={"steps": 4})
COINS = UnmaskingPolicy(gen_length=G, hidden=16)


def state(model, part=""):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name.startswith(part)])


def alike(completions, **_):
    return [1.0] * len(completions)


def fast(speed, **_):
    return list(speed)


def few_ends(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize("method, reward", [(RANKING, few_ends), (COINS, fast)], ids=["dcolt", "coins"])
def test_it_learns_what_is_rewarded(tmp_path, method, reward):
    model = tiny_model(method)
    before = {part: state(model, part) for part in ("backbone", "scorer")}
    make_trainer(tmp_path, model, rewards=[reward], max_steps=15, num_iterations=3, scale_rewards="none").train()
    rewards = logged(tmp_path, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert torch.equal(before["backbone"], state(model, "backbone")) == (method is COINS)  # 9: the predictor is frozen
    assert not torch.equal(before["scorer"], state(model, "scorer"))
    assert logged(tmp_path, "n_loops")[0] <= G
    assert logged(tmp_path, "clip_ratio")[0] == 0


@pytest.mark.parametrize("method", [RANKING, COINS], ids=["dcolt", "coins"])
def test_equal_rewards_teach_nothing(tmp_path, method):
    """dcolt.md 9."""
    model = tiny_model(method)
    before = state(model)
    make_trainer(tmp_path, model, rewards=[alike], max_steps=2).train()
    assert torch.equal(state(model), before)
    assert logged(tmp_path, "grad_norm") == [0.0, 0.0]


def finished(text, passes, alpha):
    one = Written(text)
    one.commits = [Commit((0,), (0,), (5,))] * passes
    return LearnedRollout(0, Row([]), one, gen_length=G, alpha=alpha)


@pytest.mark.parametrize(
    "text, passes, alpha, expected",
    [
        (WRONG, 1, 1.0, 0.0),  # R = 0 whenever wrong
        (WRONG, 1, 0.0, 0.0),
        (RIGHT, 5, 0.0, 1.0),  # at alpha = 0 R is correctness
        (RIGHT, G, 0.0, 1.0),
        (RIGHT, G, 1.0, 0.0),  # R(n = T) = 0
        (RIGHT, 2, 1.0, 0.75),
        (RIGHT, 4, 3.0, 0.125),
    ],
)
def test_the_reward_of_right_and_fast_answers(text, passes, alpha, expected):
    """unmasking_policy.md 9."""
    found = Rewards(["fast_answer"], None, TASK, G)([EXAMPLE], [finished(text, passes, alpha)])
    assert_close(found[0, 0], expected)


def test_fast_answers_are_of_canvases():
    with pytest.raises(RewardError, match="fast_answer counts passes over a canvas"):
        rewarded("fast_answer", [RIGHT])


@pytest.fixture
def oracle(monkeypatch):
    """A predictor that knows the answers to the questions asked."""
    examples = list(chain_examples(4, 1))

    def known(model):
        rows = [model.method.lay_out(example, model.encoder) for example in examples]
        answers = {tuple(row.ids()[: row.region_start]): row.ids()[row.region_start :] for row in rows}

        def predicted(model, stage, never, meter=None, slots_R=None):
            ids = [
                tuple(i for i, real in zip(own, mask) if real)
                for own, mask in zip(stage.prompts.ids_RP.tolist(), _mask(stage).tolist())
            ]
            gold_RG = torch.tensor([answers[one] for one in ids])
            n, width = len(model.tokenizer), model.backbone.width
            logits_AV = 50.0 * torch.nn.functional.one_hot(gold_RG[stage.at], n).float()
            return torch.zeros(*gold_RG.shape, width), logits_AV

        monkeypatch.setattr(learned_canvases, "predicted", predicted)
        return [example.question for example in examples], [one.answer for one in examples]

    return known


def _mask(stage):
    ids, mask = stage.prompts.ids_RP, stage.prompts.mask_RP
    return torch.ones_like(ids) if mask is None else mask


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_any_order_is_right_where_the_predictor_is(oracle, steps):
    """dcolt.md 9: oracle backbone."""
    model = tiny_model(Dcolt(gen_length=20, sampler={"steps": steps}))
    questions, answers = oracle(model)
    found = RankingPolicy(model).roll_out(questions, 3, 0, 64)
    assert [one.generation.answer for one in found] == [answer for answer in answers for _ in range(3)]


def test_all_at_once_is_best_where_the_predictor_is_right(oracle):
    """unmasking_policy.md 9: oracle dLLM, R -> (1 - 1/T)^alpha."""
    model = tiny_model(UnmaskingPolicy(gen_length=20, hidden=16, alpha=3.0))
    questions, answers = oracle(model)
    torch.nn.init.constant_(model.scorer.score.bias, 30.0)
    found = CoinsPolicy(model).roll_out(questions, 2, 0, 64)
    assert [one.generation.answer for one in found] == [answer for answer in answers for _ in range(2)]
    assert all(abs(one.columns["speed"] - (1 - 1 / 20) ** 3) < 1e-9 for one in found)
    assert [one.cost.loops for one in generate(model, questions)] == [1] * 4


def test_a_policy_fits_its_method(tmp_path):
    args = arguments(tmp_path)
    found = [type(policy_for(tiny_model(method), args)) for method in (RANKING, COINS)]
    assert found == [RankingPolicy, CoinsPolicy]
    assert type(policy_for(tiny_model(Cot()), args)).__name__ == "WritingPolicy"
    by_confidence = Dcolt(gen_length=G, sampler={"commit": "confidence"})
    assert type(policy_for(tiny_model(by_confidence), args)).__name__ == "OnePassPolicy"


def test_the_likeliest_tokens_have_no_temperature(tmp_path):
    with pytest.raises(InputError, match="temperature has no effect"):
        policy_for(tiny_model(COINS), arguments(tmp_path, temperature=0.7))


@pytest.mark.parametrize("method", [RANKING, COINS, Llada(gen_length=G)], ids=["dcolt", "coins", "diffu-GRPO"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, method):
    known = {"rewards": [few_ends], "beta": 0.1, "num_iterations": 2, "max_steps": 6}
    whole, cut = tiny_model(method), tiny_model(method)
    make_trainer(tmp_path / "whole", whole, **known).train()
    make_trainer(tmp_path / "cut", tiny_model(method), callbacks=[stop_at(2)], **known).train()
    make_trainer(tmp_path / "cut", cut, **known).train(resume_from_checkpoint=True)
    assert torch.equal(state(whole), state(cut))
    assert logged(tmp_path / "whole", "kl")[-1] > 0 or method is COINS  # which changes no token


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
@pytest.mark.parametrize("method", [RANKING, COINS], ids=["dcolt", "coins"])
def test_micro_batches_add_up(tmp_path, method, kind):
    found = []
    for name, settings in {"one": {"batch_size": 16}, "two": {"gradient_accumulation_steps": 2}}.items():
        known = {"rewards": [by_place], "loss_type": kind, "max_steps": 1, **settings}
        make_trainer(tmp_path / name, tiny_model(method), **known).train()
        found.append(logged(tmp_path / name, "grad_norm"))
    assert_close(*found, 1e-4)
    assert found[0][0] > 0


def by_place(completions, **_):
    return [float(i % 3) for i in range(len(completions))]

"""Reinforcement: the loss in numbers, what stops it, and that runs are the same however they are cut up."""

import copy
import math
from pathlib import Path

import pytest
import torch

from innerloop import Coconut, Cot, GrpoTrainer, Hrpo, InputError, NoCot, Slr
from innerloop.decoder.adapters import add_lora
from innerloop.decoder.cost import Cost
from innerloop.engine.generation import Generation
from innerloop.engine.rollouts import Rollout
from innerloop.tasks import Chain
from innerloop.text.row import Row
from innerloop.train import grpo
from innerloop.train.algorithms import arguments_of
from innerloop.train.policy_loss import Played, advantages, policy_loss, weights_of
from innerloop.train.rewards import Rewards
from innerloop.train.training_arguments import training_arguments
from tests.close import assert_close
from tests.models import chain_examples, tiny_model
from tests.test_trainer import logged, stop_at, weights

TASK = Chain(n_ops=3)
G = 4


def arguments(folder: Path, **settings):
    settings = {"batch_size": 2 * G, "num_generations": G, "max_completion_length": 6, "max_steps": 4, **settings}
    settings = {"logging_steps": 1, "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2, **settings}
    return arguments_of(folder, {"algorithm": "grpo", **settings})


def make_trainer(folder: Path, model=None, rewards=None, callbacks=(), valid=None, **settings) -> GrpoTrainer:
    model = tiny_model(Cot()) if model is None else model
    args = arguments(folder, **settings)
    return GrpoTrainer(model, args, list(chain_examples(16, 3)), valid, TASK, callbacks, rewards)


def test_the_answers_mark_is_that_of_the_models_wording():
    rollouts = [
        Rollout(0, Row([]), Generation(text, None, Cost())) for text in ("2 + 2 = 4\nThe answer is: 4", "### 4")
    ]
    asked, format_of = list(chain_examples(2))[:2], ["format"]
    assert Rewards(format_of, None, TASK)(asked[:1], rollouts).flatten().tolist() == [0, 1]
    assert Rewards(format_of, None, TASK, mark="The answer is:")(asked[:1], rollouts).flatten().tolist() == [1, 0]


def by_length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def test_advantages_of_the_card():  # hrpo.md, test 8
    found = advantages(torch.tensor([1.0, 0, 0, 0]), 4, "group")
    assert_close(found, [1.4997, -0.4999, -0.4999, -0.4999], 1e-4)
    assert abs(found.sum()) < 1e-6
    several = torch.tensor([0.3, 0.1, 0.7, 0.2, 5.0, 4.0, 4.0, 4.5])
    assert_close(advantages(several + 3, 4, "group"), advantages(several, 4, "group"))
    assert_close(advantages(several, 4, "none")[:4], several[:4] - several[:4].mean())
    assert_close(advantages(several, 4, "batch")[:4], (several[:4] - several[:4].mean()) / (several.std() + 1e-4))
    assert advantages(torch.full((6,), 0.1), 3, "group").eq(0).all()
    assert advantages(torch.tensor([math.nan, 1.0, 0.0, 0.5]), 4, "none").tolist() == [0, 0.5, -0.5, 0]


LENGTHS = torch.tensor([1, 3])


@pytest.mark.parametrize(
    "kind, expected", [("grpo", [1 / 2, *[1 / 6] * 3]), ("dapo", [1 / 4] * 4), ("dr_grpo", [1 / 20] * 4)]
)
def test_what_each_token_counts(kind, expected):
    assert_close(weights_of(LENGTHS, kind, 2, 4, 10), expected)


def test_the_loss_in_numbers(tmp_path):
    args = arguments(tmp_path, beta=0.5, epsilon=0.2)
    lp = torch.tensor([-1.0, -2.0, -1.0, -1.0], requires_grad=True)
    played = Played(torch.tensor([1.0, -1.0, 2.0, -1.0]), torch.full((4,), 0.25))
    loss, _ = policy_loss(lp, played, args)
    assert_close(loss, -0.25)  # ratio 1: the value says nothing
    loss.backward()
    assert_close(lp.grad, [-0.25, 0.25, -0.5, 0.25])
    played.old_U = torch.tensor([-1.5, -2.0, -0.5, -0.5])
    played.reference_U = lp.detach() - 1
    lp.grad = None
    loss, measured = policy_loss(lp, played, args)
    loss.backward()
    kl = math.exp(-1) + 1 - 1
    low = math.exp(-0.5)
    assert_close(loss, (-1.2 + 1 - 2 * low + 0.8 + 4 * 0.5 * kl) / 4)
    assert_close(measured["kl"], kl)
    assert_close(measured["clip_ratio"], 0.5)
    slope = 0.5 * (1 - math.exp(-1)) / 4
    assert_close(lp.grad, [slope, 0.25 + slope, -2 * low / 4 + slope, slope])


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_the_value_of_a_whole_group_says_nothing_but_its_gradient_does(tmp_path, kind):  # hrpo.md, test 9
    lengths = torch.tensor([3, 3, 3, 3] if kind == "dr_grpo" else [1, 4, 2, 5])
    lp = torch.linspace(-3, -1, int(lengths.sum())).requires_grad_()
    gains = advantages(torch.tensor([1.0, 0, 1, 0.3]), 4, "group").repeat_interleave(lengths)
    played = Played(gains, weights_of(lengths, kind, 4, len(lp), 8), reference_U=lp.detach() + torch.randn(len(lp)))
    loss, measured = policy_loss(lp, played, arguments(tmp_path))
    loss.backward()
    assert abs(loss) < 1e-6
    assert_close(lp.grad, -gains * played.weights_U)
    assert measured["kl"] > 0


def test_no_divergence_from_oneself(tmp_path):  # hrpo.md, test 9
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    played = Played(torch.zeros(2), torch.ones(2), reference_U=lp.detach())
    loss, measured = policy_loss(lp, played, arguments(tmp_path, beta=1.0))
    loss.backward()
    assert measured["kl"] == 0
    assert lp.grad.eq(0).all()


class Written:
    def __init__(self, text, ids=(5,)):
        self.text, self.ids = text, list(ids)


def rewarded(name, texts, **options):
    rollouts = [Rollout(0, Row([]), Written(text, range(len(text)))) for text in texts]
    return Rewards([name], None, TASK, longest=10, **options)([EXAMPLE], rollouts)[:, 0].tolist()


EXAMPLE = chain_examples(1)[0]
RIGHT, WRONG = f"### {EXAMPLE.answer}", "### 9"


@pytest.mark.parametrize(
    "name, texts, expected",
    [
        ("strict_answer", [RIGHT, f"### 1\n{RIGHT}", WRONG, EXAMPLE.answer], [1, 0, 0, 0]),  # hrpo.md, test 10
        ("answer", [RIGHT, f"### 1\n{RIGHT}", WRONG, ""], [1, 1, 0, 0]),
        ("format", [RIGHT, f"### 1\n{RIGHT}", WRONG, ""], [1, 0, 1, 0]),
        ("length", ["a" * 5, ""], [-0.5, 0]),
    ],
)
def test_built_in_rewards(name, texts, expected):
    assert rewarded(name, texts) == expected


def test_a_reward_of_ones_own_gets_columns_as_from_trl():
    seen = {}

    def mine(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [None, 2]

    found = Rewards([mine], [0.5])([EXAMPLE], [Rollout(0, Row([]), Written(text)) for text in "ab"])
    assert found.isnan().tolist() == [[True], [False]]
    assert Rewards([mine], [0.5]).total(found)[1] == 1.0
    assert seen["prompts"] == [EXAMPLE.question] * 2
    assert seen["answer"] == [EXAMPLE.answer] * 2
    assert seen["completion_ids"] == [[5], [5]]


def broken(**_):
    raise KeyError("colour")


@pytest.mark.parametrize(
    "reward, told",
    [
        (broken, r"training stopped at step 1: the reward 'broken' failed \(KeyError: 'colour'\); the last good .*-1"),
        (lambda completions, **_: [math.nan] * len(completions), "gave nan: it must give finite numbers"),
        (lambda completions, **_: [1.0], "gave 1 values for 8 samples: it must give one for each"),
    ],
)
def test_a_reward_that_fails_stops_with_one_sentence_and_keeps_the_checkpoint(tmp_path, reward, told):
    calls = []

    def later(**columns):
        calls.append(1)
        return by_length(**columns) if len(calls) == 1 else reward(**columns)

    later.__name__ = "broken"
    trainer = make_trainer(tmp_path, rewards=[later], save_strategy="steps", save_steps=1)
    with pytest.raises(InputError, match=told):
        trainer.train()
    assert (tmp_path / "checkpoint-1/manifest.json").exists()


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"batch_size": 6}, "batch_size is 6, but counts samples, num_generations=4"),
        ({"num_iterations": 2, "max_steps": 3}, "max_steps is 3, but a rollout is learned from in num_iterations=2"),
        ({"num_iterations": 2, "save_strategy": "steps", "save_steps": 3}, "save_steps is 3, but a rollout"),
        ({"num_generations": 1}, "num_generations is 1"),
        ({"loss_type": "bnpo"}, "loss_type is"),
        ({"reward_funcs": "anwser"}, "no reward 'anwser' .did you mean 'answer'"),
        ({"reward_funcs": ["no.such.thing"]}, "cannot import no.such"),
        ({"reward_funcs": ["answer", "format"], "reward_weights": [1.0]}, "reward_weights are 1, but reward_funcs 2"),
        ({"unfreeze_after": 2}, "unfreeze_after has no effect with algorithm=grpo: leave it out"),
        ({"batch_size": 1024}, "a step asks 256 questions, but there are 16"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(tmp_path, settings, told):
    with pytest.raises(InputError, match=told):
        make_trainer(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_algorithms_have_fields_of_their_own(tmp_path):
    with pytest.raises(InputError, match=r"train\.num_generations is not a training argument"):
        arguments_of(tmp_path, {"num_generations": 8})
    with pytest.raises(InputError, match=r"train\.algorithm is 'gpro' \(did you mean 'grpo'\?\)"):
        arguments_of(tmp_path, {"algorithm": "gpro"})
    assert training_arguments(tmp_path, {}).algorithm == "supervised"


@pytest.mark.parametrize("beta, same", [(0.0, True), (0.1, True)])
def test_equal_rewards_leave_weights_as_they_are(tmp_path, beta, same):
    model = tiny_model(Cot())
    before = weights(model)
    make_trainer(tmp_path, model, rewards=[lambda completions, **_: [0.1] * len(completions)], beta=beta).train()
    assert torch.equal(before, weights(model)) is same
    assert set(logged(tmp_path, "frac_reward_zero_std")) == {1.0}


def test_what_is_logged(tmp_path):
    make_trainer(tmp_path, beta=0.1, num_iterations=2, reward_funcs=["answer", "format"]).train()
    for name in ("loss", "kl", "clip_ratio"):
        assert len(logged(tmp_path, name)) == 4
    for name in ("reward", "reward_std", "reward/format", "completion_length", "frac_reward_zero_std"):
        assert len(logged(tmp_path, name)) == 2
    assert all(0 < share < 1 for share in logged(tmp_path, "rollout_share")[::2])


@pytest.mark.parametrize("method", [NoCot(), Hrpo()], ids=["no_cot", "hrpo"])
def test_what_is_rewarded_becomes_likelier(tmp_path, method):  # hrpo.md, test 12
    model = tiny_model(method)
    wanted = model.encoder.eos_id

    def mine(completion_ids, **_):
        return [float(ids[0] == wanted) for ids in completion_ids]

    settings = {"max_steps": 16, "batch_size": 16, "learning_rate": 6e-3, "max_completion_length": 1}
    make_trainer(tmp_path, model, rewards=[mine], **settings).train()
    rewards = logged(tmp_path, "reward")
    assert rewards[0] < 0.3
    assert min(rewards[-5:]) > 0.8


def test_latents_learn_from_what_is_written_after_them(tmp_path):
    model = tiny_model(Slr(n_slots=2, max_loops=2))
    before = [p.detach().clone() for p in model.loop.parameters()]
    make_trainer(tmp_path, model, rewards=[by_length], beta=0.01).train()
    assert before
    assert any(not torch.equal(p, q) for p, q in zip(before, model.loop.parameters()))


@pytest.mark.parametrize("n, at", [(1, 5), (2, 4), (2, 5)])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, n, at):
    known = {"rewards": [by_length], "beta": 0.1, "num_iterations": n, "max_steps": 12}
    whole = tiny_model(Cot())
    make_trainer(tmp_path / "whole", whole, **known).train()
    first = make_trainer(tmp_path / "cut", tiny_model(Cot()), callbacks=[stop_at(at)], **known)
    first.train()
    assert first.interrupted
    assert first.state.global_step % n == 0
    again = tiny_model(Cot())
    make_trainer(tmp_path / "cut", again, **known).train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole), weights(again))
    assert logged(tmp_path / "cut", "reward") == logged(tmp_path / "whole", "reward")


@pytest.mark.parametrize("is_trained", [False, True], ids=["new", "trained"])
def test_the_reference_of_adapters_is_the_model_before_and_holds_its_base_once(tmp_path, monkeypatch, is_trained):
    def trained(name):
        model = tiny_model(Coconut(latents_per_step=1))
        torch.manual_seed(0)
        add_lora(model.backbone, model.marker_ids(), {"r": 2, "init_lora_weights": not is_trained})
        trainer = make_trainer(tmp_path / name, model, [by_length], beta=0.1, max_steps=2)
        trainer.train()
        return trainer

    sharing = trained("sharing")
    own = {id(p): p for p in sharing.reference.parameters()}
    twice = sum(p.numel() for p in own.values()) - sum(p.numel() for p in sharing.model.parameters() if id(p) in own)
    assert twice == sum(p.numel() for p in sharing.model.parameters() if p.requires_grad)
    monkeypatch.setattr(grpo, "_frozen", lambda model: copy.deepcopy(model).requires_grad_(False).eval())
    whole = trained("whole")
    for name in ("kl", "reward", "grad_norm"):
        assert logged(tmp_path / "sharing", name) == logged(tmp_path / "whole", name)
    assert logged(tmp_path / "whole", "kl")[-1] > 0
    assert torch.equal(weights(sharing.model), weights(whole.model))


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_add_up(tmp_path, kind):
    found = []
    for name, settings in {"one": {"batch_size": 16}, "two": {"gradient_accumulation_steps": 2}}.items():
        known = {"rewards": [by_length], "loss_type": kind, "max_steps": 1, **settings}
        make_trainer(tmp_path / name, tiny_model(Cot()), **known).train()
        found.append(logged(tmp_path / name, "grad_norm"))
    assert_close(*found, 1e-4)


def test_validation_answers_and_keeps_the_best(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, valid=list(chain_examples(4)), **settings).train()
    assert len(logged(tmp_path, "eval_accuracy")) == 2
    assert (tmp_path / "checkpoint/innerloop.json").exists()

"""Rollouts: a replay has the log-probabilities of the rollout, whatever it is padded with."""

import math
from functools import partial

import pytest
import torch

from innerloop import Cot, Dcolt, Hrpo, InputError, Llada, LoopRegularised, Slr, SoftThinking, UnmaskingPolicy
from innerloop.engine.rollouts import WritingPolicy
from innerloop.methods import METHODS
from innerloop.train.policies import policy_for
from tests.models import tiny_model
from tests.test_grpo import arguments

close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
QUESTIONS = ["3 ; + 4", "1 ; * 2 ; - 1 ; + 3", "2 ; + 1 ; - 4"]
ONLY = {"spiralthinker": "thinks between words", "llada": "fills canvases", "dream": "fills canvases"}
ONLY |= {"dcolt": "fills canvases", "unmasking_policy": "fills canvases"}
ONLY |= {"block_diffusion": "fills canvases", "soft_thinking": "stops thinking by a rule"}
OTHERS = {"markers": Cot(with_markers=True), "looped regularly": LoopRegularised(block_size=1)}
WRITING = {name: cls() for name, cls in METHODS.items() if name not in (*ONLY, "loop_regularised")} | OTHERS
SHAPES = [(name, "llama") for name in WRITING] + [(name, "gpt2") for name in ("cot", "coconut", "slr", "looped")]


def rolled_out(model, temperature=0.7, samples=3, questions=QUESTIONS, **options):
    policy = WritingPolicy(model, temperature, **options)
    return policy, policy.roll_out(questions, samples, seed=1, max_new_tokens=9)


def stored(rollouts):
    return torch.tensor([value for one in rollouts for value in one.log_probs])


@pytest.mark.parametrize("name, arch", SHAPES)
def test_a_replay_has_the_log_probabilities_of_the_rollout_with_and_without_padding(name, arch):
    model = tiny_model(WRITING[name], arch)
    policy, rollouts = rolled_out(model)
    assert [one.question for one in rollouts] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    replayed = policy.replay(model, policy.batch(rollouts))
    close(replayed, stored(rollouts))
    alone = torch.cat([policy.replay(model, policy.batch([one])) for one in rollouts])
    close(alone, replayed)
    replayed.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_samples_depend_on_the_seed_the_question_and_the_sample_and_not_on_their_company():
    model = tiny_model(Cot())
    _, many = rolled_out(model)
    _, few = rolled_out(model, samples=2, batch_size=1)
    assert [one.ids for one in few] == [one.ids for i, one in enumerate(many) if i % 3 < 2]
    assert len({one.ids for one in many}) > 3


DRAWING = {
    "cot": Cot(),
    "hrpo": Hrpo(),
    "drawn mixtures": SoftThinking(noise=0.5, stop_after=0),
    "stop": Slr(n_slots=2, max_loops=3, stop={"rule": "halt"}),
    "llada": Llada(gen_length=8),
    "dcolt": Dcolt(gen_length=8, sampler={"steps": 4}),
    "coins": UnmaskingPolicy(gen_length=8, hidden=16),
}


@pytest.mark.parametrize("method", DRAWING.values(), ids=DRAWING)
def test_a_part_of_the_questions_is_drawn_as_it_is_among_all(method, tmp_path):
    """As each of several processes asks its own."""
    policy = policy_for(tiny_model(method), arguments(tmp_path))
    every, part, alone = (
        [
            (one.ids, one.n_loops, getattr(one, "hidden", ()))
            for one in policy.roll_out(QUESTIONS[first:], 3, 1, 9, places)
        ]
        for first, places in ((0, None), (1, [1, 2]), (1, None))
    )
    assert part == every[3:] and alone != part


def test_log_probabilities_are_those_of_the_temperature_among_what_may_be_written():
    model = tiny_model(Slr(n_slots=2, max_loops=2))
    _, rollouts = rolled_out(model, temperature=2.0, samples=1)
    first = torch.stack([_first(model, question) for question in QUESTIONS])
    expected = (first / 2.0).log_softmax(-1)
    close(
        torch.tensor([one.log_probs[0] for one in rollouts]),
        torch.stack([expected[i, one.ids[0]] for i, one in enumerate(rollouts)]),
    )
    assert all(math.isfinite(value) for one in rollouts for value in one.log_probs)


def _first(model, question):
    policy, (one,) = rolled_out(model, samples=1, questions=[question])
    batch = policy.batch([one])
    logits = model.written_logits(batch, model.think(batch))[0].detach()
    return logits.index_fill(0, model.suppressed_ids(), -torch.inf)


@pytest.mark.parametrize("name, told", ONLY.items())
def test_what_cannot_be_gone_through_again_is_refused(name, told):
    with pytest.raises(InputError, match=told):
        WritingPolicy(tiny_model(METHODS[name]()))

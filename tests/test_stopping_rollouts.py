"""A learned stop under reinforcement: numbers of iterations are drawn by the gate, replayed, and have a price."""

import pytest
import torch

from innerloop import GrpoTrainer, InputError, Slr
from innerloop.engine.stopping_rollouts import StoppingPolicy, chosen, unstopped
from innerloop.halting.learned import exit_distribution
from tests.close import assert_close
from tests.models import chain_examples, tiny_model
from tests.test_grpo import TASK, arguments, logged

QUESTIONS = ["3 ; + 4", "1 ; * 2 ; - 1 ; + 3", "2 ; + 1 ; - 4"]
GATED = Slr(n_slots=2, max_loops=3, stop={"rule": "halt"})


def rolled_out(samples=6):
    model = tiny_model(GATED)
    with torch.no_grad():
        model.loop.stop.gate.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        model.loop.stop.gate.bias.fill_(-0.7)
    policy = StoppingPolicy(model, 0.7)
    return model, policy, policy.roll_out(QUESTIONS, samples, seed=3, max_new_tokens=6)


def test_chances_of_stopping_are_those_of_the_card():
    logits = torch.tensor([[0.3, -1.0], [1.0, 0.2], [5.0, 5.0]])
    p = exit_distribution(logits)
    for n in (1, 2, 3):
        assert_close(chosen(logits, [n, n]), p[n - 1].log())


def test_numbers_of_iterations_are_drawn_and_replayed():
    model, policy, rollouts = rolled_out()
    assert {one.n_loops for one in rollouts} == {1, 2, 3}
    batch = policy.batch(rollouts)
    assert batch.n_targets == [len(one.ids) + 1 for one in rollouts]
    replayed = policy.replay(model, batch)
    stored = torch.tensor([value for one in rollouts for value in one.log_probs])
    torch.testing.assert_close(replayed, stored, atol=1e-4, rtol=0)
    alone = torch.cat([policy.replay(model, policy.batch([one])) for one in rollouts])
    torch.testing.assert_close(alone, stored, atol=1e-4, rtol=0)
    replayed.sum().backward()
    assert model.loop.stop.gate.weight.grad.abs().sum() > 0
    again = rolled_out(samples=2)[2]
    assert [one.n_loops for one in again] == [one.n_loops for i, one in enumerate(rollouts) if i % 6 < 2]


def test_tokens_are_those_of_a_loop_with_that_number_of_iterations():
    model, _, rollouts = rolled_out()
    for n in (1, 2, 3):
        with unstopped(model):
            plain = model.generate(QUESTIONS, loops=n, samples=6, temperature=0.7, seed=3, max_new_tokens=6)
        own = [i for i, one in enumerate(rollouts) if one.n_loops == n]
        assert own
        assert [rollouts[i].ids for i in own] == [tuple(plain[i].ids) for i in own]


def test_a_price_lowers_the_number_of_iterations(tmp_path):
    args = arguments(
        tmp_path, reward_funcs="loops", max_completion_length=1, max_steps=40, batch_size=16, learning_rate=1e-2
    )
    GrpoTrainer(tiny_model(GATED), args, list(chain_examples(16, 3)), None, TASK).train()
    found = logged(tmp_path, "n_loops")
    assert found[0] > 2
    assert sum(found[-5:]) / 5 < 1.4


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_drawn_number_counts_as_an_action(tmp_path, loss_type):
    args = arguments(tmp_path, reward_funcs="loops", loss_type=loss_type, batch_size=8)
    trainer = GrpoTrainer(tiny_model(GATED), args, list(chain_examples(16, 3)), None, TASK)
    micros = trainer._roll_out([trainer.train_dataset[:1], trainer.train_dataset[1:2]], 0)
    assert sum(micro.played.weights_U.sum() for micro in micros).item() == pytest.approx(1.0)


def test_what_refines_no_latents_together_has_no_number_to_draw():
    with pytest.raises(InputError, match="refines no latents together"):
        StoppingPolicy(tiny_model(Slr(n_slots=2, max_loops=3, loop_scope="last", stop={"rule": "halt"})))

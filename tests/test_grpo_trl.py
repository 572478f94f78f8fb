"""The loss and its gradient are those of TRL's GRPOTrainer on the same samples (extra rl-test)."""

import pytest
import torch

from innerloop import Cot
from innerloop.engine.rollouts import WritingPolicy
from innerloop.train.algorithms import arguments_of
from innerloop.train.policy_loss import Played, advantages, policy_loss, weights_of
from tests.close import assert_close
from tests.models import tiny_model

trl = pytest.importorskip("trl", reason="the oracle needs the extra rl-test", exc_type=ImportError)

LONGEST, G, TEMPERATURE = 9, 4, 0.7


def samples(model):
    policy = WritingPolicy(model, TEMPERATURE)
    rollouts = policy.roll_out(["3 ; + 4", "1 ; * 2 ; - 1 ; + 3"], G, 1, LONGEST)
    return policy, rollouts, torch.arange(2.0 * G).sqrt()


def their_loss(model, rollouts, rewards, reference, old, kind, beta):
    """Let TRL's trainer compute its loss of the samples, without the loading and logging around it."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    pad = model.encoder.pad_id
    prompts = [one.row.ids() for one in rollouts]
    p, c = max(map(len, prompts)), max(len(one.ids) for one in rollouts)
    ids = lambda rows: torch.tensor(rows)  # noqa: E731
    mask = ids([[1] * len(one.ids) + [0] * (c - len(one.ids)) for one in rollouts])

    def padded(values_U):
        found = torch.zeros(mask.shape)
        found[mask.bool()] = values_U.detach()
        return found

    inputs = {
        "prompt_ids": ids([[pad] * (p - len(row)) + row for row in prompts]),
        "prompt_mask": ids([[0] * (p - len(row)) + [1] * len(row) for row in prompts]),
        "completion_ids": ids([[*one.ids, *[pad] * (c - len(one.ids))] for one in rollouts]),
        "completion_mask": mask,
        "advantages": advantages(rewards, G, "group"),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": padded(reference),
    }
    if old is not None:
        inputs["old_per_token_logps"] = padded(old)
    config = trl.GRPOConfig(
        output_dir="unused", use_cpu=True, report_to="none", num_generations=G, per_device_train_batch_size=2 * G,
        loss_type=kind, temperature=TEMPERATURE, use_bias_correction_kl=False,
        max_completion_length=LONGEST, epsilon=0.2, bf16=False,
    )  # fmt: skip
    lm = model.backbone.lm
    trainer = GRPOTrainer(
        lm, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=_prompts(),
        processing_class=model.tokenizer,
    )  # fmt: skip
    trainer.beta = beta  # given beforehand, it would load a reference
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.training = True  # it asks the model which mode it is in; the layers stay in evaluation mode
    return trainer._compute_loss(trainer.model, inputs), trainer.model


def _prompts():
    import datasets

    return datasets.Dataset.from_list([{"prompt": "3 ; + 4"}] * 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_later", [False, True], ids=["first update", "a later one"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_losses_are_those_of_trl(tmp_path, kind, is_later):
    beta = 0.1
    model = tiny_model(Cot())
    policy, rollouts, rewards = samples(model)
    batch = policy.batch(rollouts)
    log_probs = policy.replay(model, batch)
    reference = policy.replay(tiny_model(Cot(), seed=1), batch).detach()
    noise = 0.3 * torch.randn(len(log_probs), generator=torch.Generator().manual_seed(0))
    old = log_probs.detach() + noise if is_later else None

    lengths = torch.tensor(batch.n_targets)
    args = arguments_of(
        tmp_path, {"algorithm": "grpo", "beta": beta, "loss_type": kind, "num_generations": G, "use_cpu": True}
    )
    gains = advantages(rewards, G, "group").repeat_interleave(lengths)
    weights = weights_of(lengths, kind, len(rollouts), int(lengths.sum()), LONGEST)
    loss, _ = policy_loss(log_probs, Played(gains, weights, old, reference), args)
    loss.backward()
    ours = [p.grad.clone() for p in model.backbone.lm.parameters() if p.grad is not None]
    model.zero_grad()

    theirs, lm = their_loss(model, rollouts, rewards, reference, old, kind, beta)
    theirs.backward()
    assert_close(loss, theirs)
    assert_close(ours, [p.grad for p in lm.parameters() if p.grad is not None], 1e-4)

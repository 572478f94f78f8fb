"""HRPO and soft thinking: section 9 of hrpo.md by number, and what is fed without training."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from innerloop import Cot, GrpoTrainer, Hrpo, InputError, LatentModel, SoftThinking
from innerloop.config.hybrid import Hybrid
from innerloop.engine.rollouts import WritingPolicy
from innerloop.passes.hybrid import Gate, HybridFeed, perturbed
from innerloop.train.policy_loss import Played, policy_loss
from tests.close import assert_close
from tests.models import chain_examples, tiny_model
from tests.test_grpo import TASK, arguments, by_length, logged, weights

QUESTIONS = ["3 ; + 4", "1 ; * 2 ; - 1 ; + 3", "2 ; + 1 ; - 4"]
TAU = 0.7
OPEN = Hrpo(r_min=0.5, r_max=0.9)
SOFT = SoftThinking(stop_after=0)
NOISY = SoftThinking(stop_after=0, noise=0.5)
MIXING = {"hrpo": OPEN, "sum": Hrpo(latent_norm="sum"), "match": Hrpo(latent_norm="match_token"), "soft": SOFT}
MIXING |= {"noisy": NOISY}


def played(method, arch="llama", samples=3, seed=0):
    """Return a model, its policy and rollouts, some of which have written the mark."""
    model = tiny_model(method, arch, seed)
    bias = model.backbone.lm.get_output_embeddings()
    with torch.no_grad():  # the mark comes up in the middle of many texts
        mark = model.encoder.answer_prefix_ids()[0]
        bias.weight[mark] = bias.weight.mean(0) * 2 + bias.weight[mark]
    policy = WritingPolicy(model, TAU)
    return model, policy, policy.roll_out(QUESTIONS, samples, seed=1, max_new_tokens=9)


def thought(model, one):
    """Return how many tokens of a rollout are fed with a latent: those before the mark is there, but not the last."""
    texts = [model.tokenizer.decode(one.ids[: k + 1]) for k in range(len(one.ids) - 1)]
    return sum("###" not in text for text in texts)


def stored(rollouts):
    return torch.tensor([value for one in rollouts for value in one.log_probs])


def n_fed(one):
    return 0 if one.generation.fed is None else len(one.generation.fed)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("method", MIXING.values(), ids=MIXING)
def test_2_a_replay_has_the_log_probabilities_of_the_rollout(method, arch):
    model, policy, rollouts = played(method, arch)
    replayed = policy.replay(model, policy.batch(rollouts))
    torch.testing.assert_close(replayed, stored(rollouts), atol=1e-4, rtol=0)
    alone = torch.cat([policy.replay(model, policy.batch([one])) for one in rollouts])
    torch.testing.assert_close(alone, stored(rollouts), atol=1e-4, rtol=0)
    plain = policy.replay(model, policy.batch(rollouts), is_reference=True)
    assert (plain - replayed).abs().max() > 1e-2  # what was fed matters


def test_2_rows_of_unlike_company_write_the_same():
    model, _, rollouts = played(NOISY)
    again = WritingPolicy(model, TAU, batch_size=1).roll_out(QUESTIONS, 3, seed=1, max_new_tokens=9)
    assert [one.ids for one in again] == [one.ids for one in rollouts]


def gradients(model, policy, rollouts, batch):
    model.zero_grad()
    log_probs = policy.replay(model, batch)
    gains = torch.linspace(-1, 1, len(log_probs))
    loss, _ = policy_loss(log_probs, Played(gains, torch.full_like(gains, 0.1), None, log_probs.detach() - 0.1), ARGS)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.backbone.named_parameters() if p.grad is not None}


ARGS = arguments("unused", beta=0.1)


def never_thinks(batch):
    batch.fed.is_fed_BL.zero_()


@pytest.mark.parametrize("how", ["nothing thinks", "the gate is shut", "a = 1"])
def test_1_without_latents_it_is_plain_grpo_bit_for_bit(how):
    model, policy, rollouts = played(Hrpo(gate_eps=0.0, control="shut" if how == "the gate is shut" else "none"))
    batch = policy.batch(rollouts)
    if how == "nothing thinks":
        never_thinks(batch)
    if how == "a = 1":
        with torch.no_grad():
            model.hybrid.gate.openness.raw_D.fill_(1e4)
    cot = tiny_model(Cot())
    cot.backbone.load_state_dict(model.backbone.state_dict())
    plain = WritingPolicy(cot, TAU)
    loss, found = gradients(model, policy, rollouts, batch)
    expected, wanted = gradients(cot, plain, rollouts, plain.batch(rollouts))
    assert torch.equal(loss, expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_1_shut_it_answers_as_the_base_model():
    model = tiny_model(Hrpo(control="shut"))
    base = tiny_model(Cot())
    base.backbone.load_state_dict(model.backbone.state_dict())
    assert [g.ids for g in model.generate(QUESTIONS)] == [g.ids for g in base.generate(QUESTIONS)]


def test_3_the_gate_begins_where_the_card_says():
    gate = Gate(Hybrid(0.5, gate=(0.95, 0.99)), 64)
    kept = gate.openness.raw_D.sigmoid() ** 8
    assert kept.min() >= 0.95 - 1e-6
    assert kept.max() <= 0.99 + 1e-6
    assert_close(gate.openness().exp(), kept)
    assert Gate(Hybrid(0.5, gate=(1.0, 1.0)), 8).openness.raw_D.isfinite().all()
    for u, expected in [(0.99, 6.679), (0.98, 5.980), (0.95, 5.046)]:
        assert_close(Gate(Hybrid(0.5, gate=(u, u)), 1).openness.raw_D, [expected], 1e-3)


def test_4_shares_of_token_and_latent_fit():
    gate = Gate(Hybrid(0.5, gate=(0.5, 0.9)), 16)
    e, h = torch.randn(3, 16), torch.randn(3, 16)
    r, i = gate.keeps(e).sigmoid(), gate.lets(e).sigmoid()
    a = (-8 * softplus(-gate.openness.raw_D) * r).exp()
    assert_close(gate(e, h, torch.ones(3, dtype=torch.bool)), a * e + (1 - a**2).sqrt() * i * h)
    assert ((a > 0) & (a < 1)).all()
    assert ((-8 * softplus(-gate.openness.raw_D) * (r + 0.1)).exp() < a).all()


def test_5_latents_of_one_token_and_of_many():
    model = tiny_model(Hrpo())
    table = model.backbone.embed(torch.arange(8))
    sure = torch.full((1, len(model.tokenizer)), -1e9)
    sure[0, 5] = 0
    assert_close(model.hybrid.latents(model.backbone, sure, torch.tensor([5])), table[5:6])
    e, gate = table[5:6], model.hybrid.gate
    a, i = (gate.openness() * gate.keeps(e).sigmoid()).exp(), gate.lets(e).sigmoid()
    assert_close(gate(e, e, torch.ones(1, dtype=torch.bool)), (a + (1 - a**2 + 1e-8).sqrt() * i) * e)
    with torch.no_grad():
        model.backbone.lm.get_input_embeddings().weight[:8] = torch.eye(8, 32)
    even = torch.full((1, len(model.tokenizer)), -1e9)
    even[0, :4] = 0
    assert_close(model.hybrid.latents(model.backbone, even, torch.tensor([0])).norm(), 1.0)
    match = HybridFeed(Hybrid(0.5, norm="match_token"), model.backbone)
    assert_close(
        match.latents(model.backbone, even, torch.tensor([9])).norm(), model.backbone.embed(torch.tensor([9])).norm()
    )


def test_6_a_latent_moves_what_comes_after_it_alone():
    model, policy, rollouts = played(OPEN)
    one = next(one for one in rollouts if n_fed(one) >= 3)
    batch = policy.batch([one])
    before = policy.replay(model, batch).detach()
    batch.fed.latents_BLD[0, 2] += 5
    after = policy.replay(model, batch).detach()
    assert torch.equal(before[:3], after[:3])
    assert (before[3] != after[3]).item()
    batch.fed.is_fed_BL[0, 2] = False
    off = policy.replay(model, batch).detach()
    batch.fed.latents_BLD[0, 2] += 5
    assert torch.equal(off, policy.replay(model, batch).detach())
    batch.fed.latents_BLD[0, -1] += 5
    batch.fed.is_fed_BL[0, -1] = True
    assert torch.equal(off, policy.replay(model, batch).detach())


def test_7_gates_learn_from_latents_alone():
    model, policy, rollouts = played(OPEN)
    batch = policy.batch(rollouts)
    assert not batch.fed.latents_BLD.requires_grad
    gradients(model, policy, rollouts, batch)
    assert all(p.grad.abs().sum() > 0 for p in model.hybrid.parameters())
    never_thinks(batch)
    gradients(model, policy, rollouts, batch)
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.hybrid.parameters())


def test_11_the_mark_and_what_follows_are_fed_as_they_are():
    model, policy, rollouts = played(OPEN, samples=8)
    assert [n_fed(one) for one in rollouts] == [thought(model, one) for one in rollouts]
    assert any(0 < n_fed(one) < len(one.ids) - 1 for one in rollouts)
    batch = policy.batch(rollouts)
    assert batch.fed.is_fed_BL.sum(1).tolist() == [n_fed(one) for one in rollouts]


def trainer_of(folder, model, **settings):
    settings = {"temperature": TAU, "beta": 0.01, **settings}
    return GrpoTrainer(model, arguments(folder, **settings), list(chain_examples(16, 3)), None, TASK, (), [by_length])


@pytest.mark.parametrize("method", [OPEN, NOISY], ids=["hrpo", "noisy"])
def test_it_trains_saves_and_resumes(tmp_path, method):
    whole = tiny_model(method)
    trainer_of(tmp_path / "whole", whole).train()
    saved = LatentModel.from_pretrained(tmp_path / "whole/checkpoint")
    assert [g.ids for g in saved.generate(QUESTIONS)] == [g.ids for g in whole.generate(QUESTIONS)]
    first = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path / "cut", tiny_model(method), **first, max_steps=2).train()
    again = tiny_model(method)
    trainer_of(tmp_path / "cut", again, **first).train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole), weights(again))
    if method is OPEN:
        assert all(0 < ratio < 1 for ratio in logged(tmp_path / "whole", "hidden_ratio"))


def test_gates_learn_faster_than_the_decoder(tmp_path):
    trainer = trainer_of(tmp_path, tiny_model(OPEN), learning_rate=1e-4)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    gate = trainer.model.hybrid.gate
    assert_close(rates[id(gate.openness.raw_D)], 2e-2)
    assert_close(rates[id(gate.lets.weight)], 2e-3)
    assert_close(rates[id(next(trainer.model.backbone.parameters()))], 1e-4)


def test_a_rollout_serves_one_step(tmp_path):
    with pytest.raises(InputError, match=r"what 'hrpo' is fed depends on its weights.*set num_iterations to 1"):
        trainer_of(tmp_path, tiny_model(OPEN), num_iterations=2)


def test_noise_leaves_the_token_that_was_drawn_the_largest():
    p = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).expand(4000, -1)
    drawn = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    ids = torch.multinomial(p, 1, replacement=True, generator=torch.Generator().manual_seed(1))[:, 0]
    shares, mixed = p.topk(3, dim=-1)
    found, tokens = perturbed(shares, mixed, p, ids, drawn, 1.0)
    assert torch.equal(tokens.gather(1, found.argmax(1, keepdim=True))[:, 0], ids)
    gumbel = -(-torch.rand(4000, 3, generator=torch.Generator().manual_seed(2)).log()).log()
    assert_close(found.mean(0), (shares.log() + gumbel).softmax(-1).mean(0), 0.05)  # as if drawn by the noise
    cold, _ = perturbed(shares, mixed, p, ids, drawn, 1e-3)
    assert cold.max(1).values.mean() > 0.99
    rare = torch.full((4000,), 3)
    assert (perturbed(shares, mixed, p, rare, drawn, 1.0)[1][:, -1] == 3).all()


def test_soft_thinking_needs_no_training_and_with_one_token_it_is_the_base_model():
    base = tiny_model(Cot())
    one, ten = (LatentModel(base.backbone, base.tokenizer, replace(SOFT, top_k=k)).eval() for k in (1, 10))
    wanted = [g.ids for g in base.generate(QUESTIONS)]
    assert [g.ids for g in one.generate(QUESTIONS)] == wanted
    assert [g.ids for g in ten.generate(QUESTIONS)] != wanted


@pytest.mark.parametrize("control", ["none", "shut"])
def test_the_cold_stop_writes_the_mark_after_calm_tokens(control):
    method = SoftThinking(stop_after=3, stop_entropy=100.0, control=control)
    model = tiny_model(method)
    mark = list(model.encoder.answer_prefix_ids())
    for one in model.generate(QUESTIONS, max_new_tokens=12):
        if len(one.ids) > 2 + len(mark) and not set(mark) & set(one.ids[:2]):
            assert one.ids[2 : 2 + len(mark)] == mark
    never = tiny_model(replace(method, stop_entropy=0.0)).generate(QUESTIONS, max_new_tokens=12)
    off = tiny_model(replace(method, stop_after=0)).generate(QUESTIONS, max_new_tokens=12)
    assert [one.ids for one in never] == [one.ids for one in off]


@pytest.mark.parametrize("control", ["argmax", "swap"])
def test_controls_feed_something_else(control):
    model, other = tiny_model(OPEN), tiny_model(replace(OPEN, control=control))
    other.load_state_dict(model.state_dict())
    logits = torch.randn(3, len(model.tokenizer))
    ids = logits.argmax(-1)
    found = other.hybrid.latents(model.backbone, logits, ids)
    own = model.hybrid.latents(model.backbone, logits, ids)
    assert_close(found, own.roll(1, 0) if control == "swap" else model.backbone.embed(ids[:, None])[:, 0])


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"r_min is 0\.99, but must be at most r_max"):
        Hrpo(r_max=0.9)
    with pytest.raises(InputError, match="stops thinking by a rule, which is not drawn: set stop_after to 0"):
        WritingPolicy(tiny_model(SoftThinking()))
    with pytest.raises(InputError, match="take one beam"):
        tiny_model(OPEN).generate(QUESTIONS, beams=2)
    assert math.isfinite(tiny_model(OPEN).loss(chain_examples(2)).loss.item())

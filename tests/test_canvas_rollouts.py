"""Rollouts of canvases: commits tell what every pass did, and one pass estimates how likely what was written is."""

from functools import partial

import pytest
import torch

from innerloop import BlockDiffusion, Cot, Dream, InputError, Llada, Slr
from innerloop.engine.canvas_rollouts import OnePassPolicy, fill_canvases
from innerloop.methods.denoise.commits import canvases_of
from innerloop.train.algorithms import arguments_of
from innerloop.train.policies import policy_for
from tests.models import tiny_model
from tests.test_grpo import by_length, make_trainer
from tests.test_trainer import logged

close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
QUESTIONS = ["3 ; + 4", "1 ; * 2 ; - 1 ; + 3", "2 ; + 1 ; - 4"]
G = 12
RULES = {
    "confidence": Llada(gen_length=G, sampler={"steps": 5}),
    "blocks": Llada(gen_length=G, sampler={"block_length": 4, "commit": "margin"}),
    "random": Llada(gen_length=G, sampler={"commit": "random", "steps": 4}),
    "threshold": Llada(gen_length=G, sampler={"commit": "threshold", "threshold": 0.3}),
    "remdm": Llada(gen_length=G, sampler={"commit": "remdm", "steps": 8, "remask": {"cap": 0.3}}),
    "origin": Dream(gen_length=G, sampler={"steps": 5}),
    "cached": BlockDiffusion(gen_length=G, block_length=4),
}
ESTIMATED = {"llada": Llada(gen_length=G), "dream": Dream(gen_length=G), "soft": Llada.presets["soft_masked"]}


def filled(model, samples=2, **options):
    return fill_canvases(
        model,
        QUESTIONS,
        **{"samples": samples, "seed": 1, "max_new_tokens": 64, "temperature": 0.8, "batch_size": 4} | options,
    )


@pytest.mark.parametrize("name", RULES)
def test_commits_tell_what_every_pass_did(name):
    model = tiny_model(RULES[name])
    mask_id = model.method.mask_id(model.encoder)
    for one in filled(model):
        states = list(canvases_of(one.commits, G, mask_id))
        assert states[-1][: len(one.ids)].tolist() == list(one.ids)
        assert len(one.commits) == one.generation.cost.loops
        for state, commit in zip(states, one.commits):
            assert set(commit.places) <= set(commit.asked)
            assert name == "remdm" or (state[list(commit.asked)] == mask_id).all()


def test_places_stand_in_the_order_of_their_confidence():
    model = tiny_model(Llada(gen_length=G, sampler={"steps": 1}))
    (one, *_) = filled(model, samples=1)
    assert sorted(one.commits[0].places) == list(range(G)) != list(one.commits[0].places)


def test_samples_do_not_depend_on_their_company():
    model = tiny_model(Llada(gen_length=G))
    alone = [one.commits for one in filled(model, batch_size=1)]
    assert [one.commits for one in filled(model, batch_size=6)] == alone


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ESTIMATED)
def test_one_pass_scores_what_was_written_behind_a_question_with_masks(name, arch):
    """dcolt.md, section 8: diffu-GRPO."""
    model = tiny_model(ESTIMATED[name], arch)
    policy = OnePassPolicy(model, 0.8, 4, p_mask_prompt=0.5)
    rollouts = policy.roll_out(QUESTIONS, 2, seed=1, max_new_tokens=64)
    replayed = policy.replay(model, policy.batch(rollouts))
    close(torch.cat([policy.replay(model, policy.batch([one])) for one in rollouts]), replayed)
    close(replayed, torch.cat([by_hand(model, one, 0.8) for one in rollouts]))
    replayed.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.backbone.parameters())


@torch.no_grad()
def by_hand(model, rollout, temperature):
    mask_id, n_prompt = model.method.mask_id(model.encoder), len(rollout.row)
    ids = rollout.row.ids() + [mask_id] * rollout.gen_length
    for k in rollout.hidden:
        ids[k] = mask_id
    n = len(ids)
    mask = {"attention_mask": torch.zeros(1, 1, n, n)}
    logits = model.backbone.lm(torch.tensor([ids]), **mask).logits[0] / temperature
    logits[:, model.suppressed_ids()] = -torch.inf
    first = n_prompt - int(model.method.shift)
    shown = logits[first : first + len(rollout.ids)].log_softmax(-1)
    return shown.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]


def test_the_share_of_the_question_that_is_masked_is_drawn_for_each_sample():
    model = tiny_model(Llada(gen_length=G))
    found = [OnePassPolicy(model, p_mask_prompt=p).roll_out(QUESTIONS, 3, 0, 64) for p in (0.0, 0.5, 1.0)]
    assert all(one.hidden == () for one in found[0])
    assert len({one.hidden for one in found[1]}) > 3
    assert all(len(one.hidden) == len(one.row) for one in found[2])
    masked = OnePassPolicy(model).batch(found[2][:1]).ids_BS
    assert masked.unique().tolist() == [model.method.mask_id(model.encoder)]


def test_a_canvas_learns_what_is_rewarded(tmp_path):
    model = tiny_model(Llada(gen_length=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(tmp_path, model, rewards=[by_length], max_steps=12, num_iterations=2).train()
    rewards = logged(tmp_path, "reward")
    assert rewards[-1] > rewards[0]
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method, settings, told",
    [
        (BlockDiffusion(gen_length=8, block_length=4), {}, "says nothing of 'block_diffusion'"),
        (Llada(gen_length=8, noise={"filler": "random"}), {}, "noise.filler=random"),
        (Cot(), {"p_mask_prompt": 0.2}, "p_mask_prompt is of canvases"),
        (Slr(), {"p_mask_prompt": 0.2}, "p_mask_prompt is of canvases"),
    ],
)
def test_what_has_no_estimate_is_refused(tmp_path, method, settings, told):
    args = arguments_of(tmp_path, {"algorithm": "grpo", "use_cpu": True, **settings})
    with pytest.raises(InputError, match=told):
        policy_for(tiny_model(method), args)

"""LOTUS' invariants (lotus.md, section 9).

1.  K_e = 0 == CoT with markers, R = 0 == pause tokens: tests/test_one_loop.py.
2.  kv with R == refeed with R - 1 (the logits: tests/test_one_loop.py), but L_step, which is read one pass earlier.
3.  A pass from the cache == an uncached pass over everything.
4.  h^(t) is a function of h^(t-1) alone.
5.  <bot> and the question are the same in every pass, and a latent does not depend on later ones.
6.  Replaced and shifted, latent q is exact from pass q + 1 on; R >= N == Coconut: tests/test_one_loop.py.
7.  == SLR with residual sum, and h^(R) = z_T - E: test_slr_equalities.py.
8.  Replaced == SpiralThinker's single block: test_spiralthinker_invariants.py.
9.  Empty blocks get no gradient from L_step, and step_weight has no effect on the states.
10. The number of passes: here in training, in test_lotus.py when answering.
11. On a chain task accuracy rises with R, and falls where R is smaller than in training.
"""

import dataclasses

import pytest
import torch

from innerloop import Chain, Coconut
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Lotus
from innerloop.passes.context import Context
from innerloop.passes.region import Region, RegionPass
from innerloop.text.row import ANSWER_PASS
from tests.methods.reference_lotus import LotusReference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    by_arch,
    change,
    gradients,
    on,
    passes,
    states,
    thought_of,
)

BASE = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5)  # MIXED has 3, 0, 1, 4, 2, 0 steps of 3 to 8 tokens
STAGES = [3, 0, 1, 2, 3, 1]

by_last_pass = pytest.mark.parametrize("last_pass", ["kv", "refeed"])


@pytest.mark.parametrize("n_loops", [1, 2, 4])
@by_arch
def test_2_refeeding_one_iteration_less_differs_in_the_pass_that_is_read_alone(arch, n_loops):
    kv = on(arch, change(BASE, max_loops=n_loops))
    refeed = on(arch, change(BASE, max_loops=n_loops - 1, last_pass="refeed"))
    one, other = kv.loss(MIXED).terms, refeed.loss(MIXED).terms
    assert_close(one["answer"], other["answer"], ROUNDED)
    assert abs(one["step"] - other["step"]) > 1e-4  # h^(R) and h^(R-1)
    rows = refeed.rows(MIXED)
    for row in rows:
        row.token_targets = [dataclasses.replace(readout, iteration=ANSWER_PASS) for readout in row.token_targets]
    assert_close(refeed(refeed.batch(rows)).terms["step"], one["step"], ROUNDED)


def region_pass(model, examples=MIXED):
    """The pass over the latents behind the cached prefix of a batch, and E (B, N, D)."""
    batch = model.batch(model.rows(examples))
    (prefix, prefix_mask), (region, _) = batch.columns(0), batch.columns(1)
    context = Context(model.backbone, len(batch))
    context.read(model.backbone.embed(batch.ids_BS[:, prefix]), prefix_mask)
    embeds = model.backbone.embed(batch.ids_BS[:, region])
    return RegionPass(context, Region(None, None), model.loop.weights, normed=True), embeds


@by_last_pass
@by_arch
@torch.no_grad()
def test_3_a_pass_from_the_cache_equals_an_uncached_pass_over_everything(arch, last_pass):
    model = on(arch, change(BASE, last_pass=last_pass))
    outputs = thought_of(model, MIXED).loop.outputs
    for i, question in enumerate(QUESTIONS):
        run = LotusReference(model).run(question, 3)
        for (_, output), states_ND in zip(outputs, run.states):
            assert_close(output[i], states_ND[1:], ROUNDED)


@by_arch
@torch.no_grad()
def test_4_starting_at_any_state_goes_on_as_from_the_beginning(arch):
    model = on(arch, BASE)
    f, first = region_pass(model)
    z = [first]
    for _ in range(5):
        z.append(model.loop.step(f, z[-1], first, 1)[0])
    for start in (1, 3):
        f, state = region_pass(model)[0], z[start]
        for t in range(start + 1, 6):
            state = model.loop.step(f, state, first, t)[0]
            assert torch.equal(state, z[t])


@by_arch
@torch.no_grad()
def test_4_a_state_that_stands_still_does_so_for_ever(arch):
    model = on(arch, change(BASE, loop={"scale": 0.02}, max_loops=40))
    states_T = [state for _, state in thought_of(model, MIXED).loop.states]
    assert (states_T[1] - states_T[0]).abs().max() > 1e-4
    for state in states_T[30:]:
        assert_close(state, states_T[-1], 1e-12 if arch == "gpt2" else ROUNDED)


@by_arch
@torch.no_grad()
def test_5_bot_and_the_question_are_the_same_in_every_pass(arch):
    slow = LotusReference(model := on(arch, BASE))
    run = slow.run(QUESTIONS[0], 3)
    every = [slow.read(torch.cat([run.prefix, x]))[0][: len(run.prefix)] for x in run.inputs]
    assert len(every) == 4 and all(torch.equal(one, every[0]) for one in every)
    assert_close(thought_of(model, MIXED[:1]).prompt[0][0], every[0], ROUNDED)


@by_arch
@torch.no_grad()
def test_5_a_latent_does_not_depend_on_the_inputs_of_later_ones(arch):
    model = on(arch, BASE)
    f, x = region_pass(model)
    before = f(x, 1)
    for q in (0, 4, 10):
        moved_x = x.clone()
        moved_x[:, q + 1 :] *= torch.linspace(0.5, 2.0, x.shape[2])
        after = f(moved_x, 1)
        assert_close(after[:, : q + 1], before[:, : q + 1], 1e-12)
        assert (after[:, q + 1] - before[:, q + 1]).abs().amax(1).min() > 1e-3


@by_arch
@torch.no_grad()
def test_6_replaced_and_shifted_latent_q_is_coconuts_from_pass_q_plus_one_on(arch):
    n = 6
    model = on(arch, Lotus(n_blocks=1, latents_per_block=n, max_loops=n + 2, loop={"residual": "none", "shift": True}))
    slow, question = LotusReference(model), QUESTIONS[0]
    run = slow.run(question, 1)
    slow.method = Coconut(curriculum={"max_stage": 1}, latents_per_step=n)
    sequential = slow.coconut(run.prefix, n)[len(run.prefix) : -1]
    for t, x_ND in enumerate(run.inputs[1:], 1):
        assert_close(x_ND[:t], sequential[:t], ROUNDED)
        assert t >= n or (x_ND[t:] - sequential[t:]).abs().amax(1).min() > 1e-3  # R < N is PCCoT's approximation
    ours = thought_of(model, MIXED[:1]).loop.states
    for (_, z), x_ND in zip(ours, run.inputs[1:]):
        assert_close(z[0], x_ND, ROUNDED)


@pytest.mark.parametrize("offset", [-1, 0])
def test_9_empty_blocks_get_no_gradient_from_l_step(offset):
    """In the pass that is read, the gradient is exactly zero but where a token is expected."""
    model = on("gpt2", change(BASE, answer_weight=0.0, readout_offset=offset))
    for example in MIXED:
        expected = {place for _, place, _ in LotusReference(model).shown(example, 3)}
        with states(model) as seen:
            model.loss([example]).loss.backward()
        bot, *latents = torch.cat([gradient_at(seen[0])[:, -1:], gradient_at(seen[-1])[:, :12]], dim=1)[0].abs().amax(1)
        assert [norm > 0 for norm in (bot, *latents)] == [place in expected for place in range(13)]
        model.zero_grad()


def gradient_at(states_BLD):
    return torch.zeros_like(states_BLD) if states_BLD.grad is None else states_BLD.grad


def test_9_passes_after_the_last_step_get_no_gradient_if_each_is_supervised_by_itself():
    model = on("gpt2", change(BASE, answer_weight=0.0, supervision="per_iter"))
    for example in MIXED:
        with states(model) as seen:
            model.loss([example]).loss.backward()
        reached = [gradient_at(pass_).abs().max() > 0 for pass_ in seen[1:]]
        assert reached == [0 < len(example.steps) >= t for t in range(4)]
        model.zero_grad()


def test_9_the_weight_of_l_step_has_no_effect_on_the_states():
    models = [on("gpt2", change(BASE, step_weight=weight)) for weight in (0.0, 0.25, 0.5)]
    for one, other in zip(models[0].answer_logits(MIXED), models[2].answer_logits(MIXED)):
        assert torch.equal(one, other)
    none, half, whole = (gradients(model, model.loss(MIXED).loss) for model in models)
    assert_same_gradients({name: (none[name] + whole[name]) / 2 for name in none}, half)


@by_last_pass
@pytest.mark.parametrize("n_loops", [1, 2, 5])
def test_10_the_number_of_passes_is_the_cards_whatever_m(n_loops, last_pass):
    model = on("gpt2", change(BASE, max_loops=n_loops, last_pass=last_pass))
    for example in MIXED:
        with passes(model) as seen:
            model.loss([example])
        assert len(seen) == 1 + n_loops + 1 + (last_pass == "refeed")


def trained(n_loops, n_steps=1100):
    """LOTUS trained on chains of three operations, block by block, at most ``n_loops`` iterations; and new chains."""
    task = Chain(n_ops=3, n_train=2000, n_valid=50, n_test=100)
    settings = {"type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    method = Lotus(n_blocks=3, latents_per_block=6, max_loops=n_loops, step_weight=1.0, curriculum={"length": 220})
    examples, generator = task.examples("train"), torch.Generator().manual_seed(0)
    settings |= {"num_attention_heads": 4, "initializer_range": 0.1}
    model = LatentModel.from_scratch(settings, examples, method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps, pct_start=0.1)
    for step in range(n_steps):
        chosen = torch.randint(len(examples), (64,), generator=generator).tolist()
        optimizer.zero_grad()
        model.loss([examples[i] for i in chosen], method.stage_at(step, steps_per_epoch=1)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
    return model, task.examples("test")


def accuracy(model, examples, n_loops):
    generations = model.generate([example.question for example in examples], loops=n_loops, max_new_tokens=4)
    return sum(one.answer == example.answer for one, example in zip(generations, examples)) / len(examples)


@pytest.mark.slow
def test_11_accuracy_rises_with_the_iterations_of_training_and_falls_with_fewer_when_answering():
    (deep, examples), (shallow, _) = trained(3), trained(1)
    assert accuracy(deep, examples, 3) > 0.9 > accuracy(shallow, examples, 1) + 0.4
    assert accuracy(deep, examples, 0) < 0.5 and accuracy(deep, examples, 1) < 0.5

"""Breadth: several starts of one loop, whose they are, what they cost and which counts (stable_loops.md, 3 and 7)."""

import math

import pytest
import torch

from innerloop import Chain, Coconut, Cot, InputError, LatentModel, Looped, Lotus, Pccot, Slr, SpiralThinker
from innerloop import TestTimeCompute as Attempts
from innerloop.decoder.cost import Cost
from innerloop.engine.generation import Generation
from innerloop.loop.hooks import LoopHook, hooked
from innerloop.loop.stabilize import random_states
from innerloop.loop.starts import RandomStarts, truncated_normal
from innerloop.measure import evaluate
from tests.close import ROUNDED, assert_close
from tests.methods.reference import Reference
from tests.methods.tools import QUESTIONS, lean_towards_end, sharp_model
from tests.models import chain_examples, tiny_model

B = {"residual": "B", "alpha": 0.6, "rescale": "rms", "time": "lookup"}
LOOPS = {
    "slr": Slr(n_slots=3, max_loops=4, loop=B),
    "recalled": Slr(n_slots=3, max_loops=4, loop={**B, "residual": "A"}),
    "kv_last": Slr(n_slots=3, max_loops=3, answer_from="kv_last", h0="forward"),
    "stops": Slr(n_slots=3, max_loops=6, loop=B, stop={"rule": "delta", "threshold": 0.3}),
    "lotus": Lotus(n_blocks=2, latents_per_block=2, max_loops=3),
    "pccot": Pccot(n_slots=3, max_loops=3),
}
by_loop = pytest.mark.parametrize("name", LOOPS)
ASKED, N = QUESTIONS[:4], 8


def made(name: str) -> LatentModel:
    return lean_towards_end(sharp_model(LOOPS[name]), 1.0)


def told(found) -> list:
    return [(one.ids, pytest.approx(one.change, rel=1e-6), one.cost.passes, one.cost.loops) for one in found]


@by_loop
def test_one_start_is_no_breadth_and_the_first_of_several_is_the_methods_own(name):
    model = made(name)
    plain = model.generate(ASKED, max_new_tokens=N)
    one, several = (model.generate(ASKED, max_new_tokens=N, starts=n) for n in (1, 3))
    assert [a.ids for a in one] == [a.ids for a in several[::3]] == [a.ids for a in plain]
    assert [a.cost.passes for a in several[::3]] == [a.cost.passes for a in plain]
    assert all(a.change is None for a in one) and all(0 < a.change < math.inf for a in several)
    assert len({a.change for a in several}) > len(ASKED)


@by_loop
def test_a_start_depends_on_the_seed_its_question_and_its_number_alone(name):
    model = made(name)
    alone = model.generate(ASKED, starts=3, batch_size=1, max_new_tokens=N, seed=1)
    assert told(model.generate(ASKED, starts=3, batch_size=5, max_new_tokens=N, seed=1)) == told(alone)
    assert told(model.generate(ASKED, starts=2, max_new_tokens=N, seed=1)) == told(
        [one for i, one in enumerate(alone) if i % 3 < 2]
    )
    other = model.generate(ASKED, starts=3, max_new_tokens=N, seed=2)
    assert [a.change == pytest.approx(b.change, rel=1e-6) for a, b in zip(other, alone)] == [True, False, False] * 4


def test_one_question_twice_has_starts_of_its_own_each_time():
    model = made("slr")
    found = model.generate([ASKED[0]] * 2, starts=2, max_new_tokens=N)
    assert found[0].change == pytest.approx(found[2].change) and found[1].change != pytest.approx(found[3].change)


@torch.no_grad()
@pytest.mark.parametrize("name", ["slr", "recalled"])
def test_the_loop_begins_at_the_drawn_state_and_recalls_its_own(name):
    """The slow path: z_0 is h_0's size times the draw; residual A still mixes with h_0."""
    model = made(name)
    method, slow, never = model.method, Reference(model), model.suppressed_ids()
    found = model.generate(ASKED[:2], starts=2, max_new_tokens=1, seed=5, likelihoods=True)
    for i, question in enumerate(ASKED[:2]):
        prefix = slow.embed([*slow.question(question), *slow.marker("<bot>")])
        first = slow.embed(slow.marker("<lat>") * 3)
        z = first.square().mean(-1, keepdim=True).sqrt() * truncated_normal((5, i, 1), first.shape)
        changes = []
        for t in range(1, method.max_loops + 1):
            states, _ = slow.read(torch.cat([prefix, z + slow.e(t)]))
            new = slow.mix(slow.rho(states[-3:]), first, z)
            changes.append(float((new - z).norm() / new.norm()))
            z = new
        logits = slow.read(torch.cat([prefix, z, slow.embed(slow.marker("<eot>"))]))[1][-1]
        logits[never] = -torch.inf
        one = found[2 * i + 1]
        assert one.ids == [int(logits.argmax())]
        assert_close(one.log_likelihood, float(logits.log_softmax(-1).max()), ROUNDED)
        assert_close(one.change, sum(changes[-3:]) / 3, ROUNDED)


def test_draws_are_normal_up_to_two_deviations_and_do_not_depend_on_padding():
    draws = truncated_normal((1, 2, 3), (400, 50))
    assert draws.abs().max() <= 2 and abs(draws.mean()) < 0.02 and abs(draws.std() - 0.8796) < 0.02
    assert torch.equal(truncated_normal((1, 2, 3), (7, 50)), draws[:7])
    assert not torch.equal(truncated_normal((1, 2, 4), (7, 50)), draws[:7])


def test_without_a_seed_the_loop_is_itself_bit_for_bit():
    model, seen = made("slr"), []

    class Look(LoopHook):
        def on_end(self, state, ran):
            seen.append(state)
            return state

    with hooked(model.loop, Look()):
        plain = model.answer_logits(chain_examples(3))
        with hooked(model.loop, RandomStarts([None] * 3)):
            same = model.answer_logits(chain_examples(3))
    assert torch.equal(seen[0], seen[1]) and all(map(torch.equal, plain, same))


def test_starts_have_the_type_of_the_models_states():
    model = tiny_model(LOOPS["slr"])
    model.backbone.lm.bfloat16()
    assert len(model.generate(ASKED[:2], starts=2, max_new_tokens=2)) == 4


def test_every_start_is_read_thought_about_and_charged():
    model = made("slr")
    plain = model.generate(ASKED, max_new_tokens=1)
    found = model.generate(ASKED, starts=3, max_new_tokens=1)
    for i, one in enumerate(plain):
        for other in found[3 * i : 3 * i + 3]:
            assert (other.cost.passes, other.cost.loops) == (one.cost.passes, one.cost.loops)
            assert (other.cost.positions, other.cost.flops) == (one.cost.positions, one.cost.flops)


def test_a_share_of_the_training_rows_begins_at_random_and_recalls_its_own_start():
    torch.manual_seed(0)
    state = 0.3 * torch.randn(400, 2, 8)
    begun = random_states(state, 0.25)
    moved = (begun != state).flatten(1)
    assert bool((moved.any(1) == moved.all(1)).all()) and 0.2 < moved.any(1).float().mean() < 0.3
    size = state.square().mean(-1, keepdim=True).sqrt()
    drawn = (begun / size)[moved.any(1)]
    assert drawn.abs().max() <= 2 and abs(drawn.std() - 0.8796) < 0.05
    method, fed = Slr(n_slots=3, max_loops=1, loop={**B, "residual": "A", "random_starts": 1.0}), []
    model = sharp_model(method, "llama")

    class Look(LoopHook):
        def on_input(self, state, iteration, rows):
            fed.append(state)
            return torch.zeros_like(state)  # what is recalled is all that differs then

    with hooked(model.loop, Look()):
        plain = model.loss(chain_examples(3)).loss
        assert_close(model.train().loss(chain_examples(3)).loss, plain)
    assert not torch.equal(fed[0], fed[1])


# What counts


@pytest.mark.parametrize(
    ("pick", "chosen"), [("convergence", 2), ("vote", 1), ("likelihood", 3)], ids=lambda value: str(value)
)
def test_an_answer_is_chosen_by_rest_by_vote_or_by_likelihood_in_whatever_order(pick, chosen):
    given = [("3", 0.9, -2.0), ("1", 0.5, -3.0), ("2", 0.1, -4.0), ("1", 0.7, -1.0), (None, 0.01, -0.1)]
    tried = [Generation(f"### {a}" if a else "?", a, Cost(), change=c, log_likelihood=p, ids=[1]) for a, c, p in given]
    attempts = Attempts(starts=5, pick=pick)
    assert attempts.choose(Chain(), tried)[0] is tried[chosen]
    backwards = attempts.choose(Chain(), tried[::-1])[0]
    assert backwards is tried[chosen if pick != "vote" else 3] and backwards.answer == given[chosen][0]


@pytest.mark.parametrize("pick", ["convergence", "vote", "likelihood"])
def test_evaluation_counts_all_starts_and_picks_one(pick):
    model, examples, attempts = made("slr"), chain_examples(4), Attempts(starts=3, pick=pick)
    found = evaluate(model, Chain(), examples, N, attempts=attempts, seed=2)
    tried = attempts.answer(model, [one.question for one in examples], seed=2, max_new_tokens=N)
    for prediction, three in zip(found, tried, strict=True):
        assert len(prediction.samples) == len(three) == 3
        assert prediction.cost.passes == sum(one.cost.passes for one in three)
        assert prediction.text == attempts.choose(Chain(), three)[0].text
    assert attempts.asked(2) == {"starts": 3, "pick": pick, "seed": 2}
    assert "of 3 starts" in attempts.told and not attempts.is_plain


def test_a_trace_is_of_its_own_start():
    found = made("slr").generate(ASKED[:1], starts=2, max_new_tokens=2, trace=True)
    for one in found:
        last = [float(entry.delta) for entry in one.trace.iterations[-3:]]
        assert_close(one.change, sum(last) / 3, ROUNDED)
    assert len({float(one.trace.iterations[0].delta) for one in found}) == 2


@pytest.mark.parametrize(
    "method",
    [
        Cot(),
        Coconut(),
        Looped(),
        Slr(max_loops=0),
        Slr(loop_scope="append"),
        Slr(loop_scope="all"),
        Slr(loop={"time": "none"}, fixed_point={"solver": "plain"}),
        SpiralThinker(pattern="odd", latents_per_block=2, max_loops=2),
    ],
    ids=lambda method: method.name,
)
def test_methods_without_latents_that_begin_together_are_refused(method):
    with pytest.raises(InputError, match=r"several starts are for latents .* leave starts out"):
        tiny_model(method).generate(ASKED[:1], starts=2)

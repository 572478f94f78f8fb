"""ReMDM: the invariants of remdm.md, section 9, by their numbers."""

import math

import numpy as np
import pytest

from innerloop import BlockDiffusion, InputError, Llada
from innerloop.methods.denoise.canvas import Canvas
from innerloop.methods.denoise.remasking import RemaskSettings, sigma_max, stay, weights
from innerloop.methods.denoise.settings import SamplerSettings
from tests.methods import reference_blocks as plain_blocks
from tests.methods import reference_denoise as plain
from tests.methods.test_denoise_sampling import QUESTIONS, TRUTH, G, assert_equal, fill, is_flat, knows, model_of
from tests.models import tiny_model

GRID = [(k / 16, (k + 1) / 16) for k in range(16)] + [(0.9, 0.9)]
ALL_RULES = {
    "mdlm": {"cap": 0.0},
    "cap": {"cap": 0.1},
    "rescale": {"cap": 1.0, "rescale": 0.5},
    "by confidence": {"cap": 0.2, "confidence": "sum"},
    "by confidence, mean": {"cap": 0.2, "confidence": "mean"},
    "switch": {"cap": 0.2, "when": "switch", "t_switch": 0.6},
    "loop": {"cap": 0.1, "when": "loop"},
    "loop by confidence": {"cap": 0.1, "when": "loop", "confidence": "mean"},
}
by_rule = pytest.mark.parametrize("remask", ALL_RULES.values(), ids=ALL_RULES)


def sampler_of(steps, **remask):
    return SamplerSettings(commit="remdm", steps=steps, remask=RemaskSettings(**remask))


@pytest.mark.parametrize("a_t, a_s", GRID)
def test_masses_are_probabilities_and_the_marginal_is_that_of_the_schedule(a_t, a_s):
    """1, 2, 3, 4, 6."""
    most = sigma_max(a_t, a_s)
    for sigma in np.linspace(0, most, 5):
        staying = stay(a_t, a_s, sigma)
        assert 0 <= staying <= 1
        assert (1 - sigma) * a_t + (1 - staying) * (1 - a_t) == pytest.approx(a_s)
        if a_s < 1:  # an MDLM step, then a corrector
            plain = stay(a_t, a_s, 0)
            assert plain * (1 - sigma * a_s / (1 - a_s)) + (1 - plain) * sigma == pytest.approx(staying)
    assert stay(a_t, a_s, 0) == pytest.approx((1 - a_s) / (1 - a_t))
    if a_t and most < 1:
        assert (1 - a_s) - (most + 0.01) * a_t < 0  # more would be no probability
    assert sigma_max(a_t, 1.0) == 0 or a_t == 0
    assert sigma_max(0.0, a_s) == 1
    if a_t == 0.5 * a_s:
        assert (a_s - a_t) / a_t == 1  # forward-backward


def test_the_loop_is_in_balance():
    """5."""
    sigma, a_on = 0.02, 0.9
    assert sigma_max(a_on, a_on) == pytest.approx(0.1111, abs=1e-4)
    assert sigma * a_on == pytest.approx((1 - stay(a_on, a_on, sigma)) * (1 - a_on))
    sampler, length, steps, counts = sampler_of(60, cap=sigma, when="loop"), 200, 60, np.zeros(2)
    in_loop = sampler.remask.alphas(steps)[1]
    for seed in range(20):
        canvas = Canvas(sampler, length, 0, 1, [seed])
        while not canvas.is_done:
            step, before, asked = canvas.step, canvas.tokens_G.copy(), canvas.asked()
            canvas.commit(np.full(len(asked), 5), np.full(len(asked), 0.5))
            if in_loop[step] and canvas.step == step + 1:  # no step between that fills nothing
                counts += (before == 0)[asked].sum(), ((before != 0) & (canvas.tokens_G == 0)).sum()
    expected = 20 * in_loop.sum() * sigma * a_on * length
    assert counts == pytest.approx([expected] * 2, abs=4 * math.sqrt(expected))


@by_rule
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 64])
def test_no_mask_is_left_and_one_that_knows_the_answer_gives_it(remask, steps):
    """7, 8, 10, 13."""
    canvas, committed = fill(sampler_of(steps, **remask), knows)
    assert canvas.tokens_G.tolist() == TRUTH.tolist()
    assert canvas.n_passes == len(committed) <= steps
    alphas, is_on = RemaskSettings(**remask).alphas(steps)
    assert (len(alphas), len(is_on), alphas[0], alphas[-1]) == (steps + 1, steps, 0.0, 1.0)
    assert (np.diff(alphas) >= -1e-12).all()


@pytest.mark.parametrize("remask", [{"cap": 0.1}, {"cap": 1.0, "rescale": 0.3}, {"cap": 0.05, "when": "loop"}], ids=str)
def test_the_share_of_tokens_follows_the_schedule(remask):
    """3."""
    steps, length, n = 30, 64, 40
    found, alphas = np.zeros(steps), RemaskSettings(**remask).alphas(steps)[0][:-1]

    class Watched(Canvas):
        def _again(self):  # asked for once in each step, passes that are not made among them
            if self.step < steps:
                found[self.step] += (self.tokens_G != 0).mean() / n
            return super()._again()

    for seed in range(n):
        canvas = Watched(sampler_of(steps, **remask), length, 0, 1, [seed])
        while not canvas.is_done:
            canvas.commit(np.full(len(canvas.asked()), 5), np.full(len(canvas.asked()), 0.5))
    spread = 4 * np.sqrt(np.maximum(alphas * (1 - alphas), 0.01) / (length * n))
    assert (np.abs(found - alphas) <= spread).all()


def test_without_sigma_it_is_mdlm_token_by_token():
    """2, 12: with the same numbers; never masked again, and a switch that never turns on."""
    model = model_of(Llada(gen_length=G))
    found = []
    for remask in ({"cap": 0.0}, {"rescale": 0.0}, {"when": "switch", "t_switch": 0.0}):
        model.method = Llada(gen_length=G, sampler={"commit": "remdm", "steps": 8, "remask": remask})
        found.append([one.ids for one in model.generate(QUESTIONS, temperature=1.0, seed=2)])
    assert found[0] == found[1] == found[2]
    model.method = Llada(gen_length=G, sampler={"commit": "remdm", "steps": 8, "remask": {"cap": 0.5}})
    assert [one.ids for one in model.generate(QUESTIONS, temperature=1.0, seed=2)] != found[0]
    steps, (_, committed) = 8, fill(sampler_of(8, cap=0.0), is_flat)
    slow, x = [], np.zeros(G, dtype=int)
    for k in range(steps):
        numbers = np.random.default_rng([0, k]).random((3, G))
        gone = (x == 0) & (numbers[1] >= (steps - k - 1) / (steps - k))
        slow += [np.flatnonzero(gone).tolist()] * bool(gone.any())
        x[gone] = 1
    assert committed == slow


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_engine_equals_the_plain_sampler(arch):
    sampler = {"commit": "remdm", "steps": 24, "remask": {"cap": 0.3}}
    method = Llada(gen_length=G, shift=arch == "gpt2", sampler=sampler)
    assert_equal(model_of(method, arch), method, plain.remdm, 1.0)
    blocks = BlockDiffusion(gen_length=G, block_length=4, shift=arch == "gpt2", sampler=sampler)
    assert_equal(model_of(blocks, arch), blocks, plain_blocks.remdm, 1.0)


@by_rule
def test_no_token_becomes_another_without_being_a_mask(remask):
    """10: a step masks it again, or leaves it."""
    rng = np.random.default_rng(0)
    canvas, n_again = Canvas(sampler_of(40, **remask), 32, 0, 1, [0]), 0
    while not canvas.is_done:
        before, asked = canvas.tokens_G.copy(), canvas.asked()
        canvas.commit(rng.integers(2, 9, len(asked)), rng.random(len(asked)))
        gone = (before != 0) & (canvas.tokens_G != before)
        assert (canvas.tokens_G[gone] == 0).all()
        n_again += gone.sum()
    assert (n_again > 0) == RemaskSettings(**remask).remasks


def test_a_planted_error_is_mended_only_where_tokens_are_masked_again():
    """9."""
    mended, steps = {"mdlm": 0, "loop": 0}, 40
    for name, remask in (("mdlm", {"cap": 0.0}), ("loop", {"cap": 0.1, "when": "loop"})):
        for seed in range(100):
            canvas = Canvas(sampler_of(steps, **remask), G, 0, 1, [seed])
            canvas.start_from(np.array([3]), np.array([30]))
            while not canvas.is_done:
                asked = canvas.asked()
                canvas.commit(TRUTH[asked], np.ones(len(asked)))
            mended[name] += canvas.tokens_G[3] == TRUTH[3]
    n_loop = RemaskSettings(when="loop").alphas(steps)[1].sum()
    assert mended["mdlm"] == 0
    assert mended["loop"] / 100 >= 1 - 0.9**n_loop - 3 * math.sqrt(0.25 / 100)


def test_a_block_that_is_over_is_masked_no_more_so_an_end_in_it_ends_the_canvas():
    sampler = SamplerSettings(commit="remdm", steps=12, block_length=4, remask=RemaskSettings(cap=0.3))
    canvas = Canvas(sampler, G, 0, 1, [0])
    while not canvas.is_done:
        asked = canvas.asked()
        canvas.commit(np.where(asked == 5, 1, 7), np.ones(len(asked)))
    assert canvas.written() == [7] * 5 + [1] and canvas.start == 8 < G
    assert (canvas.tokens_G[8:] == 0).all()


def test_weights_by_confidence():
    """11."""
    likely, is_token = np.array([0.9, 0.2, 0.2, 0.0]), np.array([True, True, True, False])
    by_sum, by_mean = (weights(likely, is_token, norm) for norm in ("sum", "mean"))
    assert by_sum.sum() == pytest.approx(1) and by_mean[:3].mean() == pytest.approx(1)
    assert by_sum[3] == 0 and by_sum[0] < by_sum[1] == by_sum[2]
    assert weights(likely, is_token, "none").tolist() == [1, 1, 1, 0]
    assert weights(likely, ~is_token & False, "sum").tolist() == [0, 0, 0, 0]


def test_a_cap_above_every_bound_is_the_bound():
    """12."""
    capped, scaled = RemaskSettings(cap=1.0), RemaskSettings(cap=1.0, rescale=1.0)
    assert [capped.sigma(*pair) for pair in GRID] == [sigma_max(*pair) for pair in GRID]
    assert scaled == capped and RemaskSettings(cap=0.0).sigma(0.5, 0.6) == 0
    assert RemaskSettings(when="switch", t_switch=1.0).alphas(5)[1].all()
    assert not RemaskSettings(when="switch", t_switch=0.0).alphas(5)[1].any()


@by_rule
def test_answers_depend_on_no_company_and_the_question_stays(remask):
    """13."""
    model = model_of(Llada(gen_length=G, sampler={"commit": "remdm", "steps": 8, "remask": remask, "block_length": 6}))
    whole = [one.ids for one in model.generate(QUESTIONS, temperature=1.0)]
    assert [one.ids for one in model.generate(QUESTIONS, temperature=1.0, batch_size=1)] == whole


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: RemaskSettings(cap=2.0), "cap is 2.0, but must be a number between 0 and 1"),
        (lambda: RemaskSettings(when="loop", t_on=0.05), "t_off, which must be below t_on"),
        (lambda: SamplerSettings(remask={"cap": 0.3}), "sampler.remask is for commit=remdm"),
        (lambda: SamplerSettings(commit="remdm", eos="last"), "commit=remdm looks at none"),
        (
            lambda: tiny_model(Llada(sampler={"commit": "remdm", "remask": {"when": "lop"}})),
            "sampler.remask.when is lop, but must be",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()

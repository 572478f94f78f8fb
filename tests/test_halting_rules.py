"""The catalogue of stop rules: each score against its formula, and the invariants of halting.md, section 9.

Paths do not depend on halting here: f is a function, so every rule sees the same states.
"""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from innerloop.config.stopping import COMPARES, PROBABILITIES, READS_OUT, StopKind
from innerloop.errors import InputError
from innerloop.halting.baselines import drawn_depths, uniform
from innerloop.halting.evidence import RowInfo, StopInputs
from innerloop.halting.rule import decayed
from innerloop.loop.loop import InnerLoop, LoopResult
from innerloop.loop.trace import Trace
from tests.close import assert_close
from tests.fields import FullLoop, FullStop
from tests.methods.tools import FunctionPass, iterate
from tests.test_halting import draw, loop_of, rule

B, N, D, V, T = 5, 3, 6, 9, 12
HEAD = draw(3, D, V)
KINDS = [kind for kind in get_args(StopKind) if kind not in ("none", "classifier")]
ZEROS = [torch.zeros(B, N, D)] * 3


def swirl(x: Tensor, t: int) -> Tensor:
    """A path that settles slowly, each row at its own speed, and never quite."""
    rates = 0.3 + 0.12 * x[:, :1, :1].sign() * x[:, :1, :1].abs().clamp(max=4)
    return x + rates * (x.roll(1, -1).tanh() - x) / t**0.5


def made(kind: str, **fields) -> InnerLoop:
    """Return a loop with a rule whose learned weights, if it has any, are random."""
    loop, generator = loop_of(kind, T, **fields), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loop.parameters():
            parameter += (2.0 if kind == "mlp_probe" else 0.5) * torch.randn(parameter.shape, generator=generator)
    return loop


def ran(loop: InnerLoop, f=swirl, n_loops: int = T, read_out=lambda u: u @ HEAD, **options) -> LoopResult:
    return iterate(loop, f, draw(1, B, N, D), n_loops, read_out=read_out, **options)


def depths_of(kind: str, f=swirl, **fields) -> list[int]:
    return ran(made(kind, **fields), f).n_loops


def scores_of(kind: str, **fields) -> list[float]:
    """Return the finite scores of a loop that never stops, all rows and iterations."""
    trace = Trace()
    ran(made(kind, threshold=math.inf, **fields), trace=trace)
    scores = (entry.score.tolist() for entry in trace.iterations if entry.score is not None)
    return sorted(score for row in scores for score in row if math.isfinite(score))


def thresholds_of(kind: str, **fields) -> list[float]:
    """Return thresholds from strict to loose, those in between such that rows stop at many times."""
    known = scores_of(kind, **fields)
    return [math.inf, *(known[len(known) * i // 6] for i in (5, 4, 3, 2, 1)), -1e9]


by_kind = pytest.mark.parametrize("kind", KINDS)
by_free = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "act"])  # act ends when its shares add up


# Formulas


def test_acceleration_is_the_change_of_the_change_and_must_hold_twice():
    scores, h = rule("acceleration"), [draw(i, B, N, D) for i in range(5)]
    got = [scores.score(StopInputs(h[t], h[t - 1], h[t], iteration=t)) for t in range(1, 5)]
    bends = [-((h[t] - 2 * h[t - 1] + h[t - 2]).norm(dim=-1) / h[t].norm(dim=-1)).mean(1).log10() for t in range(2, 5)]
    assert torch.isinf(got[0]).all() and torch.isinf(got[1]).all()
    for t in (3, 4):
        assert_close(got[t - 1], torch.minimum(bends[t - 2], bends[t - 3]))


def test_kl_reverse_begins_at_the_uniform_distribution_and_asks_the_old_about_the_new():
    scores, logits = rule("kl_reverse"), [draw(i, B, N, V) for i in range(2)]
    p = [torch.full((B, N, V), 1 / V), *(one.softmax(-1) for one in logits)]
    for t in (0, 1):
        divergence = (p[t] * (p[t] / p[t + 1]).log()).sum(-1).mean(1)
        assert_close(scores.score(StopInputs(*ZEROS, logits=logits[t])), -divergence.log10())


def test_minp_kl_does_not_see_what_lies_below_a_tenth_of_the_largest():
    minp, states = rule("minp_kl"), [torch.zeros(1, 1, D)] * 3
    p = torch.tensor([[[0.6, 0.3, 0.05, 0.05]], [[0.6, 0.3, 0.045, 0.055]], [[0.5, 0.3, 0.1, 0.1]]])
    scores = [minp.score(StopInputs(*states, logits=one[None].log())).item() for one in p]
    assert scores[1] > 20 > 3 > scores[2]
    floored = [torch.tensor(row) for row in ([0.6, 0.3, 0.25, 0.25], [0.5, 0.3, 0.1, 0.1])]
    old, new = (row / row.sum() for row in floored)
    assert scores[2] == pytest.approx(-(old * (old / new).log()).sum().log10().item(), rel=1e-5)


@pytest.mark.parametrize("agg", ["mean", "last", "max"])
def test_levels_of_words_are_their_formulas(agg):
    logits = draw(0, B, N, V)
    p = logits.softmax(-1)
    best = p.sort(-1, descending=True).values
    reduce = {"mean": lambda x: x.mean(1), "last": lambda x: x[:, -1], "max": lambda x: x.amin(1)}[agg]
    for kind, value in (("top_prob", best[..., 0]), ("gap", best[..., 0] - best[..., 1])):
        assert_close(rule(kind, agg=agg).score(StopInputs(*ZEROS, logits=logits)), reduce(value))
    order = (p * p.log()).sum(-1) / math.log(V)  # minus the entropy, as a share
    assert_close(
        rule("entropy_level", agg=agg).score(StopInputs(*ZEROS, logits=logits)), -(-reduce(order)).log10(), 1e-5
    )


@pytest.mark.parametrize("kind", READS_OUT)
def test_scores_of_words_do_not_see_a_constant_added_to_the_logits(kind):
    one, other = rule(kind), rule(kind)
    for seed in range(3):
        logits = draw(seed, B, N, V)
        left = one.score(StopInputs(*ZEROS, logits=logits))
        assert_close(left, other.score(StopInputs(*ZEROS, logits=logits + 7.0 * draw(9, B, N, 1))), 1e-3)


def test_scores_stay_in_their_bounds():
    sharp = draw(0, B, N, V) * torch.tensor([0.0, 0.1, 1.0, 10.0, 1000.0])[:, None, None]
    top, gap, level = (rule(k).score(StopInputs(*ZEROS, logits=sharp)) for k in ("top_prob", "gap", "entropy_level"))
    assert ((gap >= -1e-6) & (gap <= top) & (top <= 1 + 1e-6) & (top >= 1 / V - 1e-6)).all()
    assert (level >= -1e-6).all() and level[0].item() == pytest.approx(0.0, abs=1e-5) and level[-1] > 5
    for kind in ("kl", "kl_reverse", "minp_kl"):
        scores = rule(kind)
        scores.score(StopInputs(*ZEROS, logits=draw(2, B, N, V)))
        assert (scores.score(StopInputs(*ZEROS, logits=draw(3, B, N, V))) < 3).all()
        assert (scores.score(StopInputs(*ZEROS, logits=draw(3, B, N, V))) > 10).all()  # none: as large as can be


# Section 9


@by_kind
def test_a_rule_that_never_fires_leaves_the_loop_as_it_is(kind):
    plain = ran(InnerLoop(FullLoop(), D, T, torch.ones(())).eval())
    for fields in ({"threshold": math.inf}, *([{"min_loops": T}] if kind != "act" else [])):
        result = ran(made(kind, **fields))
        assert result.n_loops == [T] * B and not any(result.stopped)
        assert kind == "act" or torch.equal(result.state, plain.state)  # act mixes all iterations
    if kind == "fixed":  # which is the loop cut short
        result, short = ran(made(kind, threshold=4.0)), ran(InnerLoop(FullLoop(), D, T, torch.ones(())), n_loops=4)
        assert result.n_loops == [4] * B and torch.equal(result.state, short.state)


@by_kind
def test_a_looser_threshold_never_stops_a_row_later(kind):
    depths = [depths_of(kind, threshold=kappa) for kappa in thresholds_of(kind)]
    for strict, loose in pairwise(depths):
        assert all(a >= b for a, b in zip(strict, loose))
    assert depths[0] == [T] * B and len({tuple(d) for d in depths}) > 2


@by_free
def test_more_patience_never_stops_a_row_earlier(kind):
    kappa = thresholds_of(kind)[3]
    depths = [depths_of(kind, threshold=kappa, patience=m) for m in (1, 2, 4)]
    for less, more in pairwise(depths):
        assert all(a <= b for a, b in zip(less, more))
    assert depths[0] != depths[-1]


@by_free
@pytest.mark.parametrize("every", [2, 5])
def test_a_rule_that_looks_now_and_then_stops_only_then(kind, every):
    kappa = thresholds_of(kind, check_every=every)[4]
    depths = depths_of(kind, threshold=kappa, check_every=every)
    assert all(n % every == 0 or n == T for n in depths) and min(depths) < T


@pytest.mark.parametrize("kind", READS_OUT)
def test_words_are_read_only_when_they_are_looked_at(kind):
    n_read = []
    ran(made(kind, threshold=math.inf, check_every=3), read_out=lambda u: n_read.append(1) or u @ HEAD)
    assert len(n_read) == (T - 1) // 3  # at the last iteration there is nothing left to decide


@by_kind
@pytest.mark.parametrize("compacts", [True, False])
def test_halted_rows_are_frozen_and_every_row_ends_once(kind, compacts):
    kappa = thresholds_of(kind)[3]
    loop, trace = made(kind, threshold=kappa, **({"act_output": "last"} if kind == "act" else {})), Trace()
    result = ran(loop, compacts=compacts, trace=trace)
    n_active = [len(entry.rows) for entry in trace.iterations]
    assert n_active == sorted(n_active, reverse=True) and n_active[0] == B
    for row, n in enumerate(result.n_loops):
        assert [row in entry.rows for entry in trace.iterations] == [t < n for t in range(len(n_active))]
        assert result.stopped[row] == (n < T)
        rows, states = result.states[n - 1]
        assert torch.equal(result.state[row], states[rows.index(row)])


EARLIEST = {"delta": 1, "delta_undamped": 1, "cos": 1, "absolute": 1, "acceleration": 3}
EARLIEST |= {"kl": 2, "kl_reverse": 2, "minp_kl": 2, "entropy": 2, "argmax": 6}


@pytest.mark.parametrize("kind", EARLIEST)
def test_a_loop_that_does_nothing_stops_as_soon_as_it_may(kind):
    first, reads = EARLIEST[kind], kind in READS_OUT
    assert depths_of(kind, lambda x, t: x) == [first] * B
    # Looking now and then, states are compared with the iteration before, words with what was read before.
    assert depths_of(kind, lambda x, t: x, check_every=4) == [min(4 * first, T) if reads else 4] * B
    if kind in COMPARES:  # without comparing to the initial state the second iteration is the first to compare
        assert depths_of(kind, lambda x, t: x, compare_init=False) == [first + 1] * B


def test_random_draws_depths_with_the_chances_of_a_histogram():
    shares, n = (0.1, 0.0, 0.4, 0.2, 0.3), 20_000
    found = torch.bincount(drawn_depths(torch.arange(n), shares), minlength=6)[1:].double()
    expected = n * torch.tensor(shares).double()
    assert found[1] == 0
    chi_square = ((found - expected).square() / expected)[expected > 0].sum().item()
    assert chi_square < 16.3  # 0.1 % with 3 degrees of freedom


def test_draws_belong_to_a_place_and_to_nothing_else():
    places = torch.tensor([7, 3, 7, 100_000])
    drawn = uniform(places)
    assert drawn[0] == drawn[2] and len(set(drawn.tolist())) == 3
    assert torch.equal(uniform(places[[1]]), drawn[[1]])
    many = uniform(torch.arange(5000))
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([many[1:], many[:-1]]))[0, 1]) < 0.05


def test_random_looks_at_nothing_and_numbers_rows_without_a_place_as_they_come():
    loop = made("random")
    assert ran(loop).n_loops == depths_of("random", lambda x, t: x * t)
    assert ran(loop).n_loops != depths_of("random")  # the next rows draw anew
    loop, f = made("random"), FunctionPass(swirl)
    f.row_info = RowInfo(torch.tensor([4, 4, 9, 4, 9]))
    depths = loop(f, draw(1, B, N, D), [T] * B).n_loops
    assert depths[0] == depths[1] == depths[3] and depths[2] == depths[4]


def test_the_threshold_of_a_probability_falls_with_what_has_been_written():
    at = decayed(0.5, torch.tensor([0, 10, 1000]), 10)
    assert_close(at, torch.tensor([0.55, 0.45 + 0.1 * math.exp(-4), 0.45]))
    assert decayed(0.5, None, 10) == pytest.approx(0.55) and decayed(0.5, torch.tensor([3]), 0) == 0.5
    assert decayed(1.0, torch.tensor([0]), 10).item() == 1.0 and decayed(7.0, None, 10) == 1.0


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_decay_lets_later_tokens_stop_earlier(kind):
    known = scores_of(kind)
    kappa = (known[9 * len(known) // 10] - 0.04) / 0.9  # this score is enough later on, and not at first
    depths = {}
    for written in (0, 10_000):
        f, loop = FunctionPass(swirl), made(kind, threshold=kappa, decay=10)
        f.row_info = RowInfo(None, torch.full((B,), written))
        depths[written] = loop(f, draw(1, B, N, D), [T] * B, read_out=lambda u: u @ HEAD).n_loops
    assert all(a >= b for a, b in zip(depths[0], depths[10_000])) and depths[0] != depths[10_000]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("random", {}, "stop.histogram"),
        ("delta", {"histogram": (1.0,)}, "leave it out"),
        ("random", {"histogram": (0.0, 0.0)}, "stop.histogram"),
        ("random", {"histogram": (0.5, -0.5, 1.0)}, "histogram is .* numbers"),
        ("kl", {"compare_init": False}, "set stop.rule to delta"),
        ("kl", {"decay": 5}, "probabilities"),
        ("gap", {"decay": -1}, "decay is -1"),
        ("delta", {"check_every": 0}, "at least 1"),
        *(("act", {name: 2}, "check_every to 1") for name in ("min_loops", "patience", "check_every")),
        ("delta", {"act_output": "last"}, "stop.rule=act"),
        *(
            ("delta", fields, "stop.rule=classifier")
            for fields in ({"features": ("gap",)}, {"classifier": "svm_rbf"}, {"per_step": True})
        ),
        ("classifier", {"features": ()}, "some of gap, top, attention, mlp, block, depth"),
        ("classifier", {"features": ("gap", "gap")}, "each once"),
        ("nothing", {}, "must be one of"),
    ],
    ids=str,
)
def test_settings_that_go_together_badly_are_refused(kind, fields, message):
    with pytest.raises(InputError, match=message):
        FullStop(rule=kind, **fields)

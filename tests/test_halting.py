"""Stop scores against their formulas, and rows that halt (slr.md, section 6)."""

import math

import pytest
import torch

from innerloop.config.loop import LoopSettings
from innerloop.config.stopping import DEFAULT_THRESHOLDS
from innerloop.halting.evidence import StopInputs
from innerloop.halting.rule import StopRule
from innerloop.loop.loop import InnerLoop
from innerloop.loop.trace import Trace
from tests.close import assert_close
from tests.methods.tools import iterate

B, N, D, V = 3, 4, 6, 9
AGGREGATES = {"mean": lambda d: d.mean(1), "last": lambda d: d[:, -1], "max": lambda d: d.amax(1)}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(seed: int = 0) -> StopInputs:
    return StopInputs(*(draw(seed + i, B, N, D) for i in range(3)), logits=draw(seed + 3, B, N, V))


by_agg = pytest.mark.parametrize("agg", ["mean", "last", "max"])


# Each score is its formula


CHANGES = {
    "delta": lambda new, old, raw: (new - old).norm(dim=-1) / new.norm(dim=-1),
    "delta_undamped": lambda new, old, raw: (raw - old).norm(dim=-1) / raw.norm(dim=-1),
    "absolute": lambda new, old, raw: (new - old).norm(dim=-1),
    "cos": lambda new, old, raw: 1 - (new * old).sum(-1) / new.norm(dim=-1) / old.norm(dim=-1),
}


@pytest.mark.parametrize("kind", CHANGES)
@by_agg
def test_scores_of_states_are_their_formulas(kind, agg):
    now = moment()
    change = CHANGES[kind](now.state, now.previous, now.rescaled)
    assert_close(StopRule(kind, D, agg).score(now), -AGGREGATES[agg](change).log10())


@by_agg
def test_kl_is_that_of_successive_read_outs_and_never_stops_at_the_first(agg):
    rule, first, second = StopRule("kl", D, agg), moment(0), moment(10)
    assert rule.score(first).tolist() == [-math.inf] * B
    p, q = second.logits.softmax(-1), first.logits.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert_close(rule.score(second), -AGGREGATES[agg](kl).log10())


@by_agg
def test_entropy_is_the_change_of_that_of_the_read_out_and_never_stops_at_the_first(agg):
    rule, first, second = StopRule("entropy", D, agg), moment(0), moment(10)
    assert rule.score(first).tolist() == [-math.inf] * B
    entropies = [-(m.logits.softmax(-1) * m.logits.log_softmax(-1)).sum(-1) for m in (first, second)]
    change = AGGREGATES[agg]((entropies[1] - entropies[0]).abs())
    assert_close(rule.score(second), -change.log10())


def test_argmax_counts_how_often_running_the_top_tokens_of_all_positions_stay():
    rule = StopRule("argmax", D)
    tops = [[[0, 1], [2, 3]], [[0, 1], [2, 4]], [[0, 1], [2, 4]], [[5, 1], [2, 4]], [[5, 1], [2, 4]]]
    scores = [
        rule.score(
            StopInputs(*[torch.zeros(2, 2, D)] * 3, logits=torch.nn.functional.one_hot(torch.tensor(top), V) * 9.0)
        )
        for top in tops
    ]
    assert [score.tolist() for score in scores] == [[-math.inf, -math.inf], [1, 0], [2, 1], [0, 2], [1, 3]]


def test_halt_is_one_minus_the_product_of_what_goes_on():
    rule, product = StopRule("halt", D), torch.ones(B)
    with torch.no_grad():
        rule.gate.weight.copy_(draw(5, 1, D))
    for seed in (0, 10, 20):
        now = moment(seed)
        rate = (now.state.mean(1) @ rule.gate.weight[0] + rule.gate.bias).sigmoid()
        product = product * (1 - rate)
        assert_close(rule.score(now), 1 - product)


def test_a_new_halting_gate_stops_with_the_same_small_chance_whatever_the_state():
    rule = StopRule("halt", D)
    assert rule.score(moment()).tolist() == pytest.approx([1 / (1 + math.e)] * B)


@pytest.mark.parametrize("kind", ["kl", "entropy", "argmax", "halt"])
def test_reset_forgets_and_keep_rows_remembers_the_rows_that_go_on(kind):
    whole, part = StopRule(kind, D), StopRule(kind, D)
    first, second, rows = moment(0), moment(10), torch.tensor([2, 0])
    whole.score(first), part.score(first)
    expected = whole.score(second)
    part.keep_rows(rows)
    chosen = StopInputs(*(x[rows] for x in (second.state, second.previous, second.rescaled, second.logits)))
    assert torch.equal(part.score(chosen), expected[rows])
    whole.reset()
    fresh = StopRule(kind, D)
    assert torch.equal(whole.score(first), fresh.score(first))


def test_a_state_that_does_not_move_has_a_finite_score_above_every_threshold():
    still = draw(0, B, N, D)
    now = StopInputs(still, still, still, draw(1, B, N, V))
    for kind in ("delta", "delta_undamped", "cos", "kl", "entropy"):
        rule = StopRule(kind, D)
        rule.score(now)
        score = rule.score(now)
        assert (score > DEFAULT_THRESHOLDS[kind]).all() and score.isfinite().all()


@pytest.mark.parametrize("kind", ["delta", "delta_undamped", "cos", "kl", "entropy", "argmax", "halt"])
@by_agg
def test_padding_has_no_say_in_a_score(kind, agg):
    short, padded = StopRule(kind, D, agg), StopRule(kind, D, agg)
    mask = torch.tensor([[1, 1, 1, 0]] * B)
    for seed in (0, 10, 20):
        now = moment(seed)
        now.mask_BN = now.logits_mask = mask
        real = StopInputs(*(x[:, :3] for x in (now.state, now.previous, now.rescaled, now.logits)))
        assert_close(padded.score(now), short.score(real))


# Stopping


def shrinking(rates: list[float]):
    """Rows whose relative change in iteration t is about (1 - r) r^(t-1): each state tends to 1."""
    rate = torch.tensor(rates)[:, None, None]
    return (lambda x, t: 1 + rate[: len(x)] * (x - 1)), torch.full((len(rates), 2, D), 2.0)


def stopped(n_loops: int = 12, **settings) -> list[int]:
    """Run rows that converge at three speeds in a pass that does not compact."""
    f, state = shrinking([0.1, 0.5, 0.9])
    loop = InnerLoop(LoopSettings(**{"stop": "delta", **settings}), D, 4, torch.ones(())).eval()
    return iterate(loop, f, state, n_loops, compacts=False).n_loops


def first_below(rate: float, bound: float = 0.03) -> int:
    x, t = 2.0, 0
    while True:
        new, t = 1 + rate * (x - 1), t + 1
        if abs(new - x) / abs(new) <= bound:
            return t
        x = new


def test_each_row_stops_when_its_own_score_has_reached_the_usual_threshold():
    assert stopped() == [first_below(0.1), first_below(0.5), first_below(0.9)]


def test_a_threshold_of_ones_own_moves_the_stop():
    assert stopped(stop_threshold=math.inf) == [12, 12, 12]
    assert stopped(stop_threshold=-math.inf) == [1, 1, 1]
    assert stopped(stop_threshold=3.0) == [min(12, first_below(rate, 1e-3)) for rate in (0.1, 0.5, 0.9)]


def test_no_row_stops_before_min_loops_or_runs_past_its_limit():
    assert stopped(min_loops=4) == [max(4, n) for n in stopped()]
    assert stopped(n_loops=3) == [min(3, n) for n in stopped()]


def test_patience_asks_for_consecutive_iterations():
    once = stopped(n_loops=30)
    assert stopped(n_loops=30, patience=3) == [n + 2 for n in once]


def test_patience_begins_anew_after_an_iteration_that_moved():
    moves = iter([5.0, 0.0, 5.0, 0.0, 0.0, 0.0])  # still in iterations 2, 4, 5
    loop = InnerLoop(LoopSettings(stop="delta", patience=2), D, 4, torch.ones(())).eval()
    result = iterate(loop, lambda x, t: x + next(moves), torch.ones(1, 1, D), 6)
    assert result.n_loops == [5]


def test_nothing_stops_in_training():
    f, state = shrinking([0.1, 0.5])
    loop = InnerLoop(LoopSettings(stop="delta", stop_threshold=-math.inf), D, 4, torch.ones(())).train()
    assert iterate(loop, f, state, 5).n_loops == [5, 5]


@pytest.mark.parametrize("compacts", [True, False])
def test_rows_that_halt_keep_their_state_whether_or_not_they_leave(compacts):
    def f(x, t):  # each position's own value tells its speed
        return x - (x - x.round()) * 0.7

    state = torch.tensor([1.4, 2.04, 3.3])[:, None, None].expand(3, 2, D).clone()
    loop = InnerLoop(LoopSettings(stop="delta", patience=2), D, 4, torch.ones(())).eval()
    trace = Trace()
    together = iterate(loop, f, state, 9, compacts, trace=trace)
    assert len(set(together.n_loops)) > 1
    for row in range(3):
        alone = iterate(loop, f, state[row : row + 1], 9)
        assert alone.n_loops == [together.n_loops[row]] == [len(trace.row(row).iterations)]
        assert torch.equal(alone.state[0], together.state[row])


@pytest.mark.parametrize("kind", ["kl", "entropy", "argmax"])
def test_scores_that_look_at_words_see_the_read_out_of_the_output(kind):
    head = draw(3, D, V)
    loop = InnerLoop(LoopSettings(stop=kind, residual="A"), D, 4, torch.ones(())).eval()
    trace, rule = Trace(), StopRule(kind, D)
    result = iterate(loop, lambda x, t: x.sin(), draw(4, 2, N, D), 3, trace=trace, read_out=lambda u: u @ head)
    for entry, (_, output) in zip(trace.iterations, result.outputs):
        assert torch.equal(entry.score, rule.score(StopInputs(*[output] * 3, logits=output @ head)))


DISTANCES = {"delta": 0.03, "delta_undamped": 0.03, "cos": 1e-3, "kl": 1e-3, "kl_reverse": 1e-3, "minp_kl": 1e-5}
DISTANCES |= {"entropy": 1e-3, "absolute": 0.03, "acceleration": 0.03, "entropy_level": 0.1}
OTHERS = {"argmax": 5, "halt": 0.9, "gap": 0.8, "top_prob": 0.9, "act": 0.99, "mlp_probe": 0.9, "fixed": 1}


@pytest.mark.parametrize("kind", [kind for kind in DEFAULT_THRESHOLDS])
def test_the_usual_threshold_of_each_score_is_the_cards(kind):
    expected = -math.log10(DISTANCES[kind]) if kind in DISTANCES else OTHERS.get(kind, 0.0)
    drawn = {"stop_histogram": (1.0,)} if kind == "random" else {}
    assert LoopSettings(stop=kind, **drawn).threshold == pytest.approx(expected, abs=0.01)
    assert LoopSettings(stop=kind, stop_threshold=7.0, **drawn).threshold == 7.0

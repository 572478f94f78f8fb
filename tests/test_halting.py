"""Stop scores against their formulas, and rows that halt (slr.md, section 6)."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from innerloop.config.stopping import DEFAULT_THRESHOLDS
from innerloop.halting.evidence import StopInputs
from innerloop.halting.rule import StopRule
from innerloop.loop.loop import InnerLoop
from innerloop.loop.trace import Trace
from tests.close import assert_close
from tests.fields import FullLoop, FullStop
from tests.methods.tools import iterate

B, N, D, V = 3, 4, 6, 9
AGGREGATES = {"mean": lambda d: d.mean(1), "last": lambda d: d[:, -1], "max": lambda d: d.amax(1)}
FIELDS = {"random": {"histogram": (0.2, 0.3, 0.1, 0.4)}}

by_agg = pytest.mark.parametrize("agg", ["mean", "last", "max"])


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stop_of(kind: str, **fields) -> FullStop:
    return FullStop(**{"rule": kind} | FIELDS.get(kind, {}) | fields)


def rule(kind: str, **fields) -> StopRule:
    return StopRule(stop_of(kind, **fields), D)


def loop_of(kind: str, max_loops: int = 4, settings: FullLoop | None = None, **fields) -> InnerLoop:
    return InnerLoop(settings or FullLoop(), D, max_loops, torch.ones(()), stop=stop_of(kind, **fields)).eval()


def moment(seed: int = 0) -> StopInputs:
    return StopInputs(*(draw(seed + i, B, N, D) for i in range(3)), logits=draw(seed + 3, B, N, V))


def part(now: StopInputs, index) -> StopInputs:
    """Return some rows, or positions, of what a rule looks at."""
    return StopInputs(*(x[index] for x in (now.state, now.previous, now.rescaled, now.logits)))


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
    assert_close(rule(kind, agg=agg).score(now), -AGGREGATES[agg](change).log10())


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(-1)


WORD_CHANGES = {
    "kl": lambda new, old: (new * (new / old).log()).sum(-1),
    "entropy": lambda new, old: (entropy(new) - entropy(old)).abs(),
}


@pytest.mark.parametrize("kind", WORD_CHANGES)
@by_agg
def test_scores_of_words_compare_successive_read_outs_and_never_stop_at_the_first(kind, agg):
    scores, first, second = rule(kind, agg=agg), moment(0), moment(10)
    assert scores.score(first).tolist() == [-math.inf] * B
    change = WORD_CHANGES[kind](second.logits.softmax(-1), first.logits.softmax(-1))
    assert_close(scores.score(second), -AGGREGATES[agg](change).log10())


def test_argmax_counts_how_often_running_the_top_tokens_of_all_positions_stay():
    counts, zeros = rule("argmax"), [torch.zeros(2, 2, D)] * 3
    tops = [[[0, 1], [2, 3]], [[0, 1], [2, 4]], [[0, 1], [2, 4]], [[5, 1], [2, 4]], [[5, 1], [2, 4]]]
    scores = [counts.score(StopInputs(*zeros, logits=one_hot(torch.tensor(top), V) * 9.0)) for top in tops]
    assert [score.tolist() for score in scores] == [[-math.inf, -math.inf], [1, 0], [2, 1], [0, 2], [1, 3]]


def test_halt_is_one_minus_the_product_of_what_goes_on():
    halt, product = rule("halt"), torch.ones(B)
    assert rule("halt").score(moment()).tolist() == pytest.approx([1 / (1 + math.e)] * B)  # whatever the state
    with torch.no_grad():
        halt.gate.weight.copy_(draw(5, 1, D))
    for seed in (0, 10, 20):
        now = moment(seed)
        product = product * (1 - (now.state.mean(1) @ halt.gate.weight[0] + halt.gate.bias).sigmoid())
        assert_close(halt.score(now), 1 - product)


@pytest.mark.parametrize("kind", ["kl", "entropy", "argmax", "halt"])
def test_reset_forgets_and_keep_rows_remembers_the_rows_that_go_on(kind):
    whole, some = rule(kind), rule(kind)
    first, second, rows = moment(0), moment(10), torch.tensor([2, 0])
    whole.score(first), some.score(first)
    expected = whole.score(second)
    some.keep_rows(rows)
    assert torch.equal(some.score(part(second, rows)), expected[rows])
    whole.reset()
    assert torch.equal(whole.score(first), rule(kind).score(first))


def test_a_state_that_does_not_move_has_a_finite_score_above_every_threshold():
    still = draw(0, B, N, D)
    now = StopInputs(still, still, still, draw(1, B, N, V))
    for kind in ("delta", "delta_undamped", "cos", "kl", "entropy"):
        scores = rule(kind)
        scores.score(now)
        score = scores.score(now)
        assert (score > DEFAULT_THRESHOLDS[kind]).all() and score.isfinite().all()


@pytest.mark.parametrize("kind", ["delta", "delta_undamped", "cos", "kl", "entropy", "argmax", "halt"])
@by_agg
def test_padding_has_no_say_in_a_score(kind, agg):
    short, padded = rule(kind, agg=agg), rule(kind, agg=agg)
    for seed in (0, 10, 20):
        now = moment(seed)
        now.mask_BN = now.logits_mask = torch.tensor([[1, 1, 1, 0]] * B)
        assert_close(padded.score(now), short.score(part(now, (slice(None), slice(3)))))


# Stopping


RATES = (0.1, 0.5, 0.9)


def shrink(x: torch.Tensor, t: int) -> torch.Tensor:
    """Each state tends to 1: the relative change of a row in iteration t is about (1 - r) r^(t-1)."""
    return 1 + torch.tensor(RATES)[: len(x), None, None] * (x - 1)


def stopped(n_loops: int = 12, **fields) -> list[int]:
    """Run rows that converge at three speeds in a pass that does not compact."""
    return iterate(loop_of("delta", **fields), shrink, torch.full((3, 2, D), 2.0), n_loops, compacts=False).n_loops


def first_below(rate: float, bound: float = 0.03) -> int:
    x, t = 2.0, 0
    while True:
        new, t = 1 + rate * (x - 1), t + 1
        if abs(new - x) / abs(new) <= bound:
            return t
        x = new


def test_each_row_stops_when_its_own_score_has_reached_the_threshold():
    usual = [first_below(rate) for rate in RATES]
    assert stopped() == usual
    assert stopped(threshold=3.0) == [min(12, first_below(rate, 1e-3)) for rate in RATES]
    assert stopped(threshold=math.inf) == [12] * 3 and stopped(threshold=-math.inf) == [1] * 3
    assert stopped(min_loops=4) == [max(4, n) for n in usual]
    assert stopped(n_loops=3) == [min(3, n) for n in usual]
    assert stopped(n_loops=30, patience=3) == [n + 2 for n in stopped(n_loops=30)]


def test_patience_begins_anew_after_an_iteration_that_moved():
    moves = iter([5.0, 0.0, 5.0, 0.0, 0.0, 0.0])  # still in iterations 2, 4, 5
    result = iterate(loop_of("delta", patience=2), lambda x, t: x + next(moves), torch.ones(1, 1, D), 6)
    assert result.n_loops == [5]


def test_nothing_stops_in_training():
    loop = loop_of("delta", threshold=-math.inf).train()
    assert iterate(loop, shrink, torch.full((2, 2, D), 2.0), 5).n_loops == [5, 5]


@pytest.mark.parametrize("compacts", [True, False])
def test_rows_that_halt_keep_their_state_whether_or_not_they_leave(compacts):
    def f(x, t):  # each position's own value tells its speed
        return x - (x - x.round()) * 0.7

    state = torch.tensor([1.4, 2.04, 3.3])[:, None, None].expand(3, 2, D).clone()
    loop, trace = loop_of("delta", patience=2), Trace()
    together = iterate(loop, f, state, 9, compacts, trace=trace)
    assert len(set(together.n_loops)) > 1
    for row in range(3):
        alone = iterate(loop, f, state[row : row + 1], 9)
        assert alone.n_loops == [together.n_loops[row]] == [len(trace.row(row).iterations)]
        assert torch.equal(alone.state[0], together.state[row])


@pytest.mark.parametrize("kind", ["kl", "entropy", "argmax"])
def test_scores_that_look_at_words_see_the_read_out_of_the_output(kind):
    head, trace, scores = draw(3, D, V), Trace(), rule(kind)
    loop = loop_of(kind, settings=FullLoop(residual="A"))
    result = iterate(loop, lambda x, t: x.sin(), draw(4, 2, N, D), 3, trace=trace, read_out=lambda u: u @ head)
    for entry, (_, output) in zip(trace.iterations, result.outputs, strict=True):
        assert torch.equal(entry.score, scores.score(StopInputs(*[output] * 3, logits=output @ head)))


DISTANCES = {"delta": 0.03, "delta_undamped": 0.03, "cos": 1e-3, "kl": 1e-3, "kl_reverse": 1e-3, "minp_kl": 1e-5}
DISTANCES |= {"entropy": 1e-3, "absolute": 0.03, "acceleration": 0.03, "entropy_level": 0.1}
OTHERS = {"argmax": 5, "halt": 0.9, "gap": 0.8, "top_prob": 0.9, "act": 0.99, "mlp_probe": 0.9, "fixed": 1}


@pytest.mark.parametrize("kind", DEFAULT_THRESHOLDS)
def test_the_usual_threshold_of_each_score_is_the_cards(kind):
    expected = -math.log10(DISTANCES[kind]) if kind in DISTANCES else OTHERS.get(kind, 0.0)
    assert stop_of(kind).kappa == pytest.approx(expected, abs=0.01)
    assert stop_of(kind, threshold=7.0).kappa == 7.0

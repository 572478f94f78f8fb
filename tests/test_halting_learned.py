"""Learned stopping: ACT, distributions over iterations, probes and classifiers (halting.md, 3b to 3e and section 9)."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from innerloop import Slr
from innerloop.calibrate.fit import MOST_VECTORS, fit_classifier, fit_probe, fitted_thresholds
from innerloop.calibrate.oracles import oracle_agree, oracle_correct
from innerloop.config.stopping import ExitClassifierKind
from innerloop.errors import InputError
from innerloop.halting.classifier import ExitClassifier
from innerloop.halting.evidence import StopInputs
from innerloop.halting.learned import ActShares, exit_distribution, expected_loss, gain_targets, pull
from innerloop.loop.loop import InnerLoop
from innerloop.loop.trace import Trace
from tests.close import assert_close
from tests.fields import FullStop
from tests.methods.tools import MIXED, change, gradients, iterate, on, thought_of
from tests.test_halting import draw, loop_of, rule

B, N, D, V, T = 4, 2, 6, 9, 7
BIG = 1e4  # a logit whose rate is one


# ACT


def naive_act(rates: list[float], eps: float) -> tuple[list[float], int, float]:
    """Return the shares, N and R of one row, as the paper writes them."""
    n = next((t for t in range(1, len(rates) + 1) if sum(rates[:t]) >= 1 - eps), len(rates))
    rest = 1 - sum(rates[: n - 1])
    return [*rates[: n - 1], rest, *[0.0] * (len(rates) - n)], n, rest


def act_weights(rates_TB: Tensor, eps: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Return ACT's shares a_t (T, B), the iterations N (B,) and the ponder cost N + R (B,) of rates u_t."""
    shares, n_B = ActShares.empty(rates_TB.shape[1], rates_TB.device), torch.zeros_like(rates_TB[0])
    parts = []
    for t, rate_B in enumerate(rates_TB.float(), 1):
        share_B, ends_B = shares.take(rate_B, t, 1 - eps, torch.full_like(shares.is_over_B, t == len(rates_TB)))
        n_B = torch.where(ends_B, float(t), n_B)
        parts.append(share_B)
    return torch.stack(parts), n_B.long(), shares.ponder_B


def test_acts_shares_are_those_of_the_paper_and_add_up_to_one():
    rates = draw(0, T, 50).sigmoid() * torch.linspace(0.05, 2, 50).clamp(max=1)
    shares, n_B, ponder_B = act_weights(rates, eps=0.01)
    for row in range(50):
        expected, n, rest = naive_act(rates[:, row].tolist(), 0.01)
        assert_close(shares[:, row], torch.tensor(expected))
        assert n_B[row] == n <= T and ponder_B[row].item() == pytest.approx(n + rest, rel=1e-5)
        assert 0 < rest <= 1
    assert_close(shares.sum(0), torch.ones(50))
    assert (n_B == T).any() and (n_B < T).any()


def test_act_at_the_cards_examples_and_the_gradient_of_pondering():
    shares, n_B, ponder_B = act_weights(torch.tensor([[0.25, 0.995], *[[0.25, 0.5]] * 4]))
    assert n_B.tolist() == [4, 1]
    assert_close(ponder_B, torch.tensor([4.25, 2.0]))
    assert_close(shares[:, 1], torch.tensor([1.0, 0, 0, 0, 0]))
    rates = torch.full((5, 1), 0.3, requires_grad=True)  # N = 4
    act_weights(rates)[2].sum().backward()
    assert rates.grad[:, 0].tolist() == [-1, -1, -1, 0, 0]  # minus one for every rate before the last


def act_loop(**fields) -> InnerLoop:
    loop = loop_of("act", T, **fields)
    with torch.no_grad():
        loop.stop.gate.weight.copy_(draw(5, 1, D))
        loop.stop.gate.bias.fill_(-1.0)
    return loop


@pytest.mark.parametrize("compacts", [True, False])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("output", ["weighted", "last"])
def test_act_mixes_the_states_of_a_loop_in_training_as_in_answering(trains, output, compacts):
    loop, state = act_loop(act_output=output).train(trains), draw(1, B, N, D)
    result = iterate(loop, lambda x, t: (x + 0.3 * t).sin(), state, T, compacts)
    states, h = [], state
    for t in range(1, T + 1):
        h = (h + 0.3 * t).sin()
        states.append(h)
    rates = torch.stack([loop.stop.halting_logit(h).sigmoid() for h in states])
    shares, n_B, ponder_B = act_weights(rates)
    if output == "last":
        shares = torch.nn.functional.one_hot(n_B - 1, T).T.float()
    assert_close(result.state, (shares[..., None, None] * torch.stack(states)).sum(0))
    assert_close(result.ponder_B, ponder_B)
    assert result.n_loops == ([T] * B if trains else n_B.tolist()) and len(set(n_B.tolist())) > 1
    if trains and output == "weighted":
        result.state.sum().backward()
        assert loop.stop.gate.weight.grad.abs().max() > 1e-3


def test_a_row_of_act_that_never_loops_keeps_its_state():
    state = draw(1, 2, N, D)
    result = iterate(act_loop(), lambda x, t: x + 1, state, [0, 3])
    assert torch.equal(result.state[0], state[0]) and result.n_loops[0] == 0


PONDERING = Slr(n_slots=2, max_loops=3, stop={"rule": "act"}, ponder_weight=0.5)


def test_slr_learns_to_ponder_less():
    model = on("llama", PONDERING).train()
    out = model.loss(MIXED)
    with torch.no_grad():
        ponder = model.think(model.batch(model.rows(MIXED))).loop.ponder_B.mean().item()
    assert out.terms["ponder"].item() == pytest.approx(ponder, rel=1e-5)
    free = on("llama", change(PONDERING, ponder_weight=0.0)).train().loss(MIXED)
    assert out.loss.item() == pytest.approx(free.loss.item() + 0.5 * ponder, rel=1e-5)
    assert gradients(model, model.loss(MIXED).loss)["loop.stop.gate.weight"].abs().max() > 1e-6


def test_slr_answers_from_acts_mean_and_not_from_a_cache_without_it():
    weighted, last = (on("gpt2", change(PONDERING, stop={"act_output": output})) for output in ("weighted", "last"))
    assert thought_of(weighted, MIXED).loop.n_loops == thought_of(last, MIXED).loop.n_loops
    gaps = [(a - b).abs().max() for a, b in zip(weighted.answer_logits(MIXED), last.answer_logits(MIXED))]
    assert max(gaps) > 1e-4
    with pytest.raises(InputError, match="act_output to last"):
        change(PONDERING, answer_from="kv_last")
    with pytest.raises(InputError, match=r"stop\.rule=act"):
        change(PONDERING, stop={"rule": "halt"})


# Distributions over iterations


def brute_force(rates: list[float]) -> list[float]:
    """Return p_t: go on t - 1 times, then stop; the last iteration stops whoever is left."""
    p = [math.prod(1 - r for r in rates[:t]) * rates[t] for t in range(len(rates) - 1)]
    return [*p, 1 - sum(p)]


def test_the_exit_distribution_is_that_of_brute_force():
    for rates in itertools.product([0.1, 0.5, 0.95], repeat=4):
        p = exit_distribution(torch.tensor(rates).logit()[:, None])[:, 0]
        assert_close(p, torch.tensor(brute_force(list(rates))))
        assert p.sum().item() == pytest.approx(1.0, rel=1e-5) and (p >= 0).all()
        losses = draw(0, 4, 1)
        outcome = sum(a * b for a, b in zip(brute_force(list(rates)), losses[:, 0].tolist()))
        assert expected_loss(p[:, None], losses).item() == pytest.approx(outcome, rel=1e-5)


def test_the_exit_distribution_at_its_ends():
    for logits, expected in (([BIG, 0.0, 0.0], [1.0, 0, 0]), ([-BIG] * 3, [0, 0, 1.0])):
        assert_close(exit_distribution(torch.tensor(logits)[:, None])[:, 0], torch.tensor(expected))
    rows = exit_distribution(draw(0, 5, 2), n_loops=[5, 2])
    assert rows[2:, 1].tolist() == [0, 0, 0] and rows[:2, 1].sum().item() == pytest.approx(1.0)
    many = exit_distribution(torch.full((400, 1), -6.0, dtype=torch.float16))  # products of 400 rates do not underflow
    assert many.sum().item() == pytest.approx(1.0, abs=1e-3) and many.dtype == torch.float32


def test_pulls_are_their_divergences():
    gaps = []
    for n in (2, 5, 40):  # a geometric distribution differs from its prior through the tail alone
        p = exit_distribution(torch.full((n, 1), 0.2).logit())
        geometric = [0.2 * 0.8**t for t in range(n)]
        prior = torch.tensor(geometric) / sum(geometric)
        gaps.append(pull(p, "geometric", 0.2).item())
        assert gaps[-1] == pytest.approx((p[:, 0] * (p[:, 0] / prior).log()).sum().item(), abs=1e-6)
        reverse = (prior * (prior / p[:, 0]).log()).sum().item()
        assert pull(p, "geometric_reverse", 0.2).item() == pytest.approx(reverse, abs=1e-6)
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3
    p, uniform = exit_distribution(draw(0, 5, 20)), torch.full((5, 1), 1 / 5)
    assert_close(pull(p, "uniform"), math.log(5) + (p * p.log()).sum(0))
    assert abs(pull(uniform, "uniform").item()) < 1e-6 < pull(p, "uniform").min()


def test_what_going_on_is_worth_has_no_gradient_and_is_half_at_the_least_gain():
    losses = torch.tensor([[2.0], [1.995], [1.0], [3.0]], requires_grad=True)
    targets = gain_targets(losses)
    assert not targets.requires_grad
    expected = [0.5, 1.0, 1 / (1 + math.exp(0.25))]
    assert_close(targets[:, 0], torch.tensor(expected), 1e-3)


def test_slrs_gate_may_be_pulled_the_other_way():
    method = Slr(n_slots=2, max_loops=3, stop={"rule": "halt"}, halt={"weight": 1.0, "beta": 1.0})
    pulls = (on("llama", change(method, halt={"pull": pull})).train() for pull in ("geometric", "geometric_reverse"))
    one, other = (model.loss(MIXED).terms["halt"].item() for model in pulls)
    assert abs(one - other) > 1e-3


def test_a_sampled_halt_stops_as_often_as_its_rates_say():
    n, rate = 4000, 1 / (1 + math.e)  # of a fresh gate
    n_loops = iterate(loop_of("halt_sample", 3), lambda x, t: x, draw(0, n, 1, D), 3).n_loops
    found = torch.bincount(torch.tensor(n_loops), minlength=4)[1:]
    expected = n * torch.tensor(brute_force([rate] * 3))
    assert ((found - expected).square() / expected).sum().item() < 13.8  # 0.1 % with 2 degrees of freedom


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1), (1.0, T)])
def test_the_cumulative_threshold_is_the_quantile_of_the_exit_distribution(q, expected):
    loop = loop_of("halt", T, threshold=q)
    assert iterate(loop, lambda x, t: x, draw(0, B, N, D), T).n_loops == [expected] * B


# Probes and classifiers


def test_a_fresh_probe_stops_nowhere_and_a_fitted_one_finds_what_it_was_shown():
    states = draw(0, 5, 300, D)
    labels = states[..., 0] + 0.5 * states[..., 1] > 0.3
    probe, again, now = rule("mlp_probe"), rule("mlp_probe"), StopInputs(*[states[0][:, None]] * 3)
    assert (probe.score(now) < 0.05).all()
    first = fit_probe(probe, states, labels, seed=0)
    assert ((probe.score(now) > 0.5) == labels[0]).float().mean() > 0.95
    assert fit_probe(again, states, labels, seed=0) == first
    assert torch.equal(again.score(now), probe.score(now))


def signals(seed: int = 0, n: int = 400) -> tuple[Tensor, Tensor]:
    """Return features (T, M, 3) and labels that follow from the first two in an iteration of their own way."""
    features = draw(seed, 5, n, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([0.0, 5.0, 1.0])
    return features, features[..., 0] + (features[..., 1] - 5) / 10 > 0.2


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("kind", ExitClassifierKind.__args__)
def test_a_classifier_gives_what_scikit_learn_gives(kind, per_step):
    from sklearn import linear_model, svm

    features, labels = signals()
    classifier = ExitClassifier(("gap", "top", "block"))
    classifier.fill(fit_classifier(features, labels, kind, per_step))
    assert len(classifier.bias_K) == (4 if per_step else 1)
    one, two = (fit_classifier(features, labels, kind, per_step, seed=3) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for t in (1, 3):
        x, y = (of[t - 1 : t] if per_step else of[:4] for of in (features, labels))
        x, y = x.reshape(-1, 3).double().numpy(), y.reshape(-1).numpy()
        z, q = (x - x.mean(0)) / x.std(0), classifier(features[t], t)
        theirs = {
            "logistic": linear_model.LogisticRegression(class_weight="balanced", max_iter=1000),
            "svm_linear": svm.LinearSVC(class_weight="balanced", random_state=0, dual=False),
            "svm_rbf": svm.SVC(class_weight="balanced"),
        }[kind].fit(z, y)
        margin = torch.as_tensor(theirs.decision_function((features[t].double().numpy() - x.mean(0)) / x.std(0)))
        if kind == "svm_rbf":  # fitted to as many rows of either class
            assert ((q > 0.5) == (margin > 0)).float().mean() > 0.95
        else:
            assert_close(q, margin.sigmoid().float())
        assert ((q > 0.5) == labels[t]).float().mean() > 0.9
    again = ExitClassifier(classifier.features)
    again.load_state_dict(classifier.state_dict())  # its numbers are saved whatever their size
    assert all(torch.equal(again.score(features[t], t), classifier.score(features[t], t)) for t in (1, 2))
    for label in (1.0, 0.0):  # one class alone is certain
        classifier.fill(fit_classifier(features, torch.full_like(labels, label), kind, per_step=True))
        assert (classifier(features[0], 1) - label).abs().max() < 1e-6


def test_a_classifier_that_was_not_fitted_is_refused_and_one_that_was_cleared_stops_nowhere():
    unfitted = rule("classifier", features=("block", "depth"))
    now = StopInputs(*(draw(i, B, N, D) for i in range(3)), iteration=1, limit=3)
    with pytest.raises(InputError, match="calibrate"):
        unfitted.score(now)
    unfitted.classifier.clear()
    assert torch.isinf(unfitted.score(now)).all()
    assert_close(unfitted.features(now)[:, 1], torch.full((B,), 1 / 3))


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1.0])
def test_thresholds_keep_their_promise_on_the_rows_they_were_made_from(target):
    scores = draw(0, T, 2000).sigmoid()
    agrees = draw(1, T, 2000).sigmoid() < scores + torch.linspace(0, 0.6, T)[:, None]
    agrees[-1] = True
    tau_T = fitted_thresholds(scores, agrees, target, min_rows=20)
    goes, n_right, n_out = torch.ones(2000, dtype=torch.bool), 0, 0
    for t in range(T - 1):
        ends = goes & (scores[t] >= tau_T[t])
        assert not ends.any() or (agrees[t][ends].double().mean() >= target and ends.sum() >= 20)
        n_right, n_out, goes = n_right + int(agrees[t][ends].sum()), n_out + int(ends.sum()), goes & ~ends
    assert tau_T[-1] == math.inf
    assert n_out > 100


def test_a_threshold_is_the_loosest_that_keeps_the_promise_and_ties_stop_together():
    scores, agrees = torch.tensor([[0.9, 0.8, 0.8, 0.6, 0.5, 0.4], [0.0] * 6]), torch.ones(2, 6).bool()
    agrees[0, 4:] = False
    for target, min_rows, expected in ((0.75, 1, 0.5), (1.0, 1, 0.6), (1.0, 5, math.inf)):
        assert fitted_thresholds(scores, agrees, target, min_rows)[0].item() == pytest.approx(expected)
    agrees[0, 2] = False
    assert fitted_thresholds(scores, agrees, 1.0, min_rows=1)[0].item() == pytest.approx(0.9)


def test_a_kernel_machine_is_fitted_to_so_many_rows_of_each_kind():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.rand(2, 1400, 2, generator=generator), torch.rand(2, 1400, generator=generator) < 0.5
    fitted = fit_classifier(features, labels, "svm_rbf")  # noise, so that nearly every row is a support vector
    assert MOST_VECTORS // 2 < fitted["share_KS"].shape[1] <= MOST_VECTORS < 1400


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.1, math.inf, math.inf]),
        ({"min_loops": 2}, [0.1, 0.6, math.inf]),
        ({"check_every": 2}, [math.inf, 0.6, math.inf]),
    ],
    ids=str,
)
def test_rows_that_may_not_stop_yet_count_at_the_iterations_after(fields, expected):
    scores, agrees = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.7, 0.6], [0.0, 0.0, 0.0]]), torch.ones(3, 3).bool()
    assert fitted_thresholds(scores, agrees, 1.0, 2, FullStop(**fields)).tolist() == pytest.approx(expected)


# Oracles


def test_oracles_find_the_first_iteration_that_would_have_done():
    tops = torch.tensor(
        [[[1, 2], [3, 4], [5, 5]], [[1, 3], [3, 4], [5, 6]], [[2, 3], [3, 4], [5, 5]], [[2, 3], [3, 4], [5, 6]]]
    )
    trace = Trace(read_out=lambda one_hot: one_hot, top_k=1, gold=torch.tensor([[-1, 2, -1], [0, 9, 4], [0, 5, 6]]))
    for t, top in enumerate(tops, 1):
        states = torch.nn.functional.one_hot(top, 10).float()
        rows = [0, 1, 2] if t < 4 else [0, 1]
        trace.record(t, rows, *[states[rows]] * 3)
    assert oracle_agree(trace) == [3, 1, 1]  # the last row went as far as iteration 3
    assert oracle_correct(trace) == [3, 4, 2]
    with pytest.raises(ValueError, match="no right tokens"):
        oracle_correct(Trace())

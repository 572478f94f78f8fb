"""The inner loop on functions whose result is known by hand."""

import math

import pytest
import torch
from torch import Tensor

from innerloop.errors import InputError
from innerloop.loop.loop import InnerLoop
from innerloop.loop.trace import Trace
from tests.close import assert_close
from tests.fields import FullLoop
from tests.methods.tools import FunctionPass, iterate

WIDTH = 4
TAU = torch.tensor(0.5)


def states(seed: int = 0, n_rows: int = 2, n_positions: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n_rows, n_positions, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inner_loop(max_loops: int = 4, tau: Tensor = TAU, **settings) -> InnerLoop:
    return InnerLoop(FullLoop(**settings), WIDTH, max_loops, tau)


def linear(eigenvalues: list[float], seed: int = 0):
    """Return f(h) = J h + b with these eigenvalues of J, and J and b."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) + 2 * torch.eye(WIDTH)
    J = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.inverse()
    b = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return (lambda h, loop: h @ J.T + b), J, b


F, EYE = linear([0.5, -0.3, 0.9, 0.1])[0], torch.eye(WIDTH, dtype=torch.float64)


def run(f, state, n_loops: int, **settings):
    return iterate(inner_loop(**settings), f, state, n_loops)


# Iterating


def test_a_loop_without_settings_composes_the_function_and_tells_it_the_iteration():
    h, seen = states(), []
    result = run(lambda x, loop: seen.append(loop) or F(x, loop), h, 3)
    steps = [F(h, 1), F(F(h, 1), 2), F(F(F(h, 1), 2), 3)]
    assert torch.equal(result.state, steps[-1]) and seen == [1, 2, 3]
    assert all(torch.equal(u, v) for (_, u), v in zip(result.outputs, steps, strict=True))


def test_no_iterations_leave_the_state_as_it_is():
    h = states()
    result = run(lambda *_: pytest.fail("f was called"), h, 0, time="lookup", residual="A", rescale="rms")
    assert result.state is h and result.outputs == result.states == [] and result.n_loops == [0, 0]


def test_residuals_a_and_b_are_alike_for_one_iteration_and_not_for_two():
    after = {(kind, n): run(F, states(), n, residual=kind).state for kind in "AB" for n in (1, 2)}
    assert torch.equal(after["A", 1], after["B", 1])
    assert not torch.allclose(after["A", 2], after["B", 2], atol=1e-3)


def test_the_time_embedding_enters_the_input_but_not_the_residual():
    loop, inputs, h = inner_loop(2, residual="B", alpha=0.5, time="lookup").double(), [], states()
    with torch.no_grad():
        loop.time.table.copy_(torch.tensor([[1.0], [10.0]]).expand(2, WIDTH))
    result = iterate(loop, lambda x, _: inputs.append(x) or torch.zeros_like(x), h, 3)
    for x, expected in zip(inputs, (h + 1, h / 2 + 10, h / 4 + 10)):  # past the table: its last row
        assert_close(x, expected)
    assert_close(result.state, h / 8)


def test_states_are_rescaled_before_the_residual_and_outputs_are_not():
    result = run(lambda x, _: 7 * x, states(), 1, rescale="rms", residual="sum")
    rms = (result.state - states()).pow(2).mean(-1).sqrt()
    assert_close(rms, torch.full_like(rms, 0.5))
    assert_close(result.outputs[0][1], 7 * states())
    assert_close(result.states[0][1], result.state)


# Fixed points of the linear toy (slr.md, section 9)


def test_residuals_have_the_fixed_points_of_theory():
    f, J, b = linear([-1.2, 0.5, -0.8, 0.1])
    h, fixed = states(n_positions=1), torch.linalg.solve(EYE - J, b)

    def distance(n_loops: int, **settings) -> float:
        return (run(f, h, n_loops, **settings).state - fixed).norm().item()

    for alpha in (0.3, 0.7):  # A: a fixed point of its own, shifted to the first state
        shifted = torch.linalg.solve(EYE - alpha * J, (alpha * b + (1 - alpha) * h).transpose(1, 2))
        assert_close(run(f, h, 300, residual="A", alpha=alpha).state, shifted.transpose(1, 2), 1e-9)
    assert distance(60) > 1000 * distance(1)
    assert distance(60, residual="B", alpha=1.0) == distance(60)
    assert distance(600, residual="B", alpha=0.5) < 1e-9  # every eigenvalue is at most |(1 + 0.5) / 2|
    above = run(linear([1.2, 0.5, 0.2, 0.1])[0], h, 100, residual="B", alpha=0.5)
    assert above.state.norm() > 1e3  # which B does not cure


# Rows with their own number of iterations


@pytest.mark.parametrize("compacts", [True, False])
def test_a_row_stands_still_after_its_own_number_of_iterations(compacts):
    loop, h, trace = inner_loop(4, residual="B", rescale="rms"), states(n_rows=4), Trace()
    result = iterate(loop, F, h, [0, 1, 3, 4], compacts, trace=trace)
    for row, n_loops in enumerate([0, 1, 3, 4]):
        single = Trace()
        alone = iterate(loop, F, h[row : row + 1], n_loops, trace=single)
        assert_close(result.state[row], alone.state[0])
        for ours, other in zip(trace.row(row).iterations, single.iterations, strict=True):
            assert torch.equal(ours.delta, other.delta) and ours.delta > 0
            assert torch.equal(ours.cosine, other.cosine)
    assert torch.equal(result.state[0], h[0])
    assert result.n_loops == [0, 1, 3, 4]
    assert [entry.rows for entry in trace.iterations] == [[1, 2, 3], [2, 3], [2, 3], [3]]
    ran = [[1, 2, 3], [2, 3], [2, 3], [3]] if compacts else [[0, 1, 2, 3]] * 4
    assert [rows for rows, _ in result.outputs] == [rows for rows, _ in result.states] == ran


def test_rows_that_end_leave_a_pass_that_compacts_and_are_told_to_one_that_does_not():
    leaving, standing = FunctionPass(F), FunctionPass(F, compacts=False)
    for f in (leaving, standing):
        inner_loop(4)(f, states(n_rows=4), [0, 1, 3, 4])
    assert leaving.kept == [[1, 2, 3], [1, 2], [1]]  # places among those that ran last
    assert leaving.actives == [None] * 4 and standing.kept == []
    told = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert [active.long().tolist() for active in standing.actives] == told


def test_a_row_that_stands_still_is_not_poisoned_by_what_the_function_makes_of_it():
    h = torch.ones(2, 1, WIDTH, requires_grad=True)

    def f(x, loop):
        return x * torch.tensor([2.0, 1.0 if loop == 1 else math.inf])[:, None, None]

    result = iterate(inner_loop(), f, h, [3, 1], compacts=False)
    assert result.state[1].tolist() == [[1.0] * WIDTH]
    assert torch.isfinite(result.state).all()


# The trace


def test_the_trace_holds_the_statistics_of_every_iteration():
    loop, trace, h = inner_loop(residual="A", rescale="rms"), Trace(), states()
    iterate(loop, F, h, 3, trace=trace)
    assert [entry.loop for entry in trace.iterations] == [1, 2, 3]
    for t, entry in enumerate(trace.iterations, start=1):
        new, old = (iterate(loop, F, h, n).state.flatten(1) for n in (t, t - 1))
        delta = (new - old).norm(dim=1) / new.norm(dim=1)
        cosine = (new * old).sum(1) / (new.norm(dim=1) * old.norm(dim=1))
        for ours, expected in ((entry.delta, delta), (entry.cosine, cosine), (entry.rms, new.pow(2).mean(1).sqrt())):
            assert ours.shape == (2,) and ours.dtype == torch.float32
            assert_close(ours, expected)
        assert entry.top_ids is None and entry.top_probs is None and entry.score is None
        assert entry.rows == [0, 1]


def test_statistics_of_half_precision_states_are_in_fp32():
    trace, large = Trace(), torch.full((1, 2, WIDTH), 3e4, dtype=torch.float16)
    trace.record(1, [0], large, large, -large)
    entry = trace.iterations[0]
    assert (entry.delta.item(), entry.cosine.item()) == pytest.approx((2.0, -1.0), rel=1e-5)
    assert entry.rms.item() == pytest.approx(3e4, rel=1e-3)


def test_read_outs_are_the_likeliest_tokens_of_the_outputs_and_a_row_of_a_trace_is_that_rows():
    head = torch.randn(WIDTH, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trace, single = (Trace(read_out=lambda u: u @ head, top_k=3) for _ in range(2))
    loop, h = inner_loop(rescale="rms", residual="A"), states().requires_grad_()
    result = iterate(loop, F, h, 2, trace=trace)
    assert torch.equal(result.state, iterate(loop, F, h, 2).state)  # recording changes nothing, and keeps no graph
    assert not any(entry.delta.requires_grad or entry.top_probs.requires_grad for entry in trace.iterations)
    for entry, (_, output) in zip(trace.iterations, result.outputs, strict=True):
        probabilities = (output @ head).softmax(-1)
        assert entry.top_ids.shape == entry.top_probs.shape == (2, 3, 3)
        assert torch.equal(entry.top_ids, probabilities.argsort(-1, descending=True)[..., :3])
        assert_close(entry.top_probs, probabilities.gather(-1, entry.top_ids))
    iterate(loop, F, h[1:], 2, trace=single)
    for ours, alone in zip(trace.row(1).iterations, single.iterations, strict=True):
        for name, value in vars(alone).items():
            assert not isinstance(value, Tensor) or torch.equal(getattr(ours, name), value), name
        assert (ours.loop, ours.rows, ours.score) == (alone.loop, [1], None)


# Gradients


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 3 * 2.0**2),  # d s^3
        ({"detach": True}, 2.0**2),  # only the last factor s
        # z_3 = z_2/2 + s z_2/2 with z_t = z_{t-1} (1 + s)/2: the inputs of f are cut, the mixing is not
        ({"detach": True, "residual": "B", "alpha": 0.5}, 0.5 * 2.25 + 0.5 * (0.5 * 1.5) + 0.5**2 * (0.5 * 1.0)),
    ],
    ids=str,
)
def test_the_gradient_flows_through_all_iterations_unless_it_is_cut(settings, expected):
    """d(sum z_3)/ds for f(x) = s x from z_0 = 1, one number wide."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loop = InnerLoop(FullLoop(**settings), 1, 3, TAU)
    iterate(loop, lambda x, _: scale * x, torch.ones(1, 1, 1, dtype=torch.float64), 3).state.sum().backward()
    assert scale.grad.item() == pytest.approx(expected)


def test_the_gradient_equals_finite_differences():
    loop, h = inner_loop(residual="A").double(), states(n_rows=1, n_positions=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: iterate(loop, F, h, 3).state, h)


# Settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *(("alpha", value, "between 0 and 1") for value in (-0.1, 1.1, math.nan)),
        *(("residual", "a", "residual"), ("rescale", "RMS", "rescale"), ("time", "sinusoid", "time")),
    ],
)
def test_a_setting_outside_its_choices_is_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        FullLoop(**{field: value})


def test_a_loop_holds_a_time_table_only_if_it_is_to_have_one_and_keeps_tau_as_a_copy():
    tau = torch.tensor(0.5)
    loop = inner_loop(tau=tau)
    tau.fill_(9.0)
    assert dict(loop.named_parameters()) == {} and loop.state_dict()["rescale.tau"].item() == 0.5
    assert inner_loop(4, time="lookup").time.table.shape == (4, WIDTH)
    assert inner_loop(0, time="lookup").time is None

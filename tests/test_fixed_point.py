"""Fixed points: solvers, gradients without unrolling, and the gain of a loop, on maps with known answers."""

import pytest
import torch
from torch import Tensor

from innerloop.config.loop import FixedPointSettings, Solver
from innerloop.loop.fixed_point import Map, jacobian_gain, solve
from innerloop.loop.loop import InnerLoop
from innerloop.loop.trace import Trace
from tests.close import ROUNDED, assert_close
from tests.fields import FullLoop
from tests.methods.tools import FunctionPass, iterate

D = 5
TAU = torch.ones(())


def contraction(radius: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return J with this norm and b."""
    generator = torch.Generator().manual_seed(seed)
    j = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return j * radius / torch.linalg.matrix_norm(j, 2), torch.randn(D, generator=generator, dtype=torch.float64)


def exact(j: Tensor, b: Tensor) -> Tensor:
    """Return z* = J z* + b."""
    return torch.linalg.solve(torch.eye(D, dtype=torch.float64) - j, b)


def loop_of(settings: FullLoop, max_loops: int, **fixed_point) -> InnerLoop:
    return InnerLoop(settings, D, max_loops, TAU, fixed_point=FixedPointSettings(**fixed_point)).double()


def find(g: Map, z: Tensor, solver: Solver, n_loops: int, *settings, **options) -> tuple[Tensor, list[int]]:
    """Solve with the same limit for every row."""
    return solve(g, z, solver, [n_loops] * len(z), *settings, **options)


def start(rows: int = 3) -> Tensor:
    return torch.randn(rows, 2, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


by_solver = pytest.mark.parametrize("solver", ["plain", "damped", "anderson"])
by_gradient = pytest.mark.parametrize("gradient", ["unroll", "implicit", "phantom"])


@by_solver
@by_gradient
def test_every_solver_finds_the_fixed_point_of_a_linear_contraction(solver, gradient):
    j, b = contraction()
    tol = 1e-6 if solver == "anderson" else 1e-10  # its least squares are in fp32
    found, n_done = find(lambda z: z @ j.T + b, start(), solver, 200, tol, gradient)
    assert_close(found, exact(j, b).expand(3, 2, D), 100 * tol)
    assert len(n_done) == 3 and all(1 < n < 200 for n in n_done)


@by_solver
def test_the_implicit_gradient_is_the_exact_one(solver):
    j, b = contraction()
    j.requires_grad_(), b.requires_grad_()
    weight = start(1)[0, 0]
    expected = torch.autograd.grad((exact(j, b) * weight).sum(), (j, b))
    found, _ = find(lambda z: z @ j.T + b, start(1)[:, :1], solver, 300, 1e-9, "implicit")
    ours = torch.autograd.grad((found[0, 0] * weight).sum(), (j, b))
    assert_close(ours, expected, 1e-6)


def test_the_phantom_gradient_is_that_of_one_iteration_from_the_fixed_point():
    j, b = contraction()
    b.requires_grad_()
    found, _ = find(lambda z: (z @ j.T + b).tanh(), start(), "plain", 300, 1e-12, "phantom")
    (ours,) = torch.autograd.grad(found.sin().sum(), b)
    once = (found.detach() @ j.T + b).tanh()
    (expected,) = torch.autograd.grad(once.sin().sum(), b)
    assert_close(ours, expected, 1e-9)
    (full,) = torch.autograd.grad(find(lambda z: (z @ j.T + b).tanh(), start(), "plain", 99, 0.0, "unroll")[0].sum(), b)
    assert (full - expected).abs().max() > 1e-2


def test_anderson_needs_fewer_iterations_than_plain_on_a_slow_contraction():
    j = torch.diag(torch.tensor([0.97, 0.9, -0.8, 0.5, 0.1], dtype=torch.float64))
    steps = {s: find(lambda z: z @ j + 1, start(), s, 500, 1e-6, "unroll")[1] for s in ("plain", "anderson")}
    assert all(fast < slow / 2 for fast, slow in zip(steps["anderson"], steps["plain"]))


def test_damping_finds_a_fixed_point_that_plain_iteration_flees():
    j = torch.diag(torch.tensor([-1.2, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64))
    fixed = exact(j, torch.ones(D, dtype=torch.float64))
    damped, _ = find(lambda z: z @ j + 1, start(), "damped", 300, 1e-10, "phantom", damping=0.5)
    assert_close(damped, fixed.expand(3, 2, D), 1e-8)
    plain, n_done = find(lambda z: z @ j + 1, start(), "plain", 100, 1e-10, "phantom")
    assert n_done == [100] * 3 and (plain - fixed).norm() > 1e3


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_what_is_kept_for_the_gradient_does_not_grow_with_the_iterations(gradient):
    def n_saved(gradient: str, n_loops: int) -> int:
        j, b = contraction()
        b.requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            found, n_done = find(lambda z: (z @ j.T + b).tanh(), start(), "plain", n_loops, 0.0, gradient)
        assert n_done == [n_loops] * 3 and found.requires_grad
        return len(kept)

    assert n_saved(gradient, 2) == n_saved(gradient, 40)
    assert n_saved("unroll", 40) > 10 * n_saved("unroll", 2)
    with torch.no_grad():
        assert not find(lambda z: z @ contraction()[0].T, start(), "plain", 9, 1e-9, gradient)[0].requires_grad


# Rows of a batch


RATES = torch.tensor([0.9, 0.1, 0.5, 0.8, 0.6], dtype=torch.float64)
LIMITS = [60, 60, 0, 3, 60]  # row 2 stays where it is, row 3 runs out of iterations


def at_own_speed(rows: slice | list[int], b: Tensor) -> Map:
    """g(z) = tanh(r J z) + b, a rate and a b for each row: r is how fast it stands still."""
    basis, _ = torch.linalg.qr(contraction()[0])
    return lambda z: (RATES[rows, None, None] * (z @ basis.T)).tanh() + b[rows, None]


def shifts() -> Tensor:
    return torch.randn(5, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@by_solver
@by_gradient
def test_rows_with_speeds_and_limits_of_their_own_are_solved_as_if_alone(solver, gradient):
    tolerance = 1e-5 if solver == "anderson" else 1e-12  # its least squares are in fp32
    z, b = start(5), shifts()
    found, n_done = solve(at_own_speed(slice(None), b), z, solver, LIMITS, 1e-3, gradient)
    for row, limit in enumerate(LIMITS):
        one = slice(row, row + 1)
        alone, n_alone = solve(at_own_speed(one, b), z[one], solver, [limit], 1e-3, gradient)
        assert n_alone == n_done[row : row + 1]
        assert_close(found[one], alone, tolerance)
    assert n_done[2:4] == [0, 3] and len({*n_done}) >= 4
    assert max(n_done) < 60  # the others stand still before
    assert torch.equal(found[2], z[2])


@by_solver
@by_gradient
def test_each_row_has_the_gradient_it_has_alone(solver, gradient):
    def gradients_of(rows: slice) -> tuple[Tensor, ...]:
        z, b = start(5).requires_grad_(), shifts().requires_grad_()
        found, _ = solve(at_own_speed(rows, b), z[rows], solver, LIMITS[rows], 1e-6, gradient)
        return torch.autograd.grad(found.sin().sum(), (z, b), materialize_grads=True)

    together = gradients_of(slice(None))
    alone = [gradients_of(slice(row, row + 1)) for row in range(5)]
    for whole, parts in zip(together, zip(*alone)):
        assert_close(whole, sum(parts), ROUNDED)
    of_start, of_b = together
    assert_close(of_start[2], start(5)[2].cos())  # z_0 itself is the answer
    assert not of_b[2].any()
    assert all(of_b[row].abs().max() > 0.1 for row in (0, 1, 3, 4))
    assert gradient == "unroll" or not of_start[[0, 1, 3, 4]].any()


@by_solver
def test_a_batch_without_iterations_is_returned_as_it_is(solver):
    found, n_done = find(lambda z: pytest.fail("g was called"), start(), solver, 0, 1e-3, "unroll")
    assert torch.equal(found, start()) and n_done == [0] * 3


# The solver as a setting of the loop


@by_solver
@pytest.mark.parametrize("residual", ["none", "A", "B", "C"])
def test_a_loop_with_a_solver_ends_where_a_long_loop_ends(solver, residual):
    j, b = contraction()
    settings = FullLoop(residual=residual, alpha=0.6)
    found, long = (
        iterate(loop_of(settings, 200, **how), lambda x, t: (x @ j.T + b).tanh(), start(), 200)
        for how in ({"solver": solver, "tol": 1e-7}, {})
    )
    assert_close(found.state, long.state, 1e-6)
    assert max(found.n_loops) < 200


@pytest.mark.parametrize("solver", ["plain", "anderson"])
def test_the_implicit_gradient_of_a_loop_is_that_of_a_long_loop(solver):
    def gradients(**fixed_point) -> list[Tensor]:
        j, b = contraction()
        j.requires_grad_(), b.requires_grad_()
        loop, h = loop_of(FullLoop(residual="A", alpha=0.6), 80, **fixed_point), start().requires_grad_()
        state = iterate(loop, lambda x, t: (x @ j.T + b).tanh(), h, 80).state
        return list(torch.autograd.grad(state.sin().sum(), (j, b, h)))

    assert_close(gradients(solver=solver, tol=1e-9), gradients(), 1e-6)


@by_solver
@by_gradient
def test_a_loop_with_a_solver_gives_every_row_its_own_number_of_iterations(solver, gradient):
    loop = loop_of(FullLoop(residual="A", alpha=0.6), 60, solver=solver, gradient=gradient)
    trace, h, b = Trace(), start(5), shifts()
    result = iterate(loop, lambda x, t: at_own_speed(slice(None), b)(x), h, LIMITS, trace=trace)
    for row, limit in enumerate(LIMITS):
        one = slice(row, row + 1)
        alone = iterate(loop, lambda x, t, one=one: at_own_speed(one, b)(x), h[one], limit)
        assert alone.n_loops == result.n_loops[one]
        assert_close(result.state[one], alone.state)
        assert len(trace.row(row).iterations) == result.n_loops[row]
    assert result.n_loops[2:4] == [0, 3]


class PaddedPass(FunctionPass):
    """A pass whose rows end in padding, of which nothing can be expected but that it is no number too large."""

    def __init__(self, f, mask_BN: Tensor):
        super().__init__(f)
        self.state_mask = mask_BN

    def __call__(self, inputs: Tensor, loop: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        padding = 3 * inputs.sin() + loop  # never stands still
        return torch.where(self.state_mask[..., None] == 1, super().__call__(inputs, loop, active_B, n_extra), padding)

    def probe(self) -> "PaddedPass":
        return self


@by_solver
def test_padding_has_no_say_in_when_a_row_stands_still(solver):
    j, b = contraction()
    loop = loop_of(FullLoop(), 60, solver=solver)
    short = iterate(loop, lambda x, t: x @ j.T + b, start(2), 60)
    padded = torch.cat([start(2), 9 * start(2)[:, :1]], dim=1)
    f = PaddedPass(lambda x, t: x @ j.T + b, torch.tensor([[1, 1, 0]] * 2))
    result = loop(f, padded, [60, 60])
    assert result.n_loops == short.n_loops and max(result.n_loops) < 60
    assert_close(result.state[:, :2], short.state)


# The gain


@pytest.mark.parametrize("radius", [0.5, 0.95, 1.3])
def test_the_gain_of_a_symmetric_map_is_its_spectral_radius(radius):
    basis, _ = torch.linalg.qr(start(1)[0].T @ start(1)[0] + torch.diag(torch.arange(1.0, D + 1).double()))
    eigenvalues = torch.tensor([-radius, 0.3, 0.2, -0.1, 0.05], dtype=torch.float64)
    j = basis @ torch.diag(eigenvalues) @ basis.T
    assert jacobian_gain(lambda z: z @ j + 1, start()).item() == pytest.approx(radius, rel=0.05)


def test_the_gain_is_differentiable_in_the_weights_and_not_in_the_state():
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    state = start().requires_grad_()
    gain = jacobian_gain(lambda z: scale * z, state)
    gain.backward()
    assert (gain.item(), scale.grad.item()) == pytest.approx((0.7, 1.0), rel=1e-5) and state.grad is None


@pytest.mark.parametrize("solver", ["none", "plain"])
def test_padding_has_no_say_in_the_gain(solver):
    loop = loop_of(FullLoop(), 3, spectral_weight=1.0, solver=solver).train()
    f = PaddedPass(lambda x, t: 0.8 * x, torch.tensor([[1, 1, 0]] * 2))
    padded = torch.cat([start(2), 9 * start(2)[:, :1]], dim=1)
    assert loop(f, padded, [3, 3]).gain.item() == pytest.approx(0.8, rel=1e-3)


def test_the_gain_is_measured_in_training_alone_and_without_the_noise():
    loop = loop_of(FullLoop(noise=0.5), 3, spectral_weight=1.0)
    assert iterate(loop.train(), lambda x, t: 0.8 * x, start(), 3).gain.item() == pytest.approx(0.8, rel=1e-5)
    assert iterate(loop.eval(), lambda x, t: 0.8 * x, start(), 3).gain is None
    assert iterate(loop_of(FullLoop(), 3).train(), lambda x, t: 0.8 * x, start(), 3).gain is None

"""Loops as fixed points: solvers, gradients that need no unrolling, and the gain of a loop.

A loop z <- g(z) that converges can be run until it stands still, and differentiated there: by the implicit function
theorem, dz*/dtheta = (I - J)^-1 dg/dtheta with J = dg/dz at z* (Bai et al., arXiv 1909.01377), or by one step from z*
(the phantom gradient, arXiv 2111.05177), both with the memory of a single pass. Solvers: plain, damped, and Anderson
acceleration (Walker and Ni, 2011). Shapes: `B` rows, everything else is flattened per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from innerloop.config.loop import Gradient, Solver

Map = Callable[[Tensor], Tensor]

HISTORY = 5  # states that Anderson acceleration combines
RIDGE = 1e-4  # of its least-squares problem, relative
PROBE = 1e-2  # size of the change by which a gain is measured, relative to the state
POWER_ITERATIONS = 3


def solve(
    g: Map,
    start: Tensor,
    solver: Solver,
    max_loops: Sequence[int],
    tol: float,
    gradient: Gradient,
    damping: float = 0.7,
    on_iteration: Callable[[int, Tensor], None] = lambda loop, active_B: None,
) -> tuple[Tensor, list[int]]:
    """Find z* = g(z*) from ``start`` (B, ...); return it, differentiable, and each row's number of iterations.

    Args:
        g: the map; it treats rows independently of each other.
        start: where to begin.
        solver: plain: z <- g(z); damped: z <- (1 - damping) z + damping g(z); anderson.
        max_loops: the most iterations of each row.
        tol: relative change at which a row stands still.
        gradient: unroll, implicit or phantom.
        damping: of ``damped``.
        on_iteration: called with each 1-based iteration and the rows (B,) that still move.
    """
    if gradient == "unroll":
        return _iterate(g, start, solver, max_loops, tol, damping, on_iteration)
    with torch.no_grad():
        fixed, n_done = _iterate(g, start, solver, max_loops, tol, damping, on_iteration)
    if not torch.is_grad_enabled():
        return fixed, n_done
    state = fixed.detach().requires_grad_()
    result = g(state)
    if gradient == "implicit" and result.requires_grad:
        inner = g(state)  # a graph of its own, from which products with J are taken

        def solve_adjoint(grad: Tensor) -> Tensor:
            def adjoint(y: Tensor) -> Tensor:
                return grad + torch.autograd.grad(inner, state, y, retain_graph=True)[0]

            # (I - J^T) y = grad is itself a fixed point, and contracts as fast as the loop does.
            limits = [max(*max_loops, 30)] * len(grad)
            return _iterate(adjoint, grad, "anderson", limits, tol * 1e-2, damping)[0]

        result.register_hook(solve_adjoint)
    if min(max_loops) == 0:
        result = torch.where(_column(torch.tensor(max_loops, device=start.device) > 0, start), result, start)
    return result, n_done


def _iterate(
    g: Map,
    start: Tensor,
    solver: Solver,
    max_loops: Sequence[int],
    tol: float,
    damping: float,
    on_iteration: Callable[[int, Tensor], None] = lambda loop, active_B: None,
) -> tuple[Tensor, list[int]]:
    state, past = start, list[tuple[Tensor, Tensor]]()
    limit_B = torch.tensor(list(max_loops), device=start.device)
    active_B, n_done_B = limit_B > 0, torch.zeros_like(limit_B)
    for loop in range(1, max(max_loops) + 1):
        new = g(state)
        on_iteration(loop, active_B)
        n_done_B += active_B
        change = (new - state).float().flatten(1).norm(dim=1) / (new.float().flatten(1).norm(dim=1) + 1e-8)
        if solver == "damped":
            new = (1 - damping) * state + damping * new
        elif solver == "anderson":
            past = [*past[-HISTORY + 1 :], (state, new)]
            new = _anderson(past)
        state = torch.where(_column(active_B, new), new, state)
        active_B = active_B & (change >= tol) & (limit_B > loop)
        if not bool(active_B.any()):
            break
    return state, n_done_B.tolist()


def _column(flags_B: Tensor, like: Tensor) -> Tensor:
    return flags_B.view(-1, *[1] * (like.ndim - 1))


def _anderson(past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine g's last values with weights that sum to one and make the residuals g(z) - z cancel best, row by row."""
    shape = past[-1][1].shape
    values = torch.stack([new.flatten(1) for _, new in past], dim=1)  # (B, m, n)
    residuals = torch.stack([(new - old).flatten(1) for old, new in past], dim=1).float()
    gram = residuals @ residuals.transpose(1, 2)
    m = gram.shape[1]
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None]
    eye = torch.eye(m, device=gram.device, dtype=gram.dtype)
    weights = torch.linalg.solve(gram / scale + RIDGE * eye, torch.ones_like(gram[:, :, :1]))
    weights = weights / weights.sum(1, keepdim=True)
    return (weights.to(values.dtype) * values).sum(1).view(shape)


def jacobian_gain(g: Map, state: Tensor) -> Tensor:
    """Estimate the spectral radius of dg/dz at ``state``, the mean over rows, differentiable in g's weights (scalar).

    Power iteration on differences g(z + e v) - g(z), so any attention kernel will do; only the last one carries a
    gradient. On a linear map it tends to the largest |eigenvalue| when that is real and single.
    """
    state = state.detach()
    size = PROBE * state.float().flatten(1).norm(dim=1).clamp(min=1e-8)
    ones = [1] * (state.ndim - 1)
    step = size.view(-1, *ones).to(state.dtype)
    generator = torch.Generator(device=state.device).manual_seed(0)
    direction = _unit(torch.randn(state.shape, generator=generator, device=state.device, dtype=state.dtype))
    with torch.no_grad():
        base = g(state)
        for _ in range(POWER_ITERATIONS):
            direction = _unit(g(state + step * direction) - base)
    moved = g(state + step * direction) - g(state)
    return (moved.float().flatten(1).norm(dim=1) / size).mean()


def _unit(vectors: Tensor) -> Tensor:
    norms = vectors.float().flatten(1).norm(dim=1).clamp(min=1e-20)
    return vectors / norms.view(-1, *[1] * (vectors.ndim - 1)).to(vectors.dtype)

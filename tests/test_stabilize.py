"""Rescaling, residuals and the timestep embedding (slr.md, sections 3 and 9)."""

import pytest
import torch

from innerloop.loop.stabilize import Rescale, Residual, TimeEmbedding, rms
from tests.close import assert_close

TAU = torch.tensor(0.25)


def states(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 8)), generator=torch.Generator().manual_seed(seed)).to(dtype)


NEW, FIRST, PREVIOUS = states(0), states(1), states(2)


def residual(new, first, previous, kind: str, alpha: float) -> torch.Tensor:
    return Residual(kind, alpha, "fixed", "scalar", "softmax", 8, 3)(new, first, previous, 1)


def rescale(output, kind: str = "rms") -> torch.Tensor:
    return Rescale(kind, output.shape[-1], TAU)(output)


def time_embedding(max_loops: int) -> TimeEmbedding:
    return TimeEmbedding("lookup", "add", max_loops, 8)


# Residuals


def test_residuals_are_their_formulas():
    assert residual(NEW, FIRST, PREVIOUS, "none", 0.7) is NEW
    assert torch.equal(residual(NEW, FIRST, PREVIOUS, "sum", 0.7), NEW + FIRST)
    assert_close(residual(NEW, FIRST, PREVIOUS, "A", 0.7), 0.7 * NEW + 0.3 * FIRST)
    assert_close(residual(NEW, FIRST, PREVIOUS, "B", 0.7), 0.7 * NEW + 0.3 * PREVIOUS)
    assert_close(residual(NEW, FIRST, PREVIOUS, "sum", 0.5) / 2, residual(NEW, FIRST, PREVIOUS, "A", 0.5))
    for alpha in (0.0, 0.3, 0.7, 1.0):  # in the first iteration
        assert torch.equal(residual(NEW, FIRST, FIRST, "A", alpha), residual(NEW, FIRST, FIRST, "B", alpha))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_residuals_keep_the_type_and_are_exact_at_the_ends_of_alpha(dtype):
    new, first, previous = (x.to(dtype) for x in (NEW, FIRST, PREVIOUS))
    for kind, old in (("none", None), ("sum", None), ("A", first), ("B", previous)):
        assert residual(new, first, previous, kind, 0.7).dtype == dtype
        if old is not None:
            assert torch.equal(residual(new, first, previous, kind, 1.0), new)
            assert torch.equal(residual(new, first, previous, kind, 0.0), old)


# Rescaling


def test_rms_is_the_root_mean_square_in_fp32():
    assert rms(torch.tensor([[3.0, 4.0]])).tolist() == [[pytest.approx(12.5**0.5)]]
    assert rms(NEW).shape == (2, 3, 1)
    large = torch.full((1, 8), 3e4, dtype=torch.float16)  # its square is beyond float16
    assert rms(large).dtype == torch.float32 and rms(large).item() == pytest.approx(3e4, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rescale_gives_every_position_the_rms_tau(scale):
    rescaled = rescale(NEW * scale)
    assert_close(rms(rescaled), torch.full((2, 3, 1), 0.25))
    assert_close(rescaled / rescaled.norm(dim=-1, keepdim=True), NEW / NEW.norm(dim=-1, keepdim=True))
    assert rescale(NEW, "none") is NEW


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_rescale_computes_in_fp32_and_keeps_the_type(dtype, error):
    large = (NEW * 1e4).to(dtype)  # squares beyond float16
    rescaled = rescale(large)
    assert rescaled.dtype == dtype
    assert_close(rescaled.float(), rescale(large.float()), error)


def test_rescale_leaves_zeros_at_zero_with_a_finite_gradient():
    zeros = torch.zeros(1, 2, 8, requires_grad=True)
    rescaled = rescale(zeros)
    rescaled.sum().backward()
    assert torch.equal(rescaled, torch.zeros(1, 2, 8))
    assert torch.isfinite(zeros.grad).all()


def test_the_gradient_of_rescale_is_right():
    x, weight = states(3, 2, 5, dtype=torch.float64).requires_grad_(), states(4, 2, 5, dtype=torch.float64)
    exact = x * 0.25 / x.pow(2).mean(-1, keepdim=True).sqrt()
    (ours,), (expected,) = (torch.autograd.grad((one * weight).sum(), x) for one in (rescale(x), exact))
    assert_close(ours, expected)
    assert (ours * x).sum(-1).abs().max() < 1e-6  # the scale of the input does not matter


# The timestep embedding


def test_the_time_embedding_of_an_iteration_is_its_row_and_past_the_table_the_last():
    time = time_embedding(3)
    assert all(torch.equal(time(NEW, loop), NEW) for loop in range(1, 7))  # a new one adds nothing
    assert time(NEW.bfloat16(), 1).dtype == torch.bfloat16
    with torch.no_grad():
        time.table.copy_(torch.arange(3.0)[:, None].expand(3, 8) + 1)
    added = [(time(NEW, loop) - NEW).mean().item() for loop in range(1, 6)]
    assert added == pytest.approx([1, 2, 3, 3, 3], rel=1e-5)


def test_only_the_row_of_the_iteration_is_trained():
    time = time_embedding(3)
    time(NEW, 2).sum().backward()
    assert time.table.grad.abs().sum(1).tolist() == [0.0, 8 * 6.0, 0.0]

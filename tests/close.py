"""Equality up to rounding: the tolerance is a share of the largest value, so no CPU and no kernel is favoured."""

from collections.abc import Mapping

import torch

ROUNDED = 1e-5  # fp32; a norm of Llama computes in fp32, even in a model of double precision
ROUNDING = {torch.float64: 1e-10, torch.float32: ROUNDED, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def assert_close(actual, expected, tolerance: float | None = None, passes: int = 1) -> None:
    """Compare tensors, numbers, or lists and dicts of them; whole numbers must be equal.

    ``tolerance`` is the allowed gap as a share of the largest expected value, by default the rounding of the coarser
    dtype for each of the ``passes`` of the decoder that came one after the other.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), [expected[name] for name in actual]
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_close(one, other, tolerance, passes)
        return
    if expected is None:
        assert actual is None
        return
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    if tolerance is None:
        tolerance = passes * max(ROUNDING.get(tensor.dtype, 0.0) for tensor in (actual, expected))
    finite = expected[expected.isfinite()].double().abs()
    largest = finite.max().item() if len(finite) else 0.0
    torch.testing.assert_close(actual, expected, atol=tolerance * largest, rtol=0, check_dtype=False, equal_nan=True)

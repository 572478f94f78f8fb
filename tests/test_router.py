"""Routers: exactly k are chosen, gates have their value and slope, shares are rounded as the cards say."""

import math

import pytest
import torch

from innerloop.methods.depth.router import Router, gate_of, mixed, share_of, tokens_in, top_k, warmed

REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()


def test_top_k_of_many_ties_is_exact_and_more_than_there_are_is_all():
    scores = torch.randint(0, 3, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    real = torch.rand(50, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    k = torch.arange(1, 51)
    chosen = top_k(scores, real, k)
    assert torch.equal(chosen.sum(1), torch.minimum(k, real.sum(1)))
    assert not (chosen & ~real).any()
    for row, among, scored in zip(chosen, real, scores):
        left = scored[among & ~row]
        assert not len(left) or scored[row].min() >= left.max()


def test_a_share_is_a_whole_number_of_tokens_at_least_one_of_a_rows_own_or_of_the_columns():
    for share, n, up, down in (
        (0.125, 16, 2, 2), (0.125, 17, 3, 2), (0.1, 30, 3, 3), (2 / 3, 9, 6, 6), (1 / 3, 9, 3, 3), (0.01, 5, 1, 1),
    ):  # fmt: skip
        assert [share_of(torch.tensor([n]), share, way).item() for way in ("up", "down")] == [up, down]
    assert tokens_in(REAL, "valid").tolist() == [4, 6]
    assert tokens_in(REAL, "static").tolist() == [6, 6]


def test_a_capacity_falls_from_one_to_its_share():
    linear = [warmed(0.2, step, 4, "linear") for step in range(6)]
    assert linear == pytest.approx([max(0.2, 1 - 0.8 * step / 4) for step in range(6)])
    cosine = [warmed(0.2, step, 4, "cosine") for step in range(6)]
    assert cosine == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * min(step / 4, 1))) / 2 for step in range(6)])
    assert warmed(0.2, None, 4, "linear") == warmed(0.2, 0, 0, "cosine") == 0.2


def test_gates_and_their_slopes():
    r = torch.tensor([-2.0, 0.5], dtype=torch.double, requires_grad=True)
    assert torch.equal(gate_of(r, "identity"), r)
    assert torch.equal(gate_of(r, "sigmoid"), r.sigmoid())
    assert torch.equal(gate_of(r, "scaled_sigmoid", 0.1), 0.1 * r.sigmoid())
    assert torch.equal(gate_of(r, "sigmoid", 0.1), r.sigmoid())
    x, y = torch.randn(1, 2, 3).double(), torch.randn(1, 2, 3).double()
    g = torch.rand(1, 2).double()
    weighted = g[..., None] * y
    kept = {"delta": (x + g[..., None] * (y - x), y), "full": (x + weighted, x + y), "replace": (weighted, y)}
    for target, (value, whole) in kept.items():
        assert torch.equal(mixed(x, y, g, target), value)
        assert torch.equal(mixed(x, y, g, target, straight=True), whole)  # as with g = 1
    slopes = {}
    for straight in (False, True):
        out = mixed(x, y, gate_of(r, "st" if straight else "sigmoid")[None], "delta", straight)
        slopes[straight] = torch.autograd.grad(out.sum(), r)[0]
    assert torch.equal(slopes[True], slopes[False]) and slopes[True].abs().min() > 0


def test_a_router_computes_in_fp32_and_starts_at_small_scores_that_differ():
    torch.manual_seed(0)
    router = Router(256, 3, std=0.5)
    assert router.weight.std().item() == pytest.approx(0.5, rel=0.05)
    states = torch.randn(2, 4, 256).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = router(states)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, states.float() @ router.weight.T)
    assert router.flops == 2 * 256 * 3

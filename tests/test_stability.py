"""Stability: maps of known spectral radius, rotation and growth put in as f; identical examples; every method."""

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from innerloop.errors import InputError
from innerloop.loop.loop import InnerLoop
from innerloop.measure.loop_dynamics import spectral_radius, watch_loop
from innerloop.measure.stability import LoopStability, Spread, Stability, diverged_rate, stability
from innerloop.methods import Coconut, Cot, Pause, Slr
from tests.built import LATENTS, built
from tests.close import assert_close
from tests.fields import FullLoop
from tests.methods.tools import iterate
from tests.models import chain_examples, tiny_model
from tests.test_controls import METHODS

D = 4
TAU, LOOP = torch.ones(()), FullLoop()


def rotation(angle: float, scale: float) -> Tensor:
    """Return a matrix (D, D) that turns two planes by an angle and scales them."""
    c, s = math.cos(angle), math.sin(angle)
    plane = torch.tensor([[c, -s], [s, c]])
    return scale * torch.block_diag(plane, plane)


def watched(matrix: Tensor, n_loops: int | list[int] = 4, rows: int = 3, f=None, settings=LOOP, **options):
    """Watch a loop whose f is a linear map, if no other, from random states of two positions."""
    loop, start = InnerLoop(settings, D, 4, TAU), torch.randn(rows, 2, D, generator=torch.Generator().manual_seed(1))
    f = f or (lambda x, t: x @ matrix.T)
    return watch_loop(lambda: (iterate(loop, f, start, n_loops), None), loop, **options)[0]


@pytest.mark.parametrize(
    ("matrix", "radius"),
    [
        (torch.diag(torch.tensor([0.5, 0.3, -0.2, 0.1])), 0.5),
        (torch.diag(torch.tensor([1.0, -1.7, 0.3, 0.2])), 1.7),
        (rotation(1.1, 0.8), 0.8),
        (rotation(2.5, 1.3), 1.3),
        (torch.tensor([[0.6, 9.0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.1, 0], [0, 0, 0, 0.1]]), 0.6),  # far from normal
    ],
    ids=["contracting", "expanding", "turning, contracting", "turning, expanding", "not normal"],
)
def test_the_spectral_radius_of_a_linear_map(matrix: Tensor, radius: float):
    for entry in watched(matrix):
        assert_close(entry["radius"], torch.full((3,), radius), 0.02)


def test_the_radius_is_that_of_the_whole_step_and_of_each_row():
    matrix = torch.diag(torch.tensor([0.9, 0.5, 0.4, 0.1]))
    entry = watched(matrix, settings=FullLoop(residual="B", alpha=0.5))[-1]  # (1 + 0.9) / 2
    assert_close(entry["radius"], torch.full((3,), 0.95), 0.01)
    state = torch.tensor([[[1.0, 0.0]], [[0.0, 3.0]]])
    radius = spectral_radius(lambda z: z**2 / 2, state)  # J = diag(z)
    assert_close(radius, torch.tensor([1.0, 3.0]), 1e-3)
    assert spectral_radius(lambda z: 0 * z, state).tolist() == [0.0, 0.0]
    shift = torch.diag(torch.ones(D - 1), 1)  # nilpotent: nothing is left after D iterations
    assert watched(shift)[-1]["radius"].tolist() == [0.0] * 3


def test_a_rotation_by_half_a_turn_oscillates():
    turning, sliding = watched(rotation(math.pi, 1.0)), watched(rotation(0.0, 0.9))
    for entry in turning[1:]:
        assert_close(entry["step_cosine"], torch.full((3,), -1.0))
        assert_close(entry["cosine"], torch.full((3,), -1.0))
        assert_close(entry["change"], torch.full((3,), 2.0))
    assert_close(sliding[1]["step_cosine"], torch.ones(3))
    assert "step_cosine" not in turning[0]


def test_change_drift_and_growth_of_a_scaling():
    for scale in (0.5, 2.0):
        for t, entry in enumerate(watched(scale * torch.eye(D)), 1):
            assert_close(entry["growth"], torch.full((3,), scale**t), 1e-2)
            assert_close(entry["drift"], torch.full((3,), scale ** (t - 1)))
            assert_close(entry["change"], torch.full((3,), abs(scale - 1) / scale))


def test_rows_that_have_ended_have_no_value():
    found = watched(0.5 * torch.eye(D), n_loops=[1, 3, 2])
    assert [entry["ran"].tolist() for entry in found] == [[True] * 3, [False, True, True], [False, True, False]]
    for entry in found:
        for name in ("change", "radius", "growth"):
            assert torch.equal(~entry[name].isnan(), entry["ran"]), name


def test_kl_of_read_outs():
    same = watched(torch.eye(D), read_out=lambda u: u)
    assert "kl" not in same[0] and same[1]["kl"].abs().max() < 1e-6
    p, q = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.full((D,), 0.25)
    outputs = {1: q.log(), 2: p.log()}
    found = watched(torch.eye(D), 2, 1, f=lambda x, t: outputs[t].expand_as(x), read_out=lambda u: u, radius=False)
    assert_close(found[1]["kl"], (p * (p / q).log()).sum()[None])


def test_padding_has_no_say():
    start, mask = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 1, 0]] * 2)

    def values(state: Tensor, mask: Tensor | None) -> list[dict[str, Tensor]]:
        loop = InnerLoop(LOOP, D, 3, TAU)
        return watch_loop(lambda: (iterate(loop, lambda x, t: 0.7 * x, state, 3), mask), loop, radius=False)[0]

    for padded, plain in zip(values(start, mask), values(start[:, :2], None), strict=True):
        for name in ("change", "size", "drift", "cosine"):
            assert_close(padded[name], plain[name])


def test_what_diverges_is_said_to():
    model, examples = built(METHODS["slots, refeed"], LATENTS, n=6)
    with torch.no_grad():
        model.backbone.decoder.ln_f.weight[:] = 1e30
    found = stability(model, examples, n_jacobians=0)
    assert found.diverged == 1.0 and "diverges in 100%" in found.sentences()[0]
    json.dumps(found.as_dict(), allow_nan=False)


def test_identical_examples_have_collapsed_and_different_ones_have_not():
    model, examples = built(METHODS["slots, refeed"], LATENTS, n=10)
    same = stability(model, [examples[0]] * 5)
    assert same.loops[-1].spread < 1e-5 and any("collapsed" in sentence for sentence in same.sentences())
    alone = stability(model, examples[:1], n_jacobians=0)  # which has nothing to differ from
    assert not any("collapsed" in sentence for sentence in alone.sentences())
    different = stability(model, examples)
    assert different.loops[-1].spread > 0.1 and not any("collapsed" in sentence for sentence in different.sentences())


def test_a_loop_in_words():
    loop = {"residual": "A", "alpha": 0.01, "rescale": "none", "time": "none"}
    still = tiny_model(Slr(n_slots=2, max_loops=2, loop=loop))
    text = " ".join(stability(still, chain_examples(3), n_jacobians=1).sentences())
    assert "The loop comes to rest" in text and "The last loop shrinks small differences" in text
    measures = {"change": Spread.of(torch.ones(3)), "radius": Spread.of(2 * torch.ones(3))}
    measures["step_cosine"] = Spread.of(-torch.ones(3))
    wild = Stability([LoopStability(t, 3, measures, 1.0, 1.0, 1.0) for t in (1, 2)])
    text = " ".join(wild.sentences())
    assert "does not come to rest" in text and "enlarges" in text and "oscillates" in text and "collapsed" not in text
    assert Stability().sentences() == [] and Spread.of(torch.tensor([math.nan])) is None


MEASURED = ["slots, kv_last", "slots, a token for the time", "last", "append", "lotus", "lotus, refeed", "pccot"]


@pytest.mark.parametrize("name", [*MEASURED, "spiralthinker"])
def test_every_method_can_be_measured(name: str):
    model = tiny_model(METHODS[name], num_hidden_layers=1)
    method, examples = model.method, list(chain_examples(5))
    found = stability(model, examples, batch_size=3, n_jacobians=1)
    report = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [entry["loop"] for entry in report["loops"]] == list(range(1, method.n_loops(method.last_stage) + 1))
    for entry in report["loops"]:
        assert entry["n"] == 5 and entry["finite"] == 1.0
        for measure in ("change", "cosine", "drift", "size", "radius", "growth"):
            assert entry[measure]["low"] <= entry[measure]["median"] <= entry[measure]["high"], measure
        assert (entry["kl"] is None) == (entry["step_cosine"] is None) == (entry["loop"] == 1)
    assert not model.training and not model.loop.hooks


def test_the_report_does_not_depend_on_the_batches():
    model = tiny_model(Slr(n_slots=2, max_loops=2), num_hidden_layers=1)
    whole, parts = (stability(model, chain_examples(5), size, n_jacobians=2) for size in (5, 2))
    for a, b in zip(whole.loops, parts.loops, strict=True):
        for one, other in zip(a.measures.values(), b.measures.values(), strict=True):
            assert one is None or dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), rel=2e-2)
        assert (a.spread, a.centre) == pytest.approx((b.spread, b.centre), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Cot(), "no loop over latents"),
        (Pause(), "no loop over latents"),
        (Coconut(curriculum={"max_stage": 1}, latents_per_step=1), "no loop over latents"),  # one latent
        (Slr(max_loops=3, fixed_point={"solver": "plain"}, loop={"time": "none"}), "solver"),
    ],
)
def test_what_has_no_loop_is_refused(method, message):
    with pytest.raises(InputError, match=message):
        stability(tiny_model(method), chain_examples(2))


def test_the_rate_of_diverged_runs():
    good, bad = Stability().as_dict(), Stability(diverged=0.7).as_dict()
    points = [good, bad, {"accuracy": 0.4}, {"error": "DivergedError: training stopped"}, {"error": "InputError: x"}]
    rate = diverged_rate(points)
    assert (rate["n"], rate["diverged"], rate["share"]) == (5, 2, 0.4)
    assert rate["ci95"][0] < 0.4 < rate["ci95"][1]
    with pytest.raises(InputError):
        diverged_rate([])

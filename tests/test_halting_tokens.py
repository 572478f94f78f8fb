"""Stop rules token by token, in a looped decoder (halting.md, section 9), and what looking costs."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch

from innerloop import LatentModel, Looped, Slr
from innerloop.calibrate.loop_scan import scan_loop
from innerloop.config.stopping import StopKind
from innerloop.decoder.cost import CostMeter, flops_of
from innerloop.halting.rule import STATE_FLOPS
from innerloop.methods import Method
from innerloop.model.stopping import use_rule
from tests.close import assert_close
from tests.fields import FullStop
from tests.methods.tools import MIXED, QUESTIONS, by_arch, change
from tests.models import tiny_model

T = 4
KINDS = [kind for kind in get_args(StopKind) if kind not in ("none", "classifier", "act")]
by_kind = pytest.mark.parametrize("kind", KINDS)


def looped(kind: str, arch: str = "llama", threshold: float | None = None, **stop) -> LatentModel:
    """Return a looped model of two layers, its gate and probe random, whose tokens stop at different times.

    Without a threshold, it stops where half of the scores are reached.
    """
    stop |= {"rule": kind} | ({"histogram": (0.3, 0.2, 0.3, 0.2)} if kind == "random" else {})
    method = Looped(max_loops=T, stop=FullStop(**stop, threshold=math.inf))
    model = tiny_model(method, arch, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.loop.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if threshold is None:
        scores = scan_loop(model, MIXED).scores_TM[:-1]
        known = scores[scores.isfinite()].unique()
        at = torch.nonzero(known.diff() > 1e-4)[:, 0]  # so that rounding decides nothing
        at = at[len(at) // 2]
        threshold = known[at : at + 2].mean().item()
    use_rule(model, **stop, threshold=threshold)
    return model


def depths_of(model: LatentModel, examples=MIXED, meter: CostMeter | None = None) -> list[list[int]]:
    """Return how often each token of each row went round."""
    batch = model.batch(model.rows(examples))
    with torch.no_grad():
        thought = model.think(batch, context=model.new_context(batch, meter))
        model.written_logits(batch, thought)
    deep = thought.deep[-1]
    return [row[real].tolist() for row, real in zip(deep.depths_BL, batch.mask_BS.bool())]


def on(model: LatentModel, method: Method) -> LatentModel:
    return LatentModel(model.backbone, model.tokenizer, method).eval()


@by_kind
def test_every_rule_stops_tokens_one_by_one_batches_as_single_rows(kind):
    model = looped(kind)
    depths = depths_of(model)
    assert kind == "fixed" or len({d for row in depths for d in row}) > 1
    for example, row, logits in zip(MIXED, depths, model.answer_logits(MIXED)):
        assert_close(model.answer_logits([example])[0], logits)
        batch = model.batch(model.rows([example]))
        assert sum(row) > 0 and len(row) == int(batch.mask_BS.sum())


@by_kind
def test_no_rule_sees_a_later_token(kind):
    model = looped(kind)
    example = MIXED[3]
    other = replace(example, steps=(*example.steps[:-1], "4 - 4 = 4"), answer="4")
    left, right = (model.answer_logits([one])[0] for one in (example, other))
    both = zip(*(model.rows([one])[0].ids() for one in (example, other)))
    n_same = next(i for i, (a, b) in enumerate(both) if a != b)
    n_same -= len(model.prompts([example.question])[0]) - 1  # the token before a changed one predicts it alike
    assert n_same > 10
    assert_close(left[:n_same], right[:n_same])
    assert (left[n_same:] - right[n_same:]).abs().max() > 1e-3


@by_kind
def test_a_rule_that_never_fires_is_the_looped_model_bit_for_bit(kind):
    arch = ("gpt2", "llama")[KINDS.index(kind) % 2]
    model = looped(kind, arch, math.inf)
    plain = on(model, Looped(max_loops=T))
    assert all(map(torch.equal, model.answer_logits(MIXED), plain.answer_logits(MIXED)))
    assert {d for row in depths_of(looped(kind, arch, min_loops=T)) for d in row} == {T}


@by_arch
@pytest.mark.parametrize("n", [1, 3])
def test_fixed_is_the_model_with_fewer_loops(n, arch):
    model = looped("fixed", arch, float(n))
    shallow = on(model, Looped(max_loops=n))
    assert all(map(torch.equal, model.answer_logits(MIXED), shallow.answer_logits(MIXED)))


@pytest.mark.parametrize("kind", ["random", "halt_sample"])
def test_what_is_drawn_belongs_to_a_position_so_that_writing_equals_reading(kind):
    model = looped(kind)
    if kind == "random":  # alike at each position, whatever the row
        for a, b in pairwise(depths_of(model)):
            assert all(x == y for x, y in zip(a, b))
    one = model.generate(QUESTIONS[:1], max_new_tokens=6)[0]
    read = model.generate(QUESTIONS, max_new_tokens=6)[0]
    assert [n for _, n in one.depths] == [n for _, n in read.depths]


def test_a_falling_threshold_counts_the_written_tokens():
    kappa = 0.55
    flat, falling, strict, loose = (
        looped("top_prob", threshold=at, decay=n)
        for at, n in ((kappa, 0), (kappa, 4), (0.9 * kappa + 0.1, 0), (0.9 * kappa, 0))
    )
    for row, example in enumerate(MIXED[:4]):
        n_asked = len(falling.prompts([example.question])[0])
        at = [depths_of(model)[row] for model in (falling, strict, loose)]
        assert at[0][:n_asked] == at[1][:n_asked]
        assert all(low <= mid <= high for mid, high, low in zip(*at))
    assert depths_of(flat) != depths_of(falling) != depths_of(strict)


LOOKS = [("delta", 1), ("kl", 1), ("gap", 2), ("argmax", 1), ("halt", 1), ("mlp_probe", 1)]


@by_arch
@pytest.mark.parametrize(("kind", "every"), LOOKS)
def test_flops_are_those_of_the_iterations_and_of_the_looks(kind, every, arch):
    model = looped(kind, arch, check_every=every)
    backbone, meter = model.backbone, CostMeter(1, model.device)
    (depths,) = depths_of(model, MIXED[:1], meter)
    looks = [sum(t % every == 0 for t in range(1, min(n, T - 1) + 1)) for n in depths]
    d, v = backbone.width, backbone.config.vocab_size
    price = {"delta": STATE_FLOPS * d, "halt": 2 * d, "mlp_probe": 2 * (64 * d + 64)}.get(kind, 2 * d * v)
    positions = torch.tensor([float(sum(depths))])
    keys = torch.tensor([float(sum(n * (i + 1) for i, n in enumerate(depths)))])  # those that stopped are seen, too
    expected = flops_of(backbone, positions, keys, torch.zeros(1)) + price * sum(looks)
    assert meter.costs(backbone)[0].flops == pytest.approx(expected.item(), rel=1e-9)
    assert len(set(depths)) > 1


def test_looks_at_latents_are_counted_for_the_rows_that_are_still_going():
    model = tiny_model(Slr(n_slots=3, max_loops=T, stop={"rule": "kl"}), num_hidden_layers=2)

    def flops(**stop) -> list[float]:
        stopping = on(model, change(model.method, stop=stop))
        return [one.cost.flops for one in stopping.generate(QUESTIONS, max_new_tokens=3)]

    look = 2 * 3 * model.backbone.width * model.backbone.config.vocab_size
    for once, twice in zip(flops(threshold=math.inf, check_every=2), flops(threshold=math.inf)):
        assert twice - once == pytest.approx(2 * look)  # after iterations 1, 2 and 3 instead of 2 alone
    for stopped, free in zip(flops(threshold=-1e9), flops(rule="fixed", threshold=2.0)):
        assert stopped - free == pytest.approx(2 * look)  # there is nothing to compare with after the first

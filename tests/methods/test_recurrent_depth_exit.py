"""Recurrent depth token by token: keys where depths differ, and when tokens stop (recurrent_depth.md, section 9)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from innerloop import Chain, LatentModel
from innerloop.calibrate.calibrate import calibrate
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.decoder.cost import Meter
from tests.methods.reference_recurrence import (
    IDS,
    LENGTH,
    PLAIN,
    UNEQUAL,
    assert_sees_no_later_token,
    depths_of,
    entries,
    read,
    recurrent,
    slowly,
    some_ids,
    with_settings,
)
from tests.methods.tools import QUESTIONS, assert_close, by_arch
from tests.models import SLIDING, left_pad

WANTED = torch.tensor([UNEQUAL])
EXACT = ["latest", "skip"]
LOOKUPS = ["latest", "skip", "always_last", "compress", "anchor"]
ONE_BY_ONE = [1] * LENGTH
NEVER, AT_ONCE = math.inf, -math.inf


def looking_up(kind: str, arch: str = "llama", n_slots: int | None = None, **fields) -> LatentModel:
    """Make a model with a way to look up keys, of the same weights for all ways."""
    return recurrent(replace(PLAIN, kv_lookup=kind, kv_slots=n_slots, **fields), arch)


# Keys where depths differ


@by_arch
@pytest.mark.parametrize("kind", EXACT)
def test_tokens_of_unlike_depth_are_the_slow_reference_at_once_and_one_by_one(arch, kind):
    model = looking_up(kind, arch)
    expected, _ = slowly(model, IDS, UNEQUAL)
    for pieces in (None, ONE_BY_ONE, [3, 4, 2]):
        logits, _, deep = read(model, IDS, wanted=WANTED, pieces=pieces)
        assert_close(logits, expected)
        assert depths_of(deep) == UNEQUAL
    others = {kind: slowly(looking_up(kind, arch), IDS, UNEQUAL)[0] for kind in EXACT}
    assert (others["latest"] - others["skip"]).abs().max() > 1e-2  # and depths do matter
    assert (others["latest"] - slowly(model, IDS, [4] * LENGTH)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("arch", SLIDING)
@pytest.mark.parametrize("kind", EXACT)
def test_windows_count_positions_not_keys(arch, kind):
    """Where some tokens have no keys in a slot, the distance of the others is still that of their positions."""
    model = looking_up(kind, arch)
    expected = slowly(model, IDS, UNEQUAL)[0]
    assert_close(read(model, IDS, wanted=WANTED, pieces=[5, 1, 3])[0], expected)


@pytest.mark.parametrize("kind", LOOKUPS)
def test_batches_of_unlike_depth_equal_single_rows(kind):
    model, lengths = looking_up(kind, n_slots={"compress": 2, "anchor": 2}.get(kind)), (3, 9, 6)
    ids, mask = left_pad([some_ids(1, n, seed=n)[0] for n in lengths])
    wanted = torch.randint(1, 5, ids.shape, generator=torch.Generator().manual_seed(0))
    for pieces in (None, [4, 1, 1, 1, 2]):
        together, _, deep = read(model, ids, mask, wanted, pieces)
        depths = torch.cat([one.depths_BL for one in deep], dim=1)
        assert torch.equal(depths, wanted * mask)
        for row, n in enumerate(lengths):
            alone_pieces = None
            if pieces is not None:  # the same passes, without those in which the row had padding alone
                real = [part.sum().item() for part in mask[row].split(pieces)]
                alone_pieces = [count for count in real if count]
            alone = read(model, some_ids(1, n, seed=n), wanted=wanted[row : row + 1, -n:], pieces=alone_pieces)[0]
            assert_close(together[row, -n:], alone[0], passes=4)


@by_arch
def test_at_equal_depths_all_ways_agree_where_they_claim_to(arch):
    exact = read(looking_up("latest", arch), IDS)[0]
    for kind in LOOKUPS:  # at once: none has read a token that is done
        for n_slots in (2, 4) if kind in ("compress", "anchor") else (None,):
            assert torch.equal(read(looking_up(kind, arch, n_slots), IDS)[0], exact)
    for kind, n_slots in (("latest", None), ("skip", None), ("compress", 4), ("compress", 7), ("anchor", 3)):
        assert_close(read(looking_up(kind, arch, n_slots), IDS, pieces=ONE_BY_ONE)[0], exact)


@pytest.mark.parametrize(("kind", "n_slots"), [("always_last", None), ("compress", 2), ("anchor", 1)])
def test_ways_that_are_approximate_are_this_far_off(kind, n_slots):
    """Mean absolute error of log-probabilities, token by token against at once, at depth 4 with random weights."""
    model = looking_up(kind, n_slots=n_slots)
    exact = read(model, IDS)[0].log_softmax(-1)
    error = (read(model, IDS, pieces=ONE_BY_ONE)[0].log_softmax(-1) - exact).abs().mean(-1)[0]
    assert error[0] < 1e-5  # the first token has nothing to look up
    assert 1e-3 < error[1:].mean() < 0.5
    unlike = read(model, IDS, wanted=WANTED)[0] - read(model, IDS, wanted=WANTED, pieces=ONE_BY_ONE)[0]
    assert unlike.abs().max() > 1e-3


def test_compress_shows_what_wrote_the_slot_last_and_else_the_last_of_all():
    """Two slots, depths 4 and then 2: the second token finds iterations 3 and 4; depths 1 and 2: iteration 1, twice."""
    model = looking_up("compress", n_slots=2)
    ids = IDS[:, :2]
    for ran, found in (([4, 2], [3, 4]), ([1, 2], [1, 1]), ([3, 2], [3, 2])):
        keys = read(looking_up("latest"), ids[:, :1], wanted=torch.tensor([[4]]))[1].cache.slots
        _, context, _ = read(model, ids, wanted=torch.tensor([ran]), pieces=[1, 1])
        shown = {}
        for key, slot in context.cache.slots.items():
            if slot.layers == model.depth.core:
                first = slot.keys[0][0, :, (slot.positions_BP[0] == 0) & slot.real_BP[0]]
                shown[key] = first if first.shape[1] else None
        for number, iteration in enumerate(found, 1):
            there = shown.get(number)
            there = shown[("ended", ran[0])] if there is None else there
            assert_close(there[:, 0], keys[iteration].keys[0][0, :, 0], 1e-6)


@pytest.mark.parametrize("pieces", [None, ONE_BY_ONE, [3, 4, 2]])
def test_how_many_keys_a_token_keeps(pieces):
    ran = torch.tensor(UNEQUAL)
    expected = {
        ("latest", None): ran,
        ("skip", None): ran,
        ("always_last", None): torch.ones_like(ran),
        ("compress", 2): ran.clamp(max=2),
        ("anchor", 1): ran.clamp(max=2),
    }
    for (kind, n_slots), n in expected.items():
        model = looking_up(kind, n_slots=n_slots)
        _, context, _ = read(model, IDS, wanted=WANTED, pieces=pieces)
        assert torch.equal(entries(context, model.depth.core)[0], n)
        for layers in (model.depth.prelude, model.depth.coda):
            assert torch.equal(entries(context, layers)[0], torch.ones_like(ran))


def test_reused_slots_hold_no_more_columns_than_tokens():
    model = looking_up("compress", n_slots=2, max_loops=9)
    _, context, _ = read(model, IDS, pieces=[5, 1, 1, 1, 1])
    lengths = {key: slot.length for key, slot in context.cache.slots.items() if slot.layers == model.depth.core}
    assert lengths == {1: LENGTH, 2: LENGTH}
    _, context, _ = read(looking_up("always_last"), IDS, pieces=ONE_BY_ONE)
    assert context.cache.slots["ended", 0].length == LENGTH


@by_arch
@pytest.mark.parametrize("kind", LOOKUPS)
def test_no_token_of_unlike_depth_sees_a_later_one(arch, kind):
    model = looking_up(kind, arch, n_slots={"compress": 2, "anchor": 2}.get(kind))
    assert_sees_no_later_token(model, wanted=WANTED)


# When tokens stop


def stopping(kind: str = "delta", arch: str = "llama", **fields) -> LatentModel:
    return recurrent(replace(PLAIN, stop=kind, **fields), arch)


@by_arch
@pytest.mark.parametrize("kind", ["delta", "kl_reverse"])
def test_a_threshold_that_is_never_reached_is_the_fixed_depth_bit_for_bit(arch, kind):
    model, fixed = stopping(kind, arch, stop_threshold=NEVER), recurrent(arch=arch)
    for pieces in (None, ONE_BY_ONE):
        logits, _, deep = read(model, IDS, pieces=pieces)
        assert torch.equal(logits, read(fixed, IDS, pieces=pieces)[0])
        assert depths_of(deep) == [4] * LENGTH


@by_arch
@pytest.mark.parametrize("least", [1, 2])
def test_a_threshold_that_always_is_stops_after_the_fewest_iterations(arch, least):
    model = stopping(arch=arch, stop_threshold=AT_ONCE, min_loops=least)
    fixed = with_settings(model, stop="none", stop_threshold=None, min_loops=1, max_loops=least)
    logits, _, deep = read(model, IDS)
    assert_close(logits, read(fixed, IDS)[0])
    assert depths_of(deep) == [least] * LENGTH
    texts = [[g.text for g in m.generate(QUESTIONS, max_new_tokens=8)] for m in (model, fixed)]
    assert texts[0] == texts[1]


def test_patience_and_rare_checks_delay_the_stop():
    ran = {}
    for fields in ({}, {"patience": 2}, {"check_every": 2}, {"check_every": 3}, {"check_every": 2, "patience": 2}):
        model = stopping(stop_threshold=AT_ONCE, max_loops=5, **fields)
        ran[tuple(fields.items())] = set(depths_of(read(model, IDS)[2]))
    assert list(ran.values()) == [{1}, {2}, {2}, {3}, {4}]


@by_arch
def test_a_core_that_changes_nothing_stops_at_the_first_look(arch):
    model = stopping(arch=arch, adapter_init="pass_s")
    for layer in model.depth.core:
        for name, parameter in model.backbone.layers[layer].named_parameters():
            if "o_proj" in name or "down_proj" in name or "c_proj" in name:
                parameter.data.zero_()
    assert depths_of(read(model, IDS)[2]) == [1] * LENGTH
    assert set(depths_of(read(with_settings(model, min_loops=3), IDS)[2])) == {3}
    cosine = with_settings(model, stop="cos", stop_threshold=5.0)
    assert depths_of(read(cosine, IDS)[2]) == [1] * LENGTH


def scores(kind: str, old: Tensor, new: Tensor, p: Tensor, q: Tensor) -> float:
    """Return the card's statistic as a score: states before and after, log-probabilities before and after."""
    match kind:
        case "delta":
            distance = (new - old).norm() / new.norm()
        case "cos":
            distance = 1 - torch.cosine_similarity(new, old, dim=0)
        case "kl_reverse":
            distance = (p.exp() * (p - q)).sum()
        case _:
            distance = ((p.exp() * p).sum() - (q.exp() * q).sum()).abs()
    return -math.log10(max(distance.item(), 1e-30))


def expected_depths(model: LatentModel, kind: str, threshold: float, limit: int) -> list[int]:
    """Return when the tokens of IDS stop, read one by one: each looks at the final keys of those before it."""
    ran: list[int] = []
    for at in range(LENGTH):
        vocab = model.backbone.config.vocab_size
        old, p = slowly(model, IDS[:, : at + 1], [*ran, 0])[1][0, -1], torch.full((vocab,), -math.log(vocab))
        for i in range(1, limit + 1):
            logits, states = slowly(model, IDS[:, : at + 1], [*ran, i])
            new, q = states[0, -1], logits[0, -1].log_softmax(-1)
            nothing_before = kind == "entropy" and i == 1
            if i == limit or (not nothing_before and scores(kind, old, new, p, q) >= threshold):
                break
            old, p = new, q
        ran.append(i)
    return ran


@pytest.mark.parametrize(
    ("arch", "kind", "threshold"),
    [
        ("llama", "delta", 0.05),
        ("gpt2", "delta", 0.05),
        ("llama", "cos", 0.4),
        ("llama", "kl_reverse", 0.4),
        ("gpt2", "kl_reverse", 0.4),
        ("llama", "entropy", 0.7),
    ],
)
def test_tokens_stop_as_the_card_says(arch, kind, threshold):
    """States are compared with s_0 in the first iteration, words with the uniform distribution (KL of old to new)."""
    model = stopping(kind, arch, stop_threshold=threshold, max_loops=5)
    expected = expected_depths(model, kind, threshold, 5)
    assert len(set(expected)) > 2
    logits, context, deep = read(model, IDS, pieces=ONE_BY_ONE)
    assert depths_of(deep) == expected
    assert_close(logits, slowly(model, IDS, expected)[0])
    assert torch.equal(entries(context, model.depth.core)[0], torch.tensor(expected))
    assert torch.equal(entries(context, model.depth.coda)[0], torch.ones(LENGTH, dtype=torch.long))
    at_once = depths_of(read(model, IDS)[2])
    if kind in ("delta", "cos"):
        assert at_once == expected
    else:  # approximate: tokens read together look at each other's keys of the coda before these are final
        assert sum(a != b for a, b in zip(at_once, expected)) <= LENGTH // 3


def test_argmax_stops_when_the_word_has_stayed_for_so_long():
    model, ids, ran = stopping("argmax", stop_threshold=2.0, max_loops=6), IDS[:, :6], []
    with torch.no_grad():
        model.depth.adapter.weight[:, : model.backbone.width] *= 0.2  # so that words settle
    for at in range(6):
        tops = [slowly(model, ids[:, : at + 1], [*ran, i])[0][0, -1].argmax().item() for i in range(1, 7)]
        stays = [i for i in range(3, 6) if len(set(tops[i - 3 : i])) == 1]  # three equal words, the last in iteration i
        ran.append(min([*stays, 6]))
    assert len(set(ran)) > 1
    assert depths_of(read(model, ids, pieces=[1] * 6)[2]) == ran


def test_looser_thresholds_never_mean_more_iterations():
    """Of tokens that see no others, whose keys would depend on when these stop."""
    ids, before = some_ids(12, 1), None
    for threshold in (NEVER, 2.0, 1.0, 0.5, 0.2, 0.0, AT_ONCE):
        depths = read(stopping(stop_threshold=threshold, max_loops=6), ids)[2][0].depths_BL
        assert before is None or (depths <= before).all()
        before = depths
    spread = read(stopping(stop_threshold=0.05, max_loops=6), ids)[2][0].depths_BL
    assert len(spread.unique()) > 2


def test_a_token_that_has_stopped_stands_still():
    """Its state is bit for bit that of its last iteration, however long the others go on."""
    model = stopping(stop_threshold=0.05, max_loops=6)
    seen: list[Tensor] = []
    model.depth.remember = lambda reading, state: seen.append(state)
    depths = read(model, IDS)[2][0].depths_BL
    assert len(depths.unique()) > 2
    steps: list[Tensor] = []
    run = model.loop.step
    model.loop.step = lambda *args, **options: steps.append(run(*args, **options)) or steps[-1]
    read(model, IDS)
    going = torch.arange(LENGTH)
    for i, (states, *_) in enumerate(steps, 1):
        last = depths[0, going] == i
        assert torch.equal(states[last, 0], seen[0][0, going[last]])
        going = going[~last]
    assert len(going) == 0


@by_arch
def test_rows_that_stop_at_different_times_are_answered_as_alone(arch):
    model = stopping("kl_reverse", arch, stop_threshold=0.4, max_loops=5)
    together = model.generate(QUESTIONS, max_new_tokens=8)
    assert len({depth for g in together for _, depth in g.depths}) > 2
    for question, one in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=8)
        assert (one.text, one.depths) == (alone.text, alone.depths)
        assert one.cost.flops == pytest.approx(alone.cost.flops)


def test_flops_follow_the_depths_and_looking_at_words_is_counted():
    flops = {}
    for kind in ("none", "delta", "kl_reverse"):
        model = recurrent() if kind == "none" else stopping(kind, stop_threshold=NEVER)
        meter = Meter(1, torch.device("cpu"))
        read(model, IDS, meter=meter)
        flops[kind] = meter.costs(model.backbone)[0].flops
    backbone = model.backbone
    width, layer = backbone.width, sum(p.numel() for p in backbone.layers[0].parameters())
    attention = 4 * width * LENGTH * (LENGTH + 1) / 2
    look = LENGTH * 2 * width * backbone.config.vocab_size + 2 * layer * LENGTH + attention  # head and coda
    assert flops["kl_reverse"] - flops["none"] == pytest.approx(3 * look)  # not in the last iteration
    assert 0 < flops["delta"] - flops["none"] < 0.01 * flops["none"]
    meter = Meter(1, torch.device("cpu"))
    read(recurrent(), IDS, wanted=WANTED, meter=meter)
    core = sum(UNEQUAL) * (2 * 2 * layer + 4 * width**2)
    ends = 2 * (2 * layer * LENGTH + attention)
    seen = sum((at + 1) * ran for at, ran in enumerate(UNEQUAL))  # in every iteration all tokens before are found once
    assert meter.costs(backbone)[0].flops == pytest.approx(core + ends + 2 * 4 * width * seen)


@pytest.mark.parametrize("rule", ["delta", "kl_reverse"])
def test_thresholds_are_calibrated_for_it(rule):
    model, task = recurrent(), Chain(n_ops=2, n_valid=12)
    found = calibrate(model, task, task.examples("valid"), rule, CalibrationSettings(agreement=0.9, max_new_tokens=4))
    assert found.model is model and model.method.stop == rule
    assert found.report["tokens"]["agreement"] >= 0.9 and found.report["chosen"]["mean_loops"] < 4


def test_nothing_stops_in_training():
    model = stopping(stop_threshold=AT_ONCE).train()
    assert depths_of(read(model, IDS)[2]) == [4] * LENGTH


@by_arch
def test_no_token_sees_when_a_later_one_stops(arch):
    for kind in ("delta", "kl_reverse"):
        assert_sees_no_later_token(stopping(kind, arch, stop_threshold=0.1, max_loops=5))

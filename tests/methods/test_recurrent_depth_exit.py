"""Recurrent depth token by token: keys where depths differ, and when tokens stop (recurrent_depth.md, section 9)."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from innerloop import LatentModel
from innerloop.methods.depth.recurrent_depth import CoreStop, RecurrentDepth
from tests.fields import change
from tests.methods.reference_recurrence import (
    IDS,
    LENGTH,
    PLAIN,
    UNEQUAL,
    assert_sees_no_later_token,
    by_token,
    depths_of,
    entries,
    flops_of,
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
LOOKUPS = [("latest", None), ("skip", None), ("always_last", None), ("compress", 2), ("anchor", 2)]
ONE_BY_ONE = [1] * LENGTH
NEVER, AT_ONCE = math.inf, -math.inf
by_lookup = pytest.mark.parametrize(("kind", "n_slots"), LOOKUPS)


def looking_up(kind: str, n_slots: int | None = None, arch: str = "llama", **fields) -> LatentModel:
    """Make a model with a way to look up keys, of the same weights for all ways."""
    return recurrent(change(PLAIN, kv_lookup=kind, kv_slots=n_slots, **fields), arch)


# Keys where depths differ


@pytest.mark.parametrize("arch", ["gpt2", "llama", *SLIDING])
@pytest.mark.parametrize("kind", EXACT)
def test_tokens_of_unlike_depth_are_the_slow_reference_at_once_and_one_by_one(arch, kind):
    """Windows count positions, not keys, where some tokens have no keys in a slot."""
    model, other = (looking_up(one, arch=arch) for one in (kind, EXACT[kind == "latest"]))
    expected, _ = slowly(model, IDS, UNEQUAL)
    for pieces in (None, ONE_BY_ONE, [3, 4, 2]):
        logits, _, deep = read(model, IDS, wanted=WANTED, pieces=pieces)
        assert_close(logits, expected)
        assert depths_of(deep) == UNEQUAL
    assert (expected - slowly(other, IDS, UNEQUAL)[0]).abs().max() > 1e-2  # and depths do matter
    assert (expected - slowly(model, IDS, [4] * LENGTH)[0]).abs().max() > 1e-2


@by_lookup
def test_batches_of_unlike_depth_equal_single_rows(kind, n_slots):
    model, lengths = looking_up(kind, n_slots), (3, 9, 6)
    ids, mask = left_pad([some_ids(1, n, seed=n)[0] for n in lengths])
    wanted = torch.randint(1, 5, ids.shape, generator=torch.Generator().manual_seed(0))
    for pieces in ([LENGTH], [4, 1, 1, 1, 2]):
        together, _, deep = read(model, ids, mask, wanted, pieces)
        assert torch.equal(torch.cat([one.depths_BL for one in deep], dim=1), wanted * mask)
        for row, n in enumerate(lengths):  # alone: the same passes, without those in which there was padding alone
            real = [count for part in mask[row].split(pieces) if (count := part.sum().item())]
            alone = read(model, some_ids(1, n, seed=n), wanted=wanted[row : row + 1, -n:], pieces=real)[0]
            assert_close(together[row, -n:], alone[0], passes=4)


@by_arch
def test_at_equal_depths_all_ways_agree_where_they_claim_to(arch):
    exact = read(looking_up("latest", arch=arch), IDS)[0]
    for kind, n_slots in (*LOOKUPS, ("compress", 4), ("anchor", 4)):  # at once: none has read a token that is done
        assert torch.equal(read(looking_up(kind, n_slots, arch), IDS)[0], exact)
    for kind, n_slots in (("latest", None), ("skip", None), ("compress", 4), ("compress", 7), ("anchor", 3)):
        assert_close(by_token(looking_up(kind, n_slots, arch)), exact, passes=PLAIN.max_loops)


@pytest.mark.parametrize(("kind", "n_slots"), [("always_last", None), ("compress", 2), ("anchor", 1)])
def test_ways_that_are_approximate_are_this_far_off(kind, n_slots):
    """Mean absolute error of log-probabilities, token by token against at once, at depth 4 with random weights."""
    model = looking_up(kind, n_slots)
    error = (by_token(model).log_softmax(-1) - read(model, IDS)[0].log_softmax(-1)).abs().mean(-1)[0]
    assert error[0] < 1e-5  # the first token has nothing to look up
    assert 1e-3 < error[1:].mean() < 0.5
    assert (read(model, IDS, wanted=WANTED)[0] - by_token(model, wanted=WANTED)).abs().max() > 1e-3


@pytest.mark.parametrize(("ran", "found"), [([4, 2], [3, 4]), ([1, 2], [1, 1]), ([3, 2], [3, 2])])
def test_compress_shows_what_wrote_the_slot_last_and_else_the_last_of_all(ran, found):
    """Two slots, depths 4 and then 2: the second token finds iterations 3 and 4; depths 1 and 2: iteration 1, twice."""
    model, ids = looking_up("compress", 2), IDS[:, :2]
    keys = read(looking_up("latest"), ids[:, :1], wanted=torch.tensor([[4]]))[1].cache.slots
    slots = read(model, ids, wanted=torch.tensor([ran]), pieces=[1, 1])[1].cache.slots
    for number, iteration in enumerate(found, 1):
        of_first = [
            slots[key].keys[0][0, :, (slots[key].positions_BP[0] == 0) & slots[key].real_BP[0]]
            for key in (number, ("ended", ran[0]))
            if key in slots
        ]
        there = next(shown for shown in of_first if shown.shape[1])
        assert_close(there[:, 0], keys[iteration].keys[0][0, :, 0], 1e-6)


@pytest.mark.parametrize("pieces", [None, ONE_BY_ONE, [3, 4, 2]])
@by_lookup
def test_how_many_keys_a_token_keeps(kind, n_slots, pieces):
    model, ran = looking_up(kind, n_slots), torch.tensor(UNEQUAL)
    _, context, _ = read(model, IDS, wanted=WANTED, pieces=pieces)
    most = {"always_last": 1, "compress": 2, "anchor": 3}.get(kind, max(UNEQUAL))
    assert torch.equal(entries(context, model.depth.core)[0], ran.clamp(max=most))
    for layers in (model.depth.prelude, model.depth.coda):
        assert torch.equal(entries(context, layers)[0], torch.ones_like(ran))


@by_arch
@by_lookup
def test_no_token_of_unlike_depth_sees_a_later_one(arch, kind, n_slots):
    assert_sees_no_later_token(looking_up(kind, n_slots, arch), wanted=WANTED)


# When tokens stop


def stopping(rule: str = "delta", threshold: float | None = None, arch: str = "llama", **fields) -> LatentModel:
    return recurrent(change(PLAIN, **{"stop.rule": rule, "stop.threshold": threshold, **fields}), arch)


@by_arch
@pytest.mark.parametrize("kind", ["delta", "kl_reverse"])
def test_a_threshold_that_is_never_reached_is_the_fixed_depth_bit_for_bit(arch, kind):
    model, fixed = stopping(kind, NEVER, arch), recurrent(arch=arch)
    for pieces in (None, ONE_BY_ONE):
        logits, _, deep = read(model, IDS, pieces=pieces)
        assert torch.equal(logits, read(fixed, IDS, pieces=pieces)[0])
        assert depths_of(deep) == [4] * LENGTH


@by_arch
@pytest.mark.parametrize("least", [1, 2])
def test_a_threshold_that_always_is_stops_after_the_fewest_iterations(arch, least):
    model = stopping("delta", AT_ONCE, arch, **{"stop.min_loops": least})
    fixed = with_settings(model, stop=CoreStop(), max_loops=least)
    logits, _, deep = read(model, IDS)
    assert_close(logits, read(fixed, IDS)[0])
    assert depths_of(deep) == [least] * LENGTH
    texts = [[g.text for g in m.generate(QUESTIONS, max_new_tokens=8)] for m in (model, fixed)]
    assert texts[0] == texts[1]
    assert depths_of(read(model.train(), IDS)[2]) == [4] * LENGTH  # nothing stops in training


@pytest.mark.parametrize(("patience", "check_every", "n"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (1, 3, 3), (2, 2, 4)])
def test_patience_and_rare_checks_delay_the_stop(patience, check_every, n):
    fields = {"stop.patience": patience, "stop.check_every": check_every}
    assert set(depths_of(read(stopping("delta", AT_ONCE, max_loops=5, **fields), IDS)[2])) == {n}


@by_arch
@pytest.mark.parametrize(
    ("stop", "n"),
    [({}, 1), ({"min_loops": 3}, 3), ({"rule": "cos", "threshold": 5.0}, 1), ({"compare_init": False}, 2)],
)
def test_a_core_that_changes_nothing_stops_at_the_first_look(arch, stop, n):
    model = recurrent(change(PLAIN, stop={"rule": "delta", **stop}, adapter_init="pass_s"), arch)
    for layer in model.depth.core:
        for name, parameter in model.backbone.layers[layer].named_parameters():
            if "o_proj" in name or "down_proj" in name or "c_proj" in name:
                parameter.data.zero_()
    assert depths_of(read(model, IDS)[2]) == [n] * LENGTH


def score(rule: str, old: Tensor, new: Tensor, p: Tensor, q: Tensor) -> float:
    """Return the card's statistic as a score: states before and after, log-probabilities before and after."""
    distance = {
        "delta": lambda: (new - old).norm() / new.norm(),
        "cos": lambda: 1 - torch.cosine_similarity(new, old, dim=0),
        "kl_reverse": lambda: (p.exp() * (p - q)).sum(),
        "entropy": lambda: ((p.exp() * p).sum() - (q.exp() * q).sum()).abs(),
    }[rule]()
    return -math.log10(max(distance.item(), 1e-30))


def expected_depths(model: LatentModel, rule: str, threshold: float, limit: int) -> list[int]:
    """Return when the tokens of IDS stop, read one by one: each looks at the final keys of those before it."""
    ran, n_words = [], model.backbone.config.vocab_size
    for at in range(LENGTH):
        old, p = slowly(model, IDS[:, : at + 1], [*ran, 0])[1][0, -1], torch.full((n_words,), -math.log(n_words))
        for i in range(1, limit + 1):
            logits, states = slowly(model, IDS[:, : at + 1], [*ran, i])
            new, q = states[0, -1], logits[0, -1].log_softmax(-1)
            nothing_before = rule == "entropy" and i == 1
            if i == limit or (not nothing_before and score(rule, old, new, p, q) >= threshold):
                break
            old, p = new, q
        ran.append(i)
    return ran


@pytest.mark.parametrize(
    ("arch", "rule", "threshold"),
    [
        ("llama", "delta", 0.05),
        ("gpt2", "delta", 0.05),
        ("llama", "cos", 0.4),
        ("llama", "kl_reverse", 0.4),
        ("gpt2", "kl_reverse", 0.4),
        ("llama", "entropy", 0.7),
    ],
)
def test_tokens_stop_as_the_card_says(arch, rule, threshold):
    """States are compared with s_0 in the first iteration, words with the uniform distribution (KL of old to new)."""
    model = stopping(rule, threshold, arch, max_loops=5)
    expected = expected_depths(model, rule, threshold, 5)
    assert len(set(expected)) > 2
    logits, context, deep = read(model, IDS, pieces=ONE_BY_ONE)
    assert depths_of(deep) == expected
    assert_close(logits, slowly(model, IDS, expected)[0])
    assert entries(context, model.depth.core)[0].tolist() == expected
    assert entries(context, model.depth.coda)[0].tolist() == [1] * LENGTH
    n_unlike = sum(a != b for a, b in zip(depths_of(read(model, IDS)[2]), expected))
    assert n_unlike <= (0 if rule in ("delta", "cos") else LENGTH // 3)  # words through a coda are approximate


@by_arch
@pytest.mark.parametrize("rule", ["delta", "kl_reverse"])
@pytest.mark.parametrize("kind", EXACT)
def test_reading_at_once_is_reading_one_by_one_but_for_words_through_a_coda(arch, rule, kind):
    """Of which the help says so: before they end, tokens read together see keys of the coda that still change."""
    threshold, unlike = {"delta": 0.05, "kl_reverse": 0.4}[rule], {}
    for n_coda in (0, 1):
        model = stopping(rule, threshold, arch, max_loops=5, kv_lookup=kind, n_coda=n_coda, n_core=3 - n_coda)
        found = [read(model, some_ids(4, LENGTH), pieces=pieces) for pieces in (None, ONE_BY_ONE)]
        depths = [torch.cat([one.depths_BL for one in deep], dim=1) for _, _, deep in found]
        assert len(depths[0].unique()) > 1
        unlike[n_coda] = (depths[0] != depths[1]).sum().item()
        if unlike[n_coda] == 0:
            assert_close(found[0][0], found[1][0], passes=5)
    assert unlike[0] == 0 and (unlike[1] == 0) == (rule == "delta")
    assert "Approximate all, where a stop.rule reads words through a coda" in RecurrentDepth.__doc__


def test_argmax_stops_when_the_word_has_stayed_for_so_long():
    model, ids, ran = stopping("argmax", 2.0, max_loops=6), IDS[:, :6], []
    model.depth.adapter.weight.data[:, : model.backbone.width] *= 0.2  # so that words settle
    for at in range(6):
        tops = [slowly(model, ids[:, : at + 1], [*ran, i])[0][0, -1].argmax().item() for i in range(1, 7)]
        stays = [i for i in range(3, 6) if len(set(tops[i - 3 : i])) == 1]  # three equal words, the last in iteration i
        ran.append(min([*stays, 6]))
    assert len(set(ran)) > 1
    assert depths_of(read(model, ids, pieces=[1] * 6)[2]) == ran


def test_looser_thresholds_never_mean_more_iterations():
    """Of tokens that see no others, whose keys would depend on when these stop."""
    ids, thresholds = some_ids(12, 1), (NEVER, 2.0, 1.0, 0.5, 0.2, 0.05, 0.0, AT_ONCE)
    depths = [read(stopping("delta", kappa, max_loops=6), ids)[2][0].depths_BL for kappa in thresholds]
    assert all((looser <= tighter).all() for tighter, looser in itertools.pairwise(depths))
    assert max(len(one.unique()) for one in depths) > 2


def test_a_token_that_has_stopped_stands_still():
    """Its state is bit for bit that of its last iteration, however long the others go on."""
    model, seen, steps = stopping("delta", 0.05, max_loops=6), [], []
    run, going = model.loop.step, torch.arange(LENGTH)
    model.depth.remember = lambda reading, state: seen.append(state)
    model.loop.step = lambda *args, **options: steps.append(run(*args, **options)) or steps[-1]
    depths = read(model, IDS)[2][0].depths_BL
    assert len(depths.unique()) > 2
    for i, (states, *_) in enumerate(steps, 1):
        last = depths[0, going] == i
        assert torch.equal(states[last, 0], seen[0][0, going[last]])
        going = going[~last]
    assert len(going) == 0


@by_arch
def test_rows_that_stop_at_different_times_are_answered_as_alone(arch):
    model = stopping("kl_reverse", 0.4, arch, max_loops=5)
    together = model.generate(QUESTIONS, max_new_tokens=8)
    assert len({depth for g in together for _, depth in g.depths}) > 2
    for question, one in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=8)
        assert (one.text, one.depths) == (alone.text, alone.depths)
        assert one.cost.flops == pytest.approx(alone.cost.flops)


def test_flops_follow_the_depths_and_looking_at_words_is_counted():
    models = recurrent(), stopping("delta", NEVER), stopping("kl_reverse", NEVER)
    (fixed, states, words), backbone = map(flops_of, models), models[0].backbone
    width, layer = backbone.width, sum(p.numel() for p in backbone.layers[0].parameters())
    coda = 2 * layer * LENGTH + 4 * width * LENGTH * (LENGTH + 1) / 2
    look = LENGTH * 2 * width * backbone.config.vocab_size + coda  # and the head
    assert words - fixed == pytest.approx(3 * look)  # not in the last iteration
    assert 0 < states - fixed < 0.01 * fixed
    core = sum(UNEQUAL) * (2 * 2 * layer + 4 * width**2)
    seen = sum((at + 1) * ran for at, ran in enumerate(UNEQUAL))  # in every iteration all tokens before are found once
    assert flops_of(recurrent(), wanted=WANTED) == pytest.approx(core + 2 * coda + 2 * 4 * width * seen)


@by_arch
@pytest.mark.parametrize("rule", ["delta", "kl_reverse"])
def test_no_token_sees_when_a_later_one_stops(arch, rule):
    assert_sees_no_later_token(stopping(rule, 0.1, arch, max_loops=5))

"""What samplers do to a denoiser that is known exactly: the tables of llada.md, 7b, and remdm.md, 7b."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from innerloop import Dream
from innerloop.cli import exact_demo, main
from innerloop.cli.exact_demo import SQUARES, VALID, fill, is_valid, marginals
from innerloop.engine.canvases import propose
from innerloop.methods.denoise.settings import SamplerSettings

RANDOM, BEST = {"commit": "random"}, {}
FEW, MANY = 100, 400


def within(share, n, expected, n_expected=MANY):
    """Whether a share of ``n`` draws is an expectation, itself of so many draws, within three standard errors."""
    spread = max(expected * (1 - expected), 0.01)
    return abs(share - expected) <= 3 * math.sqrt(spread / n + spread / n_expected)


def valid(sampler, n, **options):
    return np.mean([is_valid(canvas) for canvas in fill(SamplerSettings(**sampler), n, **options)])


@pytest.mark.parametrize(
    "sampler, expected",
    [
        ({"steps": 1}, 0.0),
        ({**RANDOM, "steps": 4}, 0.19),
        ({"steps": 4}, 0.25),
        ({**RANDOM, "steps": 8}, 0.61),
        ({"steps": 8}, 0.39),
        ({"steps": 4, "ties": "lowest"}, 0.00),
        ({"steps": 8, "ties": "lowest"}, 0.15),
        ({**RANDOM, "steps": 16}, 1.0),
        ({"steps": 16}, 1.0),
    ],
)
def test_validity_from_a_free_canvas(sampler, expected):
    assert within(valid(sampler, FEW), FEW, expected)


@pytest.mark.parametrize(
    "steps, random, best, lowest",
    [(2, 0.378, 0.450, 0.207), (3, 0.528, 0.412, None), (4, 0.652, 0.840, 0.502), (6, 0.813, 0.608, 0.147),
     (12, 1.0, 1.0, 1.0)],
)  # fmt: skip
def test_validity_with_four_clues_is_not_monotone_in_the_passes_and_ties_matter(steps, random, best, lowest):
    """Four cells of a square, all choices alike. Where the lowest of equals is taken nothing is drawn: those shares are
    of all 1,820 choices in all squares; the others of 4,000 draws of a sampler that is written apart from ours."""
    rules = (RANDOM, random), (BEST, best), ({"ties": "lowest"}, lowest)
    for rule, expected in rules:
        found = None if expected is None else valid({**rule, "steps": steps}, MANY, temperature=0.0, clues=4)
        assert found is None or within(found, MANY, expected, 4000)


@pytest.mark.parametrize("ties", ["random", "lowest"])
@pytest.mark.parametrize("rule", [RANDOM, BEST], ids=["random", "confidence"])
def test_squares_are_filled_as_by_hand(rule, ties):
    """Token by token: squares that fit are counted one by one, and what equals what is decided on fractions.

    Which of several likeliest symbols is taken is drawn apart from which of several likeliest cells is.
    """
    given = []

    def see(canvases, before):
        given.append([tokens.tolist() for tokens in before])

    for steps in (2, 4, 6):
        given.clear()
        found = fill(SamplerSettings(**rule, steps=steps, ties=ties), 12, 0.0, clues=4, seed=3, see=see)
        for i, canvas in enumerate(found):
            assert canvas.tokens_G.tolist() == by_hand(given[0][i], steps, rule == RANDOM, ties, [3, i])


def by_hand(tokens, steps, is_random, ties, seed):
    """Fill a canvas with clues by even counts at temperature 0."""
    n_masks = tokens.count(0)
    for step in range(steps):
        numbers = np.random.default_rng([*seed, step]).random((3, 16))
        fitting = [square for square in VALID if all(t in (0, s) for t, s in zip(tokens, square))] or list(VALID)
        proposed = {}
        for cell in (cell for cell in range(16) if tokens[cell] == 0):
            counts = [sum(square[cell] == symbol for square in fitting) for symbol in range(2, 6)]
            best = [symbol for symbol, n in zip(range(2, 6), counts) if n == max(counts)]
            symbol = best[0] if ties == "lowest" else best[int(numbers[0, cell] * len(best))]
            rank = (0, -numbers[1, cell]) if is_random else (-Fraction(max(counts), len(fitting)), numbers[2, cell])
            proposed[cell] = (rank if is_random or ties == "random" else (rank[0], cell)), symbol
        for cell in sorted(proposed, key=lambda cell: proposed[cell][0])[: n_masks // steps + (step < n_masks % steps)]:
            tokens[cell] = proposed[cell][1]
    return tokens


def test_noise_is_mended_by_confidence_where_one_token_is_committed_at_a_time():
    assert within(valid(RANDOM, FEW, noise=0.05), FEW, 0.31)
    assert within(valid(BEST, FEW, noise=0.05), FEW, 0.96)


def test_a_threshold_gives_valid_squares_alone_in_fewer_passes():
    found = fill(SamplerSettings(commit="threshold", threshold=0.9), FEW, temperature=0.0, clues=4)
    assert all(map(is_valid, found))
    assert np.mean([canvas.n_passes for canvas in found]) <= 8  # of 12


@pytest.mark.slow  # a chi-square over 576 classes
def test_one_token_a_pass_in_random_order_draws_from_the_exact_distribution():
    n = 576 * 8
    counts = dict.fromkeys(VALID, 0)
    for canvas in fill(SamplerSettings(**RANDOM), n):
        counts[tuple(canvas.tokens_G.tolist())] += 1
    statistic = sum((k - n / 576) ** 2 / (n / 576) for k in counts.values())
    assert abs(statistic - 575) < 4 * math.sqrt(2 * 575)


@pytest.mark.slow
def test_confidence_narrows_what_is_drawn_where_the_lowest_of_equals_is_taken():
    """The card's 284 squares of 1000 are with ties to the lowest; seeded ties give back most of what that costs."""
    rules = (RANDOM, {"ties": "lowest"}, BEST)
    random, lowest, seeded = (
        len({tuple(c.tokens_G.tolist()) for c in fill(SamplerSettings(**rule), 1000)}) for rule in rules
    )
    assert random == pytest.approx(478, abs=20) and lowest == pytest.approx(284, abs=30)
    assert lowest + 100 < seeded < random
    assert len(SQUARES) == 576


MDLM = {"cap": 0.0}
CAP, RESCALE = {"cap": 0.04}, {"cap": 1.0, "rescale": 0.2}
LOOP, LOOP_BY_CONFIDENCE = ({"cap": 0.1, "when": "loop"}, {"cap": 0.1, "when": "loop", "confidence": "mean"})
GENTLE = {**LOOP_BY_CONFIDENCE, "cap": 0.05}
TABLE = {
    16: (0.195, 0.252, 0.207, 0.228, 0.235, 0.225),
    64: (0.327, 0.395, 0.435, 0.493, 0.527, 0.630),
    256: (0.278, 0.468, 0.475, 0.533, 0.558, 0.738),
}


@pytest.mark.parametrize("steps", [16, 64, pytest.param(256, marks=pytest.mark.slow)])
def test_masking_again_mends_what_a_noisy_denoiser_errs_in(steps):
    n = {16: 100, 64: 50, 256: 150}[steps]
    rules = (MDLM, CAP, RESCALE, LOOP, LOOP_BY_CONFIDENCE, GENTLE)
    found = [valid({"commit": "remdm", "steps": steps, "remask": rule}, n, noise=0.05) for rule in rules]
    for i, share in enumerate(found):
        assert within(share, n, TABLE[steps][i]), (rules[i], share)
    if steps == 256:
        assert found[0] < found[1] < found[5]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_bound_is_the_likelihood_where_conditionals_agree_and_above_it_where_not(noise):
    """Card 9, 4."""
    rng, draws = np.random.default_rng(0), []
    for i in range(1500):
        square, n = SQUARES[rng.integers(576)] + 1, i % 16 + 1
        hidden = rng.choice(16, n, replace=False)
        tokens = square.copy()
        tokens[hidden] = 0
        shares = marginals(tokens[None], noise)[0, hidden, square[hidden] - 2]
        draws.append(16 / n * -np.log(shares).sum())
    mean, error = np.mean(draws), np.std(draws) / math.sqrt(len(draws))
    assert abs(mean - math.log(576)) <= 3 * error if noise == 0 else mean > math.log(576) + 3 * error


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature):
    """Card 9, 11: a chi-square over five tokens, the next to impossible ones apart; towards 0 it is the likeliest."""
    n, logits = 4000, torch.tensor([1.0, 0.0, -1.0, 0.5, 0.2])
    drawn = torch.from_numpy(np.random.default_rng(1).random(n))
    for sampler in (SamplerSettings(), Dream().sampler):
        tokens, _ = propose(logits.expand(n, -1), sampler, temperature, drawn)
        expected = n * (logits / temperature).softmax(-1)
        assert ((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum() < 18.5  # p = .001
        assert set(propose(logits.expand(n, -1), sampler, 1e-3, drawn)[0].tolist()) == {0}


def test_the_demo_shows_a_square_pass_by_pass_and_what_rules_make_of_many(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exact_demo, "N_DRAWN", 40)
    assert main.main(["demo", "--denoise", "true"]) == 0
    out = capsys.readouterr().out
    assert "clues" in out and "pass 6" in out and "The surest cells, 6 passes: a Latin square." in out
    rows = [line for line in out.splitlines() if line.startswith("│ ") and "passes" in line]
    assert len(rows) == 6 and ["100.0%" in row for row in rows] == [False, False, True] * 2
    assert [f" {n}.0 " in row for row, n in zip(rows, [2, 4, 12] * 2, strict=True)] == [True] * 6
    assert list(tmp_path.iterdir()) == []  # nothing is written

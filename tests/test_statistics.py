"""Statistics: intervals and tests on cases with known answers, and the coverage of intervals by simulation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from innerloop.errors import InputError
from innerloop.measure.statistics import (
    Verdict,
    aligned,
    clopper_pearson,
    difference_noise,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    share_noise,
    verdict,
    verdict_of_files,
    wilson,
)
from innerloop.text.codec import from_json, to_json

RUNS = 2000


def rows(n: int, both: int, first: int, second: int) -> tuple[list[bool], list[bool]]:
    """Return who has which rows right: so many both, only the first, only the second, and the rest nobody."""
    none = [False] * (n - both - first - second)
    return [True] * (both + first) + [False] * second + none, [True] * both + [False] * first + [True] * second + none


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10) == mcnemar(9, 1)


def test_intervals_of_shares_at_known_values():
    for interval, hits, n, low, high in (
        (wilson, 0, 5, 0.0, 0.43448),
        (wilson, 3, 10, 0.10779, 0.60322),
        (wilson, 7, 7, 0.64567, 1.0),
        (wilson, 0, 0, 0.0, 1.0),
        (clopper_pearson, 0, 10, 0.0, 0.30850),
        (clopper_pearson, 10, 10, 0.69150, 1.0),
        (clopper_pearson, 8, 10, 0.44390, 0.97479),
        (clopper_pearson, 0, 0, 0.0, 1.0),
    ):
        assert interval(hits, n) == pytest.approx((low, high), abs=1e-5)


def test_the_bootstrap_agrees_with_the_normal_interval_where_there_are_many_rows():
    n, first, second = 5000, 700, 500
    d, share = (first - second) / n, (first + second) / n
    half = 1.96 * math.sqrt((share - d * d) / n)
    assert paired_bootstrap(first, second, n) == pytest.approx((d - half, d + half), abs=1e-3)
    low, high = paired_bootstrap(0, 0, 100)  # it has width where all rows agree
    assert -0.05 < low < 0 < high < 0.05
    low, high = paired_bootstrap(100, 0, 100)
    assert 0.9 < low < 1 and high == 1.0
    assert paired_bootstrap(9, 4, 80, seed=3) == paired_bootstrap(9, 4, 80, seed=3)


def test_the_verdict_is_a_sentence():
    first, second = rows(500, 300, 40, 20)
    found = verdict(first, second, ("LOTUS", "CoT"))
    assert found.difference == pytest.approx(0.04) and found.accuracies == (0.68, 0.64)
    assert found.told_apart and found.p == pytest.approx(mcnemar(40, 20)) and found.n_discordant == (40, 20)
    low, high = (100 * bound for bound in found.ci95)
    start = f"LOTUS is 4.0 points above CoT, 95 % interval {low:.1f} to {high:.1f}"
    assert found.sentence == f"{start}, p = {found.p:.2g} (n = 500)"
    other = verdict(second, first, ("CoT", "LOTUS"))
    assert other.sentence.startswith("CoT is 4.0 points below LOTUS, 95 % interval 0.")
    assert from_json(Verdict, json.loads(json.dumps(to_json(found)))) == found


def test_what_cannot_be_told_apart_is_said_to_be_so():
    found = verdict(*rows(100, 60, 6, 4), ("LOTUS", "CoT"))
    assert not found.told_apart and found.ci95[0] < 0 < found.ci95[1]
    assert found.sentence.startswith("LOTUS and CoT cannot be told apart: +2.0 points, 95 % interval -")
    assert verdict([True] * 9, [True] * 9).told_apart is False
    assert verdict([], []).told_apart is False


def write(path: Path, answers: dict[str, bool]) -> Path:
    path.write_text("".join(json.dumps({"id": key, "correct": value}) + "\n" for key, value in answers.items()))
    return path


def test_files_are_matched_by_id_and_those_of_other_examples_refused(tmp_path: Path):
    a = write(tmp_path / "a.jsonl", {"x": True, "y": False, "z": True})
    b = write(tmp_path / "b.jsonl", {"z": False, "x": True, "y": True})
    assert aligned(a, b) == ([True, False, True], [True, True, False])
    assert verdict_of_files(a, b).n_discordant == (1, 1)
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "correct": true}\n{"id": 1, "correct": false}\n')
    (tmp_path / "other.jsonl").write_text("no json\n")
    apart = "2 of 3 are only in the first and 1 of 2 only in the second, such as 'y'"
    for path, message in (
        (write(tmp_path / "c.jsonl", {"x": False, "w": True}), apart),
        (tmp_path / "twice.jsonl", "more than once"),
        (tmp_path / "other.jsonl", r"no predictions\.jsonl"),
        (tmp_path / "none.jsonl", "cannot read"),
    ):
        with pytest.raises(InputError, match=message):
            aligned(a, path)
    with pytest.raises(InputError, match="same rows"):
        verdict([True], [])


# How often an interval holds the truth, counted over simulated experiments; the nominal 95 % is held within what the
# discreteness of counts allows.


@pytest.mark.parametrize(("share", "n"), [(0.5, 100), (0.9, 100), (0.98, 150), (0.14, 150)])
def test_coverage_of_the_intervals_of_a_share(share: float, n: int):
    counts = np.random.default_rng(0).binomial(n, share, RUNS * 10)
    for interval, least in ((wilson, 0.925), (clopper_pearson, 0.95)):
        bounds = {k: interval(int(k), n) for k in np.unique(counts)}
        holds = {k: low <= share <= high for k, (low, high) in bounds.items()}
        assert np.mean([holds[k] for k in counts]) >= least, interval.__name__


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_coverage_of_the_mean_over_seeds(n: int):
    drawn = np.random.default_rng(1).normal(0.7, 0.1, (RUNS, n))
    found = [over_seeds(list(values)) for values in drawn]
    assert np.mean([abs(mean - 0.7) <= half for mean, half in found]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("share", "n", "seeds"), [(0.98, 40, 2), (0.99, 100, 2), (0.997, 300, 3), (0.5, 40, 3)])
def test_coverage_of_the_mean_over_seeds_that_differ_by_their_rows_alone(share: float, n: int, seeds: int):
    drawn = np.random.default_rng(3).binomial(n, share, (RUNS, seeds)) / n
    found = [over_seeds(list(shares), share_noise(list(shares), n)) for shares in drawn]
    assert np.mean([abs(mean - share) <= half + 1e-9 for mean, half in found]) >= 0.95
    plain = np.mean([abs(mean - share) <= half + 1e-9 for mean, half in map(over_seeds, drawn.tolist())])
    assert plain < 0.9 or share == 0.5


@pytest.mark.parametrize(("share", "n", "seeds"), [(0.15, 40, 2), (0.98, 40, 2), (0.99, 100, 2), (0.9, 300, 3)])
def test_equal_methods_are_seldom_told_apart_over_seeds(share: float, n: int, seeds: int):
    right = np.random.default_rng(4).random((RUNS, 2, seeds, n)) < share
    told_apart = 0
    for first, second in right:
        only = [(int((a & ~b).sum()), int((~a & b).sum())) for a, b in zip(first, second)]
        found = [Verdict(("a", "b"), n, (0, 0), (p - q) / n, (0, 0), 1.0, (p, q)) for p, q in only]
        mean, half = over_seeds([one.difference for one in found], difference_noise(found))
        told_apart += abs(mean) > half
    assert told_apart / RUNS <= 0.05


@pytest.mark.parametrize(
    ("first", "second", "n"), [(0.1, 0.1, 150), (0.2, 0.05, 100), (0.03, 0.01, 300), (0.9, 0, 100)]
)
def test_coverage_of_the_paired_bootstrap(first: float, second: float, n: int):
    drawn = np.random.default_rng(2).multinomial(n, [first, second, 1 - first - second], RUNS)
    bounds = {(a, b): paired_bootstrap(int(a), int(b), n) for a, b, _ in np.unique(drawn, axis=0)[:, :3]}
    holds = {pair: low - 1e-9 <= first - second <= high + 1e-9 for pair, (low, high) in bounds.items()}
    assert np.mean([holds[a, b] for a, b, _ in drawn]) >= 0.935


def test_false_alarms_of_mcnemar_are_as_rare_as_stated():
    drawn = np.random.default_rng(3).multinomial(200, [0.1, 0.1, 0.8], RUNS)
    alarms = np.mean([stats.binomtest(int(a), int(a + b)).pvalue < 0.05 for a, b, _ in drawn if a + b])
    assert alarms <= 0.06

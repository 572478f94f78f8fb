"""What pages say of loops and length: the benchmark's questions, its picture and its table."""

import argparse
import importlib.util
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from innerloop.tasks import Tracking

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str):
    """Import a script of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULTS = {
    "trained": 2,
    "split": "test",
    "device": "cpu",
    "points": [
        {
            "variant": "looped",
            "seed": seed,
            "n": {"1": 6, "4": 50},
            "loops": {"1": {"1": 0.9, "4": low}, "8": {"1": 1.0, "4": high}},
            "converged": {"1": {"accuracy": 1.0, "loops": 2.0}, "4": {"accuracy": high, "loops": 5.0 + seed}},
        }
        for seed, low, high in ((0, 0.2, 0.8), (1, 0.4, 0.6))
    ],
}


def test_a_cell_of_the_picture_is_the_mean_over_seeds(monkeypatch, tmp_path):
    plot = script("plot_loops_and_length")
    found = plot.cells(RESULTS, "looped")
    assert found["1"]["4"] == pytest.approx(0.3)
    assert found["8"]["4"] == pytest.approx(0.7)
    root = ElementTree.fromstring(f"<svg>{plot.heat_map(0, 'looped', found, 88, 2)}</svg>")
    edge = root.find("rect[@class='edge']")
    assert [text.text for text in root.findall("text[@class='in']")] == ["90", "30", "100", "70"]
    assert (edge.get("width"), edge.get("height")) == (
        str(2 * plot.CELL),
        str(plot.HIGH),
    )  # length 1 was trained, 4 not


def test_the_table_tells_what_converging_gives_beside_the_best_number_of_loops():
    (head, *rows), note = script("tables").length_lines(RESULTS)
    assert head == ["variant", "", "1 swaps", "4 swaps"]
    assert rows[0] == ["looped", "until converged", "100.0%", "70.0%"]
    assert rows[1] == ["looped", "loops until then", "2.0", "5.5"]
    assert rows[2][2:] == ["100.0%", "70.0%"]
    assert "n = 50 test questions" in note and "trained on up to 2 swaps; seeds 0, 1" in note


@pytest.mark.parametrize("length, n", [(1, 1), (2, 7), (5, 40)])
def test_questions_are_of_one_length_and_of_the_split(length, n):
    task, options = Tracking(n_swaps=6, min_swaps=1), argparse.Namespace(n=40, split="test")
    asked = script("loops_and_length").questions(task, length, options)
    assert [len(example.steps) for example in asked] == [length] * n
    assert not {e.question for e in asked} & {e.question for e in task.examples("train", 3000)}


def test_the_fit_of_width_and_depth_finds_the_form_that_made_the_losses(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    fit = script("width_depth")
    made = {(p, r): [(0.8 / ((0.4 * math.log(p) + 1) * (2 * math.log(r) + 1))) ** 1.5] * 2 for p, r in fit.cells()}
    k, m, alpha, log_a, rms, streams, loops = fit.fit(made)
    assert (k, m, alpha, log_a) == pytest.approx((0.4, 2.0, 1.5, math.log(0.8)), rel=1e-3)
    assert rms < 1e-4
    assert (streams, loops) == pytest.approx((made[2, 1][0] / made[1, 1][0], made[1, 2][0] / made[1, 1][0]), rel=1e-3)

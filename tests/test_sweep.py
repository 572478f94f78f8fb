"""Sweeps: grids and searches over any field of a recipe, resumed, with their failures, as one page."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from innerloop.errors import InputError
from innerloop.experiments import jobs, sweep
from innerloop.experiments.grid import parse_axes, values_of
from innerloop.experiments.report import document
from innerloop.experiments.search import combinations, search
from innerloop.experiments.suite import Suite, parse_suite
from innerloop.experiments.sweep import read_sweep, run_sweep, sweep_page, sweep_table, write_sweep
from tests.browser import needs_browser, screenshot
from tests.ray_cluster import two_nodes
from tests.test_cli import innerloop, refused
from tests.test_report import parsed, read
from tests.test_suite import RAW, in_this_process

QUIET = Console(quiet=True)
RECIPE = {name: RAW[name] for name in ("task", "backbone", "method", "train")}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "out": str(tmp_path / "run")}))
    return tmp_path / "recipe.yaml"


def result(variant: str, seed: int, accuracy: float) -> dict:
    cost = {"passes": 3.0, "positions": 9.0, "flops": 2e6, "thought_tokens": 1.0, "loops": 0.0}
    cost["seconds"] = {"prefill": 0.0, "thought": 0.0, "answer": 0.01}
    interval = [accuracy - 0.01, min(accuracy + 0.01, 1.0)]
    return {"variant": variant, "seed": seed, "n": 50, "accuracy": accuracy, "ci95": interval, "cost": cost}


def swept_by(recipe: Path, *grid: str, trials: int | None = None, workers: int = 1, **asked):
    return run_sweep(*read_sweep(recipe, list(grid), asked or None), trials, workers, QUIET)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Suite]:
    """Make jobs succeed at once, the better the more loops, but fail with three loops; return the suites that ran."""
    seen: list[Suite] = []

    def run(suite: Suite, *_) -> list[dict]:
        seen.append(suite)
        found = []
        for (variant, seed), job in suite.jobs.items():
            loops = job.method.max_loops
            broke = {"variant": variant, "seed": seed, "error": "it broke"}
            found.append(broke if loops == 3 else result(variant, seed, 0.1 * loops + 0.01 * seed))
        return found

    monkeypatch.setattr(sweep, "run_suite", run)
    return seen


def test_a_sweep_chooses_on_validation_data_unless_told_otherwise(recipe: Path, tmp_path: Path):
    raw, axes = read_sweep(recipe, ["method.max_loops=1,2"])
    assert raw["test"] == {"split": "valid"} and raw["seeds"] == [0] and raw["out"] == f"{tmp_path / 'run'}-sweep"
    assert raw["grid"] == {"method.max_loops": [1, 2]} == {field: values_of(axis) for field, axis in axes.items()}
    raw, _ = read_sweep(recipe, ["a=1,2"], {"out": "x", "seeds": [3, 4], "split": "test", "limit": 9})
    assert (raw["out"], raw["seeds"], raw["test"]) == ("x", [3, 4], {"split": "test", "limit": 9})
    raw, axes = read_sweep("recipes/suites/chain_spiral_grid.yaml", ["method.max_loops=1,2"])  # a suite with a grid
    assert [len(values_of(axis)) for axis in axes.values()] == [10, 2] and raw["test"] == {"split": "test"}
    assert raw["out"] == "runs/suites/chain_spiral_grid" and len(raw["grid"]["method.latents_per_block"]) == 10
    with pytest.raises(InputError, match="innerloop compare"):
        read_sweep("recipes/suites/chain_methods.yaml", ["a=1"])


@pytest.mark.parametrize(
    ("grid", "trials", "words"),
    [
        ([], None, "a sweep needs values"),
        (["a=1", "a=2"], None, "names a twice"),
        (["method.max_loops=1..4"], None, "only a search draws from"),
        (["method.max_lops=1,2"], None, "did you mean 'max_loops'"),
        (["method.max_lops=1..4"], 2, "did you mean 'max_loops'"),
        (["train.seed=1,2"], None, "list seeds"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(recipe: Path, tmp_path: Path, grid, trials, words: str):
    with pytest.raises(InputError) as error:
        swept_by(recipe, *grid, trials=trials)
    assert words in str(error.value) and not (tmp_path / "run-sweep").exists()


def test_a_grid_is_one_page_with_its_failures_and_the_same_twice(recipe: Path, tmp_path: Path, ran: list[Suite]):
    swept = swept_by(recipe, "method.max_loops=1,2,3", "train.learning_rate=1e-3,1e-2", seeds=[0, 1])
    assert len(ran[0].jobs) == 12 and swept.best.name == "max_loops=2, learning_rate=0.001"
    page = sweep_page(swept, "a sweep")
    assert page == sweep_page(swept, "a sweep")
    text = read(page)
    (figure,) = parsed(page).figures
    layout = figure["layout"]
    assert len(layout["annotations"]) == 2 and len(layout["shapes"]) == 1  # both seeds of two cells failed
    assert "max_loops=3, learning_rate=0.01 seed 1: it broke" in text
    assert "Best of 4 on valid: max_loops=2, learning_rate=0.001, 20.5%" in text
    assert "12 to 29" in str(figure)  # 50 rows
    assert sweep_table(swept).row_count == 4
    write_sweep(swept, "a sweep", tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["points"][0]["settings"] == {"method.max_loops": 1, "train.learning_rate": 0.001}
    assert report["suite"]["grid"]["method.max_loops"] == [1, 2, 3]


def test_one_axis_is_a_row_and_three_are_several_maps(recipe: Path, ran: list[Suite]):
    page = sweep_page(swept_by(recipe, "method.max_loops=1,2,4"), "one")
    map_, bars = (figure["data"][0] for figure in parsed(page).figures)
    assert map_["z"] == [bars["x"]] == [[0.1, 0.2, 0.4]]
    page = sweep_page(
        swept_by(recipe, "method.max_loops=1,2", "train.learning_rate=1e-3,1e-2", "method.n_slots=1,2"), "three"
    )
    assert len(parsed(page).figures) == 2 and "<h3>n_slots 1</h3>" in page and "<h3>n_slots 2</h3>" in page


def test_trials_are_trained_tested_and_not_run_again(recipe: Path, tmp_path: Path, monkeypatch):
    raw, axes = read_sweep(recipe, ["method.max_loops=1,2"], {"limit": 3})
    in_this_process(parse_suite(raw))
    monkeypatch.setattr(jobs, "_run_pool", lambda suite, missing, *rest: 1 / 0)
    swept = run_sweep(raw, axes, None, 1, QUIET)
    assert [row.results[0]["n"] for row in swept.rows] == [3, 3] and swept.results[0]["split"] == "valid"
    assert [row.cost("loops") for row in swept.rows] == [1.0, 2.0]


def test_a_search_goes_on_where_it_was_and_is_the_same_as_one_that_was_not_interrupted(tmp_path: Path):
    axes = parse_axes(["a=1e-4..1e-1:log", "b=1..9", "c=x,y"])
    asked: list[int] = []

    def scores(trials):
        asked.append(len(trials))
        return [None if t["b"] == 5 else -abs(t["b"] - 7) + (t["c"] == "y") for t in trials]

    whole = search(axes, 12, 2, tmp_path / "whole", scores)
    assert len(whole) == 12 and asked == [2, 4, 6, 8, 10, 12]
    part = search(axes, 6, 2, tmp_path / "part", scores)
    assert part == whole[:6] and search(axes, 12, 2, tmp_path / "part", scores) == whole
    assert all(1e-4 <= t["a"] <= 1e-1 and t["b"] in range(1, 10) and t["c"] in ("x", "y") for t in whole)
    others = search(parse_axes(["a=1..3"]), 3, 2, tmp_path / "part", lambda trials: [0.5] * len(trials))
    assert len(others) == 3 and search(axes, 12, 2, tmp_path / "part", scores) == whole  # other axes, another study


def test_a_trial_that_failed_stays_open_and_is_scored_once_it_succeeds(tmp_path: Path):
    axes, scores = parse_axes(["b=1..3"]), iter([[0.1, None], [0.1, 0.7], [0.1, 0.7]])
    search(axes, 2, 2, tmp_path, lambda trials: next(scores))
    assert (tmp_path / "study.log").read_text().count('"values":[') == 1
    search(axes, 2, 2, tmp_path, lambda trials: next(scores))
    assert (tmp_path / "study.log").read_text().count('"values":[') == 2


def test_a_grid_is_drawn_once_and_kept_and_a_search_ends_when_all_trials_are_tried(tmp_path: Path):
    axes = parse_axes(["a=1,2,3", "c=x,y"])
    for _ in range(2):
        seen: list = []
        assert search(axes, None, 2, tmp_path, lambda t, seen=seen: seen.append(t) or [0.5] * 6) == combinations(axes)
        assert seen == [combinations(axes)]
    tried = search(parse_axes(["c=1,2,3"]), 20, 2, tmp_path, lambda trials: [0.5] * len(trials))
    assert sorted(t["c"] for t in tried) == [1, 2, 3]


def test_a_search_finds_what_is_better_and_shows_it(recipe: Path, tmp_path: Path, ran: list[Suite]):
    swept = swept_by(recipe, "method.max_loops=1..6", "train.learning_rate=1e-4..1e-2:log", trials=8, workers=4)
    assert len(swept.settings) == 8 and len(ran[-1].jobs) == 8
    assert swept.best.mark.share == max(row.mark.share for row in swept.rows)
    text = read(sweep_page(swept, "a search"))
    assert "Accuracy by method.max_loops" in text and "Accuracy by train.learning_rate" in text


def test_without_what_is_optional_a_sweep_says_what_to_install(recipe: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    ray = ["sweep", recipe, "--grid", "method.max_loops=1,2", "--on", "ray"]
    refused(capsys, "pip install 'innerloop[cluster]'", *ray)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="pip install 'innerloop\\[sweep\\]'"):
        parse_axes(["c=1,2"])
    assert parse_suite(RAW | {"out": "x"}).variants == ["plain", "wide", "other"]  # which needs no grid


def test_drawn_trials_of_staged_recipes_change_the_last_method(tmp_path: Path):
    raw = {**RECIPE, "seeds": [0], "out": str(tmp_path)}
    raw["stages"] = [{"method": {"name": "cot"}}, {"method": {"name": "slr", "n_slots": 2}}]
    suite = parse_suite(raw, [{"method.n_slots": 5, "train.max_steps": 7}])
    (job,) = suite.jobs.values()
    assert job.method.n_slots == 5 and [stage.train["max_steps"] for stage in job.stages] == [7, 7]


def test_a_sweep_all_of_whose_jobs_fail_says_why_once(recipe: Path, tmp_path: Path, ran: list[Suite], capsys):
    code, out, err = innerloop(capsys, "sweep", recipe, "--grid", "method.max_loops=3", "--seeds", 0, 1)
    assert code == 2 and err == "innerloop: all of 2 jobs failed: it broke\n" and out.count("it broke") == 1
    assert "Best of" not in out and "it broke" in (tmp_path / "run-sweep" / "sweep.html").read_text()
    many = ["sweep", recipe, "--grid", "task.n_train=9,99999", "--seeds", 0]
    refused(capsys, "nothing was trained: chain: there are only", *many)


@pytest.mark.slow
def test_the_command_trains_lists_failures_and_resumes(recipe: Path, tmp_path: Path, capsys):
    grid = ["--grid", "method.max_loops=1,2", "--grid=train.max_length=1,64"]
    for _ in range(2):  # jobs that failed are tried again
        code, out, err = innerloop(capsys, "sweep", recipe, *grid, "--seeds", 0, 1, "--limit", 3)
        assert code == 2 and "4 of 8 jobs failed" in err and "longer than max_length=1" in err
        assert "Best of 2 on valid" in out
    assert "max_loops=2, max_length=1 seed 1" in read((tmp_path / "run-sweep" / "sweep.html").read_text())


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_without_complaint(recipe: Path, tmp_path: Path, ran: list[Suite]):
    swept = swept_by(recipe, "method.max_loops=1,2,3,4", "train.learning_rate=1e-3,1e-2", seeds=[0, 1])
    page = sweep_page(swept, "a sweep")
    shown, said = screenshot(page, tmp_path)
    assert not said and shown > 4 * screenshot(document("", []), tmp_path)[0]


@pytest.mark.slow
def test_jobs_run_on_a_cluster_of_two_workers(recipe: Path, tmp_path: Path, monkeypatch, capsys):
    with two_nodes(monkeypatch):
        monkeypatch.chdir(tmp_path)  # relative folders are the same on every node
        grid = ["--grid", "method.max_loops=1,2", "--grid=train.max_length=1,64"]
        code, _, err = innerloop(capsys, "sweep", recipe, *grid, "--limit", 3, "--on", "ray", "--out", "swept")
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**RECIPE, "variants": {"a": {}, "b": {}}, "out": "suite"}))
        assert innerloop(capsys, "compare", "suite.yaml", "--timed", 0, "--on", "ray")[0] == 0
    assert code == 2 and "2 of 4 jobs failed" in err and "longer than max_length=1" in err
    found = json.loads((tmp_path / "swept" / "results.json").read_text())["points"]
    assert sum("accuracy" in job for job in found) == 2

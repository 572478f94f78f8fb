import json
import math
import queue
from pathlib import Path

import pytest
import yaml

from innerloop import points
from innerloop import suite as suites
from innerloop.compare import suite_standings
from innerloop.errors import InputError
from innerloop.measure.statistics import over_seeds
from innerloop.points import run_suite
from innerloop.standing import standing_table
from innerloop.suite import load_suite, seed_means, suite_report

SUITES = sorted(Path("recipes/suites").glob("*.yaml"))
SCRATCH = {
    "type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
RAW = {
    "task": {"name": "chain", "n_ops": 2, "n_train": 32, "n_valid": 4, "n_test": 6},
    "backbone": {"scratch": SCRATCH},
    "warm_up": {"method": {"name": "cot"}, "train": {"max_steps": 2}},
    "method": {"name": "slr", "n_slots": 2, "max_loops": 2},
    "train": {"batch_size": 4, "max_steps": 3, "use_cpu": True, "save_strategy": "no"},
    "variants": {
        "plain": {},
        "wide": {"method": {"n_slots": 3}},
        "other": {"method": "pause", "train": {"max_steps": 1}},
    },
    "seeds": [0, 1],
    "test": {"loops": [1, 3], "limit": 5, "also": {"longer": {"n_ops": 3, "min_ops": 3}}},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**RAW, "out": str(tmp_path / "out")}, sort_keys=False))
    return tmp_path / "suite.yaml"


@pytest.mark.parametrize("file", SUITES, ids=lambda p: p.stem)
def test_every_suite_loads(file: Path):
    suite = load_suite(file)
    assert len(suite.points) == len(suite.variants) * len({seed for _, seed in suite.points})
    assert len({seed for _, seed in suite.points}) >= 3


def test_a_variant_changes_what_it_names_and_nothing_else(path: Path):
    suite = load_suite(path)
    plain, wide, other = (suite.points[name, 1] for name in ("plain", "wide", "other"))
    assert (plain.method.n_slots, wide.method.n_slots, wide.method.max_loops) == (2, 3, 2)
    assert other.method.name == "pause" and plain.method.name == "slr"
    assert (plain.train["max_steps"], other.train["max_steps"], other.train["batch_size"]) == (3, 1, 4)
    assert plain.train["seed"] == 1 and suite.points["plain", 0].train["seed"] == 0
    assert len({recipe.out for recipe in suite.points.values()}) == 6


def test_all_points_of_a_seed_start_from_its_warm_up(path: Path):
    suite = load_suite(path)
    for (_, seed), recipe in suite.points.items():
        assert recipe.backbone.model == suite.warm_ups[seed].out and recipe.backbone.scratch is None
    assert suite.warm_ups[0].backbone.scratch == SCRATCH and suite.warm_ups[1].train["seed"] == 1
    assert suite.warm_ups[0].train["max_steps"] == 2


def test_the_warm_up_can_be_a_teacher(path: Path):
    raw = yaml.safe_load(path.read_text())
    raw["variants"] = {"taught": {"method": {"hid_weight": 1.0, "teacher": "{warm_up}"}}}
    path.write_text(yaml.safe_dump(raw))
    suite = load_suite(path)
    assert suite.points["taught", 1].method.teacher == suite.warm_ups[1].out


def test_without_a_warm_up_points_start_from_scratch(path: Path):
    raw = yaml.safe_load(path.read_text())
    del raw["warm_up"]
    path.write_text(yaml.safe_dump(raw))
    suite = load_suite(path)
    assert not suite.warm_ups and suite.points["plain", 0].backbone.scratch == SCRATCH


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {}}, "a suite needs variants"),
        ({"variants": {"a": {"method": {"n_slot": 1}}}}, "variant 'a': method.n_slot: 'slr' has no field"),
        ({"variants": {"a": {"metod": {}}}}, "variant 'a' overrides 'metod' (did you mean 'method'?)"),
        ({"variants": {"a": {"out": "x"}}}, "variant 'a' overrides 'out'"),
        ({"seeds": [1, 1]}, "must be a list of different whole numbers"),
        ({"seeds": 3}, "must be a list of different whole numbers"),
        ({"warmup": {}}, "a suite has no section 'warmup' (did you mean 'warm_up'?)"),
        ({"test": {"splt": "test"}}, "test.splt"),
        ({"out": None}, "the suite has no 'out' folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(path: Path, changes: dict, words: str):
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    with pytest.raises(InputError) as error:
        load_suite(path)
    assert words in str(error.value)
    assert not (path.parent / "out").exists()


def in_this_process(suite, missing=None) -> list[dict]:
    """Train and test all points of a suite here, and return what `run_suite` then finds."""
    messages: queue.Queue = queue.Queue()
    for seed, recipe in suite.warm_ups.items():
        points._train(("warm-up", seed), recipe, messages)
    for key, recipe in suite.points.items():
        points._point(key, recipe, suite.exam, messages)
    seen = list(messages.queue)
    assert {key for key, _, _ in seen} == {*suite.points, *(("warm-up", seed) for seed in suite.warm_ups)}
    return run_suite(suite)


def test_points_are_trained_tested_and_never_run_twice(path: Path, monkeypatch):
    suite = load_suite(path, seeds=[3])
    results = in_this_process(suite)
    assert [(r["variant"], r["seed"], r["n"]) for r in results] == [("plain", 3, 5), ("wide", 3, 5), ("other", 3, 5)]
    # pause tokens have no iterations: the curve is of the methods that loop
    assert [int(n) for n in results[0]["loops"]] == [1, 3] and "loops" not in results[2]
    assert len(results[0]["change"]) == 3
    assert list(results[0]["also"]["longer"]) == ["trained", "1", "3"]
    assert list(results[2]["also"]["longer"]) == ["trained"]
    assert not list((path.parent / "out").rglob("checkpoint-*"))
    monkeypatch.setattr(points, "_run_pool", lambda suite, missing, *rest: {key: "ran" for key in missing})
    assert run_suite(suite) == results
    report = suite_report(path, results)
    assert len(report["points"]) == 3 and "versions" in report and "model" not in json.dumps(report["points"])
    assert report["suite"]["variants"] == RAW["variants"] and "out" not in report["suite"]
    assert [row["variant"] for row in seed_means(results)] == ["plain", "wide", "other"]
    assert standing_table(suite_standings(suite, results)).row_count == 3


def test_a_result_of_another_command_is_not_taken_for_a_points(path: Path):
    suite = load_suite(path)
    out = Path(suite.points["plain", 0].out)
    out.mkdir(parents=True)
    (out / "result.json").write_text(json.dumps({"accuracy": 1.0}))
    assert points._result(suite.points["plain", 0], suite.exam) is None


@pytest.mark.slow
def test_a_point_that_fails_stops_no_other(path: Path):
    raw = yaml.safe_load(path.read_text())
    raw["variants"] = {"plain": {}, "too long": {"train": {"max_length": 1}}}
    path.write_text(yaml.safe_dump(raw))
    plain, failed = run_suite(load_suite(path, seeds=[0]))
    assert plain["n"] == 5 and "longer than max_length" in failed["error"] and "accuracy" not in failed
    assert [row["variant"] for row in seed_means([plain, failed])] == ["plain"]


def test_means_over_seeds_by_hand():
    mean, half = over_seeds([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert over_seeds([0.4]) == (0.4, math.inf)
    point = {"variant": "a", "cost": {**dict.fromkeys(suites.COSTS, 2.0), "seconds": {"answer": 0.5, "thought": 0.25}}}
    points = [{**point, "accuracy": a, "loops": {"1": {"accuracy": a}, "2": {"accuracy": 1.0}}} for a in (0.2, 0.4)]
    (row,) = seed_means(points)
    assert row["accuracy"] == pytest.approx(0.3) and row["passes"] == 2.0 and row["seconds"] == 0.75
    assert row["loops"] == {1: pytest.approx(0.3), 2: 1.0}

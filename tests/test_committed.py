"""Results that come with a suite stand for its jobs, those alone that were trained and tested by the same settings."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from innerloop.errors import InputError
from innerloop.experiments.committed import as_digits, committed, edited, from_digits
from innerloop.experiments.compare import compare_suite
from innerloop.experiments.suite import load_suite
from innerloop.train.recipe import read_recipe
from tests.here import here
from tests.test_suite import RAW, SUITES, written

WITH_RESULTS = [path for path in SUITES if "results" in read_recipe(path)]
WHOLE = ("phop", "multiplication", "depth", "width_depth", "chain_rl", "chain_methods", "slr_stability")


@given(st.lists(st.booleans(), max_size=30))
def test_which_rows_are_right_is_read_as_it_was_written(right):
    assert from_digits(as_digits(right), len(right)) == right


@pytest.mark.parametrize("path", WITH_RESULTS, ids=lambda path: path.stem)
def test_the_results_of_a_suite_are_of_its_settings(path: Path, tmp_path: Path):
    raw, suite = read_recipe(path), load_suite(path, out=str(tmp_path))  # where nothing has been run
    found = committed(suite, raw)
    assert found
    if path.stem in WHOLE:
        assert set(found) == set(suite.jobs)


def test_the_controls_of_text_and_of_latents_are_kept_under_the_same_names():
    one = {"accuracy": 0.5, "same_answers": 0.25, "donor_answers": None, "p": 0.1}
    latents = {"controls": [{"control": "hidden", **one}, {"control": "shuffled", **one, "donor_answers": 0.75}]}
    short = {"accuracy": 0.5, "same_answers": 0.25}
    assert edited(latents) == {"hidden": short, "shuffled": {**short, "donor_answers": 0.75}}
    text = {"controls": [], "written_steps": {"early": {"0.0": one, "1.0": {}}, "mistaken": one, "exchanged": one}}
    assert edited(text) == {"hidden": short, "noise": short, "shuffled": short}


def test_results_on_file_stand_for_jobs_and_say_what_those_took(tmp_path: Path, monkeypatch):
    raw = {name: value for name, value in RAW.items() if name not in ("warm_up", "test")} | {"test": {"limit": 5}}
    file, shown = tmp_path / "results.json", []

    def compared(raw: dict, out: str | None = None) -> list[str]:
        """Return what is printed of a suite."""
        console = Console(record=True, width=300)
        path = written(tmp_path, raw)
        compare_suite(str(path), out, "other", None, 1, str(file), [], console, n_timed=0, on=here)
        return console.export_text().splitlines()

    told = [line for line in compared(raw) if line.startswith(("plain and", "plain is", "wide and", "wide is"))]
    assert len(told) == 2
    point = json.loads(file.read_text())["points"][0]
    assert len(point["right"]) == 2 and point["trained_seconds"] > 0
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    raw["results"] = str(file)
    monkeypatch.setattr("innerloop.experiments.jobs._run_pool", lambda suite, missing, *rest: shown.extend(missing))
    again = compared(raw)
    assert not shown and [line for line in again if line in told] == told
    assert any(
        "6 of 6 results are those of" in line and "6 jobs, 14 optimizer steps; training" in line for line in again
    )
    kept = json.loads(file.read_text())
    assert kept["points"][0]["right"] == point["right"] and "results" not in kept["suite"]

    def missing(changed: dict) -> set[str]:
        path = written(tmp_path, changed)
        suite = load_suite(path)
        return {name for name, _ in suite.jobs.keys() - committed(suite, read_recipe(path)).keys()}

    other, longer, new = (deepcopy(raw) for _ in range(3))
    other["variants"]["wide"]["method"]["n_slots"] = 4
    longer["train"]["max_steps"] = 4
    new["variants"]["more"] = {"method": "cot"}
    assert missing(raw) == set() and missing(other) == {"wide"} and missing(new) == {"more"}
    assert missing(longer) == {"plain", "wide", "other"}
    file.write_text(json.dumps({"points": []}))
    with pytest.raises(InputError, match="holds no results of a suite: innerloop compare SUITE --results FILE"):
        missing(raw)
    raw["results"] = 3
    with pytest.raises(InputError, match="results is 3, but must be the file of results"):
        load_suite(written(tmp_path, raw))
    assert yaml.safe_load((tmp_path / "suite.yaml").read_text())["results"] == 3

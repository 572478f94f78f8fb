"""Variants that answer with another's run by other settings of its method."""

import json
from pathlib import Path

from innerloop.experiments import jobs
from innerloop.experiments.jobs import run_suite
from innerloop.experiments.suite import parse_suite
from tests.here import here

RAW = {
    "task": {"name": "latin", "order": 4, "n_clues": 8, "n_train": 8, "n_test": 4},
    "backbone": {
        "scratch": {
            "type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    },
    "method": {"name": "llada", "gen_length": 21},
    "train": {"max_steps": 1, "batch_size": 4, "use_cpu": True, "save_strategy": "no"},
    "variants": {
        "sure": {},
        "random": {"of": "sure", "method": {"sampler": {"commit": "random"}}},
        "few": {"of": "sure", "method": {"sampler": {"steps": 3}}},
    },
}


def test_one_run_answers_by_other_settings_of_its_method(tmp_path: Path, monkeypatch):
    suite = parse_suite({**RAW, "out": str(tmp_path)})
    assert [suite.jobs[name, 0].method.sampler.commit for name in suite.variants] == [
        "confidence",
        "random",
        "confidence",
    ]
    trained = []
    monkeypatch.setattr(jobs, "run_recipe", lambda r, before=jobs.run_recipe, **o: (trained.append(r), before(r, **o)))
    results = {r["variant"]: r for r in run_suite(suite, on=here)}
    assert len(trained) == 1 and {r["model"] for r in results.values()} == {str(tmp_path / "sure" / "0")}
    assert results["random"]["method"]["sampler"]["commit"] == "random"
    passes = {name: r["cost"]["passes"] for name, r in results.items()}
    assert passes["few"] == 3 and passes["sure"] == passes["random"] == 21
    written = {name: (tmp_path / name / "0" / "predictions.jsonl").read_text() for name in results}
    assert len({json.dumps(text) for text in written.values()}) == 3

    assert all(jobs.known_result(suite, (name, 0)) for name in suite.variants)
    other = {**RAW["variants"], "few": {"of": "sure", "method": {"sampler": {"steps": 7}}}}
    again = parse_suite({**RAW, "variants": other, "out": str(tmp_path)})
    assert [jobs.known_result(again, (name, 0)) is None for name in suite.variants] == [False, False, True]

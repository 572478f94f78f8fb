import json
import math
import multiprocessing
import os
import queue
import signal
import warnings
from dataclasses import replace
from multiprocessing.managers import SyncManager
from pathlib import Path

import pytest
import torch
import yaml

from innerloop.bench import latency
from innerloop.errors import InputError
from innerloop.experiments import jobs, testing
from innerloop.experiments.compare import suite_rows, timed
from innerloop.experiments.jobs import run_suite
from innerloop.experiments.suite import EvalConfig, load_suite, parse_suite, suite_report
from innerloop.experiments.summary import by_variant, summary_table
from innerloop.experiments.workers import local_workers
from innerloop.measure.result_cache import ResultCache
from innerloop.methods import METHODS, Cot, Llada, Slr
from innerloop.tasks import Chain
from innerloop.text.codec import to_json
from innerloop.text.examples import write_examples
from innerloop.train.recipe import Recipe
from tests.here import here
from tests.models import tiny_model, trained_on
from tests.test_typed import Aux, Inject, Loop, Summed

SUITES = sorted(Path("recipes/suites").rglob("*.yaml"))
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
    "test": {"loops": [1, 3], "limit": 5, "also": {"longer": {"n_ops": 3, "min_ops": 3}}, "stability": True},
}


def written(folder: Path, raw: dict) -> Path:
    """Write a suite whose jobs go beside it."""
    (folder / "suite.yaml").write_text(yaml.safe_dump({**raw, "out": str(folder / "out")}, sort_keys=False))
    return folder / "suite.yaml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path, RAW)


@pytest.fixture
def raw(path: Path) -> dict:
    """The suite as its file says, for one seed and without a warm-up."""
    return {**yaml.safe_load(path.read_text()), "warm_up": None, "seeds": [0]}


@pytest.mark.parametrize("file", SUITES, ids=lambda p: p.stem)
def test_every_suite_loads(file: Path):
    suite = load_suite(file, seeds=[0])
    assert len(suite.jobs) == len(suite.variants) > 1
    if "smollm2" not in file.stem:  # there the loss is looked at, not the accuracy
        assert len(set(yaml.safe_load(file.read_text())["seeds"])) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("file", [p for p in SUITES if p.stem.startswith("slr_")], ids=lambda p: p.stem)
def test_the_first_job_of_a_suite_of_slr_runs(file: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("any text will do for pre-training, here and there. " * 40)
    is_text = file.stem == "slr_pretraining"
    overrides = ["--task.train", str(tmp_path / "text.txt")] if is_text else []
    suite = load_suite(file, str(tmp_path), [0], overrides)
    few = {"max_steps": 2, "batch_size": 8}

    def shortened(recipe: Recipe) -> Recipe:
        stages = tuple(replace(stage, train=stage.train | few) for stage in recipe.stages)
        return replace(recipe, train=recipe.train | few, stages=stages)

    for warm_up in suite.warm_ups.values():
        jobs.train_job(("warm-up", 0), shortened(warm_up), queue.Queue())
    key, recipe = next(iter(suite.jobs.items()))
    exam = replace(suite.test, limit=4)
    jobs.run_job(key, shortened(recipe), exam, queue.Queue())
    assert json.loads((Path(recipe.out) / "result.json").read_text())["n"] == 4


def test_a_variant_changes_what_it_names_and_nothing_else(path: Path):
    suite = load_suite(path)
    plain, wide, other = (suite.jobs[name, 1] for name in ("plain", "wide", "other"))
    assert (plain.method.n_slots, wide.method.n_slots, wide.method.max_loops) == (2, 3, 2)
    assert other.method.name == "pause" and plain.method.name == "slr"
    assert (plain.train["max_steps"], other.train["max_steps"], other.train["batch_size"]) == (3, 1, 4)
    assert plain.train["seed"] == 1 and suite.jobs["plain", 0].train["seed"] == 0
    assert len({recipe.out for recipe in suite.jobs.values()}) == 6


def test_a_variant_changes_fields_inside_the_groups_of_a_shared_method(monkeypatch):
    monkeypatch.setitem(METHODS, "summed", Summed)
    shared = {"task": "chain", "backbone": {"scratch": {"type": "llama"}}, "out": "runs/x"}
    shared["method"] = {"name": "summed", "loop": {"residual": "A"}}
    variants = {"a": {"method": {"loop": {"alpha": 0.25}}}, "b": {"method": {"name": "summed", "aux": {}}}, "c": {}}
    found = parse_suite({**shared, "variants": variants}).jobs
    loops = [found[name, 0].method.loop for name in variants]
    assert loops == [Loop("A", 0.25, inject=Inject("lookup")), *[Loop("A", inject=Inject("lookup"))] * 2]
    assert [found[name, 0].method.aux for name in variants] == [None, Aux(), None]


def test_jobs_of_a_seed_start_from_its_warm_up_but_for_those_with_a_decoder_of_their_own(path: Path, raw: dict):
    suite = load_suite(path)
    for (_, seed), recipe in suite.jobs.items():
        assert recipe.backbone.model == suite.warm_ups[seed].out and recipe.backbone.scratch is None
    assert suite.warm_ups[0].backbone.scratch == SCRATCH and suite.warm_ups[1].train["seed"] == 1
    assert suite.warm_ups[0].train["max_steps"] == 2
    taught = {"method": {"hid": {"weight": 1.0}, "teacher": "{warm_up}"}}
    changes = {"warm_up": RAW["warm_up"], "variants": {"taught": taught, "own": {"backbone": {"scratch": SCRATCH}}}}
    suite = parse_suite({**raw, **changes})
    assert suite.jobs["taught", 0].method.teacher == suite.warm_ups[0].out
    assert suite.jobs["own", 0].backbone.scratch == SCRATCH and suite.jobs["own", 0].backbone.model is None
    suite = parse_suite(raw)
    assert not suite.warm_ups and suite.jobs["plain", 0].backbone.scratch == SCRATCH


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {}}, "a suite needs variants"),
        ({"variants": {"a": {"method": {"n_slot": 1}}}}, "variant 'a': method.n_slot: 'slr' has no field"),
        ({"variants": {"a": {"metod": {}}}}, "variant 'a' overrides 'metod' (did you mean 'method'?)"),
        ({"variants": {"a": {"out": "x"}}}, "variant 'a' overrides 'out'"),
        ({"seeds": [1, 1]}, "must be a list of different whole numbers"),
        ({"seeds": 3}, "seeds is 3, but must be a list of whole numbers"),
        ({"seeds": [True]}, "must be a list of whole numbers"),
        ({"seeds": [-1]}, "must be a list of whole numbers, each at least 0"),
        ({"train": 3}, "the train section of a suite must list fields, not 3"),
        ({"warmup": {}}, "a suite has no section 'warmup' (did you mean 'warm_up'?)"),
        ({"test": {"splt": "test"}}, "test.splt"),
        ({"out": None}, "the suite has no 'out' folder"),
        ({"variants": {"a": {}, "b": {"of": "c", "test": {"beams": 2}}}}, "variant 'b' is of 'c', no variant that is"),
        ({"variants": {"a": {}, "b": {"of": "a"}}}, "variant 'b' is the same as 'a'"),
        ({"variants": {"a": {}, "b": {"of": "a", "train": {}}}}, "so it cannot set train"),
        ({"variants": {"a": {}, "b": {"of": "a", "method": "cot"}}}, "variant 'b' answers with a run of '"),
        (
            {"variants": {"a": {"test": {"limit": 3}}}},
            "its test may set samples, pick, temperature, beams, starts, not limit",
        ),
        ({"variants": {"a": {"test": {"samples": 2, "temperature": 0}}}}, "variant 'a': 2 samples at temperature 0"),
        ({"test": {"samples": 2, "controls": True}}, "controls and stability are of one answer"),
        ({"test": {"beams": 2, "stability": True}}, "controls and stability are of one answer"),
        ({"grid": {"method.max_loops": [1]}}, "lists variants or has a grid, not both"),
        ({"variants": None, "grid": []}, "grid lists the values of fields"),
        ({"variants": None, "grid": {"train.seed": [1, 2]}}, "cannot go over train.seed; list seeds"),
        ({"variants": None, "grid": {"method.loop.alpha": "0..1"}}, "has a range"),
        ({"variants": None, "grid": {"method.max_lops": [1]}}, "variant 'max_lops=1': method.max_lops"),
        ({"variants": {"warm_up": {}}}, "no variant may be called warm_up"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(path: Path, changes: dict, words: str):
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    with pytest.raises(InputError) as error:
        load_suite(path)
    assert words in str(error.value)
    assert not (path.parent / "out").exists()


def in_this_process(suite, skip=()) -> list[dict]:
    """Train and test the jobs of a suite here, all but those of some variants; return what `run_suite` then finds."""
    messages: queue.Queue = queue.Queue()
    for seed, recipe in suite.warm_ups.items():
        jobs.train_job(("warm-up", seed), recipe, messages)
    chosen = {key: recipe for key, recipe in suite.jobs.items() if key[0] not in skip}
    for key, recipe in chosen.items():
        jobs.run_job(key, recipe, suite.test, messages)
    seen = list(messages.queue)
    assert {key for key, _, _ in seen} == {*chosen, *(("warm-up", seed) for seed in suite.warm_ups)}
    return [] if skip else run_suite(suite)


def test_the_change_of_a_state_leaves_out_what_is_too_long_and_is_json_where_it_diverges():
    model = tiny_model(Slr(n_slots=2, max_loops=2))
    asked = ["1 ; + 1", " ".join(["1"] * 1000)]
    assert all(0 < change < 9 for change in testing.change_by_loop(model, asked, 3))
    with torch.no_grad():
        model.backbone.lm.get_input_embeddings().weight.fill_(math.nan)
    assert testing.change_by_loop(model, asked, 3) == [None, None, None]


def test_jobs_are_trained_tested_and_never_run_twice(path: Path, monkeypatch):
    suite = load_suite(path, seeds=[3])
    results = in_this_process(suite)
    assert [(r["variant"], r["seed"], r["n"]) for r in results] == [("plain", 3, 5), ("wide", 3, 5), ("other", 3, 5)]
    # pause tokens have no iterations: the curve is of the methods that loop
    assert [int(n) for n in results[0]["loops"]] == [1, 3] and "loops" not in results[2]
    assert len(results[0]["change"]) == 3
    assert [r.get("diverged") for r in results] == [0.0, 0.0, None]
    kept = json.loads((Path(suite.jobs["wide", 3].out) / "stability.json").read_text())
    assert kept["n"] == 5 and [entry["loop"] for entry in kept["loops"]] == [1, 2]
    assert list(results[0]["also"]["longer"]) == ["trained", "1", "3"]
    assert list(results[2]["also"]["longer"]) == ["trained"]
    assert not list((path.parent / "out").rglob("checkpoint-*"))
    monkeypatch.setattr(jobs, "_run_pool", lambda suite, missing, *rest: {key: "ran" for key in missing})
    assert run_suite(suite) == results
    report = suite_report(yaml.safe_load(path.read_text()), results)
    assert len(report["points"]) == 3 and "versions" in report and "model" not in json.dumps(report["points"])
    assert report["suite"]["variants"] == RAW["variants"] and "out" not in report["suite"]
    assert summary_table(suite_rows(suite, results)).row_count == 3


def test_a_job_is_tested_again_where_the_test_is_another(path: Path):
    suite = load_suite(path)
    out = Path(suite.jobs["plain", 0].out)
    out.mkdir(parents=True)
    (out / "result.json").write_text(json.dumps({"accuracy": 1.0}))  # of another command
    assert jobs.known_result(suite, ("plain", 0)) is None
    result = {"variant": "plain", "exam": to_json(suite.test), "model": str(out)}
    (out / "result.json").write_text(json.dumps(result))
    assert jobs.known_result(suite, ("plain", 0)) == result
    assert jobs.known_result(replace(suite, test=EvalConfig(limit=4)), ("plain", 0)) is None
    old = {"variant": "a", "exam": {"split": "test", "limit": None, "loops": [], "also": {}, "controls": False}}
    assert jobs.is_same_test(old, EvalConfig()) and not jobs.is_same_test(old, EvalConfig(samples=2))


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_own_job_alone():
    with local_workers(1) as workers:
        asked = ((os.getpid, ()), (os._exit, (1,)), (abs, (-2,)))
        handed = [workers.submit(function, *given) for function, given in asked]
        assert handed[0].result() != os.getpid() and handed[2].result() == 2
        with pytest.raises(InputError, match="killed, as happens where memory runs out"):
            handed[1].result()


def test_other_ways_of_answering_are_rows_that_train_nothing(raw: dict, monkeypatch):
    vote, best = {"samples": 3, "temperature": 1.0}, {"samples": 3, "pick": "likelihood", "temperature": 1.0}
    raw["test"] |= {"limit": 3, "loops": [1], "stability": False}
    raw["variants"] = {"vote": {"of": "plain", "test": vote}, "plain": {}, "best": {"of": "plain", "test": best}}
    raw["variants"] |= {"search": {"of": "plain", "test": {"beams": 2}}}
    suite = parse_suite(raw)
    assert suite.test_of("plain") == suite.test and suite.test_of("search").attempts.beams == 2
    trained = []
    monkeypatch.setattr(jobs, "run_recipe", lambda r, before=jobs.run_recipe, **o: (trained.append(r), before(r, **o)))
    results = {r["variant"]: r for r in run_suite(suite, on=here)}
    out = Path(raw["out"])
    assert list(results) == list(raw["variants"]) and [r.out for r in trained] == [str(out / "plain" / "0")]
    assert not (out / "vote" / "0" / "checkpoint").exists() and results["vote"]["model"] == str(out / "plain" / "0")
    assert results["vote"]["asked"] == {"samples": 3, "pick": "vote", "temperature": 1.0, "seed": 0}
    assert results["search"]["asked"] == {"beams": 2} and "asked" not in results["plain"]
    assert "loops" in results["plain"] and "loops" not in results["vote"]  # those are of the run
    assert list(results["vote"]["also"]["longer"]) == ["trained"] and results["vote"]["n"] == 3
    assert results["vote"]["cost"]["loops"] == results["plain"]["cost"]["loops"] == 2  # thought about once
    told = [(out / name / "0" / "predictions.jsonl").read_text().splitlines() for name in ("vote", "best")]
    drawn = [[json.loads(line)["samples"] for line in lines] for lines in told]
    assert drawn[0] == drawn[1] and all(len(samples) == 3 for samples in drawn[0])

    found = suite_rows(suite, list(results.values()))
    runs = {s.name: Path(suite.run_of(s.name, 0)) for s in found}
    tried = {s.name: suite.test_of(s.name).attempts for s in found}
    task = suite.jobs["plain", 0].task
    monkeypatch.setattr(latency, "REPEATS", 1)
    monkeypatch.setattr(latency, "peak_of", lambda model, job, device: 0)
    rows = timed(found, task, [e.question for e in task.examples("test", 1)], out, runs, tried)
    assert summary_table(rows).row_count == 4 and all(row.seconds > 0 for row in rows)
    assert set(json.loads((out / "times.json").read_text())["attempts"]) == {"vote", "best", "search"}

    timed(rows, task, [e.question for e in task.examples("test", 1)], out, runs)
    assert json.loads((out / "times.json").read_text())["attempts"] is None  # those of attempts are not taken for these

    run_suite(suite, on=here)
    assert len(trained) == 1  # nothing is answered again either, until the run is another
    for changes in ({"plain": {}, "more": {}, "vote": {"of": "more", "test": vote}}, {"vote": {"test": vote}}):
        other = parse_suite({**raw, "variants": changes})
        assert jobs.known_result(other, ("vote", 0)) is None  # it is of another run now
    trained_on(out / "plain" / "0")
    assert [jobs.known_result(suite, (name, 0)) is None for name in raw["variants"]] == [True, False, True, True]


def test_a_job_that_fails_stops_no_other_but_what_answers_with_its_run(raw: dict):
    short = {"train": {"max_length": 1}}
    raw["variants"] = {"short": short, "vote": {"of": "short", "test": {"samples": 2}}, "plain": {}}
    raw["test"] |= {"stability": False}
    short, vote, plain = run_suite(parse_suite(raw), on=here)
    assert "longer than max_length" in short["error"] and "accuracy" not in short and plain["n"] == 5
    assert vote["error"] == f"'short' failed, whose run it answers with: {short['error']}"
    assert [row.name for row in by_variant([short, vote, plain])] == ["plain"]


@pytest.mark.slow
def test_what_all_jobs_would_note_is_told_once(raw: dict, tmp_path: Path):
    write_examples(Chain(n_ops=2).examples("train", 40), tmp_path / "rows.jsonl")
    raw |= {"task": {"name": "plain", "train": f"{tmp_path}/rows.jsonl", "test": f"{tmp_path}/rows.jsonl"}}
    raw |= {"variants": {"a": {}, "b": {}}, "test": {"limit": 4}}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        run_suite(parse_suite(raw))
    assert [str(note.message).partition(":")[0] for note in told] == ["40 of 40 test questions are also in train"]


def test_a_suite_whose_jobs_end_with_running_text_is_refused_before_anything_is_trained(raw: dict):
    raw["task"] = {"name": "text", "train": "any.txt"}
    with pytest.raises(InputError, match="variant 'plain' ends with task 'text', which has no right answers"):
        run_suite(parse_suite(raw), on=here)


def test_a_grid_stands_in_place_of_variants(raw: dict):
    del raw["variants"]
    raw["grid"] = {"method.max_loops": [1, 2], "train.learning_rate": "1e-3,1e-2"}
    suite = parse_suite({**raw, "warm_up": RAW["warm_up"], "seeds": [0, 1]})
    assert len(suite.jobs) == 8
    job = suite.jobs["max_loops=2, learning_rate=0.01", 1]
    assert (job.method.max_loops, job.train["learning_rate"], job.train["seed"]) == (2, 0.01, 1)
    assert job.backbone.model == suite.warm_ups[1].out


def test_a_folder_with_jobs_of_another_recipe_is_refused_and_one_that_was_moved_is_not(raw: dict):
    raw["warm_up"] = RAW["warm_up"]
    suite = parse_suite(raw)
    for recipe in [*suite.warm_ups.values(), *suite.jobs.values()]:
        recipe.save(Path(recipe.out) / "config.yaml")
    jobs.check_jobs(suite)
    with pytest.raises(InputError, match=r"wide.0 was trained with another recipe \(method differ\)"):
        jobs.check_jobs(parse_suite({**raw, "variants": {"wide": {"method": {"n_slots": 4}}}}))
    jobs.check_jobs(parse_suite({**raw, "train": {**raw["train"], "logging_steps": 7}}))
    jobs.check_jobs(parse_suite({**raw, "train": dict(reversed(raw["train"].items()))}))  # the same, in another order
    Path(raw["out"]).rename(Path(raw["out"]).with_name("moved"))
    jobs.check_jobs(parse_suite({**raw, "out": str(Path(raw["out"]).with_name("moved"))}))
    with pytest.raises(InputError, match=r"train.max_stepz is not a training argument"):
        jobs.check_jobs(parse_suite({**raw, "train": {"max_stepz": 1}}))


def test_one_suite_has_all_methods():
    suite = load_suite("recipes/suites/chain-all.yaml", seeds=[0])
    assert {recipe.method.name for recipe in suite.jobs.values()} == set(METHODS)
    assert suite.test.controls


def test_a_job_that_was_interrupted_goes_on_from_its_checkpoint(path: Path, monkeypatch):
    suite = load_suite(path, seeds=[0])
    messages: queue.Queue = queue.Queue()
    jobs.train_job(("warm-up", 0), suite.warm_ups[0], messages)
    recipe = suite.jobs["plain", 0]
    ended, log = jobs._Report.on_step_end, []

    def interrupt(self, args, state, control, **_):
        log.append(state.global_step)
        if state.global_step == 1:  # noticed when the next step ends
            os.kill(os.getpid(), signal.SIGINT)
        ended(self, args, state, control)

    monkeypatch.setattr(jobs._Report, "on_step_end", interrupt)
    with pytest.raises(InputError, match="interrupted; run the suite again"):
        jobs.run_job(("plain", 0), recipe, suite.test, messages)
    jobs.run_job(("plain", 0), recipe, suite.test, messages)
    assert log == [1, 2, 3] and jobs.known_result(suite, ("plain", 0))["n"] == 5
    assert not list(Path(recipe.out).rglob("checkpoint-*"))


def test_nobody_is_heard_where_the_queue_has_gone():
    with SyncManager(ctx=multiprocessing.get_context("spawn")) as manager:
        messages = manager.Queue()
        messages.put("one")
        assert jobs._next(messages) == "one"
    assert jobs._next(messages) is None


def test_passes_over_a_canvas_are_swept_as_loops_are():
    model, task = tiny_model(Llada(gen_length=40, sampler={"block_length": 20})), Chain(n_ops=2)
    asking = testing._Asking(model, EvalConfig(loops=(2, 3, 4)), 0, ResultCache())
    found, refused = asking.by_loops("accuracy", task, task.examples("test", 2))
    assert asking.iterates and list(found) == [2, 4] and "cannot be shared evenly among 2 blocks" in refused[3]
    assert not testing._Asking(tiny_model(Cot()), EvalConfig(loops=(2,)), 0, ResultCache()).iterates

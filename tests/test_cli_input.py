"""The command line before a run is there: lists, help, mistakes, and recipes that are trained here."""

import errno
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from innerloop.cli import demo
from innerloop.cli import main as cli
from innerloop.cli.compare import compare, sweep
from innerloop.cli.verb import Verb
from innerloop.errors import InputNote
from innerloop.methods import METHODS, Cot
from tests.models import tiny_model
from tests.test_cli import RECIPE, helped, innerloop, lines_of, plain_model, refused, written
from tests.test_report import parsed

RECIPES = Path(__file__).parents[1] / "recipes" / "chain"


@pytest.mark.slow
def test_compare_trains_a_suite_and_prints_one_table(tmp_path: Path, capsys):
    suite = {name: value for name, value in RECIPE.items() if name != "stages"}
    suite |= {"variants": {"pause": {"method": {"name": "pause", "n_pauses": 2}}, "cot": {"method": "cot"}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**suite, "seeds": [0, 1], "out": str(tmp_path / "out")}))
    code, out, _ = innerloop(capsys, "compare", tmp_path / "suite.yaml", "--results", tmp_path / "kept" / "r.json")
    assert code == 0 and "pause" in out and "results.json" in out
    kept = json.loads((tmp_path / "kept" / "r.json").read_text())
    assert kept == json.loads((tmp_path / "out" / "results.json").read_text()) and len(kept["points"]) == 4


def test_ask_a_plain_model_writes_freely_but_no_verb_takes_it_for_a_run_or_a_recipe_for_a_suite(tmp_path: Path, capsys):
    code, out, _ = innerloop(capsys, "ask", plain_model(tmp_path), "3 ; + 4", "--max_new_tokens", 4)
    assert code == 0 and "4 positions" not in out and "passes" in out
    no_run = "has no innerloop.json, so it is not a saved innerloop run; give a method"
    refused(capsys, no_run, "eval", tmp_path, "--task", "chain")
    refused(capsys, "innerloop train", "compare", written(tmp_path))


def test_a_chat_model_and_a_templated_question_are_noted_once_and_answered(tmp_path: Path, capsys):
    folder = plain_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}U {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    code, _, err = innerloop(capsys, "ask", folder, "3 ; <eos> 4", "--max_new_tokens", 4)
    notes = err.splitlines()
    assert code == 0 and len(notes) == 2 and all(note.startswith("note: ") for note in notes)
    assert f"{folder} is asked through its chat template; chat: false" in notes[0]
    assert "a question has <eos>, which is read letter by letter" in notes[1]
    model = tiny_model(Cot())
    with pytest.warns(InputNote, match="give the bare question"):
        model.generate(["<eos> 1 ; + 1"], max_new_tokens=1)
    assert innerloop(capsys, "ask", plain_model(tmp_path / "base"), "3 ; + 4", "--max_new_tokens", 4)[2] == ""


def test_methods_and_tasks_are_listed_splits_made_and_laid_out(tmp_path: Path, capsys):
    for verb, names in ((["methods"], METHODS), (["data", "list"], ("chain", "prosqa", "gsm8k", "math"))):
        out = innerloop(capsys, *verb)[1]
        assert all(name in out for name in names)
    sizes = ["--n_train", 6, "--n_valid", 2, "--n_test", 3, "--n_ops", 2]
    assert innerloop(capsys, "data", "make", "chain", "--out", tmp_path, *sizes)[0] == 0
    found = {p.stem: len(lines_of(p)) for p in tmp_path.iterdir()}
    assert found == {"train": 6, "valid": 2, "test": 3}
    method = "{name: slr, n_slots: 2, max_loops: 2, step_weight: 1}"
    code, out, _ = innerloop(capsys, "data", "show", tmp_path / "test.jsonl", "--method", method, "--n", 1)
    assert code == 0 and "<bot> <lat>1 <lat>2 <eot>" in " ".join(out.split())
    assert "loop 1 must show" in out and "refined 2 times" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evla"], "there is no verb 'evla' (did you mean 'eval'?)"),
        (["train", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
        (["train"], "innerloop train needs RECIPE; innerloop train --help"),
        (["data"], "innerloop data needs one of list, make, show"),
        (["data", "mak"], "did you mean 'make'?"),
        (["eval", "x", "y"], "innerloop eval does not take y; innerloop eval --help"),
        (["eval", "x", "--splt", "test"], "does not take --splt (did you mean '--split'?)"),
        (["eval", "x", "--limit", "2.5"], "--limit is 2.5, but must be a whole number"),
        (["eval", "x", "--pick", "vot"], "must be one of vote, likelihood, convergence (did you mean 'vote'?)"),
        (["eval", "x", "--batch_size", "0"], "--batch_size is 0, but must be a whole number, at least 1"),
        (["eval", "x", "--max-new-tokens", "0"], "--max_new_tokens is 0, but must be a whole number, at least 1"),
        (["bench", "x", "--batch_sizes", "one"], "must be a list of whole numbers, each at least 1, as [1, 2]"),
        (["bench", "x", "--batch_sizes"], "--batch_sizes needs a value"),
        (["data", "make", "chain", "--n_ops", "x"], "task.n_ops is x, but must be a whole number"),
        (["eval", "runs/nowhere"], "there is no folder runs/nowhere"),
        (["ask", "./nowhere", "hi"], "there is no folder nowhere"),
        (["lens", "./nowhere"], "there is no folder nowhere"),
        (["lens", "./nowhere", "--examples", "0"], "--examples is 0, but must be a whole number, at least 1"),
        (["data", "make", "chain", "--n_opss", "3"], "did you mean 'n_ops'"),
        (["data", "make", "gsm8k"], "task 'gsm8k' has no train split"),
        (["data", "show", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["data", "show", "nowhere.jsonl", "--method", "coconot"], "did you mean 'coconut'"),
        (["data", "list", "--x", "1"], "innerloop data list does not take --x"),
        (["eval", "x", "--limit"], "--limit needs a value"),
        (["eval", "x", "--limit", "--fresh"], "--limit needs a value"),
        (["compare", "a", "b", "--seeds", "1.5"], "--seeds is ['1.5'], but must be a list of whole numbers"),
        (["demo", "--steps", "0"], "--steps is 0, but must be a whole number, at least 1"),
    ],
)
def test_mistakes_end_with_one_sentence_and_a_code(capsys, arguments: list[str], message: str):
    refused(capsys, message, *arguments)


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("lm_eval", ["eval", "model", "--backend", "lm-eval", "--tasks", "x"], "innerloop[eval]"),
        ("sklearn", ["eval", "model", "--task", "chain", "--method", "slr", "--probes"], "innerloop[fit]"),
        (
            "sklearn",
            ["calibrate", "model", "--method", "adainfer", "--rule", "classifier", "--out", "y"],
            "innerloop[fit]",
        ),
        ("math_verify", ["eval", "model", "--task", "math", "--method", "cot", "--data", "x.jsonl"], "innerloop[eval]"),
        ("plotly", ["lens", "model", "--task", "chain", "--method", "slr"], "innerloop[viz]"),
        ("plotly", ["compare", "a", "b"], "innerloop[viz]"),
        ("plotly", ["demo"], "innerloop[viz]"),
        ("ray", ["sweep", "nowhere.yaml", "--on", "ray"], "innerloop[cluster]"),
        ("ray", ["compare", "a", "b", "--on", "ray"], "innerloop[cluster]"),
        ("ray", ["eval", RECIPES, "--on", "ray"], "innerloop[cluster]"),
        ("wandb", ["train", RECIPES / "cot.yaml", "--train.report_to", "wandb"], "pip install wandb"),
        ("liger_kernel", ["train", RECIPES / "cot.yaml", "--train.loss_chunk", "fused"], "innerloop[liger]"),
    ],
)
def test_a_missing_library_is_told_before_data_are_read_or_a_model_is_loaded(
    module, arguments, words, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("innerloop.text.examples._collect", None)
    monkeypatch.setattr("innerloop.model.loading.load", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    refused(capsys, words, *arguments)
    assert len(list(tmp_path.rglob("*"))) == 2


@pytest.mark.parametrize(
    ("row", "words"), [('{"question": "q", "answ', "line 17"), ("", "no training example has steps, but 'cot' learns")]
)
def test_data_that_cannot_be_learned_from_is_refused_before_anything_starts(row, words, tmp_path: Path, capsys):
    lines = [json.dumps({"question": f"q{i}", "steps": [], "answer": "1"}) for i in range(16)]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, row]))
    recipe = written(tmp_path, task={"name": "gsm8k", "train": str(tmp_path / "train.jsonl")})
    code, _, err = innerloop(capsys, "train", recipe)
    assert code == 2 and words in err and not (tmp_path / "run").exists()


def test_words_are_shared_out_among_options_places_and_overrides():
    verb = Verb("compare", compare)
    assert verb.split(["a", "--seeds", "0", "1", "b", "--train.max_steps", "-1", "--seeds=[2,3]", "--method.x=1"]) == (
        {"seeds": ["0", "1", "2", "3"]}, ["a", "b"], ["--train.max_steps", "-1", "--method.x=1"]
    )  # fmt: skip
    grid = ["r.yaml", "--grid", "method.a=1,2", "--grid=method.b=x,y", "--workers", "2"]
    found = {"grid": ["method.a=1,2", "method.b=x,y"], "workers": "2"}
    assert Verb("sweep", sweep).split(grid) == (found, ["r.yaml"], [])


def test_the_module_is_the_command_with_its_exit_code_and_debug_shows_where_an_error_arose(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["innerloop", "evla"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("innerloop", run_name="__main__")
    assert exit_.value.code == 2 and "did you mean 'eval'?" in capsys.readouterr().err
    assert "Traceback" in innerloop(capsys, "train", "nowhere.yaml", "--debug")[2]


def test_a_pipe_that_is_closed_ends_the_command_without_a_word(monkeypatch, capfd):
    for words in (["--help"], ["methods"], ["train", str(RECIPES / "slr.yaml"), "--help"]):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as closed:
            monkeypatch.setattr("sys.stdout", closed)
            monkeypatch.setattr("innerloop.cli.data.console", Console())
            try:
                code = cli.main(words)
            except SystemExit as exit_:
                code = exit_.code
        monkeypatch.undo()
        assert code in (0, 1) and capfd.readouterr().err == ""


@pytest.mark.parametrize("width", [80, 100])
def test_no_name_of_a_method_is_cut(width: int, monkeypatch, capsys):
    monkeypatch.setattr("innerloop.cli.data.console", Console(width=width))
    out = innerloop(capsys, "methods")[1]
    assert {line.split()[0] for line in out.splitlines() if line[1:2].strip()} >= set(METHODS)
    assert "…" not in out and all(word in out for word in ("2502.05171", "content-free", "projection;", "pattern"))


def test_the_train_section_is_listed_ours_with_what_they_say_and_those_of_transformers(capsys):
    out = " ".join(helped(capsys, "train", RECIPES / "slr.yaml", "--help", "train").split())
    assert "--train.batch_size examples per device and forward pass (default: 32)" in out
    assert "max_steps=-1" in out and "learning_rate=0.0001" in out and "per_device_train_batch_size" not in out


def test_a_recipe_of_slr_fits_on_a_page_and_a_field_of_a_group_is_answered_by_the_nearest(capsys):
    recipe = "recipes/chain/slr.yaml"
    out = helped(capsys, "train", recipe, "--help")
    assert len(out.splitlines()) <= 100 and "--method.loop.FIELD" in out and "--method.n_slots" in out
    near = "method.loop.residul: 'method.loop' has no field 'residul' (did you mean 'residual'?)"
    refused(capsys, near, "train", recipe, "--method.loop.residul", "A")


def test_help_lists_the_verbs_and_the_options_of_each(capsys):
    for verb in cli.VERBS:
        assert verb == "train" or f"usage: innerloop {verb}" in helped(capsys, *verb.split(), "--help")
    for asked in (["--help"], [], ["data", "--help"]):
        out = helped(capsys, *asked)
        assert all(f"    {verb} " in out for verb in cli.VERBS)
    assert "0.1" in helped(capsys, "--version")


@pytest.mark.slow
def test_the_demo_trains_compares_and_reports(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "WARM_UP_STEPS", 5)
    code, out, _ = innerloop(capsys, "demo", "--out", tmp_path / "demo", "--steps", 8)
    assert code == 0
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [r["method"]["name"] for r in results] == ["no_cot", "cot", "pause", "coconut", "slr"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<title>slr on chain: inside 8 answers" in (tmp_path / "demo" / "lens.html").read_text()
    rows = [part.partition("</table>")[0].count("<tr>") for part in page.split("<table")[1:]]
    assert rows == [6, 4]  # the results of five methods, and the controls of the three that have latents
    assert "cannot be told apart" in page or "points below" in page or "points above" in page
    assert parsed(page).figures  # and nothing is asked for outside the page
    assert "report.html" in out and "innerloop ask" in out and "Times are medians of 5 turns" in " ".join(out.split())
    assert re.search(r"^slr:  8/8  in .*  test: ", out, re.MULTILINE) and "start over" not in out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("model.safetensors")}
    code, again, _ = innerloop(capsys, "demo", "--out", tmp_path / "demo", "--steps", 8)
    assert code == 0 and "to start over, remove it or choose another by --out" in again
    assert again.partition("interval")[2] == out.partition("interval")[2]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("model.safetensors")}
    refused(capsys, "was trained with another recipe (train differ)", "demo", "--out", tmp_path / "demo", "--steps", 9)


def test_an_interrupted_run_says_how_to_go_on_and_is_no_success(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("innerloop.train.callbacks.StopOnInterrupt.on_step_end", stop_now)
    train = ["train", written(tmp_path, train={**RECIPE["train"], "max_steps": 9}), "--out", tmp_path / "other"]
    refused(capsys, f"--out {tmp_path / 'other'} --resume", *train)
    monkeypatch.undo()
    assert innerloop(capsys, *train, "--resume")[0] == 0
    assert (tmp_path / "other" / "finished").exists()


def stop_now(self, args, state, control, **_):
    control.should_save = control.should_training_stop = True


def test_a_curriculum_cut_short_is_told_and_can_be_evaluated_where_it_ended(tmp_path: Path, capsys):
    method = {"name": "coconut", "curriculum": {"max_stage": 2, "unit": "step", "length": 9}}
    _, out, _ = innerloop(capsys, "train", written(tmp_path, stages=None, method=method))
    assert "training ended in stage 0 of 3" in out
    _, out, _ = innerloop(capsys, "eval", tmp_path / "run", "--max_new_tokens", 4)
    assert "trained up to stage 0 of 3 only" in out
    code, out, _ = innerloop(capsys, "eval", tmp_path / "run", "--max_new_tokens", 4, "--stage", 0)
    assert code == 0 and "trained up to" not in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--train.batch_size", "0"), "train.batch_size is 0, but must be a whole number, at least 1"),
        (("--train.max_steps", "2.7"), "must be a whole number"),
        (("--train.max_steps", "[1]"), "must be a whole number"),
        (("--train.max_steps", "["), "is not valid YAML"),
        (("--train.loss_norm", "micor"), "must be one of global, micro (did you mean 'micro'?)"),
        (("--train.per_device_train_batch_size", "4"), "called train.batch_size here"),
        (("--train.seed", "-1"), "innerloop: "),
        (("--backbone.scratch.hidden_size", "0"), "innerloop: "),
        (("--out", "[1]"), "must be a folder's name"),
        (("--backbone.freeze", "true"), "backbone.freeze needs weights worth keeping"),
        (("--train.max_length", "3"), "every training example is longer"),
    ],
)
def test_wrong_values_end_with_one_sentence_and_leave_no_folder(tmp_path: Path, capsys, override, message: str):
    refused(capsys, message, "train", written(tmp_path), *override)
    assert not (tmp_path / "run").exists()


def test_a_student_follows_the_teacher_of_the_stage_before(tmp_path: Path, capsys):
    student = {"name": "slr", "n_slots": 2, "max_loops": 2, "hid": {"weight": 1.0}, "teacher": "{out}/stages/1"}
    recipe = written(tmp_path, stages=[{"method": {"name": "cot"}}, {"method": student}])
    assert innerloop(capsys, "train", recipe, "--train.save_strategy", "no")[0] == 0  # a bare no is a strategy
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[0]["loss_hid"] > 0
    assert innerloop(capsys, "train", recipe, "--train.save_strategy", "no", "--resume")[0] == 0


def test_a_stage_may_freeze_what_the_one_before_trained(tmp_path: Path, capsys):
    method = {"name": "slr", "n_slots": 2, "max_loops": 2, "loop": {"lora": "shared"}}
    stages = [{"method": {"name": "cot"}}, {"method": method, "backbone": {"freeze": True}}]
    assert innerloop(capsys, "train", written(tmp_path, stages=stages))[0] == 0
    name = "model.layers.0.mlp.up_proj.weight"
    folders = [tmp_path / "run" / "stages" / "1" / "checkpoint", tmp_path / "run" / "checkpoint"]
    first, second = (load_file(folder / "model.safetensors")[name] for folder in folders)
    assert (first == second).all()


@pytest.mark.parametrize("config", ["out: x", "task: 5", "task: "])
def test_a_run_that_does_not_say_its_task_is_named(tmp_path: Path, capsys, config: str):
    tiny_model(Cot()).save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "config.yaml").write_text(config)
    unsaid = "does not say which task it is for: restore it, or give --task NAME"
    refused(capsys, unsaid, "eval", tmp_path, "--limit", 1)
    refused(capsys, "--task 5: write a task's name", "eval", tmp_path, "--task", "5")
    refused(capsys, "no task '5'", "eval", tmp_path, "--task", "{name: 5}", "--data", "x.jsonl")


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EMFILE"])
def test_what_the_machine_refuses_is_one_sentence_with_a_hint(code: str, capsys, monkeypatch):
    def fails(arguments):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "/data/a")

    monkeypatch.setattr("innerloop.cli.main._run", fails)
    hint = {"ENOSPC": "make room", "EROFS": "choose a folder", "EMFILE": "allow more open files"}[code]
    assert innerloop(capsys, "data", "list")[0] == 2
    refused(capsys, f"/data/a cannot be used ({os.strerror(getattr(errno, code))}): {hint}", "data", "list")

"""The command line from end to end on tiny models: what is printed, written and returned."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from innerloop.cli import main as cli
from innerloop.decoder.backbone import Backbone
from innerloop.lens import record as lens_record
from innerloop.lens.record import answer_alone
from innerloop.methods import METHODS, Cot, Looped, Lotus
from innerloop.tasks import Chain
from innerloop.text.examples import write_examples
from tests.models import chain_examples, tiny_model
from tests.test_typed import Summed

RECIPE = {
    "task": {"name": "chain", "n_ops": 2, "n_train": 64, "n_valid": 8, "n_test": 8},
    "backbone": {
        "scratch": {"type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 16, "max_position_embeddings": 64}
    },
    "train": {"max_steps": 2, "batch_size": 4, "use_cpu": True, "logging_steps": 1},
    "stages": [{"method": {"name": "cot"}}, {"method": {"name": "slr", "n_slots": 2, "max_loops": 2}}],
}  # fmt: skip


TASK = Chain(n_ops=2, n_train=64, n_valid=8, n_test=8)


def innerloop(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture, words: str, *arguments: object) -> None:
    """The command ends with a code and one sentence that has some words."""
    code, _, err = innerloop(capsys, *arguments)
    assert code != 0 and words in err and err.startswith("innerloop: "), err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


def written(folder: Path, **changes) -> Path:
    """Write the recipe, with changes, for a run beside it."""
    both = RECIPE | {"out": str(folder / "run")} | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump({name: v for name, v in both.items() if v is not None}))
    return folder / "recipe.yaml"


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "innerloop.json").read_text())["method"]


def data_of(folder: Path, *questions: str) -> list[object]:
    """Write questions; return the options that ask for them."""
    rows = [{"id": f"e{i}", "question": q, "steps": [], "answer": "1"} for i, q in enumerate(questions)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task", "gsm8k", "--data", folder / "data.jsonl", "--out"]


def plain_model(folder: Path) -> Path:
    """Write a model that innerloop knows nothing of."""
    model = tiny_model(Cot())
    model.backbone.lm.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, trained through the command line."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["train", str(written(folder))]) == 0
    return folder / "run"


def test_train_leaves_config_metrics_and_an_ordinary_checkpoint(run: Path):
    assert yaml.safe_load((run / "config.yaml").read_text())["stages"][1]["method"]["n_slots"] == 2
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")][:2] == [1, 2]
    names = {"config.json", "model.safetensors", "innerloop.json", "innerloop.safetensors"}
    assert names <= {p.name for p in (run / "checkpoint").iterdir()}
    assert settings_of(run / "checkpoint")["name"] == "slr"
    assert settings_of(run / "stages/1/checkpoint")["name"] == "cot"


def test_train_does_not_overwrite_a_run_and_resuming_a_finished_one_does_nothing(run: Path, capsys):
    recipe, files = run.parent / "recipe.yaml", (run / "config.yaml", run / "checkpoint" / "model.safetensors")
    before = [file.stat().st_mtime_ns for file in files]
    refused(capsys, "holds a run already; go on with --resume", "train", recipe)
    others = ["train", recipe, "--resume", "--method.n_slots", 3]
    refused(capsys, "begun with another recipe (stage 2: method)", *others)
    assert innerloop(capsys, "train", recipe, "--resume", "--train.max_steps", 2)[0] == 0
    assert [file.stat().st_mtime_ns for file in files] == before


def test_eval_writes_the_result_of_the_contract_and_the_same_twice(run: Path, tmp_path: Path, capsys):
    results = []
    for folder in ("a", "b"):
        code, out, _ = innerloop(capsys, "eval", run, "--out", tmp_path / folder, "--max_new_tokens", 8)
        assert code == 0 and "accuracy" in out
        results.append(json.loads((tmp_path / folder / "result.json").read_text()))
    first, second = results
    assert list(first) == ["task", "split", "n", "accuracy", "ci95", "unparsable", "cost", "method", "model", "saved",
                           "seed", "versions", "device", "asked"]  # fmt: skip
    assert first["asked"] == {"max_new_tokens": 8}  # answers that are not those of the run as it is say so
    assert list(first["cost"]) == ["passes", "positions", "flops", "thought_tokens", "loops", "written", "seconds"]
    assert list(first["cost"]["seconds"]) == ["prefill", "thought", "answer"]
    assert first["n"] == 8 and first["method"]["name"] == "slr" and first["seed"] == 0
    assert first["cost"]["loops"] == 2
    for result in results:
        result["cost"].pop("seconds")
    assert first == second
    predictions = lines_of(tmp_path / "a" / "predictions.jsonl")
    assert sum(p["correct"] for p in predictions) / 8 == first["accuracy"]
    assert [p["gold"] for p in predictions] == [e.answer for e in TASK.examples("test")]
    refused(capsys, "give --out DIR", "eval", run, "--method", "no_cot")  # another's result replaces none of the run's


def test_ask_shows_each_loop_the_steps_of_blocks_or_the_iterations_of_each_token(run: Path, tmp_path: Path, capsys):
    code, out, _ = innerloop(capsys, "ask", run, "3 ; + 4 ; * 2", "--max_new_tokens", 4)
    assert code == 0 and "passes" in out
    assert "what the latents held" in out and "change" in out and "latent 1" in out
    tiny_model(Lotus(n_blocks=2, latents_per_block=3)).save_pretrained(tmp_path / "lotus")
    out = innerloop(capsys, "ask", tmp_path / "lotus", "3 ; + 4", "--max_new_tokens", 2)[1]
    assert "block 1: " in out and "block 2: " in out and "block 3" not in out
    tiny_model(Looped(max_loops=3, stop={"rule": "delta", "threshold": 0.4})).save_pretrained(tmp_path / "looped")
    code, out, _ = innerloop(capsys, "ask", tmp_path / "looped", "3 ; + 4", "--max_new_tokens", 4)
    assert code == 0 and "iterations per token:" in out and "latents held" not in out
    counts = [int(n) for n in re.findall(r" x (\d+)", out)]
    words = out.split("\niterations")[0].splitlines()[-1].split()
    assert sum(counts) == len(words) > 5 and words[:4] == ["3", ";", "+", "4"] and "mean" in out


def test_lens_writes_one_page_into_the_run(run: Path, capsys):
    code, out, _ = innerloop(capsys, "lens", run, "--examples", 2)
    assert code == 0 and "lens.html: 2 examples" in out
    page = (run / "lens.html").read_text()
    examples = TASK.examples("test", 3)
    assert page.startswith("<!doctype html>") and '"loop 2"' in page
    assert [f'"id":"{example.id}"' in page for example in examples] == [True, True, False]
    other = run.parent / "other.html"
    assert innerloop(capsys, "lens", run, "--examples", 1, "--loops", 3, "--split", "valid", "--out", other)[0] == 0
    assert '"loop 3"' in other.read_text() and '"split":"valid"' in other.read_text()


def test_an_interrupted_lens_goes_on(run: Path, tmp_path: Path, capsys, monkeypatch):
    answered = []

    def interrupted(model, task, example, *settings):
        if len(answered) == 2:
            answered.clear()
            raise KeyboardInterrupt
        answered.append(example.id)
        return answer_alone(model, task, example, *settings)

    asked = ["lens", run, "--examples", 4, "--out"]
    assert innerloop(capsys, *asked, tmp_path / "whole.html")[0] == 0
    monkeypatch.setattr(lens_record, "answer_alone", interrupted)
    code, out, _ = innerloop(capsys, *asked, tmp_path / "page.html")
    assert code == 130 and f"2 parts are kept in {tmp_path / 'page.parts.json'}; the same command goes on" in out
    assert not (tmp_path / "page.html").exists()
    code, out, _ = innerloop(capsys, *asked, tmp_path / "page.html")
    assert code == 0 and "measured before: 2 examples" in out and len(answered) == 2
    pages = [re.sub(r'"seconds":{[^}]*}', "", (tmp_path / name).read_text()) for name in ("whole.html", "page.html")]
    assert pages[0] == pages[1] and not (tmp_path / "page.parts.json").exists()


def test_what_is_too_long_is_left_out_and_told(run: Path, tmp_path: Path, capsys):
    left, long = "left out, as they cannot be answered: ", "1 " * 999
    lens = ["lens", run, "--max_new_tokens", 2, *data_of(tmp_path, long, "1 ; + 1"), tmp_path / "lens.html"]
    code, out, _ = innerloop(capsys, *lens)
    assert code == 0 and left + "e0" in out and "lens.html: 1 examples" in out
    asked = data_of(tmp_path, long, "1 ; + 1", "1 ; + 2", long)
    calibrate = ["calibrate", run, "--rule", "delta"]
    code, out, _ = innerloop(capsys, *calibrate, *asked, tmp_path / "early")
    assert code == 0 and left + "e0, e3 (2 of 4)" in out
    assert json.loads((tmp_path / "early" / "calibration.json").read_text())["n"]["choose"] == 2
    bench = ["bench", run, "--repeats", 1, "--batch_sizes", "[1]", "--max_new_tokens", 2, "--questions"]
    code, out, _ = innerloop(capsys, *bench, 2, *asked, tmp_path / "b.json")
    assert code == 0 and left + "e0 (1 of 3)" in out
    assert json.loads((tmp_path / "b.json").read_text())["models"]["run"]["points"][0]["n"] == 2
    few = "a turn answers 3 questions, but of 4 only 2 can be answered by the run"
    refused(capsys, few, *bench, 3, *asked, tmp_path / "c.json")
    asked = data_of(tmp_path, "1 ; + 1", *[long] * 9)
    code, out, err = innerloop(capsys, *calibrate, *asked, tmp_path / "none")
    assert code == 2 and "at least 2 examples, but of 10 validation examples 1 can be answered" in err
    assert "e7, e8 and 1 more (9 of 10)" in out


def test_lens_goes_to_the_terminal_or_of_a_plain_model_here(run: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = innerloop(capsys, "lens", run, "--terminal", "true")
    assert code == 0 and "what the latents held" in out and "gold step 1:" in out and not list(tmp_path.iterdir())
    plain_model(tmp_path / "model")
    refused(capsys, "say how it shall reason: --method NAME", "lens", "model", "--task", "chain")
    arguments = ["--task", "chain", "--method", "cot", "--examples", 1, "--max_new_tokens", 3]
    assert innerloop(capsys, "lens", "model", *arguments)[0] == 0
    assert "no latents to look into" in (tmp_path / "lens.html").read_text()


def test_calibrate_chooses_a_threshold_and_says_what_it_costs(run: Path, tmp_path: Path, capsys):
    arguments = ["--rule", "delta", "--max-drop", 1.0, "--limit=6", "--check", 4]
    code, out, _ = innerloop(capsys, "calibrate", run, *arguments, "--out", tmp_path / "early")
    assert code == 0 and "validation: delta at" in out and "test: accuracy" in out
    report = json.loads((tmp_path / "early" / "calibration.json").read_text())
    assert report["n"] == {"fit": 0, "choose": 6, "check": 4} and report["chosen"]["mean_loops"] == 1.0
    stop = settings_of(tmp_path / "early")["stop"]
    assert (stop["rule"], stop["threshold"]) == ("delta", report["threshold"])
    assert settings_of(run / "checkpoint")["stop"]["rule"] == "none"
    model = plain_model(tmp_path / "plain")
    for options in (["--adopt", "true"], ["--method", "adainfer", "--rule", "gap"]):
        refused(capsys, "by --out DIR", "calibrate", model, "--task", "chain", *options)
        assert not (model / "calibration.json").exists()


def test_verbs_that_answer_take_a_type_of_weights_and_a_device(run: Path, tmp_path: Path, capsys):
    half = ["--dtype", "bf16", "--device", "cpu"]
    assert innerloop(capsys, "eval", run, "--limit", 2, "--out", tmp_path, *half)[0] == 0
    assert json.loads((tmp_path / "result.json").read_text())["asked"] == {"dtype": "bfloat16"}
    assert innerloop(capsys, "ask", run, "3 ; + 4", "--max_new_tokens", 2, *half)[0] == 0
    assert innerloop(capsys, "lens", run, "--terminal", "true", *half)[0] == 0
    found = innerloop(capsys, "calibrate", run, "--rule", "delta", "--limit", 2, "--out", tmp_path / "early", *half)
    assert found[0] == 0 and load_file(tmp_path / "early" / "model.safetensors").popitem()[1].dtype == torch.bfloat16
    for verb in (["eval", run], ["ask", run, "3"], ["lens", run, "--out", tmp_path / "l.html"], ["calibrate", run]):
        refused(capsys, "there are the CPU and", *verb, "--device", "cuda:99")
        refused(capsys, "int4", *verb, "--dtype", "int4")


def test_short_passes_are_compiled_where_it_is_asked_for(run: Path, tmp_path: Path, capsys, monkeypatch):
    asked: list[Backbone] = []
    monkeypatch.setattr(Backbone, "compile_passes", lambda self: asked.append(self))
    plain = ["eval", run, "--limit", 2, "--out", tmp_path]
    bench = ["bench", run, "--out", tmp_path / "b.json", "--repeats", 1, "--questions", 1, "--batch_sizes", "[1]"]
    for words, n in ((plain, 0), ([*plain, "--compile", "true"], 1), ([*bench, "--compile", "true"], 2)):
        assert innerloop(capsys, *words)[0] == 0 and len(asked) == n


def helped(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        innerloop(capsys, *arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_of_a_recipe_shows_the_methods_fields_and_a_line_for_each_group(run: Path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "summed", Summed)
    recipe = run.parent / "recipe.yaml"
    summed = ["train", recipe, "--stages.2.method=summed", "--help"]
    out = helped(capsys, *summed)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "--method.n_blocks" in lines[1] and "--method.loop.FIELD residual, alpha, layers, inject" in lines
    assert any(line.startswith("--task.FIELD n_ops, min_ops") for line in lines) and "--method.loop.residual" not in out
    assert "--method.loop.residual" in helped(capsys, *summed, "method.loop")
    assert "--task.n_ops" in helped(capsys, "train", recipe, "--help", "task")
    assert "parts_learning_rate" in helped(capsys, "train", recipe, "--help", "train")
    assert "--n_ops" in helped(capsys, "data", "make", "chain", "--help")
    for path, message in (("metod", "did you mean 'method'?"), ("method.lop", "'Slr' has no group 'lop'")):
        refused(capsys, message, "train", recipe, "--help", path)


def test_your_own_examples_are_a_task_and_other_data_are_read_for_another(run: Path, tmp_path: Path, capsys):
    data = tmp_path / "train.jsonl"
    write_examples(chain_examples(8, 3), data)
    assert innerloop(capsys, "train", written(tmp_path, task={"name": "plain", "train": str(data)}))[0] == 0
    assert innerloop(capsys, "eval", tmp_path / "run", "--data", data, "--max_new_tokens", 2)[0] == 0
    assert innerloop(capsys, "eval", run, "--task", "gsm8k", "--data", data, "--out", tmp_path, "--limit", 2)[0] == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["n"] == 2 and result["task"]["name"] == "gsm8k"
    assert set(result["accuracy_by_match"]) == {"number", "string"}


@pytest.mark.parametrize("written", [["--stability", "RUN"], ["RUN", "--stability"], ["RUN", "--stability", "yes"]])
def test_what_is_yes_or_no_needs_no_value(run: Path, tmp_path: Path, capsys, written: list[str]):
    arguments = ["--out", tmp_path, "--limit", 2, *[run if w == "RUN" else w for w in written]]
    assert innerloop(capsys, "eval", *arguments)[0] == 0 and (tmp_path / "stability.json").exists()
    assert innerloop(capsys, "eval", run, "--out", tmp_path / "no", "--limit", 2, "--stability", "false")[0] == 0
    assert not (tmp_path / "no" / "stability.json").exists()


def test_a_folder_that_cannot_be_made_is_named(run: Path, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path / "file" / "inside"):
        for verb in ("eval", "calibrate"):
            refused(capsys, "give another folder by --out DIR", verb, run, "--limit", 2, "--out", taken)
        refused(capsys, "name another file by --out FILE", "bench", run, "--out", taken / "bench.json")
        refused(capsys, "choose another folder", "data", "make", "chain", "--out", taken, "--n_train", 2)
        refused(capsys, "is a file: choose another", "train", run.parent / "recipe.yaml", "--out", taken)
    assert (tmp_path / "file").read_text() == ""


def test_eval_draws_several_answers_or_searches_and_says_so(run: Path, tmp_path: Path, capsys):
    few = ["--out", tmp_path, "--max-new-tokens", 3, "--limit", 3]
    asked = {"max_new_tokens": 3, "samples": 4, "pick": "vote", "temperature": 1.5, "seed": 5}
    code, out, _ = innerloop(capsys, "eval", run, *few, "--samples", 4, "--temperature", 1.5, "--seed", 5)
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0 and "slr, vote of 4 at temperature 1.5 on chain/test" in out and result["asked"] == asked
    drawn = [p["samples"] for p in lines_of(tmp_path / "predictions.jsonl")]
    assert [len(samples) for samples in drawn] == [4, 4, 4] and result["cost"]["loops"] == 2
    assert result["diversity"] == pytest.approx(sum(len(set(samples)) - 1 for samples in drawn) / 9)
    assert f"; diversity of its samples {result['diversity']:.0%}" in out
    assert 0 < result["cost"]["written"] <= 4 * 3
    assert innerloop(capsys, "eval", run, *few, "--beams", 3)[0] == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["asked"] == {"max_new_tokens": 3, "beams": 3} and result["cost"]["loops"] == 2
    for wrong, words in (
        (["--samples", 2, "--temperature", 0], "are all the same"),
        (["--samples", 2, "--pick", "likelihood", "--controls", "true"], "are of one answer"),
        (["--samples", 2, "--backend", "lm-eval", "--tasks", "x"], "say how they are answered"),
    ):
        refused(capsys, words, "eval", run, *few, *wrong)


def test_eval_and_ask_begin_at_several_states(run: Path, tmp_path: Path, capsys):
    few = ["--out", tmp_path, "--max-new-tokens", 3, "--limit", 3, "--starts", 3]
    code, out, _ = innerloop(capsys, "eval", run, *few, "--pick", "convergence", "--seed", 5)
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0 and "slr, calmest of 3 starts on chain/test" in out and result["cost"]["loops"] == 6
    assert result["asked"] == {"max_new_tokens": 3, "starts": 3, "pick": "convergence", "seed": 5}
    code, out, _ = innerloop(capsys, "ask", run, "3 ; + 1", "--starts", 3, "--max_new_tokens", 3)
    assert code == 0 and "the method's own" in out and "random 2" in out and "the calmest is shown below" in out
    refused(capsys, "leave starts out", "ask", run / "stages" / "1", "3 ; + 1", "--starts", 2)


def test_eval_runs_another_number_of_loops_where_there_are_loops(run: Path, tmp_path: Path, capsys):
    few, found = ["--out", tmp_path, "--max_new_tokens", 1], []
    for loops in (0, 5):
        assert innerloop(capsys, "eval", run, "--loops", loops, *few)[0] == 0
        cost = json.loads((tmp_path / "result.json").read_text())["cost"]
        found.append((cost["passes"], cost["loops"]))
    assert found == [(1, 0), (7, 5)]
    stage = run / "stages" / "1"
    refused(capsys, "'cot' has no max_loops", "eval", stage, "--task", "chain", "--loops", 3, "--out", tmp_path)

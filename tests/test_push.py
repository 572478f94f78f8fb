"""Sharing on the Hub, against a stand-in of it: whole or not at all, interrupted and resumed, and loaded again."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants

import innerloop as il
from innerloop.cli.main import main
from innerloop.errors import InputError
from innerloop.model import run_folder
from innerloop.model.card import card
from innerloop.model.doctor import examine
from innerloop.model.shared_files import without_machine
from innerloop.train.recipe import load_recipe
from tests.fields import change
from tests.hub import standing_in
from tests.models import moved, saved, tiny_model
from tests.test_checkpoint import contents

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in huggingface_hub itself
REPO = "me/codi-chain"
QUESTION = "3 ; + 1 ; * 2"
BESIDE = ("README.md", "config.yaml", "result.json")  # of what is shared, what is not of the checkpoint


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the Hub."""
    with standing_in(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def run(tmp_path):
    """A run as training and `innerloop eval --controls true` leave it."""
    folder = tmp_path / "run"
    saved(moved(tiny_model(il.Codi(n_latents_total=2))), folder / "checkpoint")
    task = {"name": "gsm8k", "train": "owner/words:main:train", "test": str(tmp_path / "secret.jsonl")}
    recipe = {"task": task, "backbone": {"model": "owner/base"}, "method": {"name": "codi"}, "out": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    result = {"task": task, "split": "test", "n": 200, "accuracy": 0.425, "ci95": [0.3586, 0.4943], "seed": 3}
    result |= {"cost": {"passes": 7.5, "positions": 40.0}, "versions": {"torch": "2.13.0"}, "device": "cpu"}
    effect = {"title": "shuffled", "accuracy": 0.1, "difference": -0.325}
    found = {"controls": [effect], "verdict": {"kind": "carried", "sentence": "The answers come from the latents."}}
    result |= {"saved": run_folder.identity(folder), "model": str(folder), "controls": found}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_run_is_shared_whole_and_loaded_again_by_its_name(hub, run, capsys):
    assert main(["push", str(run), REPO]) == 0
    assert f"{hub.url}/{REPO}: shared" in capsys.readouterr().out
    shared = {name: data for name, data in hub.repos[REPO].items() if name not in BESIDE}
    assert shared == contents(run / "checkpoint")
    assert hub.commits[REPO] == 1
    model, again = il.LatentModel.from_pretrained(run), il.LatentModel.from_pretrained(REPO)
    assert again.method == model.method
    assert examine(run_folder.resolve(REPO)).problems == []
    assert again.generate([QUESTION])[0].ids == model.generate([QUESTION])[0].ids


def test_the_card_says_what_a_reader_needs(run, tmp_path):
    text = card(run, REPO)
    front = yaml.safe_load(text.split("---")[1])
    assert front["tags"] == ["innerloop", "latent-reasoning", "reasoning", "codi", "custom_generate"]
    assert (front["base_model"], front["datasets"]) == ("owner/base", ["owner/words"])
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 42.5}]
    for words in (
        "# codi-chain",
        "https://arxiv.org/abs/2502.21074",
        f'il.LatentModel.from_pretrained("{REPO}")',
        f'custom_generate="{REPO}", trust_remote_code=True',
        "**42.5%** (95 % interval 35.9% to 49.4%) of 200 test questions of `gsm8k`, seed 3.",
        "| passes of the decoder | 7.5 |",
        "The answers come from the latents.",
        "| shuffled | 10.0% | -32.5 |",
        "n_latents_total: 2",
        "test: secret.jsonl",
    ):
        assert words in text
    assert str(tmp_path) not in text


def test_the_recipe_that_is_shared_says_what_was_trained(hub, run):
    main(["push", str(run), REPO])
    (run / "shared.yaml").write_bytes(hub.repos[REPO]["config.yaml"])
    own, shared = load_recipe(run / "config.yaml"), load_recipe(run / "shared.yaml")
    assert shared == replace(own, out="run", task=replace(own.task, test="secret.jsonl"))


@pytest.mark.slow  # two runs of a recipe
def test_a_shared_model_is_trained_again_by_its_recipe(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scratch = {"type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    recipe = {
        "task": {"name": "chain", "n_ops": 2, "n_train": 8},
        "backbone": {"scratch": scratch | {"num_attention_heads": 2}},
        "method": {"name": "codi", "n_latents_total": 1},
        "train": {"max_steps": 1, "batch_size": 2, "use_cpu": True},
        "out": str(tmp_path / "first"),
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 0
    assert main(["push", "first", REPO]) == 0
    shared = il.LatentModel.from_pretrained(REPO)
    assert "innerloop train config.yaml" in hub.repos[REPO]["README.md"].decode()
    Path("config.yaml").write_bytes(hub.repos[REPO]["config.yaml"])
    assert main(["train", "config.yaml", "--out", "again"]) == 0
    again = il.LatentModel.from_pretrained("again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in shared.state_dict().items())
    assert (
        "again" in examine("again").facts["recipe"]
        and "config.yaml" in examine(run_folder.resolve(REPO)).facts["recipe"]
    )


def test_nothing_of_the_machine_is_shared(hub, run, tmp_path):
    method = il.SpiralThinker(hid={"weight": 1.0, "teacher": str(tmp_path / "teacher")})
    saved(moved(tiny_model(method)), run / "checkpoint")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["train"] = {"run_name": "of mine", "hub_token": "hf_secret", "teacher_cache": "~me/cache", "max_steps": 3}
    recipe["stages"] = [{"train": {"teacher_cache": f"--file={Path.home()}/x/cache"}}]
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    main(["push", str(run), REPO])
    files = {name: data for name, data in hub.repos[REPO].items() if not name.endswith(".safetensors")}
    for secret in (tmp_path, Path.home(), "hf_secret", "of mine", "~me"):
        assert [name for name, data in files.items() if str(secret).encode() in data] == []
    found = yaml.safe_load(files["config.yaml"])
    assert found["train"] == {"teacher_cache": "cache", "max_steps": 3} and found["out"] == "run"
    assert found["stages"] == [{"train": {"teacher_cache": "--file=cache"}}]
    told = next(line for line in files["config.yaml"].decode().splitlines() if "names alone" in line)
    assert all(name in told for name in ("task.test", " train.teacher_cache", "stages.1.train.teacher_cache"))
    assert il.LatentModel.from_pretrained(REPO).method.hid.teacher == "teacher"
    assert examine(run_folder.resolve(REPO)).problems == []


def test_what_needs_a_model_of_this_machine_is_shared_without_it(hub, run, tmp_path, capsys):
    source = saved(tiny_model(il.NoCot()), tmp_path / "source")
    told = il.SimCot(latents_per_step=1, aux={"source": str(source), "embed": "own"})
    saved(tiny_model(told), run / "checkpoint")
    assert main(["push", str(run), REPO]) == 2
    assert "which is on this machine: load it with aux.weight=0 and share that" in capsys.readouterr().err
    untold = change(told, aux={"weight": 0.0, "source": None})
    il.LatentModel.from_pretrained(run, untold).push_to_hub(REPO)
    assert il.LatentModel.from_pretrained(REPO).method == untold


@pytest.mark.parametrize("at", [".", "teacher"], ids=["nothing to cut", "a path of the machine"])
def test_what_was_downloaded_is_shared_again_with_its_recipe_and_results(hub, run, tmp_path, at):
    if at != ".":  # innerloop.json is another one where it is shared
        method = il.SpiralThinker(hid={"weight": 1.0, "teacher": str(tmp_path / at)})
        saved(moved(tiny_model(method)), run / "checkpoint")
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"saved": run_folder.identity(run)}))
    main(["push", str(run), REPO])
    assert main(["push", REPO, "you/codi-chain"]) == 0
    first, again = hub.repos[REPO], hub.repos["you/codi-chain"]
    assert again["README.md"].decode() == first["README.md"].decode().replace(REPO, "you/codi-chain")
    for words in (b"**42.5%**", b"| shuffled | 10.0% | -32.5 |"):
        assert words in again["README.md"]
    assert {name: data for name, data in first.items() if name != "README.md"} == {
        name: data for name, data in again.items() if name != "README.md"
    }


@pytest.mark.parametrize(
    "text",
    ["/", "owner/name", "runs/a", "{out}/stages/1", "https://host/a/b", "a / b", "\\n", "/ ", "m:cfg:train", "~"],
)
def test_what_is_no_path_of_the_machine_stays(text):
    assert without_machine({"a": [text]}) == {"a": [text]}


@pytest.mark.parametrize(
    "path", ["/data/x.jsonl", "../x.jsonl", "~/x.jsonl", "C:\\me\\x.jsonl", "file:///d/x.jsonl", "/x.jsonl"]
)
def test_paths_of_the_machine_are_cut_to_names(path):
    assert without_machine(path) == "x.jsonl"


def test_controls_of_an_earlier_measurement_are_not_told(run):
    result = json.loads((run / "result.json").read_text())
    (run / "controls.json").write_text(json.dumps(result.pop("controls")))
    (run / "result.json").write_text(json.dumps(result))
    text = card(run, REPO)
    assert "42.5%" in text and "has not been measured" in text and "| shuffled" not in text


def test_the_card_of_a_model_of_running_text_tells_its_perplexity(run):
    result = json.loads((run / "result.json").read_text())
    for name in ("accuracy", "cost", "controls"):
        del result[name]
    result |= {"nll": 2.0, "ci95": [1.9, 2.1], "perplexity": 7.389}
    (run / "result.json").write_text(json.dumps(result))
    text = card(run, REPO)
    assert "**7.389** (95 % interval 6.686 to 8.166) of 200 test chunks of `gsm8k`" in text
    (told,) = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert told == {"type": "perplexity", "value": 7.389}


@pytest.mark.parametrize("verb", [("eval",), ("calibrate", "--rule", "kl")], ids=lambda one: one[0])
def test_results_of_a_model_on_the_hub_need_a_folder(hub, run, tmp_path, monkeypatch, verb, capsys):
    monkeypatch.chdir(tmp_path)
    main(["push", str(run), REPO])
    assert main([verb[0], REPO, "--task", "{name: chain, n_ops: 5}", *verb[1:]]) == 2
    assert "is a name on the Hub, where results cannot be kept: give a folder by --out DIR" in capsys.readouterr().err
    assert not Path(REPO).exists()


def test_what_was_measured_of_other_weights_is_not_told(run):
    saved(moved(tiny_model(il.Codi(n_latents_total=2)), 1), run / "checkpoint")
    assert "Not measured yet" in card(run, REPO) and "42.5%" not in card(run, REPO)


def test_the_python_of_a_card_runs_as_printed(hub, run, capsys):
    main(["push", str(run), REPO])
    own, plain = re.findall(r"```python\n(.*?)```", hub.repos[REPO]["README.md"].decode(), re.DOTALL)
    said = []
    for code in (own, plain):
        capsys.readouterr()
        exec(code, {"question": QUESTION})
        said.append(capsys.readouterr().out.strip())
    assert said[0] == said[1] != ""


def test_an_upload_that_is_interrupted_leaves_nothing_and_goes_on(hub, run, capsys):
    hub.refuses = lambda kind: 400 if kind == "large" and hub.asked["large"] > 1 else None
    assert main(["push", str(run), REPO]) == 2
    assert "run the same again, and it goes on with what is missing" in capsys.readouterr().err
    assert hub.repos[REPO] == {} and len(hub.objects) >= 1
    kept, hub.refuses = len(hub.objects), lambda kind: None
    hub.asked.clear()
    assert main(["push", str(run), REPO]) == 0
    assert hub.asked["large"] == 3 - kept
    assert "model.safetensors" in hub.repos[REPO]


def test_a_model_is_shared_from_python_too(hub, run):
    model = il.LatentModel.from_pretrained(run)
    assert model.push_to_hub(REPO, run=run) == f"{hub.url}/{REPO}"
    assert "**42.5%**" in hub.repos[REPO]["README.md"].decode()
    with pytest.raises(InputError, match="whose weights are not this model's: leave run out"):
        moved(model).push_to_hub(REPO, run=run)
    model.push_to_hub(REPO)
    assert "Not measured yet" in hub.repos[REPO]["README.md"].decode()


def test_a_strangers_class_is_not_imported_because_a_run_on_the_hub_names_it(hub, run, tmp_path, monkeypatch):
    (tmp_path / "their_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    il.LatentModel.from_pretrained(run).push_to_hub("they/wrote")
    shared = hub.repos["they/wrote"]
    settings = json.loads(shared["innerloop.json"])
    settings["method"]["name"] = "their_module.Codi"
    shared["innerloop.json"] = json.dumps(settings).encode()
    with pytest.raises(InputError, match=r"a class of its author's own, their_module.Codi: have it on PYTHONPATH"):
        il.LatentModel.from_pretrained("they/wrote")
    with pytest.raises(SystemExit, match="imported"):
        il.LatentModel.from_pretrained("they/wrote", trust_remote_code=True)
    with pytest.raises(SystemExit, match="imported"):  # what lies on this machine is one's own
        il.LatentModel.from_pretrained(run_folder.resolve("they/wrote"))


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, r"does not let you write to me/codi-chain \(401\): log in with hf auth login"), (400, "the Hub refused")],
)
def test_what_the_hub_refuses_is_one_sentence(hub, run, status, message):
    hub.refuses = lambda kind: status if kind == "create" else None
    with pytest.raises(InputError, match=message) as caught:
        il.LatentModel.from_pretrained(run).push_to_hub(REPO)
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_not_there_is_one_sentence(run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"me/codi-chain could not be uploaded .* goes on with what is missing"):
        il.LatentModel.from_pretrained(run).push_to_hub(REPO)


@pytest.mark.parametrize("repo", ["a/b/c", "", "me/ codi", "/me", "me/" + "x" * 100])
def test_a_name_that_is_none_is_refused_before_anything_is_done(repo, capsys):
    assert main(["push", "no/such/run", repo]) == 2
    assert "is no name on the Hub: write OWNER/NAME" in capsys.readouterr().err


def test_what_is_not_whole_is_not_shared(run, capsys):
    (run / "checkpoint/innerloop.safetensors").unlink()
    assert main(["push", str(run), REPO]) == 2
    assert "innerloop.safetensors is missing), so it is not shared" in capsys.readouterr().err

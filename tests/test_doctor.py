"""What a folder is, whether it is whole and what can use it; of nothing in it code is run."""

import json
import pickle
import re
from pathlib import Path

import pytest

import innerloop as il
from innerloop.cli.main import main
from innerloop.errors import InputError
from innerloop.model.doctor import examine
from tests.formats.released import RELEASED
from tests.models import saved, tiny_lm, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tiny_model(il.Codi(n_latents_total=2)), tmp_path_factory.mktemp("run") / "checkpoint").parent


@pytest.fixture
def copy(run, tmp_path):
    import shutil

    return Path(shutil.copytree(run / "checkpoint", tmp_path / "copy"))


class Trap:
    def __reduce__(self):
        return Path.write_text, (Path("trapped"), "x")


def test_a_run(run, capsys):
    assert main(["doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run / 'checkpoint'}: a run: the method codi\n") and out.endswith("it is whole\n")
    assert "paper: arXiv 2502.21074" in out and "architecture: llama" in out
    assert re.search(r"weights: [\d,]+ numbers as F32", out) and re.search(r"of the method: [\d,]+ numbers as F32", out)
    assert (
        "transformers, with the thought" in out
        and "open Hugging Face folders: without the thought, and without a word of it\n" in out
    )


@pytest.mark.parametrize(
    ("method", "tool"),
    [(il.Cot(), "it writes its steps as text"), (il.Looped(), "it repeats or skips its layers")],
    ids=["cot", "looped"],
)
def test_what_can_use_a_folder_depends_on_its_method(method, tool, tmp_path):
    assert any(tool in line for line in examine(saved(tiny_model(method), tmp_path / "run")).tools)


def test_a_plain_model_and_released_weights(tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    assert examine(tmp_path).kind == "a Hugging Face model"
    assert examine(tmp_path).problems == ["it has no tokenizer (tokenizer.json, tokenizer.model, ..)"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ouro", "auto_map": {"AutoConfig": "x.Y"}}))
    assert "code of its own" in examine(tmp_path).facts["code"]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]), "copy it again"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors is no whole safetensors"),
        (lambda f: (f / "innerloop.safetensors").unlink(), "innerloop.safetensors is missing"),
        (lambda f: (f / "tokenizer.json").unlink(), "it has no tokenizer"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda f: (f / "custom_generate/generate.py").write_text("print()"),
            "custom_generate/generate.py has 7 bytes",
        ),
        (lambda f: (f / "innerloop.json").write_text("{}"), "innerloop.json names no method"),
        (
            lambda f: (f / "innerloop.json").write_text(json.dumps({"method": {"name": "no_such.Method"}})),
            "method 'no_such.Method': cannot import no_such",
        ),
    ],
)
def test_what_is_broken_is_named(broken, problem, copy):
    broken(copy)
    assert any(problem in one for one in examine(copy).problems)


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_of_every_layout_are_whole(name, tmp_path, capsys):
    RELEASED[name](tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    assert ": released weights: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIM_COT-GPT2-CODI", "SIM_COT-GPT2-Coconut"])
def test_what_a_release_lacks_and_its_base_has_is_no_fault(name, tmp_path):
    RELEASED[name](tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    found = examine(tmp_path)
    assert found.problems == [] and "that of the base" in found.facts["tokenizer"]
    assert "says nothing" in found.facts["config.json"]
    assert ("checkpoint_28" in found.facts.get("pickles", "")) == (name == "SIM_COT-GPT2-Coconut")


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("TaH-plus-1.7B", "iter_decider.bin"),
        ("TaH-plus-1.7B", "lora/adapter_model.safetensors"),
        ("gsm-lotus-llama3b", "model-00002-of-00002.safetensors"),
        ("LLaDA-8B", "tokenizer.json"),
        ("LLaDA-8B", "model.safetensors"),
    ],
)
@pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
def test_a_file_of_a_release_that_is_missing_is_named_by_doctor_and_on_loading(name, gone, tmp_path):
    RELEASED[name](tmp_path)
    (tmp_path / gone).unlink()
    named = "no weights" if gone == "model.safetensors" else gone
    assert any(named in one for one in examine(tmp_path).problems)
    with pytest.raises(InputError, match=re.escape(gone)) as caught:
        il.LatentModel.from_pretrained(tmp_path, device="cpu")
    assert "pickle" not in str(caught.value)


@pytest.mark.parametrize(("text", "told"), [("{", "is not valid JSON"), ("{}", "holds no settings")])
def test_a_configuration_that_says_nothing_is_named(text, told, tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert f"config.json {told}" in examine(tmp_path).problems


def test_a_missing_shard_of_pickles_is_named(tmp_path):
    tiny_lm().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    assert any("pytorch_model-1.bin is missing" in one for one in examine(tmp_path).problems)


def test_a_missing_shard_is_named(tmp_path):
    tiny_lm().save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    assert "model-00002-of-" in examine(tmp_path).problems[1]


def test_the_exit_code_tells_a_script(copy, capsys):
    (copy / "innerloop.safetensors").unlink()
    assert main(["doctor", str(copy)]) == 2
    assert "is not whole: innerloop.safetensors is missing" in capsys.readouterr().err


def test_pickles_are_named_and_not_opened(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "pytorch_model.bin: not opened" in examine(copy).facts["pickles"]
    assert not (tmp_path / "trapped").exists()


def test_what_is_no_model(tmp_path):
    assert examine(tmp_path).problems == ["it has neither config.json nor innerloop.json"]
    (tmp_path / "config.yaml").write_text("")
    assert "--resume true" in examine(tmp_path).problems[0]
    with pytest.raises(InputError, match="there is no folder"):
        examine(tmp_path / "none")

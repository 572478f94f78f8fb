"""Models of the Hub: settings say what they are before weights are fetched, and code never is; README's lines run."""

import fnmatch
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from innerloop import InputError, LatentModel
from innerloop.cli.eval import eval_
from innerloop.cli.verb import Verb
from innerloop.formats.recognise import FORMATS, released
from innerloop.model import run_folder
from tests.formats import authors, authors_latent
from tests.formats.released import RELEASED, read, write

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
listed = importlib.import_module("released")
pytestmark = [
    pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote"),
    pytest.mark.usefixtures("short_canvases"),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of one model, NAME; what is fetched of it is listed."""
    fetched: list[str] = []

    def snapshot_download(name, allow_patterns, **options):
        assert options.keys() <= {"revision", "token", "cache_dir", "local_files_only"}
        if name != "someone/NAME":
            raise OSError("no such model")
        for path in sorted((tmp_path / "hub").rglob("*")):
            own = str(path.relative_to(tmp_path / "hub"))
            if path.is_file() and any(fnmatch.fnmatch(own, pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / own).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "cache" / own)
                fetched.append(own)
        return str(tmp_path / "cache")

    def list_repo_files(name, revision=None, token=None):
        return [str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*")]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    return tmp_path / "hub", fetched


@pytest.mark.parametrize("name", RELEASED)
def test_a_model_of_the_hub_is_opened_and_its_code_is_not_fetched(name, hub):
    RELEASED[name](hub[0])
    (hub[0] / "modeling_own.py").write_text("raise SystemExit")
    model = LatentModel.from_pretrained("someone/NAME", device="cpu", revision="main")
    assert model.generate(["?"], max_new_tokens=1)
    assert not any(one.endswith(".py") for one in hub[1])


def test_of_another_model_nothing_but_settings_is_fetched(hub):
    authors.llada(hub[0])
    authors.write_json(hub[0], "config.json", model_type="llama", hidden_size=8)
    assert released("someone/NAME") is None
    assert not any(one.endswith(".safetensors") for one in hub[1])


def test_what_cannot_be_fetched_is_told_as_of_any_model(hub):
    with pytest.raises(InputError, match=r"give a method|cannot load"):
        LatentModel.from_pretrained("someone/else", device="cpu", local_files_only=True)


def test_the_name_of_a_release_tells_what_its_settings_do_not(hub, monkeypatch):
    authors.a2d(hub[0])
    known, source = released("someone/NAME")
    source.name = "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"
    assert known.open(source).method.name == "block_diffusion"


def test_where_its_own_code_may_run_nothing_is_recognised(tmp_path):
    authors.llada(tmp_path / "model")
    with pytest.raises(InputError, match="give a method"):
        LatentModel.from_pretrained(tmp_path / "model", trust_remote_code=True, device="cpu")


def test_every_format_is_found_by_the_layouts_of_these_tests(tmp_path):
    found = set()
    for name, make in RELEASED.items():
        make(tmp_path / name)
        known, _ = released(tmp_path / name)
        found.add(known.name)
    assert found == {known.name for known in FORMATS}


def test_a_run_of_ours_is_none_of_them(tmp_path):
    authors_latent.latent_tts(tmp_path / "theirs")
    LatentModel.from_pretrained(tmp_path / "theirs", device="cpu").save_pretrained(tmp_path / "ours")
    assert released(tmp_path / "ours") is None
    assert run_folder.is_run(tmp_path / "ours")


def test_what_the_readme_says_of_released_models_runs_as_printed(tmp_path, monkeypatch, capsys):
    authors_latent.codi(tmp_path / "CODI-gpt2")
    opened = LatentModel.from_pretrained.__func__
    of = {"zen-E/CODI-gpt2": tmp_path / "CODI-gpt2"}
    monkeypatch.setattr(LatentModel, "from_pretrained", classmethod(lambda cls, name: opened(cls, of[name])))
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().partition("## Open released models")[2]
    (code,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert len(code.strip().splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("codi ")
    assert run_folder.is_run(tmp_path / "models/codi")


def test_each_checkpoint_of_the_list_has_a_command_that_eval_takes():
    names = [one.name for one in listed.RELEASED]
    assert len(set(names)) == len(names)
    for one in listed.RELEASED:
        given, places, overrides = Verb("eval", eval_).split(one.command(Path("runs"))[2:])
        assert (places, overrides, {"out"} <= given.keys()) == ([one.name], [], True)


def test_the_list_is_printed_without_downloading_anything():
    found = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/released.py")], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0
    assert len(found.stdout.splitlines()) == 2 * len(listed.RELEASED)


@pytest.mark.parametrize(("asked", "found"), [("auto", torch.bfloat16), ("fp32", torch.float32)])
def test_weights_keep_their_type_or_get_another(asked, found, tmp_path):
    authors_latent.latent_tts_codi(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    write(path, {name: one.bfloat16() for name, one in read(path).items()})
    model = LatentModel.from_pretrained(tmp_path / "model", dtype=asked, attn_implementation="eager", device="cpu")
    assert {one.dtype for one in model.backbone.parameters()} == {found}
    assert model.loop.rescale.inner.weight.dtype == torch.float32
    assert model.backbone.config._attn_implementation == "eager"

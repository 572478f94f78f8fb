"""Models that come with code of their own, in files or in pickles: it runs where it is let, and fails in a sentence."""

import json

import pytest
import torch
import transformers.dynamic_module_utils as dynamic

from innerloop import Codi, Cot, InputError, LatentModel
from tests.formats.test_refused import Malicious, pickled
from tests.models import chain_tokenizer, saved, tiny_lm, tiny_model

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""
MADE = "    def __init__(self, config):\n        super().__init__(config)\n        self.config.of_no_name.x\n"
RUN = "    def forward(self, *args, **options):\n        return {}['a key']\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a model whose code is in modeling_own.py."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, tokenizer = tmp_path / "model", chain_tokenizer()
    tiny_lm(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    return folder


def load(folder, code, **options):
    (folder / "modeling_own.py").write_text(code)
    return LatentModel.from_pretrained(folder, method=Cot(), **options)


def test_a_model_with_code_of_its_own_runs_where_it_is_let(folder):
    assert load(folder, CODE, trust_remote_code=True).generate(["3 ; + 1"])


def test_code_runs_only_where_it_is_let(folder):
    with pytest.raises(
        InputError, match=r"code of its own; read that, and let it run with trust_remote_code"
    ) as caught:
        load(folder, CODE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import nowhere_to_be_found\n" + CODE, "ImportError: .*nowhere_to_be_found"),
        ("raise RuntimeError('first\\nsecond')\n" + CODE, "RuntimeError: first second"),
        (CODE + MADE, "AttributeError: .*of_no_name"),
        (CODE + RUN, "fails with KeyError"),
    ],
    ids=["lacks a package", "fails as it is read", "fails as the model is made", "fails as it runs"],
)
def test_what_fails_in_that_code_is_one_sentence_that_names_the_option(folder, code, told):
    with pytest.raises(InputError, match=told) as caught:
        load(folder, code, trust_remote_code=True)
    assert "trust_remote_code" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pickle", "zip", "cut short"])
@pytest.mark.parametrize("own", [False, True], ids=["a plain model", "a run of ours"])
def test_a_pickle_that_holds_more_than_tensors_is_refused_and_runs_nothing(own, kind, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "was-run"
    if own:
        saved(tiny_model(Codi(n_latents_total=2)), folder)
    else:
        chain_tokenizer().save_pretrained(folder)
        tiny_lm(vocab_size=len(chain_tokenizer())).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    path, content = folder / "pytorch_model.bin", {"x": torch.ones(9), "of.no.use": Malicious(trace)}
    pickled(content, path, kind)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle .* nothing in it was run") as caught:
        LatentModel.from_pretrained(folder, method=Cot())
    assert "\n" not in str(caught.value) and not trace.exists()

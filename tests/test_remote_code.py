"""Models that come with code of their own: they are tried as all are, and what fails in that code is one sentence."""

import json

import pytest
import transformers.dynamic_module_utils as dynamic

from innerloop import Cot, InputError, LatentModel
from tests.models import chain_tokenizer, tiny_lm

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

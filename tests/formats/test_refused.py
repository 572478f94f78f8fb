"""What no format opens: weights that are not whole, and files that would do more than hold tensors."""

import json
import pickle

import pytest
import torch

from innerloop import InputError, LatentModel
from innerloop.formats.recognise import released
from tests.formats import authors
from tests.formats.released import RELEASED, read, weight_files, write

pytestmark = pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
EACH = pytest.mark.parametrize("name", RELEASED)
GONE = ("h.1.ln_2.weight", "core_block.1.norm_2.weight", "lora_B.weight")


def made(tmp_path, name):
    """The folder of a layout."""
    RELEASED[name](tmp_path / name)
    return tmp_path / name


@EACH
def test_a_missing_tensor_is_refused_by_name(name, tmp_path):
    folder = made(tmp_path, name)
    path = weight_files(folder)[-1]
    tensors = read(path)
    gone = next(one for one in tensors if one.endswith(("layers.1.input_layernorm.weight", "ff_norm.weight", *GONE)))
    del tensors[gone]
    write(path, tensors)
    with pytest.raises(InputError) as caught:
        LatentModel.from_pretrained(folder, device="cpu")
    assert ".".join(gone.split(".")[-4:]) in str(caught.value)


@EACH
def test_a_tensor_too_many_is_refused_by_name(name, tmp_path):
    folder = made(tmp_path, name)
    path = weight_files(folder)[-1]
    write(path, {**read(path), "of.no.use": torch.ones(2)})
    with pytest.raises(InputError, match=r"of\.no\.use"):
        LatentModel.from_pretrained(folder, device="cpu")


class Malicious:
    """Unpickled as a pickle usually is, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


PICKLES = pytest.mark.parametrize(
    "name", ["LLaDA-8B", *(name for name in RELEASED if "CODI-" in name or "Coconut" in name)]
)


@PICKLES
@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(name, kind, tmp_path):
    folder, trace = made(tmp_path, name), tmp_path / "was-run"
    path = weight_files(folder)[-1]
    tensors = read(path)
    path.unlink()
    evil = path if path.suffix != ".safetensors" else folder / "pytorch_model.bin"
    whole = {**tensors, "of.no.use": Malicious(trace)}
    torch.save(whole, evil) if kind == "zip" else evil.write_bytes(pickle.dumps(whole))
    with pytest.raises(InputError, match=rf"{evil.name} is a pickle .* nothing in it was run"):
        LatentModel.from_pretrained(folder, device="cpu")
    assert not trace.exists()


@PICKLES
def test_a_pickle_of_tensors_is_read_and_named(name, tmp_path):
    folder = made(tmp_path, name)
    path = weight_files(folder)[-1]
    tensors = read(path)
    if path.suffix == ".safetensors":
        path.unlink()
        torch.save(tensors, path := folder / "pytorch_model.bin")
    with pytest.warns(match=rf"{path.name} is a pickle, of which tensors alone were read"):
        LatentModel.from_pretrained(folder, device="cpu")


def test_a_choice_that_no_llama_has_is_refused(tmp_path):
    authors.llada(tmp_path / "llada", alibi=True)
    with pytest.raises(InputError, match="alibi=True, and such models can only be opened with False"):
        LatentModel.from_pretrained(tmp_path / "llada", device="cpu")


def test_a_mask_that_is_no_token_is_refused(tmp_path):
    authors.llada(tmp_path / "llada", mask_token_id=9999)
    with pytest.raises(InputError, match="mask_token_id=9999, and the tokenizer has no such token"):
        LatentModel.from_pretrained(tmp_path / "llada", device="cpu")


def test_what_config_json_does_not_say_is_asked_for(tmp_path):
    authors.llada(tmp_path / "llada")
    config = json.loads((tmp_path / "llada/config.json").read_text())
    del config["n_layers"]
    (tmp_path / "llada/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json has no n_layers: restore it"):
        LatentModel.from_pretrained(tmp_path / "llada", device="cpu")


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("LLaDA-8B", {"d_model": 16}, r"do not have the shapes that config\.json says .* restore"),
        ("LLaDA-8B", {"d_model": "wide"}, "its settings do not fit"),
        ("LLaDA-8B", {"n_layers": 3}, r"lack model\.transformer\.blocks\.2\."),
        ("LLaDA-8B", {"n_layers": 1}, r"hold model\.transformer\.blocks\.1\..* has no place"),
        ("Dream-v0", {"mask_token_id": None}, "has no mask_token_id"),
        ("mdlm", {"model_type": "a2d-bert"}, "only llama, qwen2, qwen3 are known"),
        ("Ouro-1.4B", {"hidden_act": "gelu"}, "can only be opened with silu"),
        ("huginn-0125", {"tie_embeddings": False}, "can only be opened with True"),
        ("ParScale-1.8B-P2", {"parscale_n": 4}, "shapes|Prefixes|size mismatch"),
        ("Recurrent-Llama-3.2-train-recurrence-32", {"init_values": {"embed_scale": 2.0}}, "opened with 1"),
        ("latent-tts-coconut", {"latent_id": 9999}, "no such token"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_sentence(name, changes, told, tmp_path):
    folder = made(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=told) as caught:
        LatentModel.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_settings_of_any_form_are_no_known_format(tmp_path):
    wrong = {"architectures": None, "model_type": "gpt2"}
    authors.write_json(tmp_path, "config.json", **wrong)
    authors.write_json(tmp_path, "tokenizer_config.json", added_tokens_decoder=[1], x=None)
    authors.write_json(tmp_path, "added_tokens.json", a="b")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    assert released(tmp_path) is None

"""What no format opens: weights that are not whole, and files that would do more than hold tensors."""

import json
import pickle

import pytest
import torch

from innerloop import InputError, LatentModel
from innerloop.formats.recognise import released
from innerloop.model.doctor import examine
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


def pickled(content, path, kind):
    """Write a pickle, in the form of today's torch.save or a bare one."""
    path.write_bytes(pickle.dumps(content)) if kind == "pickle" else torch.save(content, path)


def as_pickle(folder, content, kind, shards=False):
    """Put a pickle in the place of a layout's weights: under their name where they are one, else as torch names it."""
    files = weight_files(folder)
    for path in files:
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    path = files[-1] if files[-1].suffix != ".safetensors" else folder / "pytorch_model.bin"
    if shards:
        path = folder / "pytorch_model-00002-of-00002.bin"
        torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
        parts = [path.name, "pytorch_model-00001-of-00002.bin"]
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict(enumerate(parts))}))
    pickled(content, path, kind)
    return path


def weights_of(folder):
    return {name: one for path in weight_files(folder) for name, one in read(path).items()}


@EACH
@pytest.mark.parametrize(("kind", "shards"), [("pickle", False), ("zip", False), ("zip", True)])
def test_a_malicious_pickle_is_refused_and_runs_nothing(name, kind, shards, tmp_path):
    folder, trace = made(tmp_path, name), tmp_path / "was-run"
    path = as_pickle(folder, {**weights_of(folder), "of.no.use": Malicious(trace)}, kind, shards)
    with pytest.raises(InputError, match=rf"{path.name} is a pickle .* nothing in it was run") as caught:
        LatentModel.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
    examine(folder)
    assert not trace.exists()


BESIDE = ("training_args.bin", "optimizer.pt", "rng_state.pth", "adapter_model.bin", "tokenizer.pkl", "spiece.model")


@EACH
def test_a_malicious_file_beside_the_weights_is_not_read(name, tmp_path):
    folder, trace = made(tmp_path, name), tmp_path / "was-run"
    for i, one in enumerate(BESIDE):
        pickled(Malicious(trace), folder / one, ("pickle", "zip")[i % 2])
    for own in [path for path in folder.iterdir() if path.is_dir()]:  # of an adapter
        pickled(Malicious(trace), own / "adapter_model.bin", "zip")
    LatentModel.from_pretrained(folder, device="cpu")
    assert not trace.exists()


@EACH
def test_a_pickle_under_the_name_of_safetensors_runs_nothing(name, tmp_path):
    folder, trace = made(tmp_path, name), tmp_path / "was-run"
    tensors = weights_of(folder)
    for path in weight_files(folder):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    pickled({**tensors, "of.no.use": Malicious(trace)}, folder / "model.safetensors", "zip")
    with pytest.raises(InputError):
        LatentModel.from_pretrained(folder, device="cpu")
    assert not trace.exists()


@EACH
def test_a_pickle_of_tensors_is_read_and_named(name, tmp_path):
    folder = made(tmp_path, name)
    path = as_pickle(folder, weights_of(folder), "zip")
    with pytest.warns(match=rf"{path.name}(, .*)? is a pickle, of which tensors alone were read"):
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

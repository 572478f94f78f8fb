"""What no format opens: weights that are not whole, and files that would do more than hold tensors."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from innerloop import InputError, LatentModel
from innerloop.formats.recognise import FORMATS
from tests.formats import authors

pytestmark = pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
EACH = pytest.mark.parametrize("name", authors.RELEASED)


def write(folder, name):
    authors.RELEASED[name](folder)
    return folder


def changed(path, change):
    """Write a file of weights again, with other tensors."""
    is_pickle = path.suffix == ".bin"
    tensors = torch.load(path, weights_only=True) if is_pickle else load_file(path)
    change(tensors)
    torch.save(tensors, path) if is_pickle else save_file(tensors, path)


def weight_file(folder):
    return next(folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists())


def test_every_format_has_a_layout_here():
    assert len({id(known) for known in FORMATS}) <= len(authors.RELEASED)


@EACH
def test_a_missing_tensor_is_refused_by_name(name, tmp_path):
    folder, gone = write(tmp_path / name, name), []
    changed(weight_file(folder), lambda tensors: gone.append(tensors.popitem()[0]))
    with pytest.raises(InputError) as caught:
        LatentModel.from_pretrained(folder, device="cpu")
    assert gone[0] in str(caught.value)


@EACH
def test_a_tensor_too_many_is_refused_by_name(name, tmp_path):
    folder = write(tmp_path / name, name)
    changed(weight_file(folder), lambda tensors: tensors.update({"of.no.use": torch.ones(2)}))
    with pytest.raises(InputError, match=r"of\.no\.use"):
        LatentModel.from_pretrained(folder, device="cpu")


class Malicious:
    """Unpickled as a pickle usually is, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@EACH
@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(name, kind, tmp_path):
    folder, trace = write(tmp_path / name, name), tmp_path / "was-run"
    (folder / "model.safetensors").unlink(missing_ok=True)
    evil = folder / "pytorch_model.bin"
    if kind == "zip":
        torch.save({"weight": Malicious(trace)}, evil)
    else:
        evil.write_bytes(pickle.dumps({"weight": Malicious(trace)}))
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle .* nothing in it was run"):
        LatentModel.from_pretrained(folder, device="cpu")
    assert not trace.exists()


@EACH
def test_a_pickle_of_tensors_is_read_and_named(name, tmp_path):
    folder = write(tmp_path / name, name)
    path = weight_file(folder)
    tensors = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
    path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.warns(match=r"pytorch_model\.bin is a pickle, of which tensors alone were read"):
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

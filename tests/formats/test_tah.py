"""TaH as released, against a decoder written out from the authors' tensors that reads hard tokens twice."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, layer_norm, silu

from innerloop import InputError, LatentModel, Tah
from tests.formats import authors_depth, plain
from tests.formats.authors import HEADS, LAYERS, WIDTH
from tests.formats.proved import QUESTIONS, check_decoder
from tests.formats.test_refused import Malicious, pickled

pytestmark = pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
THETA, EPS = 700.0, 1e-6


def linear(w, name, x, lora):
    y = x @ w[f"{name}.weight"].T
    if lora:
        at = f"lora/base_model.model.{name}"
        y = y + x @ w[f"{at}.lora_A.weight"].T @ w[f"{at}.lora_B.weight"].T * 8 / 4
    return y


def heads_at(w, at, h, places, lora):
    """Queries, keys and values (L, H, E) of tokens at some places."""
    found = []
    for name in "qkv":
        one = linear(w, f"{at}.self_attn.{name}_proj", h, lora).unflatten(-1, (-1, WIDTH // HEADS))
        if name != "v":
            one = plain.rms(one, w[f"{at}.self_attn.{name}_norm.weight"], EPS)
            whole = one.new_zeros(int(max(places)) + 1, *one.shape[1:]).index_copy(0, places, one)
            one = plain.turned(whole, THETA)[places]
        found.append(one)
    return found


def read(w, x, places, before, lora):
    """States after each layer, the last one normed, and each layer's keys and values; ``before``: those of depth 1."""
    states, kept = [x], []
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        q, k, v = heads_at(w, at, plain.rms(x, w[f"{at}.input_layernorm.weight"], EPS), places, lora)
        sees = places <= places[:, None]
        kept.append((k, v))
        if before is not None:
            k, v = torch.cat([before[i][0], k]), torch.cat([before[i][1], v])
            sees = torch.cat([torch.arange(len(before[i][0])) <= places[:, None], sees], 1)
        x = x + linear(w, f"{at}.self_attn.o_proj", plain.attend(q, k, v, sees), lora)
        h = plain.rms(x, w[f"{at}.post_attention_layernorm.weight"], EPS)
        gate, up = (linear(w, f"{at}.mlp.{name}_proj", h, lora) for name in ("gate", "up"))
        x = x + linear(w, f"{at}.mlp.down_proj", silu(gate) * up, lora)
        states.append(x)
    states[-1] = plain.rms(x, w["model.norm.weight"], EPS)
    return states, kept


def goes_on(w, states, logits, threshold):
    """What the decider says of each token."""
    own = {name.removeprefix("decider/"): one for name, one in w.items() if name.startswith("decider/")}
    line = lambda name, x: x @ own[f"{name}.weight"].T + own[f"{name}.bias"]  # noqa: E731
    norm = lambda name, x: layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])  # noqa: E731
    top = line("logits_projection", logits.topk(20).values)
    x = line("backbone.input_projection", line("combined_projection", torch.cat([states[0], states[1], top], -1)))
    for i in range(2):
        at = f"backbone.blocks.{i}"
        x = x + line(f"{at}.mlp.3", gelu(line(f"{at}.mlp.0", norm(f"{at}.layer_norm", x))))
    return line("backbone.output_layer.1", norm("backbone.output_layer.0", x))[:, 0].sigmoid() > threshold


def slow_logits(w, ids, threshold):
    table, places = w["model.embed_tokens.weight"], torch.arange(len(ids))
    states, kept = read(w, table[ids], places, None, lora=False)
    logits = states[-1] @ table.T
    again = goes_on(w, states, logits, threshold).nonzero()[:, 0]
    if len(again):
        values, words = logits[again].topk(20)
        mixed = (values.softmax(-1)[..., None] * table[words]).sum(1)
        states, _ = read(w, mixed, again, kept, lora=True)
        logits = logits.index_add(0, again, states[-1] @ table.T)
    return logits


@pytest.mark.parametrize("threshold", [0.5, 0.0, 1.0])
def test_hard_tokens_are_read_twice(threshold, tmp_path):
    w = authors_depth.tah(tmp_path / "TaH-plus", threshold)
    model = LatentModel.from_pretrained(tmp_path / "TaH-plus", device="cpu")
    assert isinstance(model.method, Tah)
    assert (model.method.tau, model.method.max_loops, model.method.lora.gamma) == (threshold, 2, 8.0)
    check_decoder(model, lambda ids: slow_logits(w, ids, threshold))


def test_of_the_threshold_that_is_tried_some_tokens_are_hard_and_some_are_not(tmp_path):
    authors_depth.tah(tmp_path / "TaH-plus")
    model = LatentModel.from_pretrained(tmp_path / "TaH-plus", device="cpu")
    assert {n for one in model.generate(QUESTIONS, max_new_tokens=8) for _, n in one.depths} == {1, 2}


def changed_decider(folder, change):
    saved = torch.load(folder / "iter_decider.bin", weights_only=True)
    change(saved)
    torch.save(saved, folder / "iter_decider.bin")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda saved: saved["state_dict"].pop("logits_projection.bias"), r"lack logits_projection\.bias"),
        (lambda saved: saved["state_dict"].update(more=torch.ones(1)), "hold more"),
        (lambda saved: saved.update({"class": "IterLabelDecider"}), "only MLPIterDecider is known"),
        (lambda saved: saved["init_args"].update(hidden_dims=[16, 32]), "unlike width"),
        (lambda saved: saved["init_args"].update(topk=7), "must be as many"),
        (lambda saved: saved.pop("class"), "copy it again"),
    ],
)
def test_another_decider_is_refused(change, told, tmp_path):
    authors_depth.tah(tmp_path / "model")
    changed_decider(tmp_path / "model", change)
    with pytest.raises(InputError, match=told):
        LatentModel.from_pretrained(tmp_path / "model", device="cpu")


def test_a_lora_that_is_not_whole_is_refused_by_name(tmp_path):
    authors_depth.tah(tmp_path / "model")
    path = tmp_path / "model/lora/adapter_model.safetensors"
    tensors = load_file(path)
    gone, _ = tensors.popitem()
    save_file(tensors, path)
    with pytest.raises(InputError, match=gone.replace(".", r"\.")):
        LatentModel.from_pretrained(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_malicious_decider_is_refused_and_runs_nothing(kind, tmp_path):
    authors_depth.tah(tmp_path / "model")
    evil, path = {"class": Malicious(tmp_path / "was-run")}, tmp_path / "model/iter_decider.bin"
    pickled(evil, path, kind)
    with pytest.raises(InputError, match=r"iter_decider\.bin is a pickle .* nothing in it was run"):
        LatentModel.from_pretrained(tmp_path / "model", device="cpu")
    assert not (tmp_path / "was-run").exists()

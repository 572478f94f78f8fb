"""Stacks of layers made of others, the matrices of a layer, and what decoders do to embeddings."""

import copy

import pytest
import torch

from innerloop.decoder.backbone import Backbone
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.methods import Cot, Looped, Method, RelaxedRecursive
from innerloop.methods.depth.tying import depths_of, rebuild, stepwise, with_ends
from tests.close import assert_close
from tests.models import answers_of, chain_tokenizer, from_scratch, random_ids, tiny_backbone

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.2}
OTHERS = {
    "phi3": {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128},
    "granite": {"num_key_value_heads": 2, "intermediate_size": 48, "embedding_multiplier": 3.0},
}


def other(arch: str, method: Method) -> LatentModel:
    """Make a model of an architecture with fused matrices, or with scaled embeddings."""
    return from_scratch({"type": arch, **SMALL, **OTHERS[arch]}, chain_tokenizer(), method).eval()


def test_a_rebuilt_model_is_saved_by_transformers_and_loaded(arch: str, tmp_path):
    backbone, ids = tiny_backbone(arch), random_ids(2, 7)
    rebuild(backbone, [[0, 2], [1]])
    backbone.lm.save_pretrained(tmp_path)
    again = Backbone(type(backbone.lm).from_pretrained(tmp_path).eval()).lm
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, backbone.lm(input_ids=ids).logits)


def test_the_mean_is_taken_of_weights_and_the_shape_of_a_kind():
    backbone = tiny_backbone("gemma3")  # sliding, full, sliding
    first, last = (copy.deepcopy(backbone.layers[i].state_dict()) for i in (0, 2))
    full = backbone.layers[1].self_attn.is_sliding
    rebuild(backbone, [[0, 2], [0]], kinds=[0, 1])
    for name, tensor in backbone.layers[0].state_dict().items():
        assert_close(tensor, (first[name] + last[name]) / 2)
    assert all(torch.equal(tensor, first[name]) for name, tensor in backbone.layers[1].state_dict().items())
    assert backbone.config.layer_types == ["sliding_attention", "full_attention"]
    assert backbone.layers[1].self_attn.is_sliding == full != backbone.layers[0].self_attn.is_sliding


def test_depths_are_shared_out_in_cycles():
    assert depths_of(6, 2) == [[0, 2, 4], [1, 3, 5]] and depths_of(3, 3) == [[0], [1], [2]]
    with pytest.raises(InputError, match="7 layers cannot be tied to blocks of 2: choose a number that divides 7"):
        depths_of(7, 2)
    assert stepwise(5, 2) == [0, 4] and stepwise(4, 3) == [0, 2, 3]  # 1.5 is rounded up
    assert with_ends([[0, 2], [1]], 1, 6, 2) == [[0], [1, 3], [2], [4], [5]]


@pytest.mark.parametrize(
    ("arch", "attention", "heads"),
    [("gpt2", "attn.c_attn", [32, 32, 32]), ("phi3", "self_attn.qkv_proj", [32, 16, 16])],  # phi3 shares its keys
)
def test_fused_matrices_are_taken_apart(arch, attention, heads):
    backbone = tiny_backbone("gpt2") if arch == "gpt2" else other("phi3", Cot()).backbone
    found, layer = backbone.matrices(0), backbone.layers[0]
    parts = [found[f"{attention}.{part}"] for part in "qkv"]
    whole = parts[0].module.weight
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.T if arch == "gpt2" else whole)
    assert [part.weight.shape for part in parts] == [(n, 32) for n in heads]
    if arch == "phi3":
        halves = [found[f"mlp.gate_up_proj.{part}"].weight for part in ("gate", "up")]
        assert torch.equal(torch.cat(halves), layer.mlp.gate_up_proj.weight)
    n_weights = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert sum(m.weight.numel() for m in found.values()) == n_weights


@pytest.mark.parametrize("arch", OTHERS)
def test_other_decoders_loop_and_are_relaxed(arch):
    model = other(arch, Cot())
    plain = answers_of(model)
    assert torch.equal(answers_of(LatentModel(model.backbone, model.tokenizer, Looped(max_loops=1)).eval()), plain)
    backbone, method = Backbone(copy.deepcopy(model.backbone.lm)), RelaxedRecursive(rank=1000)
    start = method.convert(backbone, None)
    relaxed = LatentModel(backbone, model.tokenizer, method).eval()
    torch.nn.ModuleDict(relaxed.trained_modules()).load_state_dict(start, strict=False)
    assert_close(answers_of(relaxed), plain, 1e-4)

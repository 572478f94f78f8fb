"""Families of decoders: what is supported works, what is not is refused in one sentence that says why."""

import copy
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from innerloop import Coconut, Cot, InputError, LatentModel, Looped, Slr
from innerloop.decoder import check
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.check import check_passes
from innerloop.decoder.kv_buffer import FullLayer
from innerloop.model.loading import load_decoder
from tests.close import assert_close
from tests.models import chain_tokenizer, from_scratch, random_ids, tiny_backbone

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
families = importlib.import_module("families")
RECORDED = {
    one["family"]: one for one in json.loads((ROOT / "benchmarks/results/families.json").read_text())["families"]
}
BEYOND_LLAMA = ("bloom", "falcon", "falcon with ALiBi", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi")
ALIBI = ("bloom", "falcon with ALiBi", "gpt_neo", "mpt")  # and what else counts columns
REFUSED = {
    "qwen3_5_text": r"layer 0 remembers more than keys and values \(a LinearAttentionLayer\)",
    "granitemoehybrid": "remembers more than keys and values",
    "mamba": "has no|remembers more",
    "gemma3n_text": "run from embeddings it gives other logits than by itself",
    "ctrl": "changes in place the embeddings",
    "bert": "has no list of layers",
    "opt as opt-350m": "has no final norm",
}


@pytest.fixture(scope="module", params=BEYOND_LLAMA)
def family(request):
    return request.param


def test_a_family_answers_in_a_batch_with_holes_as_alone(family):
    lm = families.small_lm(family)
    check_passes(Backbone(lm))
    assert families.try_answering(lm, Slr(n_slots=3, max_loops=2)) is None
    assert families.try_answering(lm, Coconut(latents_per_step=1, pad_latent_to_max=False)) is None


@pytest.mark.parametrize("family", ["llama4_text", "moshi"])
@pytest.mark.parametrize("size", [3, 64])
def test_windows_and_chunks_longer_than_what_is_tried_are_tried_too(family, size, monkeypatch):
    monkeypatch.setitem(families.SMALL, "sliding_window", size)
    monkeypatch.setitem(families.SMALL, "attention_chunk_size", size)
    backbone = Backbone(families.small_lm(family))
    with pytest.raises(InputError, match=r"gets other states than alone|gives other states than one over the whole"):
        check_passes(backbone)
    names = {name: getattr(backbone.config, name) for name in check.WINDOWS if hasattr(backbone.config, name)}
    assert names and set(names.values()) == {size}  # as it was


@torch.no_grad()
def test_a_family_has_its_own_logits_read_whole_or_token_by_token(family):
    ids, backbone = random_ids(2, 12), Backbone(families.small_lm(family))
    own = families.small_lm(family)(input_ids=ids).logits
    assert own.std() > 0.1
    assert_close(backbone.head(backbone(backbone.embed(ids))), own)
    past = backbone.empty_cache()
    parts = [backbone(backbone.embed(chunk), cache=past) for chunk in ids.split([3, 1, 1, 5, 1, 1], dim=1)]
    assert_close(backbone.head(torch.cat(parts, dim=1)), own)


@pytest.mark.parametrize("family", [name for name in BEYOND_LLAMA if name not in ALIBI])
def test_layers_of_a_family_run_apart_give_the_states_of_the_whole(family):
    check_passes(Backbone(families.small_lm(family)), sections=True)


@pytest.mark.parametrize("family", ALIBI)
def test_attention_that_counts_columns_is_refused_where_tokens_have_unlike_depth(family):
    with pytest.raises(InputError, match="methods that loop inside the token"):
        check_passes(Backbone(families.small_lm(family)), sections=True)


@pytest.mark.parametrize(("family", "why"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_read_in_pieces_is_refused_in_one_sentence(family, why):
    with pytest.raises(InputError, match=why) as caught:
        check_passes(Backbone(families.small_lm(family)))
    assert "\n" not in str(caught.value) and "docs/models.md" in str(caught.value)


def test_a_refused_family_is_refused_by_whatever_makes_a_model(tmp_path):
    lm = families.small_lm("qwen3_5_text")
    lm.save_pretrained(tmp_path)
    chain_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="remembers more than keys and values"):
        LatentModel.from_pretrained(tmp_path, method=Cot())
    with pytest.raises(InputError, match="remembers more than keys and values"):
        from_scratch({"type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 1}, chain_tokenizer(), Cot())
    with pytest.raises(InputError, match="remembers more than keys and values"):
        load_decoder(tmp_path, chain_tokenizer(), torch.float32)
    bloom = {"type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
    with pytest.raises(InputError, match="methods that loop inside the token"):
        from_scratch(bloom, chain_tokenizer(), Looped())
    assert from_scratch(bloom, chain_tokenizer(), Slr()).generate(["3 ; + 1"])


def test_what_attention_and_mlp_add_is_found_or_the_family_refused():
    for family in ("gpt_neox", "falcon", "gptj", "phi"):
        backbone = Backbone(families.small_lm(family))
        assert set(backbone.taps(0)) <= set(backbone.layers[0].children())
    with pytest.raises(InputError, match="OPTDecoderLayer has no attention or no MLP"):
        Backbone(families.small_lm("opt")).taps(0)


# What the check notices, each on a model in which that alone is wrong


def shared_fork(monkeypatch):
    def shared(cache):
        for layer in cache.layers:
            layer.values *= 0.5  # in place, as running states are written to
        return cache_fork(cache)

    cache_fork = check.fork
    monkeypatch.setattr(check, "fork", shared)


def blind_mask(monkeypatch):
    monkeypatch.setattr(Backbone, "mask_of", lambda *_: None)


def forgetful_cache(monkeypatch):
    update = FullLayer.update
    monkeypatch.setattr(FullLayer, "update", lambda *args: tuple(t * (t.shape[2] < 4) for t in update(*args)))


def mixed_rows(monkeypatch):
    monkeypatch.setattr(check, "join_rows", lambda caches, gaps, order: check.select_rows(caches[1], order * 0))


def bent_layers(monkeypatch):
    forward = Backbone.forward

    def bent(self, embeds_BLD, *, inner=None, **options):
        return forward(self, embeds_BLD * (1.1 if inner else 1), inner=inner, **options)

    monkeypatch.setattr(Backbone, "forward", bent)


def nothing_finite(monkeypatch):
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: forward(self, x) * torch.inf)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (shared_fork, "what one fork of its cache reads changes another"),
        (blind_mask, "a row in a padded batch gets other states than alone"),
        (forgetful_cache, "a cached pass in pieces gives other states than one over the whole"),
        (mixed_rows, "rows whose caches are cut and joined get other states than alone"),
        (bent_layers, "its layers run one part after the other give other states"),
        (nothing_finite, "its logits are not finite"),
    ],
)
def test_the_check_says_what_is_wrong(broken, why, monkeypatch):
    backbone = tiny_backbone()
    check_passes(backbone, sections=True)
    broken(monkeypatch)
    with pytest.raises(InputError, match=re.escape(why)):
        check_passes(backbone, sections=True)


def test_the_check_takes_six_short_passes():
    backbone, seen = tiny_backbone(), []
    backbone.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    check_passes(backbone)
    assert len(seen) == 6 and sum(seen) <= 40


def test_a_check_in_half_precision_allows_for_its_rounding():
    backbone = tiny_backbone()
    check_passes(Backbone(copy.deepcopy(backbone.lm).bfloat16()))


# The table


@pytest.mark.slow
@pytest.mark.parametrize("family", RECORDED)
def test_the_table_says_what_a_family_can(family):
    assert families.outcome(family)["can"] == RECORDED[family]["can"]


def test_the_table_has_every_family_of_transformers_and_those_of_the_field_are_supported():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(RECORDED)
    able = {name for name, one in RECORDED.items() if {"text", "latents", "trains"} <= set(one["can"])}
    assert {*BEYOND_LLAMA, "llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"} <= able
    assert all(one["why"] for one in RECORDED.values() if len(one["can"]) < 5)


@pytest.mark.slow  # torch.compile takes seconds for each
def test_compiled_passes_of_a_family_write_what_others_write(family):
    lm = families.small_lm(family)
    model = families.put_on(lm, Slr(n_slots=2, max_loops=2)).double()
    asked = [example.question for example in families.unlike_examples()]
    plain = model.generate(asked, max_new_tokens=6)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.backbone.compile_passes("eager")
    assert [one.ids for one in model.generate(asked, max_new_tokens=6)] == [one.ids for one in plain]
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (family not in ALIBI)


@pytest.mark.parametrize(("start", "most"), [(16, 16), (64, 64), (None, 64)])
def test_rows_end_where_a_long_one_would_turn_the_positions_of_the_others(start, most):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": start}
    scaling = (
        {"rope_type": "longrope", "rope_theta": 1e4, **factors}
        if start
        else {"rope_type": "default", "rope_theta": 1e4}
    )
    assert tiny_backbone("llama", max_position_embeddings=64, rope_parameters=scaling).context_length == most

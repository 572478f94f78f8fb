"""The backbone against the models' own forward passes, on every architecture."""

import copy
import os
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import sdpa_attention

from innerloop.decoder import masks
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.check import check_passes
from innerloop.decoder.ragged_cache import DepthCache, view
from innerloop.errors import InputError
from tests.close import assert_close
from tests.models import ARCHS, SLIDING, VOCAB, WINDOW, left_pad, random_ids, tiny_backbone, tiny_lm

LENGTH = 2 * WINDOW + 3  # longer than two windows
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}


def test_gpt2s_activation_becomes_one_operator_with_the_same_values():
    ids, lm = random_ids(2, LENGTH), tiny_lm("gpt2")
    named = {type(module).__name__ for module in lm.modules()}
    with torch.no_grad():
        own = lm(input_ids=ids).logits
        Backbone(lm)
        assert_close(lm(input_ids=ids).logits, own)
    left = {type(module).__name__ for module in lm.modules()}
    assert (named - left, left - named) == ({"NewGELUActivation"}, {"GELU"})


def odd_lm(model_type: str, **settings):
    """Make a tiny model of an architecture outside `ARCHS`."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def states_of(backbone, ids, **options):
    return backbone(backbone.embed(ids), **options)


def composed(backbone, embeds, ranges, **options):
    """Run layer ranges one after the other, then the final norm."""
    for layers in ranges:
        embeds = backbone(embeds, layers=layers, **options)
    return backbone.norm(embeds)


def looped(backbone, embeds, ranges, **options):
    """Run the prelude once, the middle layers twice and the rest once, without a cache."""
    prelude, middle, coda = ranges
    return composed(backbone, embeds, [prelude, middle, middle, coda], **options)


# The whole model


@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}], ids=["usual", "eager"])
def test_states_from_embeddings_show_the_models_own_logits(arch, attention):
    lm = tiny_lm(arch, **attention)
    backbone, ids = Backbone(lm), random_ids(2, LENGTH)
    with torch.no_grad():
        own = lm(input_ids=ids).logits
    assert own.std() > 0.1  # logits that are all alike would make the comparison empty
    assert_close(backbone.head(states_of(backbone, ids)), own)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("granite", GRANITE), ("cohere", {"logit_scale": 0.25}), ("gemma", {"head_dim": 8}), ("olmo2", {}), ("phi3", {})],
)
def test_other_architectures_show_their_own_logits(model_type, settings):
    lm = odd_lm(model_type, **settings)
    backbone, ids = Backbone(lm), random_ids(2, LENGTH)
    check_passes(backbone)
    with torch.no_grad():
        own = lm(input_ids=ids).logits
    assert own.std() > 0.1
    assert_close(backbone.head(states_of(backbone, ids)), own)


def test_softcapping_is_part_of_the_head():
    backbone = tiny_backbone("gemma2")
    logits = backbone.head(100 * states_of(backbone, random_ids(1, 4)))
    assert 2.9 < logits.abs().max() <= 3.0


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 1, 6, 2], [WINDOW + 2, LENGTH - WINDOW - 2]])
def test_a_cached_pass_equals_an_uncached_one(arch, chunks):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    cache = backbone.empty_cache()
    parts = [states_of(backbone, chunk, cache=cache) for chunk in ids.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), states_of(backbone, ids))


@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}], ids=["usual", "eager"])
def test_left_padded_rows_equal_rows_by_themselves(arch, attention):
    backbone = tiny_backbone(arch, **attention)
    rows = [random_ids(1, n, seed=n)[0] for n in (LENGTH, WINDOW + 2, 3, 1)]
    ids, mask = left_pad(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batched = states_of(backbone, ids, mask=mask, positions_BL=positions)
    for row, states in zip(rows, batched):
        assert_close(states[-len(row) :], states_of(backbone, row[None])[0])


def test_left_padded_rows_decoded_token_by_token_equal_rows_by_themselves(arch):
    backbone = tiny_backbone(arch)
    rows = [random_ids(1, n, seed=n)[0] for n in (LENGTH, WINDOW + 2, 4)]
    ids, mask = left_pad(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, parts = backbone.empty_cache(), []
    for start, stop in [(0, LENGTH - 3), *pairwise(range(LENGTH - 3, LENGTH + 1))]:
        parts.append(
            states_of(
                backbone,
                ids[:, start:stop],
                mask=mask[:, :stop],
                positions_BL=positions[:, start:stop],
                cache=cache,
            )
        )
    for row, states in zip(rows, torch.cat(parts, dim=1)):
        assert_close(states[-len(row) :], states_of(backbone, row[None])[0])


def test_a_later_token_changes_no_earlier_state(arch):
    backbone, ids = tiny_backbone(arch), random_ids(1, 8)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % VOCAB
    before, after = states_of(backbone, ids), states_of(backbone, other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


@pytest.mark.parametrize("arch", [a for a in ARCHS if a not in SLIDING])
def test_a_four_dimensional_mask_goes_to_the_attention_as_it_is(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    assert_close(states_of(backbone, ids, mask=causal), states_of(backbone, ids))
    everywhere = states_of(backbone, ids, mask=torch.ones_like(causal))
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % VOCAB
    changed = states_of(backbone, other, mask=torch.ones_like(causal))
    assert not torch.allclose(everywhere[:, 0], changed[:, 0], atol=1e-3)  # the first position sees the last


# The state between layers


def test_all_states_are_the_embeddings_and_the_output_of_each_layer(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, 7)
    states = states_of(backbone, ids, all_states=True)
    assert len(states) == backbone.n_layers + 1
    for n in range(1, backbone.n_layers):
        assert_close(states[n], states_of(backbone, ids, layers=range(n)))
    assert_close(states[-1], states_of(backbone, ids))
    if arch != "gpt2":  # GPT-2's first state has its learned positions in it
        assert_close(states[0], backbone.embed(ids))


@pytest.mark.parametrize("chunks", [[LENGTH], [4, 1, 6, 2]])
def test_the_final_norm_may_be_left_out(arch, chunks):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    cache = backbone.empty_cache()
    parts = [states_of(backbone, chunk, cache=cache, normed=False) for chunk in ids.split(chunks, dim=1)]
    before, after = torch.cat(parts, dim=1), states_of(backbone, ids)
    assert not torch.allclose(before, after, atol=1e-2)
    with torch.no_grad():
        assert_close(backbone.norm(before), after)


def test_all_states_of_a_section_are_counted_once_however_often_they_are_asked_for(arch):
    backbone, ids = tiny_backbone(arch), random_ids(1, 4)
    for _ in range(2):
        assert len(states_of(backbone, ids, layers=range(2), all_states=True)) == 3
    assert len(states_of(backbone, ids, all_states=True)) == backbone.n_layers + 1


@pytest.mark.parametrize(
    "ranges", [[range(1), range(1, 3)], [range(2), range(2, 3)], [range(i, i + 1) for i in range(3)]]
)
def test_layer_ranges_compose_to_the_whole(arch, ranges):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    with torch.no_grad():
        ours = composed(backbone, backbone.embed(ids), ranges)
    assert_close(ours, states_of(backbone, ids))


def test_layer_ranges_compose_where_the_model_multiplies_its_embeddings():
    backbone, ids = Backbone(odd_lm("granite", **GRANITE)), random_ids(2, 6)
    with torch.no_grad():
        ours = composed(backbone, backbone.embed(ids), [range(1), range(1, 3)])
    assert_close(ours, states_of(backbone, ids))


def test_layer_ranges_compose_in_bfloat16(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, 6)
    backbone.to(torch.bfloat16)
    with torch.no_grad():
        ours = composed(backbone, backbone.embed(ids), [range(1), range(1, 3)])
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, states_of(backbone, ids))


def test_dropout_of_the_embeddings_is_not_applied_to_the_state_between_layers():
    backbone = tiny_backbone("gpt2", embd_pdrop=0.9, attn_pdrop=0.0, resid_pdrop=0.0)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone(states, layers=range(1, 3))
        backbone.train()
        assert torch.equal(backbone(states, layers=range(1, 3)), expected)


def test_layer_ranges_of_left_padded_rows_equal_rows_by_themselves(arch):
    backbone = tiny_backbone(arch)
    rows = [random_ids(1, n, seed=n)[0] for n in (LENGTH, WINDOW + 2, 4)]
    ids, mask = left_pad(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ranges = [range(1), range(1, 2), range(2, 3)]
    with torch.no_grad():
        batched = looped(backbone, backbone.embed(ids), ranges, mask=mask, positions_BL=positions)
        for row, states in zip(rows, batched):
            single = looped(backbone, backbone.embed(row[None]), ranges)[0]
            assert_close(states[-len(row) :], single)


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 1, 6, 2]])
@pytest.mark.parametrize(
    "middle",
    [pytest.param(range(1, 2), id="middle"), pytest.param(range(1, 3), id="end"), pytest.param(range(2), id="start")],
)
def test_two_loops_of_a_layer_range_decoded_with_a_cache_equal_full_recomputation(arch, middle, chunks):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    n = backbone.n_layers
    ranges = [range(middle.start), middle, range(middle.stop, n)]
    cache, parts = DepthCache(), []
    with torch.no_grad():
        whole = backbone.embed(ids)
        for layers, n_times in zip(ranges, (1, 2, 1)):
            for _ in range(n_times if len(layers) else 0):
                whole = backbone(whole, layers=layers)
        read = 0
        for chunk in ids.split(chunks, dim=1):
            positions = torch.arange(read, read + chunk.shape[1])[None]
            states = backbone.embed(chunk)
            for layers, n_times in zip(ranges, (1, 2, 1)):
                for loop in range(n_times if len(layers) else 0):
                    slot = cache.slot((layers, loop), layers, positions)
                    states = backbone(states, layers=layers, cache=view(slot), positions_BL=positions)
                    slot.extend(positions, None, None)
            parts.append(states)
            read += chunk.shape[1]
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("middle", [range(1, 2), range(1, 3)])
def test_a_cached_layer_range_counts_its_own_positions(arch, middle):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    slot, parts = DepthCache().slot("middle", middle, ids), []
    with torch.no_grad():
        states = backbone(backbone.embed(ids), layers=range(1))
        whole = backbone(states, layers=middle)
        for chunk, columns in zip(states.split([4, 1, 6, 2], dim=1), ids.split([4, 1, 6, 2], dim=1)):
            parts.append(backbone(chunk, layers=middle, cache=view(slot)))
            slot.extend(columns, None, None)
    assert_close(torch.cat(parts, dim=1), whole)


def test_a_section_edits_nothing_of_the_model(arch):
    backbone = tiny_backbone(arch)
    decoder = backbone.decoder
    modules = dict(backbone.lm.named_modules())
    weights = {name: tensor.clone() for name, tensor in backbone.lm.state_dict().items()}
    config, config_object = copy.deepcopy(backbone.lm.config.to_dict()), decoder.config
    ids = random_ids(1, 4)
    whole = states_of(backbone, ids)
    for layers in (range(2), range(1, 3), range(1, 2)):
        states_of(backbone, ids, layers=layers)

    assert dict(backbone.lm.named_modules()) == modules  # modules compare by identity
    assert decoder.config is config_object
    assert backbone.lm.config.to_dict() == config
    after = backbone.lm.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(states_of(backbone, ids), whole)


def test_gradients_reach_the_shared_weights_through_a_section():
    backbone = tiny_backbone()
    states = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    backbone(states, layers=range(1, 2)).sum().backward()
    has_gradient = [any(p.grad is not None for p in layer.parameters()) for layer in backbone.layers]
    assert has_gradient == [False, True, False]


# What the backbone knows of its model


def test_embed_rms_is_the_rms_of_the_embeddings_as_the_layers_see_them(arch):
    backbone = tiny_backbone(arch)
    seen = backbone.embed(torch.arange(VOCAB)[None]).double()
    assert backbone.embed_rms().item() == pytest.approx(seen.pow(2).mean().sqrt().item(), rel=1e-6)
    assert backbone.embed_rms().dtype == torch.float32


def test_embed_rms_includes_gemmas_scaling():
    backbone = tiny_backbone("gemma3")
    table = backbone.lm.get_input_embeddings().weight
    assert backbone.embed_rms().item() == pytest.approx((table.pow(2).mean().sqrt() * 32**0.5).item(), rel=1e-6)


def test_anatomy_is_read_off_the_model(arch):
    backbone = tiny_backbone(arch)
    assert (backbone.n_layers, backbone.width, backbone.context_length) == (3, 32, 256)
    assert len(backbone.empty_cache().layers) == 3


def test_check_passes_and_leaves_the_mode_as_it_was(arch):
    backbone = tiny_backbone(arch)
    check_passes(backbone)
    assert not backbone.lm.training
    backbone.train()
    check_passes(backbone)
    assert all(module.training for module in backbone.lm.modules())


def test_check_refuses_a_model_that_scales_its_logits_in_an_unknown_way(monkeypatch):
    backbone = tiny_backbone()
    forward = type(backbone.lm).forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 1.05
        return out

    monkeypatch.setattr(type(backbone.lm), "forward", scaled)
    with pytest.raises(InputError, match="other logits than by itself"):
        check_passes(backbone)


def test_check_refuses_a_model_that_scales_its_embeddings_in_an_unknown_way(monkeypatch):
    backbone = tiny_backbone()
    decoder = type(backbone.decoder)
    forward = decoder.forward

    def scaled(self, input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids) * 4
        return forward(self, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(decoder, "forward", scaled)
    with pytest.raises(InputError, match="run from embeddings"):
        check_passes(backbone)


def test_shared_keys_are_read_where_they_lie_with_the_same_result(monkeypatch):
    """Where there is a mask too; and transformers' own switch is as it was afterwards."""
    backbone, seen = tiny_backbone("llama"), []
    assert backbone.config.num_key_value_heads < backbone.config.num_attention_heads
    embeds, mask = backbone.embed(torch.arange(12).view(2, 6)), torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    mask_4d = backbone.mask_of(mask, 6, None, embeds.dtype)
    repeat = sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *args: seen.append(1) or repeat(*args))
    found = []
    for value in (None, "0"):
        if value is not None:
            monkeypatch.setenv(masks.GROUPED, value)
        found.append(backbone(embeds, mask=mask_4d))
        assert os.environ.get(masks.GROUPED) == value and bool(seen) == (value is not None)
    assert_close(found[0][mask.bool()], found[1][mask.bool()])

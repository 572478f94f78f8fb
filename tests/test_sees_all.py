"""Passes that see more than the past: the mask decides, on every architecture, and what would ignore it is refused."""

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.check import Trial, check_passes
from innerloop.decoder.cost import CostMeter
from innerloop.decoder.masks import visible
from innerloop.errors import InputError
from innerloop.passes.context import Context
from tests.close import assert_close
from tests.models import ARCHS, WINDOW, left_pad, random_ids, tiny_backbone, tiny_lm
from tests.test_backbone import odd_lm

LENGTH = 2 * WINDOW + 3  # longer than two windows
by_arch = pytest.mark.parametrize("arch", ARCHS)
by_attention = pytest.mark.parametrize(
    "arch, attention",
    [(arch, kind) for arch in ARCHS for kind in ("sdpa", "eager") if (arch, kind) != ("gemma2", "sdpa")],
)


@torch.no_grad()
def read(backbone: Backbone, ids: Tensor, mask: Tensor | None = None, sees: str = "all") -> Tensor:
    return Context(backbone, len(ids)).read(backbone.embed(ids), mask, sees=sees)


@by_attention
def test_a_causal_mask_of_four_dimensions_gives_the_decoders_own_logits(arch, attention):
    lm, ids = tiny_lm(arch, attn_implementation=attention), random_ids(2, LENGTH)
    backbone = Backbone(lm)
    mask = backbone.mask_of(torch.ones_like(ids), LENGTH, 0, torch.float32)
    with torch.no_grad():
        states = backbone(backbone.embed(ids), mask=mask)
        assert_close(backbone.head(states), lm(input_ids=ids).logits)


@by_arch
def test_every_token_changes_every_state_and_windows_are_lifted(arch):
    backbone, ids = tiny_backbone(arch, num_hidden_layers=1, layer_types=None), random_ids(1, LENGTH)
    whole = read(backbone, ids)
    for place in range(LENGTH):
        other = ids.clone()
        other[0, place] = 3 + (ids[0, place] - 2) % 40
        assert ((read(backbone, other) - whole).abs().amax(-1) > 1e-6).all()


@by_arch
def test_padding_on_either_side_changes_nothing(arch):
    backbone = tiny_backbone(arch)
    rows = [random_ids(1, n, seed=n)[0] for n in (LENGTH, 4)]
    ids, mask = left_pad(rows)
    for padded, real in ((ids, mask), (ids.flip(1), mask.flip(1))):
        together = read(backbone, padded, real)
        for row, own in enumerate(rows):
            alone = own if padded is ids else own.flip(0)
            assert_close(together[row, real[row].bool()], read(backbone, alone[None])[0])


@by_arch
def test_what_was_read_before_is_seen_whole_and_stays_as_it_was(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    context = Context(backbone, 2)
    with torch.no_grad():
        first = context.read(backbone.embed(ids[:, :8]), sees="all")
        second = context.read(backbone.embed(ids[:, 8:]), sees="all")
    assert_close(first, read(backbone, ids[:, :8]))
    seen = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool)
    seen[:, :8, 8:] = False
    dtype = torch.float32 if arch == "gemma2" else torch.bool
    with torch.no_grad():
        whole = backbone(backbone.embed(ids), mask=visible(backbone.config, seen, torch.zeros_like(seen).long(), dtype))
    assert_close(second, whole[:, 8:])


def test_a_pass_that_sees_all_counts_a_key_for_every_pair():
    backbone, meter = tiny_backbone(), CostMeter(2, torch.device("cpu"))
    context = Context(backbone, 2, meter)
    context.read(backbone.embed(random_ids(2, 5)), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]), sees="all")
    assert meter.keys.tolist() == [25, 9]
    assert meter.positions.tolist() == [5, 3]


@by_attention
def test_a_decoder_that_follows_masks_is_taken(arch, attention):
    check_passes(Backbone(tiny_lm(arch, attn_implementation=attention)), sees_all=True)


def test_attention_that_ignores_a_mask_is_found():
    def deaf(module, query, key, value, attention_mask, **options):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    lm = tiny_lm("llama")
    AttentionInterface.register("deaf", deaf)
    lm.config._attn_implementation = "deaf"
    with pytest.raises(InputError, match=r"'deaf' takes no mask of its own.*attn_implementation=sdpa"):
        Trial(Backbone(lm)).see_all()
    AttentionInterface.register("sdpa", deaf)  # under a name that is trusted
    lm.config._attn_implementation = "sdpa"
    try:
        with pytest.raises(InputError, match="sees the past alone, whatever the mask"):
            Trial(Backbone(lm)).see_all()
    finally:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("sdpa", sdpa_attention_forward)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_decoder_that_counts_how_far_back_keys_lie_is_refused(family):
    settings = {"n_layer": 2, "n_head": 4} if family == "bloom" else {"n_layers": 2, "n_heads": 4, "d_model": 32}
    with pytest.raises(InputError, match=r"counts how far back keys lie.*denoise with a decoder"):
        check_passes(Backbone(odd_lm(family, **settings)), sees_all=True)

"""AdaInfer's invariants (adainfer.md, section 9), on GPT-2 and Llama shapes, and Gemma's, whose outputs are normed."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from innerloop import AdaInfer, Cot, LatentModel
from innerloop.calibrate.loop_scan import scan_loop
from innerloop.decoder.cost import Meter, flops_of
from innerloop.halting.rule import STATE_FLOPS
from innerloop.methods.depth.exit_pass import ExitCache
from innerloop.model.stopping import use_rule
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from tests.close import assert_close
from tests.methods.tools import MIXED, QUESTIONS, by_arch, change
from tests.models import random_ids, tiny_model

L = 6
EXITS = (2, 3, 5)
SHORT = MIXED[2]
POLICIES = ("lazy_backfill", "propagate", "full_compute")
GEMMA = {"gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2}}
LEAVES = AdaInfer(exits=EXITS, stop="top_prob", stop_threshold=0.5)
FORCED = change(LEAVES, stop_threshold=math.inf)  # tokens leave when they are told to
by_policy = pytest.mark.parametrize("policy", POLICIES)
by_shape = pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])


@functools.cache
def base(arch: str = "llama") -> LatentModel:
    """Return a plain model that the tests share; who changes it takes a copy."""
    return tiny_model(Cot(), arch, num_hidden_layers=L, **GEMMA.get(arch, {}))


def on(model: LatentModel, method: AdaInfer) -> LatentModel:
    return LatentModel(model.backbone, model.tokenizer, method).eval()


@functools.cache
def truncated(arch: str, n_layers: int) -> LatentModel:
    """Return the plain model with its first layers alone."""
    twin = copy.deepcopy(base(arch))
    backbone = twin.backbone
    setattr(backbone.decoder, backbone.anatomy.layers, backbone.layers[:n_layers])
    backbone.config.num_hidden_layers = n_layers
    if getattr(backbone.config, "layer_types", None):
        backbone.config.layer_types = backbone.config.layer_types[:n_layers]
    return twin


def read(
    model: LatentModel, examples, wanted_BS: Tensor | None = None, meter: Meter | None = None
) -> tuple[Batch, Thought]:
    """Read whole rows; ``wanted_BS`` says how many sections each token shall run."""
    batch = model.batch(model.rows(examples))
    context = model.new_context(batch, meter)
    context.depth.wanted_BS = wanted_BS
    with torch.no_grad():
        thought = model.think(batch, context=context)
        model.written_logits(batch, thought)
    return batch, thought


def logits_with(model: LatentModel, examples, wanted_BS: Tensor) -> list[Tensor]:
    """Return the logits of what is written when tokens leave after known numbers of sections."""
    batch = model.batch(model.rows(examples))
    context = model.new_context(batch)
    context.depth.wanted_BS = wanted_BS
    with torch.no_grad():
        return list(model.written_logits(batch, model.think(batch, context=context)).split(batch.n_targets))


def pattern(model: LatentModel, examples, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw how many sections each token runs; return it (B, S), and how many those that write ran (U,)."""
    batch = model.batch(model.rows(examples))
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(1, len(EXITS) + 2, batch.ids_BS.shape, generator=generator)
    return wanted, wanted.flatten()[batch.predict_at_U]


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Neutral settings


@by_shape
@by_policy
def test_a_rule_that_never_fires_is_the_base_model_bit_for_bit(policy, arch):
    model = base(arch)
    expected = model.answer_logits(MIXED)
    assert_equal(on(model, AdaInfer()).answer_logits(MIXED), expected)
    never = change(LEAVES, stop_threshold=math.inf, kv_missing=policy)
    assert_equal(on(model, never).answer_logits(MIXED), expected)
    assert_equal(on(model, change(never, stop_threshold=0.0, min_loops=4)).answer_logits(MIXED), expected)
    (written, (alone,)) = (m.generate(QUESTIONS[:1], max_new_tokens=5) for m in (on(model, never), model))
    assert written[0].text == alone.text


@by_arch
def test_flops_without_exits_are_the_models_and_a_rule_adds_its_looks(arch):
    model = base(arch)
    (plain,), (bare,) = (m.generate(QUESTIONS[:1], max_new_tokens=5) for m in (model, on(model, AdaInfer())))
    assert bare.cost.flops == plain.cost.flops
    (looked,) = on(model, change(LEAVES, stop_threshold=math.inf)).generate(QUESTIONS[:1], max_new_tokens=5)
    n_written = len(looked.depths) - len(on(model, AdaInfer()).prompts(QUESTIONS[:1])[0])
    head = 2 * model.backbone.width * model.backbone.config.vocab_size
    assert looked.cost.flops - plain.cost.flops == pytest.approx((n_written + 1) * len(EXITS) * head)


# The lens


@by_shape
@pytest.mark.parametrize(("n_loops", "n_layers"), [(1, 2), (2, 3), (3, 5), (4, 6)])
def test_leaving_at_a_layer_is_the_model_cut_there(n_loops, n_layers, arch):
    model = base(arch)
    method = AdaInfer(exits=EXITS, stop="fixed", stop_threshold=float(n_loops))
    shallow = truncated(arch, n_layers)
    assert_equal(on(model, method).answer_logits(MIXED), shallow.answer_logits(MIXED))
    ours, theirs = (m.generate(QUESTIONS[:2], max_new_tokens=5) for m in (on(model, method), shallow))
    assert [g.text for g in ours] == [g.text for g in theirs]
    assert {n for _, n in ours[0].depths} == {n_layers}


@by_shape
def test_the_lens_at_the_last_layer_is_hugging_faces_logits(arch):
    model = on(base(arch), change(LEAVES, stop_threshold=math.inf))
    ids = random_ids(1, 9) % model.backbone.config.vocab_size
    context = model.new_context(model.batch(model.rows(MIXED[:1])))
    context.depth.asked_B = None
    with torch.no_grad():
        states = context.read(model.backbone.embed(ids))
        theirs = model.backbone.lm(input_ids=ids).logits
    assert torch.equal(model.backbone.head(states), theirs)


# Features


def features_of(model: LatentModel, examples=MIXED) -> Tensor:
    """Return what a classifier would look at (T, M, F)."""
    use_rule(model, stop="classifier", stop_features=("gap", "top", "attention", "mlp", "block", "depth"))
    model.loop.stop.classifier.clear()
    found = scan_loop(model, examples).features_TMF
    assert found is not None
    return found


@by_shape
def test_features_are_what_the_layers_give(arch):
    """Taken from the modules of a plain pass over one row, by the names that they have in Hugging Face's code."""
    plain, example = copy.deepcopy(base(arch)), MIXED[3]
    features = features_of(on(plain, AdaInfer(exits=EXITS)), [example])
    backbone, outputs = plain.backbone, {}
    names = {"gpt2": ("attn", "mlp")}.get(arch, ("self_attn", "mlp"))
    if arch == "gemma3":
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
    for i, layer in enumerate(backbone.layers, 1):
        for name, module in (
            ("attention", getattr(layer, names[0])),
            ("mlp", getattr(layer, names[1])),
            ("block", layer),
        ):
            module.register_forward_hook(
                lambda module, args, out, key=(name, i): outputs.update(
                    {key: out if isinstance(out, Tensor) else out[0]}
                )
            )
    row = plain.rows([example])[0]
    with torch.no_grad():
        backbone.lm(input_ids=torch.tensor([row.ids()]))
    batch = plain.batch([row])
    for t, d in enumerate((*EXITS, L)):
        for name in ("attention", "mlp", "block"):
            now, before = (outputs[name, i][0, batch.predict_at_U].float() for i in (d, d - 1))
            expected = torch.nn.functional.cosine_similarity(now, before, dim=-1)
            at = ("gap", "top", "attention", "mlp", "block", "depth").index(name)
            assert_close(features[t, :, at], expected)
        best = backbone.head(backbone.norm(outputs["block", d][0, batch.predict_at_U])).softmax(-1).topk(2).values
        assert_close(features[t, :, 0], best[:, 0] - best[:, 1])
        assert_close(features[t, :, 1], best[:, 0])
    assert_close(features[:, 0, 5], torch.tensor([*EXITS, L]) / L)


@by_arch
def test_features_stay_in_their_bounds_and_do_not_see_the_padding(arch):
    model = on(base(arch), AdaInfer(exits=EXITS))
    features = features_of(model)
    gap, top, cosines = features[..., 0], features[..., 1], features[..., 2:5]
    assert ((gap >= 0) & (gap <= top) & (top <= 1) & (top >= 1 / model.backbone.config.vocab_size)).all()
    assert (cosines.abs() <= 1 + 1e-6).all() and cosines.std() > 0.05
    alone = torch.cat([features_of(model, [example]) for example in MIXED], dim=1)
    assert_close(features, alone)


def test_features_do_not_depend_on_the_order_of_the_words():
    model = copy.deepcopy(base())
    features = features_of(on(model, AdaInfer(exits=EXITS)))
    order = torch.randperm(model.backbone.config.vocab_size, generator=torch.Generator().manual_seed(0))
    head = model.backbone.lm.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
    assert_close(features_of(on(model, AdaInfer(exits=EXITS))), features)


@by_arch
def test_layers_that_do_nothing_are_noticed_after_the_first_of_them(arch):
    model, m = copy.deepcopy(base(arch)), 3
    with torch.no_grad():
        for layer in model.backbone.layers[m:]:
            names = ("attn.c_proj", "mlp.c_proj") if arch == "gpt2" else ("self_attn.o_proj", "mlp.down_proj")
            for name in names:
                for parameter in layer.get_submodule(name).parameters():
                    parameter.zero_()
    every = tuple(range(1, L))
    still = on(model, AdaInfer(exits=every, stop="cos", stop_threshold=6.0, compare_init=False))
    batch, thought = read(still, MIXED)
    assert set(thought.deep[-1].depths_BL.flatten()[batch.predict_at_U].tolist()) == {m + 1}
    features = features_of(on(model, AdaInfer(exits=every[1:])))
    assert features[m - 1 :, :, 4].min() > 1 - 1e-5 and features[0, :, 4].max() < 1 - 1e-3
    agrees = scan_loop(on(model, AdaInfer(exits=every, stop="gap")), MIXED).agrees_TM
    assert agrees[m - 1 :].all() and not agrees[0].all()


def test_a_head_that_says_nothing_has_no_gap():
    model = copy.deepcopy(base())
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.zero_()
    features = features_of(on(model, AdaInfer(exits=EXITS)))
    assert features[..., 0].abs().max() == 0
    assert_close(features[..., 1], torch.full(features.shape[:2], 1 / model.backbone.config.vocab_size))


# Keys and values after leaving


@by_shape
@pytest.mark.parametrize("policy", ["lazy_backfill", "full_compute"])
def test_exact_policies_give_every_token_the_base_models_state_at_its_layer(policy, arch):
    model = base(arch)
    exiting = on(model, change(FORCED, kv_missing=policy))
    at_layer = {t: torch.cat(truncated(arch, d).answer_logits(MIXED)) for t, d in enumerate((*EXITS, L), 1)}
    for seed in range(2):
        wanted, of_U = pattern(exiting, MIXED, seed)
        found = torch.cat(logits_with(exiting, MIXED, wanted))
        expected = torch.stack([at_layer[t][u] for u, t in enumerate(of_U.tolist())])
        assert_close(found, expected)


@by_arch
def test_propagating_is_not_exact_but_where_nothing_is_skipped(arch):
    model = base(arch)
    exiting = on(model, change(FORCED, kv_missing="propagate"))
    wanted, of_U = pattern(exiting, MIXED)
    found, expected = torch.cat(logits_with(exiting, MIXED, wanted)), torch.cat(model.answer_logits(MIXED))
    is_deep_U = of_U == len(EXITS) + 1  # tokens that run all layers, among others that do not
    gaps = (found - expected).abs().amax(1)[is_deep_U]
    assert gaps.max() > 1e-2
    full = torch.cat(logits_with(exiting, MIXED, torch.full_like(wanted, len(EXITS) + 1)))
    assert torch.equal(full, expected)


def token_by_token(model: LatentModel, example, wanted_S: Tensor) -> tuple[Tensor, ExitCache]:
    """Return the states (S, D) of a row that is read in pieces, and the cache."""
    batch = model.batch(model.rows([example]))
    context = model.new_context(batch)
    context.depth.wanted_BS = wanted_S[None]
    embeds, n_asked = model.backbone.embed(batch.ids_BS), int(context.depth.asked_B) + 1
    with torch.no_grad():
        parts = [context.read(embeds[:, :n_asked])]
        parts += [context.read(embeds[:, i : i + 1]) for i in range(n_asked, embeds.shape[1])]
    return torch.cat(parts, dim=1)[0], context.cache


@by_shape
@by_policy
def test_writing_token_by_token_equals_reading_at_once(policy, arch):
    model = on(base(arch), change(FORCED, kv_missing=policy))
    wanted, _ = pattern(model, [SHORT])
    batch, thought = read(model, [SHORT], wanted)
    states, _ = token_by_token(model, SHORT, wanted[0])
    at = batch.predict_at_U
    assert_close(states[at], thought.deep[-1].states_BLD[0, at])


@by_shape
def test_after_a_token_of_full_depth_the_cache_is_that_of_the_base_model(arch):
    model = on(base(arch), FORCED)
    wanted, _ = pattern(model, [SHORT])
    wanted[0, -1] = len(EXITS) + 1
    _, lazy = token_by_token(model, SHORT, wanted[0])
    _, whole = token_by_token(model, SHORT, torch.full_like(wanted[0], len(EXITS) + 1))
    assert lazy.left is None and whole.left is None
    assert set(lazy.slots) == set(whole.slots) == set(range(len(EXITS) + 1))
    for key, slot in lazy.slots.items():
        order = slot.positions_BP[0].masked_fill(~slot.real_BP[0], 10**6).argsort()[: whole.slots[key].length]
        assert torch.equal(slot.positions_BP[0, order], whole.slots[key].positions_BP[0])
        for ours, theirs in ((slot.keys, whole.slots[key].keys), (slot.values, whole.slots[key].values)):
            for a, b in zip(ours, theirs):
                assert_close(a[:, :, order], b)


@by_arch
def test_what_is_left_behind_is_a_suffix_that_a_deep_token_completes(arch):
    model = on(base(arch), FORCED)
    wanted, _ = pattern(model, [SHORT])
    wanted[0, -3:] = torch.tensor([1, 3, 2])  # the token before the last goes deeper than its neighbours
    _, cache = token_by_token(model, SHORT, wanted[0])
    left = cache.left
    assert left is not None
    done = left.done_BW[0][left.tokens.real[0]].tolist()
    assert done == sorted(done, reverse=True)
    assert done[-1] == 2 and done[-2] == 3 and len(EXITS) + 1 not in done
    assert left.tokens.positions_RN[0, -1].item() == len(wanted[0]) - 1


@by_policy
@by_arch
def test_a_batch_of_mixed_exits_equals_single_rows_in_reading_and_writing(arch, policy):
    model = on(base(arch), change(LEAVES, kv_missing=policy))
    together = model.answer_logits(MIXED)
    batch, thought = read(model, MIXED)
    assert len(set(thought.deep[-1].depths_BL.flatten()[batch.predict_at_U].tolist())) > 2
    for example, logits in zip(MIXED, together):
        assert_close(model.answer_logits([example])[0], logits)
    for question, one in zip(QUESTIONS[:3], model.generate(QUESTIONS[:3], max_new_tokens=6)):
        (alone,) = model.generate([question], max_new_tokens=6)
        assert (one.text, one.depths) == (alone.text, alone.depths)
        assert one.cost.flops == pytest.approx(alone.cost.flops, rel=1e-12)


@by_policy
def test_no_token_sees_a_later_one(policy):
    model = on(base(), change(LEAVES, kv_missing=policy))
    example = MIXED[3]
    other = dataclasses.replace(example, steps=(*example.steps[:-1], "4 - 4 = 4"), answer="4")
    left, right = (model.answer_logits([one])[0] for one in (example, other))
    ids = [row.ids() for row in model.rows([example, other])]
    n_same = next(i for i, (a, b) in enumerate(zip(*ids)) if a != b) - len(model.prompts([example.question])[0]) + 1
    assert_close(left[:n_same], right[:n_same])
    assert n_same > 10 and (left[n_same:] - right[n_same:]).abs().max() > 1e-3


# Cost


@by_arch
@by_policy
def test_flops_of_a_row_are_those_of_what_was_run(policy, arch):
    model = on(base(arch), change(LEAVES, stop="delta", stop_threshold=0.3, kv_missing=policy))
    backbone, meter = model.backbone, Meter(1, model.device)
    _, thought = read(model, MIXED[3:4], meter=meter)
    depths = thought.deep[-1].depths_BL[0]
    n_asked = int(thought.context.depth.asked_B)
    assert len(set(depths[n_asked:].tolist())) > 1
    ends = torch.tensor([0, *EXITS, L])
    sections = torch.bucketize(depths, ends)
    ran = depths.clone()
    if policy == "lazy_backfill":  # a deep token completes everything before it
        ran = depths.flip(0).cummax(0).values.flip(0)
    elif policy == "full_compute":
        ran[:] = L
    else:
        ran[:n_asked] = depths[n_asked]
    keys = ran * torch.arange(1, len(ran) + 1)
    looks = sections[n_asked:].clamp(max=len(EXITS)).sum().item() * STATE_FLOPS * backbone.width
    expected = flops_of(backbone, ran.sum()[None] / L, keys.sum()[None] / L, torch.zeros(1)) + looks
    if policy == "propagate":
        expected += ((L - ran).sum() * 2 * backbone.n_made_by(range(1))).item()
    assert meter.costs(backbone)[0].flops == pytest.approx(expected.item(), rel=1e-9)


@by_arch
def test_words_are_read_out_once_for_looking_and_writing(arch):
    """A token that leaves at its first look costs its layers and one reading; one that does not, a reading more."""
    model = on(base(arch), AdaInfer(exits=(3,), stop="top_prob", stop_threshold=0.0))
    backbone = model.backbone
    (found,) = model.generate(QUESTIONS[:1], max_new_tokens=1)
    n = len(model.prompts(QUESTIONS[:1])[0])
    first = range(1, n + 1)
    layers = flops_of(backbone, torch.tensor([n * 3 / L]), torch.tensor([sum(first) * 3 / L]), torch.ones(1))
    assert found.cost.flops == pytest.approx(layers.item(), rel=1e-9)
    truth = truncated(arch, 3).generate(QUESTIONS[:1], max_new_tokens=1)[0]
    assert found.text == truth.text
    late = on(base(arch), AdaInfer(exits=(3,), stop="top_prob", stop_threshold=2.0))
    (found,) = late.generate(QUESTIONS[:1], max_new_tokens=1)
    whole = flops_of(backbone, torch.tensor([float(n)]), torch.tensor([float(sum(first))]), 2 * torch.ones(1))
    assert found.cost.flops == pytest.approx(whole.item(), rel=1e-9)


@by_shape
def test_propagation_makes_the_keys_and_values_of_the_layers_own_maps(arch):
    """Keys of skipped layers are what those layers would make of the last state, with the position of the token."""
    model = on(base(arch), AdaInfer(exits=(3,), stop="fixed", stop_threshold=1.0, kv_missing="propagate"))
    batch = model.batch(model.rows(MIXED[3:4]))
    _, thought = read(model, MIXED[3:4])
    context = thought.context if thought.after is None else thought.after
    slot = context.cache.slots[1]
    states = truncated(arch, 3).backbone(model.backbone.embed(batch.ids_BS), layers=range(3))
    for i, layer in enumerate(slot.layers):
        alone = DynamicCache()
        model.backbone(states, layers=range(layer, layer + 1), cache=alone, positions_BL=slot.positions_BP)
        assert_close(slot.keys[i], alone.layers[layer].keys)
        assert_close(slot.values[i], alone.layers[layer].values)
    maps = ("c_attn",) if arch == "gpt2" else ("k_proj", "v_proj")
    weights = model.backbone.layers[3].named_parameters()
    n_made = sum(p.numel() for name, p in weights if name.split(".")[-2] in maps)
    assert model.backbone.n_made_by(range(3, 4)) == n_made > 0

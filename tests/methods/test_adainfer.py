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
from innerloop.decoder.cost import CostMeter, flops_of
from innerloop.halting.rule import STATE_FLOPS
from innerloop.methods.depth.exit_pass import ExitCache
from innerloop.model.stopping import use_rule
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from tests.close import assert_close
from tests.methods.tools import MIXED, QUESTIONS, by_arch, change
from tests.models import tiny_model

L = 6
EXITS = (2, 3, 5)
SHORT = MIXED[2]
POLICIES = ("lazy_backfill", "propagate", "full_compute")
GEMMA = {"gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2}}
LEAVES = AdaInfer(layers=EXITS, stop={"rule": "top_prob", "threshold": 0.5})
FORCED = change(LEAVES, stop={"threshold": math.inf})  # tokens leave when they are told to
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


@torch.no_grad()
def read(
    model: LatentModel, examples, wanted_BS: Tensor | None = None, meter: CostMeter | None = None
) -> tuple[Batch, Thought, Tensor]:
    """Read whole rows, to the logits (U, V) of what is written; each token runs ``wanted_BS`` sections."""
    batch = model.batch(model.rows(examples))
    context = model.new_context(batch, meter)
    context.depth.wanted_BS = wanted_BS
    thought = model.think(batch, context=context)
    return batch, thought, model.written_logits(batch, thought)


def written_depths(batch: Batch, thought: Thought) -> list[int]:
    """Return after which layers the tokens that write have left."""
    return thought.deep[-1].depths_BL.flatten()[batch.predict_at_U].tolist()


def pattern(model: LatentModel, examples, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw how many sections each token runs; return it (B, S), and how many those that write ran (U,)."""
    batch, generator = model.batch(model.rows(examples)), torch.Generator().manual_seed(seed)
    wanted = torch.randint(1, len(EXITS) + 2, batch.ids_BS.shape, generator=generator)
    return wanted, wanted.flatten()[batch.predict_at_U]


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Neutral settings


@by_shape
@by_policy
def test_a_rule_that_never_fires_is_the_base_model_bit_for_bit(policy, arch):
    model, never = base(arch), change(FORCED, kv_missing=policy)
    for method in (AdaInfer(), never, change(never, stop={"threshold": 0.0, "min_loops": 4})):
        assert_equal(on(model, method).answer_logits(MIXED), model.answer_logits(MIXED))
    written, bare, plain = (
        m.generate(QUESTIONS[:1], max_new_tokens=5)[0] for m in (on(model, never), on(model, AdaInfer()), model)
    )
    assert written.text == plain.text and bare.cost.flops == plain.cost.flops
    looks = (len(written.depths) - len(model.prompts(QUESTIONS[:1])[0]) + 1) * len(EXITS)
    head = 2 * model.backbone.width * model.backbone.config.vocab_size
    assert written.cost.flops - plain.cost.flops == pytest.approx(looks * head)


# The lens


@by_shape
@pytest.mark.parametrize(("n_loops", "n_layers"), [(1, 2), (2, 3), (3, 5), (4, 6)])
def test_leaving_at_a_layer_is_the_model_cut_there(n_loops, n_layers, arch):
    model = base(arch)
    method = AdaInfer(layers=EXITS, stop={"rule": "fixed", "threshold": float(n_loops)})
    shallow = truncated(arch, n_layers)
    assert_equal(on(model, method).answer_logits(MIXED), shallow.answer_logits(MIXED))
    ours, theirs = (m.generate(QUESTIONS[:2], max_new_tokens=5) for m in (on(model, method), shallow))
    assert [g.text for g in ours] == [g.text for g in theirs]
    assert {n for _, n in ours[0].depths} == {n_layers}


# Features

FEATURES = ("gap", "top", "attention", "mlp", "block", "depth")


def features_of(model: LatentModel, examples=MIXED) -> Tensor:
    """Return what a classifier would look at (T, M, F)."""
    use_rule(model, rule="classifier", features=FEATURES)
    model.loop.stop.classifier.clear()
    return scan_loop(model, examples).features_TMF


@by_shape
def test_features_are_what_the_layers_give(arch):
    """Taken from the modules of a plain pass over one row, by the names that they have in Hugging Face's code."""
    plain, outputs = copy.deepcopy(base(arch)), {}
    features = features_of(on(plain, AdaInfer(layers=EXITS)), MIXED[3:4])
    backbone, names = plain.backbone, {"gpt2": ("attn", "mlp"), "llama": ("self_attn", "mlp")}.get(arch)
    names = names or ("post_attention_layernorm", "post_feedforward_layernorm")

    def noted(key):
        return lambda module, args, out: outputs.update({key: out if isinstance(out, Tensor) else out[0]})

    for i, layer in enumerate(backbone.layers, 1):
        parts = {"attention": getattr(layer, names[0]), "mlp": getattr(layer, names[1]), "block": layer}
        for name, module in parts.items():
            module.register_forward_hook(noted((name, i)))
    row = plain.rows(MIXED[3:4])[0]
    with torch.no_grad():
        backbone.lm(input_ids=torch.tensor([row.ids()]))
    at_U = plain.batch([row]).predict_at_U
    for t, d in enumerate((*EXITS, L)):
        for name in ("attention", "mlp", "block"):
            now, before = (outputs[name, i][0, at_U].float() for i in (d, d - 1))
            cosine = torch.nn.functional.cosine_similarity(now, before, dim=-1)
            assert_close(features[t, :, FEATURES.index(name)], cosine)
        best = backbone.head(backbone.norm(outputs["block", d][0, at_U])).softmax(-1).topk(2).values
        assert_close(features[t, :, 0], best[:, 0] - best[:, 1])
        assert_close(features[t, :, 1], best[:, 0])
    assert_close(features[:, 0, 5], torch.tensor([*EXITS, L]) / L)


@by_arch
def test_features_stay_in_their_bounds_whatever_the_padding_and_the_order_of_the_words(arch):
    model = copy.deepcopy(base(arch))
    head, n_words = model.backbone.lm.get_output_embeddings(), model.backbone.config.vocab_size
    if arch == "gpt2":  # its words are embedded by the table of the head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model = on(model, AdaInfer(layers=EXITS))
    features = features_of(model)
    gap, top, cosines = features[..., 0], features[..., 1], features[..., 2:5]
    assert ((gap >= 0) & (gap <= top) & (top <= 1) & (top >= 1 / n_words)).all()
    assert (cosines.abs() <= 1 + 1e-6).all() and cosines.std() > 0.05
    assert_close(features, torch.cat([features_of(model, [example]) for example in MIXED], dim=1))
    with torch.no_grad():
        head.weight.copy_(head.weight[torch.randperm(n_words, generator=torch.Generator().manual_seed(0))])
        assert_close(features_of(model), features)
        head.weight.zero_()
    silent = features_of(model)  # a head that says nothing has no gap
    assert silent[..., 0].abs().max() == 0
    assert_close(silent[..., 1], torch.full_like(silent[..., 1], 1 / n_words))


@by_arch
def test_layers_that_do_nothing_are_noticed_after_the_first_of_them(arch):
    model, m, every = copy.deepcopy(base(arch)), 3, tuple(range(1, L))
    for name, parameter in model.backbone.layers[m:].named_parameters():
        if any(part in name for part in ("c_proj", "o_proj", "down_proj")):
            parameter.data.zero_()
    still = on(model, AdaInfer(layers=every, stop={"rule": "cos", "threshold": 6.0, "min_loops": 2}))
    assert set(written_depths(*read(still, MIXED)[:2])) == {m + 1}
    features = features_of(on(model, AdaInfer(layers=every[1:])))
    assert features[m - 1 :, :, 4].min() > 1 - 1e-5 and features[0, :, 4].max() < 1 - 1e-3
    agrees = scan_loop(on(model, AdaInfer(layers=every, stop={"rule": "gap"})), MIXED).agrees_TM
    assert agrees[m - 1 :].all() and not agrees[0].all()


# Keys and values after leaving


@by_shape
@pytest.mark.parametrize("policy", ["lazy_backfill", "full_compute"])
def test_exact_policies_give_every_token_the_base_models_state_at_its_layer(policy, arch):
    model = on(base(arch), change(FORCED, kv_missing=policy))
    at_layer = {t: torch.cat(truncated(arch, d).answer_logits(MIXED)) for t, d in enumerate((*EXITS, L), 1)}
    for seed in range(2):
        wanted, of_U = pattern(model, MIXED, seed)
        expected = torch.stack([at_layer[t][u] for u, t in enumerate(of_U.tolist())])
        assert_close(read(model, MIXED, wanted)[2], expected)


@by_arch
def test_propagating_is_not_exact_but_where_nothing_is_skipped(arch):
    model = on(base(arch), change(FORCED, kv_missing="propagate"))
    (wanted, of_U), expected = pattern(model, MIXED), torch.cat(base(arch).answer_logits(MIXED))
    gaps = (read(model, MIXED, wanted)[2] - expected).abs().amax(1)
    assert gaps[of_U == len(EXITS) + 1].max() > 1e-2  # tokens that run all layers, among others that do not
    assert torch.equal(read(model, MIXED, torch.full_like(wanted, len(EXITS) + 1))[2], expected)


@torch.no_grad()
def token_by_token(model: LatentModel, wanted_S: Tensor) -> tuple[Tensor, ExitCache]:
    """Return the states (S, D) of a row that is read in pieces, and the cache."""
    batch = model.batch(model.rows([SHORT]))
    context = model.new_context(batch)
    context.depth.wanted_BS = wanted_S[None]
    embeds, n_asked = model.backbone.embed(batch.ids_BS), int(context.depth.asked_B) + 1
    pieces = embeds.split([n_asked, *[1] * (embeds.shape[1] - n_asked)], dim=1)
    return torch.cat([context.read(piece) for piece in pieces], dim=1)[0], context.cache


@by_shape
@by_policy
def test_writing_token_by_token_equals_reading_at_once(policy, arch):
    model = on(base(arch), change(FORCED, kv_missing=policy))
    wanted, _ = pattern(model, [SHORT])
    batch, thought, _ = read(model, [SHORT], wanted)
    at = batch.predict_at_U
    assert_close(token_by_token(model, wanted[0])[0][at], thought.deep[-1].states_BLD[0, at])


@by_shape
def test_after_a_token_of_full_depth_the_cache_is_that_of_the_base_model(arch):
    """Until then, what is left behind is a suffix of the row."""
    model = on(base(arch), FORCED)
    wanted = pattern(model, [SHORT])[0][0]
    wanted[-3:] = torch.tensor([1, 3, 2])  # the token before the last goes deeper than its neighbours
    left = token_by_token(model, wanted)[1].left
    done = left.done_BW[0][left.tokens.real[0]].tolist()
    assert done == sorted(done, reverse=True) and done[-2:] == [3, 2] and len(EXITS) + 1 not in done
    assert left.tokens.positions_RN[0, -1].item() == len(wanted) - 1
    wanted[-1] = len(EXITS) + 1
    lazy, whole = (token_by_token(model, w)[1] for w in (wanted, torch.full_like(wanted, len(EXITS) + 1)))
    assert lazy.left is None and whole.left is None
    assert set(lazy.slots) == set(whole.slots) == set(range(len(EXITS) + 1))
    for key, slot in lazy.slots.items():
        other = whole.slots[key]
        order = slot.positions_BP[0].masked_fill(~slot.real_BP[0], 10**6).argsort()[: other.length]
        assert torch.equal(slot.positions_BP[0, order], other.positions_BP[0])
        for ours, theirs in zip((*slot.keys, *slot.values), (*other.keys, *other.values)):
            assert_close(ours[:, :, order], theirs)


@by_policy
@by_arch
def test_a_batch_of_mixed_exits_equals_single_rows_in_reading_and_writing(arch, policy):
    model = on(base(arch), change(LEAVES, kv_missing=policy))
    together = model.answer_logits(MIXED)
    assert len(set(written_depths(*read(model, MIXED)[:2]))) > 2
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
    model = on(base(arch), change(LEAVES, stop={"rule": "delta", "threshold": 0.3}, kv_missing=policy))
    backbone, meter = model.backbone, CostMeter(1, model.device)
    thought = read(model, MIXED[3:4], meter=meter)[1]
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
    n = len(base(arch).prompts(QUESTIONS[:1])[0])
    for threshold, ran, n_read in ((0.0, 3, 1), (2.0, L, 2)):
        model = on(base(arch), AdaInfer(layers=(3,), stop={"rule": "top_prob", "threshold": threshold}))
        (found,) = model.generate(QUESTIONS[:1], max_new_tokens=1)
        positions, keys = torch.tensor([n * ran / L]), torch.tensor([n * (n + 1) / 2 * ran / L])
        expected = flops_of(model.backbone, positions, keys, torch.tensor([float(n_read)]))
        assert found.cost.flops == pytest.approx(expected.item(), rel=1e-9)
        assert found.text == truncated(arch, ran).generate(QUESTIONS[:1], max_new_tokens=1)[0].text


@by_shape
def test_propagation_makes_the_keys_and_values_of_the_layers_own_maps(arch):
    """Keys of skipped layers are what those layers would make of the last state, with the position of the token."""
    model = on(base(arch), AdaInfer(layers=(3,), stop={"rule": "fixed", "threshold": 1.0}, kv_missing="propagate"))
    batch, thought, _ = read(model, MIXED[3:4])
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

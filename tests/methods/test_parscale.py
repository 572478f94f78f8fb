"""ParScale against the bare Hugging Face model, one stream and one row at a time (parscale.md, section 9)."""

import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import DynamicCache

from innerloop import Cot, InputError, LatentModel, Looped, ParScale
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.masks import window_of
from innerloop.methods.depth.streams import Aggregator
from innerloop.methods.depth.tying import rebuild
from tests.close import ROUNDED, assert_close
from tests.fields import make
from tests.methods.test_every_depth_method import NO_DROPOUT
from tests.methods.tools import MIXED, QUESTIONS, by_arch, gradients, lean_towards_end, logits_of, stir
from tests.models import WINDOW, answers_of, saved, tiny_model


def parscale(arch: str = "llama", **fields) -> LatentModel:
    """Make a model of three layers whose prefixes and weights are not at their start."""
    fields = {"streams": 2, "n_prefix": 3, **fields}
    model = tiny_model(make(ParScale, **fields), arch, **(NO_DROPOUT if arch == "gpt2" else {}))
    stir(model, 0.5)
    return model


def base_of(model: LatentModel) -> LatentModel:
    """The decoder alone."""
    return LatentModel(model.backbone, model.tokenizer, Cot()).eval()


ROOT = Path(__file__).parents[2]

# The slow path


def masks(lm, n_prefix: int, n: int, bias: Tensor | float = 0.0) -> dict[str, Tensor] | Tensor:
    """Which of the columns each query sees, written out: all of the prefix, and what lies behind it, in the window."""
    window = window_of(lm.config)

    def made(reach: int | None) -> Tensor:
        mask = torch.full((n, n_prefix + n), -1e9, dtype=lm.dtype)
        for q in range(n):
            for k in range(n_prefix + n):
                at = k - n_prefix
                if at < 0 or (at <= q and (reach is None or q - at < reach)):
                    mask[q, k] = bias if at < 0 else 0.0
        return mask[None, None]

    if not getattr(lm.config, "layer_types", None):
        return made(window)
    return {"full_attention": made(None), "sliding_attention": made(window)} if window else made(None)


def streams(model: LatentModel, ids: list[int]) -> Tensor:
    """The states (P, L, D) of each stream, after the final norm: no library code but the prefixes themselves."""
    lm, parts, found = model.backbone.lm, model.depth.prefixes, []
    for p in range(model.method.streams):
        cache, n_prefix = DynamicCache(), model.method.n_prefix
        if parts is not None:
            for i, (keys, values) in enumerate(zip(parts.keys, parts.values)):
                cache.update(keys[None, p], values[None, p], i)
        inputs = {"inputs_embeds": lm.get_input_embeddings()(torch.tensor([ids])), "past_key_values": cache}
        bias = 0.0 if parts is None or parts.bias is None else parts.bias[p]
        inputs["attention_mask"] = masks(lm, n_prefix if parts is not None else 0, len(ids), bias)
        out = lm.get_decoder()(**inputs, position_ids=torch.arange(len(ids))[None], use_cache=True)
        found.append(out.last_hidden_state[0])
    return torch.stack(found)


def mixed(model: LatentModel, states_PLD: Tensor) -> Tensor:
    """The card's aggregation (L, D), channel by channel."""
    mix, n = model.depth.mix, len(states_PLD)
    z = torch.stack([states_PLD[p, :, d] for d in range(states_PLD.shape[-1]) for p in range(n)], dim=-1)
    w = torch.softmax(
        mix.outer.weight @ silu(mix.inner.weight @ z.T + mix.inner.bias[:, None]) + mix.outer.bias[:, None], 0
    )
    w = (1 - mix.smoothing) * w + mix.smoothing / n
    return sum(w[p, :, None] * states_PLD[p] for p in range(n))


def slowly(model: LatentModel, ids: list[int]) -> Tensor:
    """The logits (L, V) of a row."""
    return model.backbone.head(mixed(model, streams(model, ids)))


@torch.no_grad()
def written_slowly(model: LatentModel, question: str, n: int) -> list[int]:
    """Greedy decoding that reads everything anew for each token."""
    ids, first = model.tokenizer.encode(question + "\n"), len(model.tokenizer.encode(question + "\n"))
    while len(ids) - first < n and (len(ids) == first or ids[-1] != model.tokenizer.eos_token_id):
        logits = slowly(model, ids)[-1].clone()
        logits[model.suppressed_ids()] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[first:]


# Section 9


@pytest.mark.parametrize("fields", [{}, {"n_prelude": 1, "n_coda": 1}])
def test_1_one_stream_is_the_decoder_bit_for_bit(arch, fields):
    model = tiny_model(ParScale(streams=1, **fields), arch)
    assert list(model.depth.parameters()) == []
    assert torch.equal(answers_of(model, 6), answers_of(base_of(model), 6))
    ours, theirs = (one.generate(QUESTIONS, max_new_tokens=5) for one in (model, base_of(model)))
    assert [one.ids for one in ours] == [one.ids for one in theirs]


@by_arch
def test_2_equal_prefixes_make_equal_streams_whose_mixture_does_not_depend_on_the_weights(arch):
    model = parscale(arch, streams=3)
    for side in (model.depth.prefixes.keys, model.depth.prefixes.values):
        for parameter in side:
            parameter.data[:] = parameter.data[:1].clone()
    found = streams(model, model.tokenizer.encode(QUESTIONS[0]))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    before = answers_of(model)
    model.depth.mix.outer.bias.data += torch.tensor([2.0, 0.0, -2.0])
    assert_close(answers_of(model), before)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_3_weights_sum_to_one_and_none_is_below_its_share_of_the_smoothing(smoothing):
    torch.manual_seed(0)
    mix = Aggregator(8, 4, smoothing)
    states = torch.randn(2, 4, 5, 8)
    assert_close(mix(states), torch.full((2, 5, 4), 0.25))
    torch.nn.init.normal_(mix.outer.weight, std=50.0)
    weights = mix(states)
    assert weights.dtype == torch.float32 and bool((weights >= smoothing / 4).all())
    assert_close(weights.sum(-1), torch.ones(2, 5))
    assert (weights.std() > 0.1) == (smoothing < 1)


@by_arch
def test_4_the_order_of_the_streams_does_not_matter(arch):
    model, order = parscale(arch, streams=3), torch.tensor([2, 0, 1])
    before, parts, mix = answers_of(model), model.depth.prefixes, model.depth.mix
    for parameter in (*parts.keys, *parts.values, mix.outer.weight, mix.outer.bias):
        parameter.data = parameter.data[order]
    mix.inner.weight.data = mix.inner.weight.data.unflatten(1, (-1, 3))[:, :, order].flatten(1)
    assert_close(answers_of(model), before)


def test_5_without_prefixes_all_streams_are_the_decoder(arch):
    model = parscale(arch, n_prefix=0, streams=3)
    assert model.depth.prefixes is None
    assert_close(answers_of(model), answers_of(base_of(model)))


@pytest.mark.parametrize("n_streams", [2, 4])
def test_6_cached_decoding_is_the_full_forward_pass_and_batches_are_their_rows(arch, n_streams):
    """The engine, batched and row by row, writes what reading everything anew for each token does."""
    model = parscale(arch, streams=n_streams, prefix_bias=-0.5 * (n_streams == 2))
    lean_towards_end(model, 2.0)
    expected = [written_slowly(model, question, 8) for question in QUESTIONS]
    assert len({len(ids) for ids in expected}) > 1
    together = model.generate(QUESTIONS, max_new_tokens=8)
    assert [one.ids for one in together] == expected
    assert [model.generate([question], max_new_tokens=8)[0].ids for question in QUESTIONS] == expected
    assert [one.ids for one in model.generate(QUESTIONS, max_new_tokens=8, batch_size=2)] == expected


@pytest.mark.parametrize("prefix_bias", [0.0, -1.0])
def test_7_the_logits_are_those_of_the_slow_path(arch, prefix_bias):
    """Also behind the window of a layer, from where the prefix is still seen."""
    model = parscale(arch, prefix_bias=prefix_bias)
    rows = model.rows(MIXED)
    assert max(len(row) for row in rows) > 2 * WINDOW
    with torch.no_grad():
        for row, logits in zip(rows, logits_of(model, rows)):
            supervised = slowly(model, row.ids())[:-1][-len(logits) :]
            assert_close(logits, supervised, ROUNDED * 5)


@by_arch
@pytest.mark.parametrize("prefix_bias", [0.0, -1.0])
def test_8_gradients_are_those_of_the_slow_path_and_differ_between_streams(arch, prefix_bias):
    model = parscale(arch, prefix_bias=prefix_bias).train()
    row = model.rows(MIXED[:1])[0]
    ours = gradients(model, model(model.batch([row])).loss)
    logits, ids = slowly(model, row.ids()), torch.tensor(row.ids())
    n = model.batch([row]).n_targets[0]
    theirs = gradients(model, torch.nn.functional.cross_entropy(logits[:-1][-n:], ids[-n:]))
    assert theirs.keys() <= ours.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, ROUNDED * 20)
    first = ours["depth.prefixes.keys.0"]
    assert first.abs().max() > 0 and not torch.allclose(first[0], first[1])


def test_9_states_are_interleaved_channel_by_channel():
    """With a second stream of zeros every other column of W1, from the second on, is without effect."""
    torch.manual_seed(0)
    mix, states = Aggregator(8, 2, 0.1), torch.randn(1, 2, 5, 8)
    torch.nn.init.normal_(mix.outer.weight)
    states[:, 1] = 0.0
    before = mix(states)
    mix.inner.weight.data[:, 1::2] = 7.0
    assert torch.equal(mix(states), before)
    mix.inner.weight.data[:, ::2] += 1.0
    assert not torch.allclose(mix(states), before)


# With the loop, training, costs, disk


@by_arch
def test_streams_of_a_loop_without_prefixes_are_the_loop(arch):
    model = parscale(arch, n_prefix=0, n_prelude=1, max_loops=3)
    loop = LatentModel(model.backbone, model.tokenizer, Looped(n_prelude=1, max_loops=3)).eval()
    assert_close(answers_of(model), answers_of(loop))


@by_arch
def test_streams_of_a_loop_are_those_of_the_unrolled_decoder(arch):
    """Every iteration has the prefixes of its layers."""
    model, order = parscale(arch, n_prelude=1, max_loops=2, prefix_bias=-0.5), [0, 1, 2, 1, 2]
    backbone = Backbone(copy.deepcopy(model.backbone.lm))
    rebuild(backbone, [[layer] for layer in order])
    twin = LatentModel(backbone, model.tokenizer, ParScale(n_prefix=3, prefix_bias=-0.5)).eval()
    parts, own = twin.depth.prefixes, model.depth.prefixes
    twin.depth.mix.load_state_dict(model.depth.mix.state_dict())
    parts.bias.data = own.bias.data
    for place, layer in enumerate(order):
        parts.keys[place].data, parts.values[place].data = own.keys[layer].data, own.values[layer].data
    assert_close(answers_of(model), answers_of(twin))
    lean_towards_end(model, 1.0), lean_towards_end(twin, 1.0)
    ours, theirs = (one.generate(QUESTIONS, max_new_tokens=6) for one in (model, twin))
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    assert_close([one.cost.flops for one in ours], [one.cost.flops for one in theirs])


@by_arch
def test_far_below_zero_the_prefixes_bias_leaves_a_trained_decoder_as_it_was(arch):
    model = parscale(arch, prefix_bias=-30.0)
    assert_close(answers_of(model), answers_of(base_of(model)))
    model.depth.prefixes.bias.data[:] = 0.0
    before = answers_of(model)
    model.depth.prefixes.bias = None
    assert_close(answers_of(model), before)


def test_streams_of_one_frozen_decoder_are_switched_at_run_time(tmp_path: Path):
    base = tiny_model(Cot())
    folder = saved(base, tmp_path / "base")
    found = []
    for n in (2, 4):
        model = LatentModel.from_pretrained(folder, ParScale(streams=n, n_prefix=3))
        stir(model)
        found.append((answers_of(model), saved(model, tmp_path / f"p{n}")))
    narrow = LatentModel.from_pretrained(found[0][1])
    wide = narrow.beside(found[1][1])
    assert wide.backbone is narrow.backbone and wide.method.streams == 4
    for _ in range(2):
        assert torch.equal(answers_of(narrow), found[0][0]) and torch.equal(answers_of(wide), found[1][0])
    assert torch.equal(answers_of(narrow.beside(folder)), answers_of(base))
    other = saved(tiny_model(ParScale(n_prefix=3), seed=1), tmp_path / "other")
    with pytest.raises(InputError, match="has other weights than this model's: train it from this model"):
        narrow.beside(other)


@by_arch
@pytest.mark.parametrize("n_streams", [1, 2, 4])
def test_a_pass_is_counted_once_and_its_work_for_each_stream(arch, n_streams):
    """FLOPs are those of P decoders, of what attends to the prefixes, and of the mixing."""
    model, n_prefix = parscale(arch, streams=n_streams), 3
    (one,), (alone,) = ([*m.generate(QUESTIONS[:1], max_new_tokens=1)] for m in (model, base_of(model)))
    ours, base, config, width = one.cost, alone.cost, model.backbone.config, model.backbone.width
    assert (ours.passes, ours.positions) == (base.passes, base.positions)
    assert ours.stream_passes == n_streams * ours.passes
    head = 2 * width * config.vocab_size * ours.logits
    seen = 4 * model.backbone.n_layers * width * ours.positions * n_prefix
    mixing = ours.positions * 2 * (n_streams * width * width + 2 * n_streams * width)
    expected = base.flops if n_streams == 1 else n_streams * (base.flops - head + seen) + head + mixing
    assert_close(ours.flops, expected)


def test_kernels_that_take_no_mask_are_refused():
    model = tiny_model(Cot())
    model.backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="prefixes need a mask of their own, which flash_attention_2 does not take"):
        LatentModel(model.backbone, model.tokenizer, ParScale())


def test_training_logs_whether_the_streams_have_collapsed():
    model = parscale(streams=3).train()
    measured = model.loss(MIXED).measured
    assert 0 < measured["stream_entropy"] <= 1 and -0.5 <= measured["stream_cosine"] < 1
    for parameter in model.depth.prefixes.parameters():
        parameter.data[:] = parameter.data[:1].clone()
    model.depth.mix.outer.weight.data.zero_(), model.depth.mix.outer.bias.data.zero_()
    measured = model.loss(MIXED).measured
    assert_close([measured["stream_entropy"], measured["stream_cosine"]], [1.0, 1.0])


def test_with_a_frozen_decoder_prefixes_and_mixture_are_what_learns():
    model = parscale()
    model.backbone.requires_grad_(False)
    learnt = gradients(model.train(), model.loss(MIXED).loss)
    assert {name.split(".")[1] for name, one in learnt.items() if one.abs().max() > 0} == {"prefixes", "mix"}


def released(model: LatentModel, folder: Path) -> Path:
    """Write a model as the authors do: one file with all weights, under Qwen2's names and their own."""
    saved(model, folder)
    names = {"depth.mix.inner": "model.aggregate_layer.0", "depth.mix.outer": "model.aggregate_layer.2"}
    weights, own = load_file(folder / "model.safetensors"), load_file(folder / "innerloop.safetensors")
    for name, tensor in own.items():
        *_, side, layer = name.split(".")
        if name.startswith("depth.prefixes"):
            weights[f"model.layers.{layer}.self_attn.prefix_{side[0]}"] = tensor
        elif name.startswith("depth.mix"):
            part, _, kind = name.rpartition(".")
            weights[f"{names[part]}.{kind}"] = tensor
    save_file(weights, folder / "model.safetensors")
    method, path = model.method, folder / "config.json"
    told = {"parscale_n": method.streams, "parscale_n_tokens": method.n_prefix, "parscale_attn_smooth": 0.01}
    path.write_text(json.dumps(json.loads(path.read_text()) | told | {"model_type": "qwen2_parscale"}))
    for file in folder.glob("innerloop.*"):
        file.unlink()
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_in_the_authors_format_becomes_a_run(tied, tmp_path: Path, monkeypatch, capsys):
    model = tiny_model(ParScale(streams=2, n_prefix=3, smoothing=0.01), "qwen2", tie_word_embeddings=tied)
    stir(model, 0.5)
    folder = released(model, tmp_path / "released")
    monkeypatch.setattr("sys.argv", ["x", str(folder), str(tmp_path / "run")])
    script = runpy.run_path(str(ROOT / "scripts/parscale_checkpoint.py"), run_name="script")
    script["main"]()
    again = LatentModel.from_pretrained(tmp_path / "run")
    assert again.method == model.method and torch.equal(answers_of(again), answers_of(model))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.prefix_k"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"other weights than its configuration says: depth.prefixes.keys.1 differ"):
        script["main"]()
    with pytest.raises(InputError, match="is no ParScale checkpoint"):
        script["opened"](tmp_path / "run")

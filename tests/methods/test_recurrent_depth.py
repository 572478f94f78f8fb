"""Recurrent depth: what its surgery leaves alone, its state, and decoding (recurrent_depth.md, section 9)."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from innerloop import Cot, Example, InputError, LatentModel, Looped, RecurrentDepth
from innerloop.methods.depth.initial_state import mean_cosine, noise_at
from tests.methods.reference_recurrence import (
    IDS,
    LENGTH,
    PLAIN,
    assert_sees_no_later_token,
    by_token,
    flops_of,
    read,
    recurrent,
    slowly,
    some_ids,
    with_settings,
)
from tests.methods.tools import MIXED, QUESTIONS, ROUNDED, assert_close, by_arch, stir
from tests.models import WIDTH, answers_of, left_pad, saved, tiny_model

PRETRAINED = Path(__file__).parents[2] / "models" / "smollm2-135m"
WHOLE = RecurrentDepth(n_prelude=1, n_coda=1, drops=False, max_loops=1)  # nothing is dropped, the state is ignored


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of chain-of-thought models with eight layers."""
    root = tmp_path_factory.mktemp("base")
    return {arch: saved(tiny_model(Cot(), arch, num_hidden_layers=8), root / arch) for arch in ("gpt2", "llama")}


# Retrofit


@pytest.mark.parametrize("method", [WHOLE, replace(WHOLE, injection="add", state_std=0.0)], ids=["pass_e", "add"])
def test_every_architecture_keeps_its_logits(arch, method):
    assert torch.equal(answers_of(tiny_model(method, arch)), answers_of(tiny_model(Cot(), arch)))


@by_arch
def test_pass_e_begins_as_the_pruned_model_whatever_the_iterations_and_the_state(folders, arch):
    method = RecurrentDepth(max_loops=1)  # (2, 3, 2) of eight layers
    model, pruned = (LatentModel.from_pretrained(folders[arch], m) for m in (method, Cot()))
    layers = pruned.backbone.layers
    pruned.backbone.replace_layers([layers[i] for i in (0, 1, 3, 4, 5, 6, 7)], (0, 1, 3, 4, 5, 6, 7))
    expected = answers_of(pruned)
    assert torch.equal(answers_of(model), expected)
    for fields in ({"max_loops": 5}, {"max_loops": 3, "state_seed": 7}, {"max_loops": 2, "state_std": 0.0}):
        assert torch.equal(answers_of(with_settings(model, **fields)), expected)


def test_layers_are_chosen_by_the_rule_of_the_card():
    rule = RecurrentDepth()
    assert [rule.split(n) for n in (22, 16, 30, 8, 3)] == [(4, 8, 4), (3, 6, 3), (6, 11, 6), (2, 3, 2), (1, 1, 1)]
    assert replace(rule, drops=False).split(30) == (6, 18, 6)
    assert RecurrentDepth(n_prelude=4, n_core=6, n_coda=2).split(16) == (4, 6, 2)
    for fields, n in (({"n_core": 8}, 9), ({"n_prelude": 3, "n_coda": 3}, 6), ({"drops": False}, 2)):
        with pytest.raises(InputError, match="too few are left"):
            RecurrentDepth(**fields).split(n)
    with pytest.raises(InputError, match="leave 2 of the model's 4 layers for the core, not n_core=3"):
        recurrent(replace(PLAIN, n_core=3))


def test_windowed_layers_keep_their_kind_when_others_are_dropped():
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    base = tiny_model(Cot(), "gemma3", num_hidden_layers=5, layer_types=kinds).backbone
    RecurrentDepth(n_prelude=1, n_core=1, n_coda=1).convert(base, None)
    assert base.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in base.layers] == [0, 1, 2]


@pytest.mark.pretrained
@pytest.mark.skipif(not PRETRAINED.exists(), reason="models/smollm2-135m is not there: make pretrained")
def test_a_real_model_begins_as_it_was_and_learns():
    example = Example("Tom has 3 cats with 4 legs each. How many legs is that?", ("<<3*4=12>>",), "12", "a")
    base = LatentModel.from_pretrained(PRETRAINED, Cot(), dtype=torch.float32).answer_logits([example])[0]
    method = RecurrentDepth(n_prelude=8, n_coda=8, drops=False, max_loops=2)
    model = LatentModel.from_pretrained(PRETRAINED, method, dtype=torch.float32)
    assert torch.equal(model.answer_logits([example])[0], base)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-5), []
    for _ in range(3):
        losses.append(model.loss([example]).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


@by_arch
def test_a_saved_model_comes_back_whatever_numbers_of_layers_are_left_to_the_rule(folders, arch, tmp_path):
    method = RecurrentDepth(n_prelude=1, n_core=4, max_loops=3, adapter_init="mean")
    model = LatentModel.from_pretrained(folders[arch], method)
    stir(model)
    model.save_pretrained(tmp_path)
    again, other = (LatentModel.from_pretrained(tmp_path, m) for m in (None, RecurrentDepth(max_loops=3)))
    assert again.method == method
    for loaded in (again, other):
        assert (loaded.depth.prelude, loaded.depth.core, loaded.depth.coda) == (range(1), range(1, 5), range(5, 7))
        assert torch.equal(answers_of(loaded), answers_of(model))


@by_arch
@pytest.mark.parametrize("n_loops", [1, 3])
def test_pass_s_from_the_preludes_output_is_a_plain_looped_model(arch, n_loops):
    model = recurrent(replace(PLAIN, adapter_init="pass_s", max_loops=n_loops), arch)
    model.depth.first_state = lambda reading, told: told
    looped = recurrent(Looped(n_prelude=1, n_coda=1, max_loops=n_loops), arch)
    assert torch.equal(answers_of(model), answers_of(looped))
    assert torch.equal(answers_of(model), answers_of(recurrent(Cot(), arch))) == (n_loops == 1)


# The adapter and the state


def test_the_adapter_reads_the_state_first():
    adapter = recurrent().depth.adapter
    assert adapter.weight.shape == (WIDTH, 2 * WIDTH) and adapter.bias is None
    s, e = torch.randn(2, 3, WIDTH)
    swapped = torch.cat([e, s], -1) @ torch.cat([adapter.weight[:, WIDTH:], adapter.weight[:, :WIDTH]], 1).T
    assert_close(adapter(torch.cat([s, e], -1)), swapped, ROUNDED)
    for init, expected in (("pass_e", e), ("pass_s", s), ("mean", (s + e) / 2)):
        assert_close(recurrent(replace(PLAIN, adapter_init=init)).depth.adapter(torch.cat([s, e], -1)), expected, 1e-6)
    assert adapter.weight.std().item() == pytest.approx(1 / math.sqrt(6 * WIDTH), rel=0.1)  # PyTorch's own


def test_the_first_state_is_normal_cut_at_three_deviations_and_depends_on_seed_and_position_alone():
    noise = noise_at(torch.arange(4)[:, None], torch.arange(64).expand(4, 64), 512)
    assert 2.9 < noise.abs().max() <= 3
    assert noise.std().item() == pytest.approx(0.9866, abs=5e-3) and noise.mean().abs() < 1e-2
    rows = noise.flatten(0, 1)[:50]
    assert torch.corrcoef(torch.cat([rows, rows.roll(1, 1)])).fill_diagonal_(0).abs().max() < 0.25
    at = torch.tensor([[0, 1, 2, 3], [5, 3, 2, 9]])
    ones, twos = (noise_at(torch.tensor([[seed], [seed]]), at, 8) for seed in (1, 2))
    assert torch.equal(ones[0, 3], ones[1, 1]) and torch.equal(ones[0, 2], ones[1, 2])
    assert not torch.equal(ones, twos) and len(ones.flatten().unique()) > 40


def first_states(model: LatentModel) -> list[torch.Tensor]:
    """Record the first states of all passes from now on."""
    seen, make = [], model.depth.first_state
    model.depth.first_state = lambda *args: seen.append(make(*args)) or seen[-1]
    return seen


@pytest.mark.parametrize(("std", "expected"), [(None, math.sqrt(2 / (5 * WIDTH))), (0.5, 0.5), (0.0, 0.0)])
def test_the_spread_of_the_first_state_is_the_cards_or_as_asked(std, expected):
    model = recurrent(replace(PLAIN, state_std=std))
    seen = first_states(model)
    read(model, some_ids(8, 40))
    assert seen[0].std().item() == pytest.approx(0.9866 * expected, rel=0.03)


def test_the_state_is_drawn_anew_in_training_and_fixed_by_its_seed_otherwise():
    model = recurrent()
    first = answers_of(model)
    assert torch.equal(first, answers_of(model))
    assert (answers_of(with_settings(model, state_seed=1)) - first).abs().max() > 1e-3
    model.train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.loss(MIXED).loss.item())
    assert losses[0] == losses[1] != losses[2]


# Reading at once, in pieces, and in batches


@pytest.mark.parametrize(
    "fields", [{}, {"double_norm": True}, {"injection": "add", "adapter_init": "pass_e"}], ids=["", "norms", "add"]
)
@by_arch
def test_it_is_the_slow_reference_read_at_once_and_token_by_token(arch, fields):
    model = recurrent(replace(PLAIN, **fields), arch)
    expected, _ = slowly(model, IDS, [4] * LENGTH)
    assert_close(read(model, IDS)[0], expected)
    assert_close(by_token(model), expected, passes=PLAIN.max_loops)
    if fields:
        assert (read(recurrent(arch=arch), IDS)[0] - expected).abs().max() > 1e-3


def test_reading_at_once_equals_reading_in_pieces(arch):
    model = recurrent(arch=arch)
    for pieces in ([1] * LENGTH, [4, 2, 3]):
        assert_close(read(model, IDS, pieces=pieces)[0], read(model, IDS)[0])


@by_arch
def test_batches_equal_single_rows(arch):
    model = recurrent(arch=arch)
    ids, mask = left_pad([some_ids(1, n, seed=n)[0] for n in (3, 9, 6)])
    together = read(model, ids, mask)[0]
    for row, n in enumerate((3, 9, 6)):
        assert_close(together[row, -n:], read(model, some_ids(1, n, seed=n))[0][0])
    gens = model.generate(QUESTIONS, max_new_tokens=10)
    assert [g.text for g in gens] == [model.generate([q], max_new_tokens=10)[0].text for q in QUESTIONS]
    assert all({depth for _, depth in g.depths} == {4} for g in gens)


@by_arch
def test_no_token_sees_a_later_one(arch):
    assert_sees_no_later_token(recurrent(arch=arch))


def test_the_answer_may_be_written_alone():
    model = recurrent(replace(PLAIN, write_steps=False))
    (row,), (with_steps,) = model.rows(MIXED[:1]), recurrent().rows(MIXED[:1])
    assert [span.kind.value for span in row.spans] == ["question", "answer"]
    assert [span.kind.value for span in with_steps.spans] == ["question", "step", "step", "step", "answer"]


@pytest.mark.parametrize("r", [1, 6])
def test_answering_may_have_another_number_of_iterations(r):
    model, twin = recurrent(), recurrent(replace(PLAIN, max_loops=r))
    usual, asked, other = (
        [g.text for g in one.generate(QUESTIONS, max_new_tokens=8, loops=loops)]
        for one, loops in ((model, None), (model, r), (twin, None))
    )
    assert asked == other != usual


# The chain of states


def test_a_new_token_goes_on_from_the_last_state_of_the_one_before():
    model, plain = recurrent(replace(PLAIN, chains_state=True)), recurrent()
    ids, mask = left_pad([some_ids(1, n, seed=n)[0] for n in (2, 5)])
    mask = torch.cat([mask, torch.tensor([[1, 1], [0, 1]])], dim=1)
    ids = torch.cat([ids, some_ids(2, 2, seed=9)], dim=1)
    seen, noise = first_states(model), first_states(plain)
    _, context, _ = read(model, ids, mask, pieces=[5, 1, 1])
    read(plain, ids, mask, pieces=[5, 1, 1])
    assert torch.equal(seen[0], noise[0])  # tokens read together begin with noise
    assert_close(seen[1][0, 0], slowly(model, ids[:1, 3:5], [4, 4])[1][0, -1])
    assert_close(seen[2][1, 0], slowly(plain, ids[1:, :5], [4] * 5)[1][0, -1])  # the second row read nothing between
    part = context.keep_rows(torch.tensor([1])).cache
    assert torch.equal(part.state_B1D, context.cache.state_B1D[1:])


def test_the_chain_of_states_is_approximate_and_this_much():
    """Decoded one by one, tokens begin elsewhere than when read at once; here, with random weights, far away."""
    model = recurrent(replace(PLAIN, chains_state=True))
    at_once, stepwise = read(model, IDS)[0], by_token(model)
    assert torch.equal(at_once, read(recurrent(), IDS)[0])
    assert_close(stepwise[:, :1], at_once[:, :1])
    assert 1e-3 < (stepwise - at_once).abs().amax(-1)[0, 1:].mean() < 5
    model.depth.adapter.weight.data[:, :WIDTH] = 0  # the state is ignored
    assert_close(by_token(model), read(with_settings(model, chains_state=False), IDS)[0], passes=PLAIN.max_loops)


# What is counted and measured


@by_arch
def test_flops_are_affine_in_the_iterations_and_weights_independent_of_them(arch):
    models = [recurrent(replace(PLAIN, max_loops=r), arch) for r in (1, 2, 5)]
    flops = [flops_of(model) for model in models]
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) == 1
    layer = sum(p.numel() for p in models[0].backbone.layers[0].parameters())
    two_layers = 2 * (2 * layer * LENGTH + 4 * WIDTH * LENGTH * (LENGTH + 1) / 2)
    per_loop = two_layers + 4 * WIDTH**2 * LENGTH
    assert flops == pytest.approx([two_layers + r * per_loop for r in (1, 2, 5)])


def test_collapse_of_the_states_shows_in_their_mean_cosine():
    states, real = torch.randn(3, 5, WIDTH), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    cosines = torch.nn.functional.cosine_similarity(states[:, :, None], states[:, None], dim=-1)
    first, second = (cosines[0].sum() - 5) / 20, (cosines[1, 2:, 2:].sum() - 3) / 6
    assert mean_cosine(states, real).item() == pytest.approx(((first + second) / 2).item(), rel=1e-5)
    assert mean_cosine(torch.ones(2, 4, WIDTH), torch.ones(2, 4).bool()).item() == pytest.approx(1.0)
    model = recurrent()
    expected = mean_cosine(slowly(model, IDS, [4] * LENGTH)[1], torch.ones(1, LENGTH).bool())
    assert read(model, IDS)[2][0].measured["state_cosine"].item() == pytest.approx(expected.item(), abs=1e-4)
    assert read(model, IDS[:, :1])[2][0].measured == {}


# Settings


@pytest.mark.parametrize(
    ("fields", "is_neutral"),
    [
        ({"loop.time": "lookup"}, True),
        ({"loop.lora": "per_iter", "loop.lora_rank": 2}, True),
        ({"loop.residual": "B", "loop.alpha": 0.5}, False),
        ({"loop.rescale": "rms"}, False),
        ({"loop.scale": 0.5}, False),
    ],
    ids=lambda fields: next(iter(fields)) if isinstance(fields, dict) else "",
)
def test_what_steadies_loops_works_inside_the_core_too(fields, is_neutral):
    model = recurrent()
    twin, plain = with_settings(model, **fields), answers_of(model)
    assert torch.equal(answers_of(twin), plain) == is_neutral
    stir(twin)
    assert (answers_of(twin) - plain).abs().max() > 1e-3
    assert_close(by_token(twin), read(twin, IDS)[0], passes=PLAIN.max_loops)

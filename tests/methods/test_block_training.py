"""What block diffusion learns from: noise per block, and rows read clean and noised (block_diffusion.md, 2, 3, 6)."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import BlockDiffusion, InputError, LatentModel, Llada
from innerloop.measure.bound import bounds
from innerloop.measure.likelihood import likelihood
from innerloop.methods.denoise.noise import by_block, hide
from innerloop.passes.context import Context
from innerloop.text.examples import Example
from tests.close import assert_close
from tests.methods import reference_blocks as reference
from tests.methods.test_block_sampling import by_layout
from tests.methods.test_denoise_training import EXAMPLES, G
from tests.methods.tools import learn
from tests.models import ARCHS, answers_of, left_pad, moved, random_ids, saved, tiny_backbone, tiny_model
from tests.test_trainer import copies, logged, make_trainer, trained_names

K = 5  # of which the answers of these examples are no multiple, and prompts neither
UNLIKE = [*EXAMPLES[:2], Example("3 ; + 4", ("3 + 4 = 2",), "2", "short", {}), Example("1", (), "1", "shorter", {})]


def blocks(**changes):
    return BlockDiffusion(**{"gen_length": 25, "block_length": K, **changes})


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.backbone.parameters()), allow_unused=True)


def assert_same(model, one, other, gap=1e-6):
    """Two losses are the same, and their gradients."""
    assert_close(one, other, gap)
    for got, wanted in zip(gradients(model, one), gradients(model, other)):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert_close(got, wanted, 1e-5)


# Noise


def test_times_are_spread_evenly_over_rows_and_blocks():
    """Section 3: antithetic over both together; each is uniform by itself."""
    found = [blocks().spread([[1, 2], [0, 1, 2], [4]], str(seed)) for seed in range(300)]
    for drawn in found[:50]:
        flat = sorted(t for row in drawn for t in row.values())
        assert np.allclose(np.diff(flat), 1 / 6) and flat[0] >= 0 and flat[-1] < 1
    assert [list(row) for row in found[0]] == [[1, 2], [0, 1, 2], [4]]
    each = np.array([[t for row in drawn for t in row.values()] for drawn in found])
    assert each.mean(0) == pytest.approx([0.5] * 6, abs=4 * math.sqrt(1 / 12 / 300))
    assert abs(np.diff(each[0, :2])) > 1 / 6  # two blocks of a row are no neighbours


def test_a_time_of_the_row_is_that_of_all_its_blocks_and_times_may_be_clipped():
    by_row = blocks(noise={"t_per": "row"}).spread([[1, 2], [0, 1, 2], [4]], "s")
    assert [len(set(row.values())) for row in by_row] == [1, 1, 1]
    assert np.allclose(np.diff(sorted(row[max(row)] for row in by_row)), 1 / 3)
    clipped = [blocks(noise={"t_from": 0.3, "t_to": 0.8}).spread([[0, 1]] * 4, str(seed)) for seed in range(50)]
    flat = [t for drawn in clipped for row in drawn for t in row.values()]
    assert 0.3 <= min(flat) < 0.31 and 0.79 < max(flat) < 0.8


@pytest.mark.parametrize("weight", ["1/t", "linear", "uniform", "cart"])
def test_a_hidden_token_counts_by_the_time_of_its_block(weight):
    method = blocks(noise={"weight": weight, "norm": "batch"})
    model = tiny_model(method)
    row = method.lay_out(EXAMPLES[0], model.encoder)
    own, times = method.blocks(row), {}
    times = {b: (i + 1) / 7 for i, b in enumerate(by_block(row, own))}
    found, n_hidden = {b: 0 for b in times}, {b: 0 for b in times}
    for seed in range(200):
        noise = hide(row, times, method.noise, 9, False, str(seed), own).noise
        assert list(noise.hidden) == sorted(noise.hidden) and noise.hidden[0:1] >= (row.region_start,)
        for k, w in zip(noise.hidden, noise.weights):
            p = 0.999 * times[own[k]] + 0.001
            seen = [i for i in range(len(row)) if own[i] < own[k] or (own[i] == own[k] and i not in noise.hidden)]
            cart = sum(0.5 * 0.1 * 0.9 ** (abs(k - i) - 1) for i in seen)
            expected = {"1/t": 1 / p, "linear": 1 - times[own[k]], "uniform": 1.0, "cart": cart}[weight]
            assert w == pytest.approx(expected)
            found[own[k]] += w
            n_hidden[own[k]] += 1
    for b, places in by_block(row, own).items():
        p = 0.999 * times[b] + 0.001
        n = 200 * len(places)
        assert n_hidden[b] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


@by_layout
def test_blocks_are_counted_from_the_answer_or_the_row(layout):
    method = blocks(**layout)
    model = tiny_model(method)
    for example in UNLIKE:
        row = method.lay_out(example, model.encoder)
        own, start = method.blocks(row), row.region_start
        assert list(own) == reference.blocks_of(start, len(row), method)
        edges = [k for k in range(1, len(row)) if own[k] != own[k - 1]]
        first = 0 if method.block_origin == "row" else start
        assert all((k - first) % K == 0 for k in edges) and len(row) == start + 25
        assert min(own) >= 0


# The loss


@by_layout
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_two_passes_are_one_of_both_halves_in_loss_and_gradient(arch, layout):
    """Section 2 and card 6, for rows of unlike prompts in one batch."""
    method = blocks(**layout)
    model = tiny_model(method, arch).double()
    rows = method.rows(UNLIKE, model.encoder, seed="s")
    expected = sum(reference.in_2l(model, row, method) for row in rows) / sum(row.noise.n_counted for row in rows)
    assert_same(model, model(model.batch(rows)).loss, expected)


def test_so_they_are_where_hidden_tokens_are_read_as_random_ones():
    method = blocks(noise={"filler": "random"})
    model = tiny_model(method).double()
    rows = method.rows(UNLIKE, model.encoder, seed="s")
    assert all(len(row.noise.fillers) == len(row.noise.hidden) > 0 for row in rows)
    expected = sum(reference.in_2l(model, row, method) for row in rows) / sum(row.noise.n_counted for row in rows)
    assert_same(model, model(model.batch(rows)).loss, expected)


def test_text_that_is_cut_is_cut_before_its_blocks_are_hidden():
    method = blocks(block_origin="row", noise={"truncate": 1.0})
    model, text = tiny_model(method), [Example("3 + 4", (), " = 2 2 * 2 = 4 + 1 = 5", str(i), {}) for i in range(3)]
    model.encoder.running_text = True
    lengths = {len(row) for seed in range(20) for row in method.rows(text, model.encoder, seed=f"0/{seed}/0/0")}
    assert len(lengths) > 2
    rows = method.rows(text, model.encoder, seed="0/1/0/0")
    assert all(len(row.noise.blocks) == len(row) for row in rows)
    assert torch.isfinite(model(model.batch(rows)).loss)


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_loss_in_chunks_with_passes_that_are_run_again_is_the_whole(chunk):
    model = tiny_model(blocks()).double()
    rows = model.rows(UNLIKE, seed="s")
    expected = model(model.batch(rows)).loss
    model.loss_chunk, model.checkpoint_passes = chunk, True
    model.train()
    assert_same(model, model(model.batch(rows)).loss, expected)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("shift", [False, True])
def test_one_block_as_long_as_the_row_is_llada_bit_for_bit(arch, shift):
    """Card 6: no clean half is read at all."""
    found = []
    for method in (
        Llada(gen_length=G, shift=shift),
        blocks(gen_length=G, block_length=64, block_origin="row", shift=shift),
    ):
        model = tiny_model(method, arch)
        rows = method.rows(UNLIKE, model.encoder, seed="s")
        out = model(model.batch(rows))
        found.append((rows, out.loss, gradients(model, out.loss), torch.cat(model.answer_logits(UNLIKE))))
    (a, loss_a, gradients_a, logits_a), (b, loss_b, gradients_b, logits_b) = found
    assert [row.noise.hidden for row in a] == [row.noise.hidden for row in b]
    assert [row.noise.weights for row in a] == [row.noise.weights for row in b]
    assert torch.equal(loss_a, loss_b) and torch.equal(logits_a, logits_b)
    assert all(torch.equal(x, y) for x, y in zip(gradients_a, gradients_b) if x is not None)
    assert model.batch(b).halves.n_clean == 0


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_blocks_of_one_token_have_the_likelihood_of_the_decoder(arch):
    """Card 6: exactly, with a single draw."""
    model = tiny_model(blocks(block_length=1, shift=True), arch)
    found = bounds(model, UNLIKE, n_draws=1)
    for example, bound in zip(UNLIKE, found):
        row = model.method.lay_out(example, model.encoder)
        ids, start = torch.tensor([row.ids()]), row.region_start
        with torch.no_grad():
            own = model.backbone.lm(input_ids=ids).logits[0, start - 1 : -1].double()
        assert bound.nll == pytest.approx(float(cross_entropy(own, ids[0, start:], reduction="sum")), rel=1e-5)
    text = [Example("3 + 4", (), " = 2 2 * 2 = 4", "0", {})]
    ids = torch.tensor([model.method.lay_out(text[0], model.encoder).ids()])
    own = likelihood(tiny_model(blocks(block_length=1, shift=True, block_origin="row"), arch), text)
    assert own.n_tokens[0] > 0 and math.isfinite(own.nll)


def test_in_place_a_block_of_one_token_is_predicted_from_a_mask_behind_what_was_written():
    model = tiny_model(blocks(block_length=1)).double()
    row = model.method.lay_out(EXAMPLES[0], model.encoder)
    ids, mask, total = row.ids(), model.method.mask_id(model.encoder), 0.0
    with torch.no_grad():
        for k in range(row.region_start, len(row)):
            logits = model.backbone.lm(input_ids=torch.tensor([[*ids[:k], mask]])).logits[0, -1]
            total -= float(logits.log_softmax(-1)[ids[k]])
    assert bounds(model, EXAMPLES[:1], n_draws=1)[0].nll == pytest.approx(total, rel=1e-9)


@torch.no_grad()
def test_the_bound_of_blocks_is_the_sum_of_theirs():
    """Each block's is the mean over all its subsets, given what was written before."""
    method = blocks(gen_length=4, block_length=2, write_steps=False)
    model, example = tiny_model(method).double(), Example("3 ; + 4", (), "2", "a", {})
    (found,) = bounds(model, [example], n_draws=400)
    row, mask, total = method.lay_out(example, model.encoder), method.mask_id(model.encoder), 0.0
    ids, start = row.ids(), row.region_start
    for first in (start, start + 2):
        for hidden, weight in (((first,), 2 / 4), ((first + 1,), 2 / 4), ((first, first + 1), 1 / 2)):
            noised = [mask if k in hidden else i for k, i in enumerate(ids[: first + 2])]
            own = reference.blocks_of(start, first + 2, method)
            seen = [[a <= b for a in own] for b in own]
            log_probs = model.backbone.head(reference.states_of(model, noised, [*range(first + 2)], seen)).log_softmax(
                -1
            )
            total -= weight * sum(float(log_probs[k, ids[k]]) for k in hidden)
    assert abs(found.nll - total) <= 3 * found.error


# What is seen


@pytest.mark.parametrize("arch", ARCHS)
def test_a_token_is_seen_by_its_block_and_by_those_after_it(arch):
    """Card 6; windows are lifted."""
    backbone, n = tiny_backbone(arch, num_hidden_layers=1, layer_types=None), 13
    ids, numbers = random_ids(1, n), 2 * (torch.arange(n)[None] // K)

    def read(ids):
        with torch.no_grad():
            return Context(backbone, 1).read(backbone.embed(ids), sees="blocks", halves_BL=numbers)[0]

    whole = read(ids)
    for place in range(n):
        other = ids.clone()
        other[0, place] = 3 + (ids[0, place] - 2) % 40
        is_changed = (read(other) - whole).abs().amax(-1) > 1e-6
        assert is_changed.tolist() == [k // K >= place // K for k in range(n)]


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_read_in_pieces_is_what_is_read_at_once(arch):
    """Card 6: any split of the prompt into blocks; rows of unlike length, and columns that are picked."""
    backbone, rows = tiny_backbone(arch), [random_ids(1, n, seed=n)[0] for n in (14, 8)]
    ids, mask = left_pad(rows)
    numbers = 2 * ((mask.cumsum(1) - 1).clamp(min=0) // 3)
    with torch.no_grad():
        alone = [
            Context(backbone, 1).read(backbone.embed(row[None]), sees="blocks", halves_BL=own)
            for row, own in ((row, 2 * (torch.arange(len(row))[None] // 3)) for row in rows)
        ]
        for cut in (6, 9, 12):  # where a block ends in both rows
            context, parts = Context(backbone, 2), []
            for part in (slice(0, cut), slice(cut, None)):
                embeds = backbone.embed(ids[:, part])
                parts.append(context.read(embeds, mask[:, part], sees="blocks", halves_BL=numbers[:, part]))
                if part.stop is not None:
                    padding = torch.zeros(2, 2, dtype=torch.long)
                    columns = torch.cat([padding, torch.arange(cut).expand(2, -1)], 1)
                    context = context.pick(columns, torch.cat([padding, mask[:, :cut]], 1))
            for row, states in enumerate(torch.cat(parts, 1)):
                assert_close(states[mask[row].bool()], alone[row][0])


# As a whole


@by_layout
def test_a_saved_model_opens_again(layout, tmp_path):
    model = moved(tiny_model(blocks(**layout)))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == model.method
    assert torch.equal(answers_of(loaded), answers_of(model))
    questions = [example.question for example in EXAMPLES]
    assert [one.ids for one in loaded.generate(questions)] == [one.ids for one in model.generate(questions)]


def test_a_run_is_not_gone_on_with_where_its_blocks_are_counted_otherwise(tmp_path):
    folder = saved(tiny_model(blocks()), tmp_path / "run")
    with pytest.raises(InputError, match="was trained with block_origin=answer, and here it is row: set"):
        LatentModel.from_pretrained(folder, blocks(block_origin="row"), device="cpu")
    assert LatentModel.from_pretrained(folder, blocks(block_length=1), device="cpu").method.block_length == 1


def test_the_trainer_trains_it_and_validates_it(tmp_path):
    model = tiny_model(blocks(sampler={"steps": 5}))
    before, settings = copies(model), {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 4}
    make_trainer(
        tmp_path, model, EXAMPLES, EXAMPLES[:2], batch_size=3, gradient_accumulation_steps=2, **settings
    ).train()
    assert len(logged(tmp_path, "loss_masked")) == 4 and len(logged(tmp_path, "eval_accuracy")) == 1
    assert "backbone.lm.model.layers.0.self_attn.q_proj.weight" in trained_names(before, model)


@pytest.mark.parametrize("changes", [{}, {"block_origin": "row"}, {"soft": {"share": 0.8, "unroll": 2}}], ids=str)
@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(changes):
    model = tiny_model(blocks(**changes, sampler={"steps": 10}), "gpt2", num_hidden_layers=2, initializer_range=0.1)
    learn(model, EXAMPLES, 500, seed="{}")
    answers = [one.answer for one in model.generate([example.question for example in EXAMPLES])]
    assert answers == [example.answer for example in EXAMPLES]

"""Filling blocks with a cache: the engine against plain samplers without one (block_diffusion.md, sections 4 and 6)."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from innerloop import BlockDiffusion, Cot, InputError, Llada
from innerloop.methods.denoise.block_canvas import BlockCanvas
from innerloop.methods.denoise.block_diffusion import BlockSampler
from tests.fields import change
from tests.methods import reference_blocks as reference
from tests.methods.test_denoise_sampling import QUESTIONS, TRUTH, G, assert_equal, model_of
from tests.models import ARCHS, chain_examples, tiny_model

K = 4
LAYOUTS = {
    "": {},
    "shift": {"shift": True},
    "of the row": {"block_origin": "row"},
    "of the row, shift": {"block_origin": "row", "shift": True},
}
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
RULES = {
    "one token a pass": {},
    "two passes a block": {"steps": 6},
    "uneven counts": {"steps": 9},
    "random": {"commit": "random", "steps": 6},
    "margin": {"commit": "margin", "steps": 6},
    "entropy": {"commit": "entropy", "steps": 6},
    "ends last": {"eos": "last"},
    "no ends": {"eos": "never", "steps": 6},
    "guidance": {"guidance": 1.5, "steps": 6},
}
OTHERS = {
    "threshold": {"commit": "threshold", "threshold": 0.3},
    "origin": {"commit": "origin"},
    "remdm": {"commit": "remdm", "steps": 12, "remask": {"cap": 0.3}},
    "edit": {"commit": "threshold", "threshold": 0.2, "edit": 0.05, "edit_passes": 2},
    "lowest": {"ties": "lowest", "steps": 6},
    "drawn positions": {"position_temperature": 0.5, "steps": 6},
}
DRAWN = {"temperature 0": 0.0, "temperature 0.7": 0.7}


def blocks(**changes):
    return BlockDiffusion(**{"gen_length": G, "block_length": K, **changes})


@pytest.mark.parametrize("temperature", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("sampler", RULES.values(), ids=RULES)
def test_the_engine_equals_the_plain_sampler(sampler, temperature):
    """Card 6: cached sampling is full recomputation; prompts of unlike length share passes."""
    method = blocks(sampler=sampler)
    assert_equal(model_of(method), method, reference.counted, temperature)


@by_layout
@pytest.mark.parametrize("size", [1, 3, G])
def test_it_does_so_for_every_layout_and_size(layout, size):
    method = blocks(block_length=size, **layout)
    for arch in ("gpt2", "llama"):
        assert_equal(model_of(method, arch), method, reference.counted, 0.7)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_does_so_on_every_architecture(arch):
    method = blocks(sampler={"steps": 6}, shift=True)
    assert_equal(model_of(method, arch), method, reference.counted, 0.0)


@pytest.mark.parametrize("temperature", DRAWN.values(), ids=DRAWN)
def test_it_does_so_where_canvases_begin_as_random_tokens(temperature):
    method = blocks(noise={"filler": "random"}, sampler={"steps": 6})
    assert_equal(model_of(method), method, reference.counted, temperature)


@by_layout
def test_random_with_a_token_a_pass_is_first_hitting(layout):
    method = blocks(sampler={"commit": "random"}, **layout)
    assert_equal(model_of(method), method, reference.first_hitting, 1.0)


def test_hitting_times_are_those_of_tokens_that_are_unmasked_independently():
    """What the network is not told: t u^(1 / m) is the largest of m uniform times below t."""
    model, found = model_of(blocks(gen_length=K)), []
    for seed in range(3):
        plain = reference.first_hitting(model, model.method, QUESTIONS[0], seed=seed)
        assert plain.nfe == len(plain.times) == K
        assert sorted(plain.times, reverse=True) == plain.times
    rng = np.random.default_rng(0)
    for _ in range(4000):
        found.append(np.cumprod(rng.random(K) ** (1 / np.arange(K, 0, -1))))
    assert np.mean(found, 0) == pytest.approx(np.arange(K, 0, -1) / (K + 1), abs=0.02)


@pytest.mark.parametrize("level, edit", [(0.2, 0.02), (0.9, 0.05), (0.0, 0.1)])
def test_the_engine_equals_the_plain_sampler_that_edits(level, edit):
    method = blocks(sampler={"commit": "threshold", "threshold": level, "edit": edit, "edit_passes": 3})
    model = model_of(method)
    assert_equal(model, method, reference.editing, 0.0)
    without = change(method, **{"sampler.edit": None})
    model.method = without
    plain = [one.ids for one in model.generate(QUESTIONS)]
    model.method = method
    assert [one.ids for one in model.generate(QUESTIONS)] != plain


def test_an_error_is_overwritten_only_where_tokens_are_edited():
    for edit, expected in ((None, 30), (0.9, TRUTH[1])):
        canvas = BlockCanvas(blocks(sampler=BlockSampler(edit=edit)), [3, 4], 0, 1, [0])
        canvas.start_from(np.array([1]), np.array([30]))
        while not canvas.is_done:
            asked = canvas.asked()
            canvas.commit(TRUTH[asked], np.ones(len(asked)))
        assert canvas.tokens_G[1] == expected and (canvas.tokens_G == TRUTH).sum() == G - (edit is None)
        assert canvas.n_passes == G - 1 + (0 if edit is None else G // K)  # one more for each block, to see it settled


# As others


@pytest.mark.parametrize("temperature", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("sampler", [{}, {"steps": 5}, {"commit": "random"}, {"commit": "threshold", "threshold": 0.3},
                                     {"commit": "remdm", "steps": 8}, {"guidance": 1.0, "steps": 4}])  # fmt: skip
def test_one_block_as_long_as_the_row_is_llada(sampler, temperature):
    """Card 6."""
    for arch in ("gpt2", "llama"):
        model = model_of(blocks(), arch)
        found = []
        for method in (
            Llada(gen_length=G, sampler=sampler),
            blocks(block_length=64, block_origin="row", sampler=sampler),
        ):
            model.method = method
            answers = model.generate(QUESTIONS, temperature=temperature, batch_size=3)
            found.append([(one.ids, one.cost.passes, one.cost.positions, one.cost.flops) for one in answers])
        assert found[0] == found[1]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_blocks_of_one_token_are_the_decoder_itself(arch):
    """Card 6, and its count of passes: the same text for the same cost, from transformers' own passes too."""
    model = model_of(blocks(block_length=1, shift=True, sampler={"ties": "lowest"}), arch)
    found = model.generate(QUESTIONS, batch_size=2)
    mask = model.method.mask_id(model.encoder)
    for question, one in zip(QUESTIONS, found):
        ids = model.prompts([question])[0].ids()
        for token in one.ids:
            logits = model.backbone.lm(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[mask] = -torch.inf
            assert token == int(logits.argmax())
            ids.append(token)
        assert one.cost.passes == len(one.ids)
    plain = model_of(Cot(), arch)
    plain.backbone, plain.suppressed_ids = model.backbone, model.suppressed_ids
    for one, other in zip(found, plain.generate(QUESTIONS, max_new_tokens=G)):
        assert one.ids == other.ids
        assert (one.cost.passes, one.cost.positions) == (other.cost.passes, other.cost.positions)
        assert one.cost.flops == other.cost.flops


# Costs and company


@by_layout
@pytest.mark.parametrize(
    "sampler, a_block",
    [({}, K), ({"steps": 3}, 1), ({"steps": 6, "guidance": 1.0}, 2), ({"commit": "threshold", "threshold": 1.1}, K)],
)
def test_passes_and_positions_are_as_many_as_the_formula_says(sampler, a_block, layout):
    """Card 6: the passes of all blocks; the question once, each pass its block, and each block but the last once more.

    Shifted, a pass also reads the column before its block again, where that is not read anyway.
    """
    model = tiny_model(blocks(sampler={**sampler, "eos": "never"}, **layout))
    lines, shift, of_row = 2 if "guidance" in sampler else 1, model.method.shift, model.method.block_origin == "row"
    for row, one in zip(model.prompts(QUESTIONS), model.generate(QUESTIONS, batch_size=3)):
        before = len(row) % K if of_row else 0  # of the question, in the first block
        edges = [*range(-before, G, K), G]
        sizes = [end - start for start, end in pairwise(edges)]
        passes = [min(end - max(start, 0), a_block) for start, end in pairwise(edges)]
        finished = len(row) - before + sum(sizes[:-1])
        n_again = sum(n - 1 for n, start in zip(passes, edges) if shift and len(row) + start > 0)
        n_unread = sum(n for n, size in zip(passes, sizes) if shift and size == 1)
        assert one.cost.passes == lines * sum(passes)
        expected = finished + sum(n * size for n, size in zip(passes, sizes)) + n_again - n_unread
        assert one.cost.positions == lines * expected


def test_a_question_of_60_tokens_and_an_answer_of_64_read_an_eighth_of_the_positions():
    question = " ; ".join(f"+ {i % 5}" for i in range(20))
    model = tiny_model(BlockDiffusion(gen_length=64, block_length=8, sampler={"eos": "never"}))
    row = model.prompts([question])[0]
    (ours,) = model.generate([question], max_new_tokens=64)
    model.method = Llada(gen_length=64, sampler={"eos": "never"})
    (plain,) = model.generate([question], max_new_tokens=64)
    assert len(row) == 60 and len(ours.ids) == len(plain.ids) == 64
    assert (ours.cost.passes, plain.cost.passes) == (64, 64)
    assert plain.cost.positions == 64 * (60 + 64)
    assert ours.cost.positions == 60 + 64 * 8 + 56 <= plain.cost.positions / 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampler", [*RULES.values(), *OTHERS.values()], ids=[*RULES, *OTHERS])
def test_answers_depend_on_no_company(sampler, temperature):
    """Card 6: in a batch of unlike prompts, with canvases that join and leave, as alone."""
    model = model_of(blocks(sampler=sampler, shift="guidance" in sampler))
    options = {"temperature": temperature, "seed": 3}
    whole = [
        (one.ids, one.cost.passes, one.cost.positions) for one in model.generate(QUESTIONS, batch_size=5, **options)
    ]
    for size in (1, 3):
        found = model.generate(QUESTIONS, batch_size=size, **options)
        assert [(one.ids, one.cost.passes, one.cost.positions) for one in found] == whole


def test_a_model_without_an_opinion_breaks_ties_by_the_seed_alone():
    model = model_of(blocks(sampler={"eos": "never"}))
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.zero_()
    whole = [one.ids for one in model.generate(QUESTIONS, batch_size=5)]
    assert [one.ids for one in model.generate(QUESTIONS, batch_size=1)] == whole
    assert len(set(map(tuple, whole))) == len(QUESTIONS)


def test_the_cache_is_written_and_kept_and_nothing_else():
    """A pass reads blocks once; a canvas that leaves takes its columns along."""
    model, sizes = tiny_model(blocks(sampler={"eos": "never"})), []
    forward = model.backbone.forward
    model.backbone.forward = lambda embeds, **known: (
        sizes.append((*embeds.shape[:2], known["cache"].get_seq_length())) or forward(embeds, **known)
    )
    model.generate(QUESTIONS[:1])
    n = len(model.prompts(QUESTIONS[:1])[0])
    widths = [(n + K, 0), *[(K, n)] * 3, (2 * K, n), *[(K, n + K)] * 3, (2 * K, n + K), *[(K, n + 2 * K)] * 3]
    assert sizes == [(1, *width) for width in widths]


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: blocks(block_length=5), "gen_length is 12, which is no multiple of block_length, 5: change either"),
        (lambda: blocks(block_length=24), "no multiple of block_length, 24"),
        (lambda: blocks(block_length=0), "block_length is 0, but must be a whole number, at least 1"),
        (lambda: blocks(sampler={"steps": 4}), "steps is 4, which cannot be shared evenly among 3 blocks"),
        (lambda: blocks(sampler={"block_length": 4}), "set method.block_length"),
        (lambda: blocks(sampler={"edit": 0.9, "commit": "random"}), "commit=random ranks by none: set commit to"),
        (lambda: blocks(sampler={"edit": 0.0}), "edit is 0.0, but must be a number"),
        (lambda: blocks(block_origin="end"), "block_origin is end, but must be"),
        (lambda: blocks(noise={"t_from": 0.6, "t_to": 0.5}), "noise.t_from is 0.6, which is above t_to, 0.5"),
        (lambda: tiny_model(blocks(mask_token="<pad>")), "'<pad>', which is the tokenizer's padding token"),
        (lambda: tiny_model(blocks(gen_length=252)).generate(QUESTIONS), "canvas 252, but the model reads at most 256"),
        (lambda: tiny_model(blocks(gen_length=4)).prepared(chain_examples(2)), "raise it to .* or more"),
        (lambda: tiny_model(blocks()).generate(QUESTIONS, beams=2), "follows no beams"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(make, told):
    with pytest.raises(InputError, match=told):
        make()

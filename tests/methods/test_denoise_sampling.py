"""Filling canvases: the engine against the cards' plain samplers, and what the cards ask of any sampler."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from innerloop import Dream, InputError, Llada
from innerloop.engine import canvases
from innerloop.engine.canvases import CanvasEngine, likeliest, nucleus
from innerloop.engine.options import EngineOptions
from innerloop.methods.denoise.canvas import Canvas
from innerloop.methods.denoise.settings import SamplerSettings
from tests.fields import change
from tests.methods import reference_denoise as reference
from tests.models import ARCHS, chain_examples, tiny_model

G = 12
QUESTIONS = ["3 ; + 4 ; * 2 ; - 1", "1 ; + 1", "2", "4 ; - 3 ; * 2", "3 ; + 4 ; * 2 ; - 1 ; + 2 ; * 3"]
BY_LLADA = {
    "one token a pass": {},
    "three passes": {"steps": 3},
    "uneven counts": {"steps": 5},
    "random": {"commit": "random", "steps": 4},
    "blocks": {"steps": 6, "block_length": 4},
    "left to right": {"block_length": 1},
    "ends last": {"eos": "last", "steps": 4},
    "no ends": {"eos": "never", "steps": 4},
    "guidance": {"guidance": 1.5, "steps": 4},
    "guidance, blocks, ends last": {"guidance": 0.5, "steps": 6, "block_length": 4, "eos": "last"},
}
BY_DREAM = {
    "origin": {"steps": 6},
    "confidence": {"commit": "confidence", "steps": 5},
    "one token a step": {"commit": "confidence"},
    "margin": {"commit": "margin", "steps": 5},
    "entropy": {"commit": "entropy", "steps": 5},
    "positions drawn": {"commit": "confidence", "steps": 5, "position_temperature": 0.2},
}
DRAWN = {"temperature 0": 0.0, "temperature 0.7": 0.7}
TRUTH = np.arange(5, 5 + G)


def model_of(method, arch="llama", **changes):
    return tiny_model(method, arch, **changes).double()


def assert_equal(model, method, by, temperature):
    """The engine gives every question, in company, what the plain sampler gives it; and the passes that commit."""
    model.method = method
    found = model.generate(QUESTIONS, batch_size=3, temperature=temperature, seed=7)
    for index, (question, one) in enumerate(zip(QUESTIONS, found)):
        plain = by(model, method, question, index=index, seed=7, temperature=temperature)
        assert one.ids == plain.text()
        assert one.cost.passes <= plain.nfe


@pytest.mark.parametrize("temperature", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("sampler", BY_LLADA.values(), ids=BY_LLADA)
def test_the_engine_equals_lladas_plain_sampler(sampler, temperature):
    method = Llada(gen_length=G, sampler=sampler)
    assert_equal(model_of(method), method, reference.llada, temperature)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_engine_equals_the_plain_sampler_on_every_architecture(arch):
    method = Llada(gen_length=G, sampler={"steps": 6, "block_length": 4})
    assert_equal(model_of(method, arch), method, reference.llada, 0.0)


@pytest.mark.parametrize("temperature", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("sampler", BY_DREAM.values(), ids=BY_DREAM)
def test_the_engine_equals_dreams_plain_sampler(sampler, temperature):
    method = Dream(gen_length=G, sampler={**sampler, "top_p": 0.9 if temperature else 1.0})
    assert_equal(model_of(method, "gpt2"), method, reference.dream, temperature)


@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 2.0])
def test_the_engine_equals_the_plain_threshold_sampler(level):
    method = Llada(gen_length=G, sampler={"commit": "threshold", "threshold": level, "block_length": 4})
    assert_equal(model_of(method), method, reference.threshold, 0.0)


# Without a model: places are predicted by what is put in its stead.


def fill(sampler, predictor, length=G, seed=0, mask=0, eos=1, temperature=0.0):
    """Fill a canvas by ``predictor(tokens) -> logits (G, V)``; return it, and the places committed by each pass."""
    canvas, committed = Canvas(sampler, length, mask, eos, [seed]), []
    while not canvas.is_done:
        asked, drawn = canvas.asked(), torch.from_numpy(canvas.drawn())
        logits = predictor(canvas.tokens_G)[asked].clone()
        logits[:, mask] = -torch.inf
        tokens, scores = canvases.propose(logits, sampler, temperature, drawn[0, asked])
        committed.append(canvas.commit(tokens.numpy(), scores.numpy()).tolist())
    return canvas, committed


def knows(tokens):
    return 30 * torch.eye(32)[torch.from_numpy(TRUTH)]


def is_flat(tokens):
    return torch.zeros(G, 32).index_fill(1, torch.tensor([1]), -5.0)  # all alike, but for the end of sequence


ANY = [
    SamplerSettings(steps=s, block_length=k, commit=c, ties=t)
    for s, k in ((1, None), (4, 4), (6, 2), (12, 12), (3, 4))
    for c in ("confidence", "random", "margin", "entropy", "origin")
    for t in ("random", "lowest")
    if s % (G // (k or G)) == 0
]


BY_GRID = [
    Dream(sampler={"commit": c, "steps": s, "position_temperature": t}).sampler
    for c, t in (("origin", 0.0), ("confidence", 0.0), ("margin", 0.3), ("entropy", 0.0))
    for s in (1, 5, 12)
]


@pytest.mark.parametrize("sampler", [*ANY, *BY_GRID, SamplerSettings(commit="threshold")])
def test_one_that_knows_the_answer_recovers_it(sampler):
    """Card 9, 5, and dream's: whatever the passes, blocks and rule; all masks of a canvas are committed, each once."""
    canvas, committed = fill(sampler, knows)
    assert canvas.tokens_G.tolist() == TRUTH.tolist()
    assert sorted(place for places in committed for place in places) == list(range(G))  # each once


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("sampler", [{"steps": 1}, {"guidance": 1.5, "steps": 1}, {"guidance": 4.0},
                                     {"guidance": 0.5, "commit": "random", "block_length": 4, "steps": 6}])  # fmt: skip
def test_so_it_does_in_the_engine_whatever_the_guidance(sampler, arch, monkeypatch):
    """Card 9, 5."""
    model, own = model_of(Llada(gen_length=G, sampler=sampler), arch), canvases.predict
    words = [i for i in range(len(model.tokenizer)) if i not in (model.encoder.eos_id, *model.suppressed_ids())]
    truth = torch.tensor((words * G)[:G])

    def predict(backbone, prompts, tokens_RG, asked, *rest):
        logits_AV = own(backbone, prompts, tokens_RG, asked, *rest)
        rows = torch.arange(len(logits_AV))
        known = truth[asked[1]].repeat(len(rows) // len(asked[1]))
        return torch.zeros_like(logits_AV).index_put((rows, known), torch.tensor(30.0))

    monkeypatch.setattr(canvases, "predict", predict)
    for one in model.generate(QUESTIONS):
        assert one.ids == truth.tolist()
        assert one.cost.passes == (2 if "guidance" in sampler else 1) * sampler.get("steps", G)


def test_random_order_is_the_mean_over_all_orders_of_what_a_table_says():
    """Card 9, 9: three places, two symbols, conditionals that agree with no one joint; a chi-square over 8 classes."""
    table, n = np.random.default_rng(0).dirichlet([1.0, 1.0], size=(3, 3, 3, 3)), 400  # place, then 0 or a symbol each

    def shares(tokens, place):
        return table[(place, *(max(t - 1, 0) for t in tokens))]

    def logits(tokens):
        return torch.tensor([[-np.inf, -np.inf, *np.log(shares(tokens.tolist(), place))] for place in range(3)])

    expected = dict.fromkeys(product((2, 3), repeat=3), 0.0)
    for order, canvas in product(permutations(range(3)), expected):
        known, share = [0, 0, 0], 1 / 6
        for place in order:
            share *= shares(known, place)[canvas[place] - 2]
            known[place] = canvas[place]
        expected[canvas] += share
    counts = dict.fromkeys(expected, 0)
    sampler = SamplerSettings(commit="random")
    for seed in range(n):
        canvas, _ = fill(sampler, logits, length=3, seed=seed, temperature=1.0)
        counts[tuple(canvas.tokens_G.tolist())] += 1
    assert sum((counts[c] - n * p) ** 2 / (n * p) for c, p in expected.items()) < 24.3  # p = .001


@pytest.mark.parametrize("steps, block", [(5, None), (12, None), (6, 4), (3, 4), (20, None)])
def test_counts_are_the_larger_first_and_blocks_fill_from_left_to_right(steps, block):
    """Card 9, 6."""
    _, committed = fill(SamplerSettings(steps=steps, block_length=block), is_flat)
    size, each = block or G, steps // (G // (block or G))
    counts = [n for n in (size // each + (i < size % each) for i in range(each)) if n]
    assert [len(places) for places in committed] == counts * (G // size)
    blocks = [place // size for places in committed for place in places]
    assert blocks == sorted(blocks)


def test_ties_are_broken_by_index_or_by_the_seed():
    """Card 9, 7."""
    orders = [
        fill(SamplerSettings(ties=t), is_flat, seed=s)[1] for t, s in (("lowest", 0), ("random", 0), ("random", 1))
    ]
    assert orders[0] == [[i] for i in range(G)]
    assert orders[1] != orders[0] and orders[1] != orders[2]
    assert fill(SamplerSettings(), is_flat)[1] == orders[1]
    assert fill(SamplerSettings(block_length=1), is_flat)[1] == orders[0]


def test_equal_tokens_are_told_apart_by_the_seed_and_in_proportion():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]]).expand(3000, -1)
    assert set(likeliest(logits, None).tolist()) == {1}
    drawn = torch.from_numpy(np.random.default_rng(0).random(3000))
    shares = torch.bincount(likeliest(logits, drawn), minlength=5) / 3000
    assert shares.tolist() == pytest.approx([0, 1 / 3, 0, 1 / 3, 1 / 3], abs=0.03)


@pytest.mark.parametrize("level, n_passes", [(1.1, G), (0.0, 1), (-1.0, 1)])
def test_a_threshold_that_none_or_all_pass_gives_one_token_a_pass_or_one_pass(level, n_passes):
    """Card 9, 10."""
    canvas, _ = fill(SamplerSettings(commit="threshold", threshold=level), is_flat)
    assert canvas.n_passes == n_passes


def test_a_nucleus_keeps_the_token_that_crosses_it():
    shares = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = [int(nucleus(shares, p, 1.0).isfinite().sum()) for p in (0.4, 0.5, 0.6, 0.8, 0.81, 1.0)]
    assert kept == [1, 1, 2, 2, 3, 4]
    assert int(nucleus(shares, 0.6, 0.1).isfinite().sum()) == 1  # of the tempered distribution


@pytest.mark.parametrize("commit", ["origin", "confidence"])
def test_dreams_grid_commits_the_masks_that_its_times_say(commit):
    """Card dream 9: in expectation #masked (1 - s/t); all in one step; the sum is all."""
    sampler = Dream(sampler={"commit": commit, "steps": 4}).sampler
    found = np.zeros(4)
    for seed in range(300):
        canvas, before = Canvas(sampler, G, 0, 1, [seed]), G
        while not canvas.is_done:
            step, asked = canvas.step, canvas.asked()
            canvas.commit(np.full(len(asked), 5), np.zeros(len(asked)))
            found[step] += before - len(canvas.masks())
            before = len(canvas.masks())
    grid = np.linspace(1, 1e-3, 5)
    expected = G * (grid[:-1] - grid[1:]) if commit == "origin" else [2, 3, 3, 4]
    expected[-1] += G * 1e-3 if commit == "origin" else 0
    assert found / 300 == pytest.approx(expected, abs=0.25 if commit == "origin" else 0)


# Costs and company


@pytest.mark.parametrize("sampler, n_passes", [({}, G), ({"steps": 5}, 5), ({"steps": 6, "block_length": 4}, 6),
                                               ({"steps": 24}, G), ({"steps": 3, "guidance": 2.0}, 6)])  # fmt: skip
def test_passes_are_as_many_as_the_formula_says(sampler, n_passes):
    method = Llada(gen_length=G, sampler={**sampler, "eos": "never"})
    model = tiny_model(method)
    for rows in (QUESTIONS[:1], QUESTIONS):
        found = model.generate(rows)
        assert {one.cost.passes for one in found} == {n_passes}
        assert [one.cost.positions for one in found] == [n_passes * (len(r) + G) for r in model.prompts(rows)]
        if not sampler:
            assert {one.cost.logits for one in found} == {sum(range(G + 1))}


def test_a_canvas_whose_text_is_settled_leaves_and_another_joins():
    method = Llada(gen_length=G, sampler={"steps": 6})
    model = model_of(method)
    engine, sizes = CanvasEngine(model, EngineOptions(batch_size=2)), []
    forward = model.backbone.forward
    model.backbone.forward = lambda embeds, **known: sizes.append(len(embeds)) or forward(embeds, **known)
    passes = {index: one.cost.passes for index, one in engine.run(QUESTIONS)}
    assert len(set(passes.values())) > 1  # of unlike progress
    assert sum(sizes) == sum(passes.values())
    assert max(sizes) == 2 and sizes.count(2) > len(sizes) / 2


@pytest.mark.parametrize("method", [Llada(gen_length=G, sampler={"steps": 4}), Dream(gen_length=G),
                                    Llada(gen_length=G, sampler={"commit": "threshold", "threshold": 0.3}),
                                    *(Llada(gen_length=G, sampler=sampler) for sampler in (
                                        {"commit": "random", "steps": 4, "block_length": 6}, {"commit": "margin"},
                                        {"ties": "lowest", "eos": "last"}, {"commit": "origin", "eos": "never"},
                                        {"position_temperature": 0.5, "top_p": 0.8})),
                                    Dream(gen_length=G, sampler={"commit": "entropy", "steps": 5, "top_p": 0.9}),
                                    Llada(gen_length=G, sampler={"guidance": 1.0, "steps": 4})])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_depend_on_no_company(method, temperature):
    model = model_of(method)
    options = {"temperature": temperature, "seed": 3}
    whole = [one.ids for one in model.generate(QUESTIONS, batch_size=5, **options)]
    for size in (1, 2):
        assert [one.ids for one in model.generate(QUESTIONS, batch_size=size, **options)] == whole
    if temperature:
        twice = model.generate(QUESTIONS, samples=2, **options)
        assert [one.ids for one in twice[::2]] == whole and [one.ids for one in twice[1::2]] != whole
        assert [one.ids for one in model.generate(QUESTIONS, temperature=temperature, seed=4)] != whole


def test_a_model_that_ignores_the_question_is_not_moved_by_guidance(monkeypatch):
    """Card 9, 8."""
    model = model_of(Llada(gen_length=G, sampler={"steps": 4}))
    own = canvases.predict
    monkeypatch.setattr(canvases, "predict", lambda b, prompts, *rest: own(
        b, type(prompts)(torch.full_like(prompts.ids_RP, 7), prompts.mask_RP), *rest))  # fmt: skip
    mask = model.method.mask_id(model.encoder)
    with torch.no_grad():
        model.backbone.lm.get_input_embeddings().weight[mask] = model.backbone.lm.get_input_embeddings().weight[7]
    plain = [one.ids for one in model.generate(QUESTIONS[:1])]
    model.method = change(model.method, **{"sampler.guidance": 3.0})
    assert [one.ids for one in model.generate(QUESTIONS[:1])] == plain


def test_the_mask_is_never_written_and_loops_are_passes():
    model = tiny_model(Llada(gen_length=G))
    with torch.no_grad():
        head = model.backbone.lm.get_output_embeddings().weight
        head[model.method.mask_id(model.encoder)] = 100 * head.abs().max()
    found = model.generate(QUESTIONS, loops=3)
    assert all(model.method.mask_id(model.encoder) not in one.ids for one in found)
    assert max(one.cost.loops for one in found) <= 3
    assert max(len(one.ids) for one in model.generate(QUESTIONS, max_new_tokens=2)) <= 2


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Llada(gen_length=10, sampler={"block_length": 4}), "gen_length is 10, which is no multiple of.*4"),
        (lambda: Llada(gen_length=8, sampler={"block_length": 4, "steps": 3}), "steps is 3.*2 blocks: make it a"),
        (lambda: Llada(sampler={"steps": 0}), "steps is 0, but must be a whole number, at least 1"),
        (lambda: Llada(sampler={"commit": "threshold", "steps": 4}), "as many passes as it needs: leave steps out"),
        (lambda: Llada(sampler={"commit": "random", "position_temperature": 1.0}), "commit=random has none"),
        (lambda: Llada(sampler={"guidance": -1.0}), "guidance is -1.0, but must be a number, at least 0"),
        (lambda: Llada(sampler={"top_p": 0.0}), "top_p is 0.0, but must be a number"),
        (lambda: Llada(gen_length=0), "gen_length is 0"),
        (lambda: tiny_model(Llada(mask_token="<pad>")), "'<pad>', which is the tokenizer's padding token"),
        (lambda: tiny_model(Llada(mask_token="<eos>")), "end-of-sequence token: choose another"),
        (lambda: tiny_model(Llada(gen_length=250)).generate(QUESTIONS), "canvas 250, but the model reads at most 256"),
        (lambda: tiny_model(Llada()).generate(QUESTIONS, beams=2), "follows no beams"),
        (lambda: tiny_model(Llada()).generate(QUESTIONS, likelihoods=True), "leave likelihoods out"),
        (lambda: tiny_model(Llada(gen_length=4)).prepared(chain_examples(2)), "raise it to .* or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(make, told):
    with pytest.raises(InputError, match=told):
        make()

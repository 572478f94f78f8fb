"""What denoising learns from: which tokens are hidden, what each counts, and the loss over the global batch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import Dream, InputError, LatentModel, Llada
from innerloop.methods.denoise.noise import hide, times, weights_of
from innerloop.methods.denoise.settings import NoiseSettings
from innerloop.text.examples import Example
from innerloop.text.row import Kind
from tests.close import assert_close
from tests.fields import change
from tests.methods import reference_denoise as reference
from tests.models import answers_of, chain_examples, moved, saved, tiny_model

G = 24
EXAMPLES = list(chain_examples(6))
METHODS = {
    "llada": Llada(gen_length=G),
    "llada, shifted": Llada(gen_length=G, shift=True),
    "dream": Dream(gen_length=G),
    "dream, in place": Dream(gen_length=G, shift=False),
}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def row_of(model, example=EXAMPLES[0]):
    return model.method.lay_out(example, model.encoder)


def test_a_row_is_the_question_and_a_canvas_filled_up_with_ends():
    model = tiny_model(Llada(gen_length=G))
    row = row_of(model)
    ids, answer = row.ids()[row.region_start :], [i for span in row.suffix[:-1] for i in span.ids]
    assert len(ids) == G and ids[: len(answer)] == answer
    assert set(ids[len(answer) :]) == {model.encoder.eos_id}
    assert [span.kind for span in row.suffix] == [Kind.STEP] * 3 + [Kind.ANSWER] * 2
    assert row.labels() == [-100] * row.region_start + ids
    assert len(row_of(tiny_model(Llada(gen_length=G, write_steps=False))).suffix) == 2


@by_method
def test_the_question_is_never_hidden_and_the_share_of_the_rest_is_p(method):
    """Card 9, 2."""
    model = tiny_model(method)
    row, mask = row_of(model), model.method.mask_id(model.encoder)
    noisy = [hide(row, 0.3, method.noise, mask, method.shift, str(s)) for s in range(300)]
    hidden = [place for one in noisy for place in one.noise.hidden]
    assert min(hidden) >= row.region_start and max(hidden) < len(row)
    p = 0.3 * (1 - method.noise.least) + method.noise.least
    assert len(hidden) / (300 * G) == pytest.approx(p, abs=3 * math.sqrt(p * (1 - p) / (300 * G)))
    batch = model.batch(noisy[:4])
    assert ((batch.ids_BS == mask).sum(1) == torch.tensor([len(one.noise.hidden) for one in noisy[:4]])).all()
    assert (batch.ids_BS == model.batch([row] * 4).ids_BS)[batch.ids_BS != mask].all()


def test_times_are_uniform_and_spread_evenly_over_a_batch():
    drawn = np.array([sorted(times(8, str(seed))) for seed in range(200)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.allclose(np.diff(drawn), 1 / 8)
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert times(4, "a") == times(4, "a") != times(4, "b")


@by_method
def test_the_loss_and_its_gradient_are_the_cards(method):
    """Each hidden token's cross-entropy times its weight, over what the global batch counts; no other place has any."""
    model = tiny_model(method, "gpt2" if method.shift else "llama").double()
    rows = model.method.rows(EXAMPLES, model.encoder, seed="s")
    total, count = torch.zeros((), dtype=torch.double), 0.0
    for row in rows:
        ids = row.ids()
        noisy = [method.mask_id(model.encoder) if k in row.noise.hidden else i for k, i in enumerate(ids)]
        with torch.enable_grad():
            logits = reference.logits_of.__wrapped__(model, noisy, method.shift)
        for place, weight in zip(row.noise.hidden, row.noise.weights):
            total = total + weight * cross_entropy(logits[place], torch.tensor(ids[place]))
        count += row.noise.n_counted
    expected = total / count
    out = model(model.batch(rows))
    assert_close(out.loss, expected, 1e-6)
    for got, wanted in zip(*(torch.autograd.grad(x, list(model.backbone.parameters()), allow_unused=True)
                             for x in (out.loss, expected))):  # fmt: skip
        assert (got is None) == (wanted is None)
        if got is not None:
            assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("norm, divisor", [("sequence", 6 * G), ("token", 6 * G), ("batch", 6), ("masked", None)])
def test_normalisers_count_the_global_batch(norm, divisor):
    method = Llada(gen_length=G, noise={"norm": norm, "weight": "uniform"})
    model = tiny_model(method).double()
    rows = method.rows(EXAMPLES, model.encoder, seed="s")
    plain = [model(model.batch([row])) for row in rows]
    n_hidden = [len(row.noise.hidden) for row in rows]
    total = sum(out.measured["loss_masked"] * n for out, n in zip(plain, n_hidden))
    whole = model.batch(rows)
    assert_close(model(whole).loss, total / (divisor or sum(n_hidden)), 1e-6)
    parts = [model(model.batch(part), n_items=whole.counts()).loss for part in (rows[:2], rows[2:])]
    assert_close(sum(parts), model(whole).loss, 1e-6)


@pytest.mark.parametrize("weight", ["1/t", "linear", "uniform", "cart"])
def test_a_model_without_an_opinion_loses_log_v_a_token(weight):
    """Card 9, 1: with 1/t in expectation over t, whatever is hidden."""
    model = tiny_model(Llada(gen_length=G, noise={"weight": weight}))
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.zero_()
    assert model.loss(EXAMPLES).measured["loss_masked"].item() == pytest.approx(
        math.log(len(model.tokenizer)), rel=1e-5
    )
    if weight == "1/t":
        rows = [row for s in range(600) for row in model.method.rows(EXAMPLES[:4], model.encoder, seed=str(s))]
        sums = [sum(row.noise.weights) for row in rows]
        assert np.mean(sums) == pytest.approx(1.0, abs=4 * np.std(sums) / math.sqrt(len(sums)))


@by_method
def test_one_that_knows_loses_nothing_and_only_hidden_tokens_have_a_gradient(method):
    """Card 9, 1: logits of other places change no loss, so their gradient is 0, not next to nothing."""
    model = tiny_model(method, "gpt2" if method.shift else "llama")
    rows, v = model.rows(EXAMPLES, seed="s"), len(model.tokenizer)
    batch = model.batch(rows)
    states_BSV = torch.zeros(*batch.ids_BS.shape, v, requires_grad=True)
    model.backbone.forward, model.backbone.head = (lambda embeds, **known: states_BSV), (lambda states: states)
    model.backbone.head_inputs = lambda states_UV: lambda part: states_UV[part]
    assert batch.bounds[0] + batch.columns(2)[0].stop > 0
    (gradient,) = torch.autograd.grad(model(batch).loss, states_BSV)
    touched = gradient.flatten(0, 1).abs().sum(-1).nonzero()[:, 0]
    assert touched.tolist() == sorted(batch.predict_at_U.tolist())
    with torch.no_grad():
        states_BSV.view(-1, v)[batch.predict_at_U, batch.targets_U] = 60.0
    assert model(batch).loss.item() == 0


def test_subsets_weighed_by_their_size_are_the_integral_over_t():
    """Card 9, 3: E[1/t sum of losses] = mean over l of L / l sum = mean over orders of the chain rule."""
    n = 3
    loss = {s: np.random.default_rng(s).random(n) for s in range(2**n)}  # of each place, given which are hidden

    def summed(s):
        return sum(loss[s][i] for i in range(n) if s >> i & 1)

    sizes = {s: bin(s).count("1") for s in range(1, 2**n)}
    by_size = sum(n / k * summed(s) / math.comb(n, k) for s, k in sizes.items()) / n
    t = (np.arange(20_000) + 0.5) / 20_000
    integral = sum((t ** (k - 1) * (1 - t) ** (n - k)).mean() * summed(s) for s, k in sizes.items())
    orders = [(a, b, c) for a in range(n) for b in range(n) for c in range(n) if len({a, b, c}) == n]
    chain = np.mean([sum(loss[sum(1 << j for j in o[i:])][o[i]] for i in range(n)) for o in orders])
    assert by_size == pytest.approx(integral, rel=1e-6)
    assert by_size == pytest.approx(chain, rel=1e-9)


# Card dream, 9


def cart(hidden, length, q):
    return weights_of(hidden, length, 0.5, 0.5, NoiseSettings(weight="cart", cart_q=q))


def test_cart_counts_clean_tokens_by_their_distance():
    hidden, q = [3, 4, 9], 0.1
    slow = [sum(0.5 * q * (1 - q) ** (abs(n - i) - 1) for i in range(12) if i not in hidden) for n in hidden]
    assert cart(hidden, 12, q) == pytest.approx(slow)
    assert cart([8, 7, 2], 12, q) == pytest.approx(slow)  # the row turned round
    assert cart([500], 1001, q) == pytest.approx([1.0])
    assert cart([0], 1000, q) == pytest.approx([0.5])
    assert cart(list(range(12)), 12, q) == [0.0] * 12
    assert cart([3, 4, 9], 12, 1.0) == [0.5, 0.5, 1.0]  # adjacent ones alone


def test_cart_knows_places_alone_and_no_tokens():
    """Rows of other tokens with the same places hidden count the same; the first token of a row cannot be hidden."""
    model = tiny_model(Dream(gen_length=G))
    a, b = (row_of(model, Example(q, (), "2", "a", {})) for q in ("3 ; + 4", "4 ; - 1"))
    assert a.ids() != b.ids()
    found = [hide(row, 0.5, model.method.noise, 9, True, "s").noise for row in (a, b)]
    assert found[0].hidden == found[1].hidden and found[0].weights == found[1].weights
    assert 0 < max(found[0].weights) <= 1
    row = hide(replace(a, prefix=[]), 1.0, model.method.noise, 9, True, "s")
    with pytest.raises(InputError, match="the first token of a row cannot be supervised: nothing comes before it"):
        model.batch([row])


@pytest.mark.parametrize("t, mean", [(0.1, 0.87), (0.5, 0.48), (0.9, 0.10)])
def test_cart_is_roughly_one_minus_t(t, mean):
    rng, found = np.random.default_rng(0), []
    for _ in range(40):
        hidden = np.flatnonzero(rng.random(256) < t).tolist()
        found += cart(hidden, 256, 0.1)
    assert np.mean(found) == pytest.approx(mean, abs=0.03)


def test_a_shifted_model_under_a_causal_mask_scores_like_a_decoder():
    method = Dream(gen_length=G)
    model = tiny_model(method, "gpt2").double()
    ids = row_of(model).ids()
    backbone, row = model.backbone, torch.tensor([ids])
    with torch.no_grad():
        own = backbone.lm(input_ids=row).logits[0]
        mask = backbone.mask_of(torch.ones_like(row), len(ids), 0, own.dtype)
        logits = backbone.head(backbone(backbone.embed(row), mask=mask))[0]
    batch = model.batch(method.rows(EXAMPLES[:1], model.encoder, seed="s"))
    assert_close(logits[batch.predict_at_U], own[batch.predict_at_U], 1e-6)
    assert (batch.targets_U == row[0, batch.predict_at_U + 1]).all()


# As a whole


@by_method
def test_a_saved_model_opens_again_and_sees_all(method, tmp_path):
    model = moved(tiny_model(method))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == method
    assert torch.equal(answers_of(loaded), answers_of(model))
    questions = [example.question for example in EXAMPLES]
    assert [one.ids for one in loaded.generate(questions)] == [one.ids for one in model.generate(questions)]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_any_decoder_becomes_a_mask_predictor(arch, tmp_path):
    plain = tiny_model(change(Llada(gen_length=G)), arch)
    plain.backbone.lm.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    model = LatentModel.from_pretrained(tmp_path, Dream(gen_length=G), device="cpu")
    later = model.answer_logits(EXAMPLES[:1])[0]
    rows = model.rows(EXAMPLES[:1])
    first = rows[0].noise.hidden[0]
    clean = [k for k in range(rows[0].region_start, len(rows[0])) if k not in rows[0].noise.hidden and k > first]
    batch = model.batch(rows)
    batch.ids_BS[0, clean[-1]] += 1
    thought = model.think(batch)
    assert not torch.allclose(model.written_logits(batch, thought)[0], later[0])


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_loss_in_chunks_is_the_whole(chunk):
    model = tiny_model(Llada(gen_length=G)).double()
    expected = model.loss(EXAMPLES).loss
    model.loss_chunk, model.checkpoint_passes = chunk, True
    model.train()
    assert_close(model.loss(EXAMPLES).loss, expected, 1e-6)


def test_draws_follow_the_seed_and_the_row_alone():
    model = tiny_model(Llada(gen_length=G))
    whole = model.rows(EXAMPLES, seed="0/1/0/0")
    assert whole == model.rows(EXAMPLES, seed="0/1/0/0") != model.rows(EXAMPLES, seed="0/2/0/0")
    assert model.rows(EXAMPLES) == model.rows(EXAMPLES)
    assert len({len(row.noise.hidden) for row in whole}) > 2

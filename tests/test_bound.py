"""The likelihood of answers that are denoised: a bound by Monte Carlo, against all subsets enumerated."""

import math
from itertools import combinations

import pytest
import torch

from innerloop import Cot, Dream, InputError, Llada
from innerloop.measure.bound import Bound, bounds, hidden_counts
from innerloop.measure.likelihood import likelihood
from innerloop.text.examples import Example
from tests.methods import reference_denoise as reference
from tests.models import chain_examples, tiny_model

EXAMPLE = Example("3 ; + 4", (), "2", "a", {})
BY_LENGTH = {n: Llada(gen_length=n, write_steps=False) for n in (3, 4, 6)}


def enumerated(model, example):
    """Return the bound of an answer as the mean over numbers of hidden tokens and over all subsets of that size."""
    method, row = model.method, model.method.lay_out(example, model.encoder)
    ids, start = row.ids(), row.region_start
    length, sizes = len(ids) - start, []
    for n in range(1, length + 1):
        found = []
        for hidden in combinations(range(start, len(ids)), n):
            noisy = [method.mask_id(model.encoder) if k in hidden else i for k, i in enumerate(ids)]
            log_probs = reference.logits_of(model, noisy, method.shift).log_softmax(-1)
            found.append(length / n * -sum(float(log_probs[k, ids[k]]) for k in hidden))
        sizes.append(sum(found) / len(found))
    return sum(sizes) / length


@pytest.mark.parametrize("method", [*BY_LENGTH.values(), Dream(gen_length=4, write_steps=False)])
def test_the_bound_is_the_enumerated_one_within_three_errors(method):
    model = tiny_model(method, "gpt2" if method.shift else "llama").double()
    (found,) = bounds(model, [EXAMPLE], n_draws=240)
    assert found.n_tokens == method.gen_length and len(found.draws) == 240
    assert abs(found.nll - enumerated(model, EXAMPLE)) <= 3 * found.error


def test_it_does_not_depend_on_how_many_draws_share_a_pass_or_on_other_examples():
    model = tiny_model(Llada(gen_length=24)).double()
    whole = bounds(model, chain_examples(3), n_draws=16, batch_size=64)
    for size in (1, 4, 16):
        again = bounds(model, chain_examples(3), n_draws=16, batch_size=size)
        assert [bound.nll for bound in again] == pytest.approx([bound.nll for bound in whole], rel=1e-9)
    assert bounds(model, chain_examples(1), n_draws=16)[0].nll == pytest.approx(whole[0].nll, rel=1e-9)


@pytest.mark.parametrize("n_tokens, n_draws", [(8, 16), (4, 16), (100, 16), (7, 5), (32, 32), (6, 1)])
def test_every_number_of_hidden_tokens_comes_equally_often(n_tokens, n_draws):
    """Card 9, 8b; the authors' rounding does not do so."""
    every = [n for first in range(1, n_tokens + 1) for n in hidden_counts(n_tokens, n_draws, first)]
    assert {every.count(n) for n in range(1, n_tokens + 1)} == {n_draws}
    if n_draws == n_tokens:
        assert sorted(hidden_counts(n_tokens, n_draws, 3)) == list(range(1, n_tokens + 1))


@pytest.mark.parametrize("n_tokens, even, odd", [(8, 1.5, 0.5), (4, 1.25, 0.75), (32, 1.0, 1.0)])
def test_the_authors_rounding_prefers_even_numbers(n_tokens, even, odd):
    every = [n for first in range(1, n_tokens + 1) for n in hidden_counts(n_tokens, 16, first, "authors")]
    assert {every.count(n) / 16 for n in range(2, n_tokens + 1, 2)} == {even}
    assert {every.count(n) / 16 for n in range(1, n_tokens + 1, 2)} == {odd}


def test_one_draw_is_exact_for_one_token_and_log_v_without_an_opinion():
    assert math.isnan(Bound((1.0,), 1).error)
    model = tiny_model(Llada(gen_length=24))
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.zero_()
    found = bounds(model, chain_examples(2), n_draws=3)
    assert [bound.nll for bound in found] == pytest.approx([24 * math.log(len(model.tokenizer))] * 2)
    assert found[0].error == pytest.approx(0, abs=1e-4)


def test_running_text_has_a_bound_too():
    texts = [Example("3 + 4", (), " = 2 2 * 2 = 4", str(i), {}) for i in range(3)]
    model = tiny_model(Llada()).double()
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.zero_()
    found = likelihood(model, texts)
    assert found.nll == pytest.approx(math.log(len(model.tokenizer)))
    assert found.n_tokens == (7, 7, 7)
    assert likelihood(model, texts, batch_size=1).losses == pytest.approx(found.losses)


def test_what_has_no_bound_is_refused():
    with pytest.raises(InputError, match="'cot' does not denoise, so its likelihood is exact"):
        bounds(tiny_model(Cot()), [EXAMPLE])
    with pytest.raises(InputError, match="n_draws is 0"):
        bounds(tiny_model(BY_LENGTH[4]), [EXAMPLE], n_draws=0)

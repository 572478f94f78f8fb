"""The likelihood of answers that are denoised: a bound by Monte Carlo, against all subsets enumerated."""

import json
import math
from itertools import combinations

import pytest
import torch

from innerloop import Cot, Dream, InputError, Llada
from innerloop.measure.bound import Bound, bounds, hidden_counts, row_bounds, summary
from innerloop.measure.likelihood import likelihood
from innerloop.tasks import Chain
from innerloop.text.examples import Example
from tests.methods import reference_denoise as reference
from tests.models import chain_examples, saved, tiny_model
from tests.test_cli import innerloop, refused

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


@pytest.mark.parametrize("n_draws", [1, 4, 16])
@pytest.mark.parametrize("n_tokens", [4, 6])
def test_so_is_the_mean_of_calls_of_few_draws(n_draws, n_tokens):
    model = tiny_model(BY_LENGTH[n_tokens]).double()
    calls = [bounds(model, [EXAMPLE], n_draws=n_draws, seed=s)[0].nll for s in range(192 // n_draws)]
    mean = sum(calls) / len(calls)
    error = math.sqrt(sum((one - mean) ** 2 for one in calls) / (len(calls) - 1) / len(calls))
    assert abs(mean - enumerated(model, EXAMPLE)) <= 3 * error


def test_what_a_result_says_of_answers():
    found = summary([Bound((1.0, 3.0), 4), Bound((4.0, 6.0), 4)])
    assert (found["nll"], found["nll_per_token"], found["draws"], found["n"]) == (3.5, 0.875, 2, 2)
    assert found["mc_error"] == pytest.approx(math.sqrt(2) / 2)
    assert found["ci95"] == pytest.approx([3.5 - 1.96 * 1.5, 3.5 + 1.96 * 1.5], abs=1e-3)
    assert (summary([Bound((1.0,), 4)])["mc_error"], summary([Bound((1.0,), 4)])["ci95"]) == (None, None)


@pytest.mark.parametrize("filler", ["mask", "random"])
def test_it_does_not_depend_on_how_many_draws_share_a_pass_or_on_other_examples(filler):
    model = tiny_model(Llada(gen_length=24, noise={"filler": filler})).double()
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


@pytest.mark.parametrize("shift", [False, True])
def test_one_draw_is_the_likelihood_of_an_answer_of_one_token(shift):
    """Card 9, 3."""
    model = tiny_model(Llada(shift=shift), "gpt2" if shift else "llama").double()
    model.encoder.running_text = True
    row = model.method.lay_out(Example("3", (), " 4", "a", {}), model.encoder)
    ids, mask = row.ids(), model.method.mask_id(model.encoder)
    (found,) = row_bounds(model, [row], n_draws=1)
    log_probs = reference.logits_of(model, [*ids[:-1], mask], shift).log_softmax(-1)
    assert found.n_tokens == 1 and found.nll == pytest.approx(-float(log_probs[-1, ids[-1]]), rel=1e-9)


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


def test_eval_bounds_the_right_answers_where_it_is_asked(tmp_path, capsys):
    model, few = tiny_model(Llada(gen_length=40)), ["--task", "chain", "--limit", 3, "--out", tmp_path]
    run = saved(model, tmp_path / "run")
    code, out, _ = innerloop(capsys, "eval", run, *few, "--bound", 4)
    found = json.loads((tmp_path / "result.json").read_text())["bound"]
    assert code == 0 and f"nll of the right answers at most {found['nll']:.4f} nats each" in out
    examples = Chain().examples("test", 3)
    assert found["nll"] == pytest.approx(sum(one.nll for one in bounds(model, examples, n_draws=4)) / 3, rel=1e-5)
    assert (found["draws"], found["n"]) == (4, 3)
    plain = saved(tiny_model(Cot()), tmp_path / "cot")
    short = saved(tiny_model(Llada(gen_length=8)), tmp_path / "short")
    refused(capsys, "but the canvas has gen_length=8: raise it to", "eval", short, *few, "--bound", 4)
    refused(capsys, "'cot' does not denoise, so its likelihood is exact", "eval", plain, *few, "--bound", 4)

"""Beam search: against transformers' own, and against all texts that there are."""

import pytest
import torch

from innerloop import Cot, InputError, Slr
from tests.methods.reference import Reference
from tests.methods.tools import lean_towards_end, passes
from tests.models import tiny_model
from tests.test_engine_continuous import POOL, made

N = 6
ASKED = POOL[:4]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_texts_and_scores_are_those_of_transformers(arch):
    model = lean_towards_end(tiny_model(Cot(), arch), 2.0)
    theirs = {"num_beams": 4, "early_stopping": "never", "max_new_tokens": N, "do_sample": False, "pad_token_id": 0}
    theirs |= {"eos_token_id": model.encoder.eos_id, "return_dict_in_generate": True, "output_scores": True}
    for batch_size in (32, 8):
        found = model.generate(ASKED, max_new_tokens=N, beams=4, batch_size=batch_size)
        assert any(one.ended for one in found) and not all(one.ended for one in found)
        for question, one in zip(ASKED, found):
            ids = torch.tensor([model.prompts([question])[0].ids()])
            out = model.backbone.lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **theirs)
            assert out.sequences[0, ids.shape[1] :].tolist()[: len(one.ids)] == one.ids
            assert one.log_likelihood / len(one.ids) == pytest.approx(float(out.sequences_scores[0]), rel=1e-5)


def log_probs_of(model, question):
    """Return a function that tells how likely each word is after some, by the slow reference."""
    slow, never = Reference(model), model.suppressed_ids().tolist()
    start = slow.think(question, slow.last_stage)[0]

    def log_probs(ids):
        logits = slow.read(torch.cat([start, slow.embed(list(ids))]) if ids else start)[1][-1]
        logits[never] = -torch.inf
        return logits.log_softmax(-1)

    return log_probs


@torch.no_grad()
@pytest.mark.parametrize("name", ["cot", "slots"])
def test_with_a_beam_for_each_word_nothing_is_likelier(name):
    """Two tokens long, all texts are looked at: those that end at once, and those of two tokens."""
    model, _ = made(name)
    n_words, eos, never = len(model.tokenizer), model.encoder.eos_id, model.suppressed_ids().tolist()
    for question, one in zip(ASKED[:2], model.generate(ASKED[:2], max_new_tokens=2, beams=n_words)):
        log_probs = log_probs_of(model, question)
        first = log_probs([])
        scores = {(eos,): float(first[eos])}
        for word in set(range(n_words)) - {eos, *never}:
            second = (first[word] + log_probs([word])) / 2
            scores |= {(word, other): float(second[other]) for other in range(n_words)}
        best = max(scores, key=scores.__getitem__)
        assert tuple(one.ids) == best and one.log_likelihood / len(best) == pytest.approx(scores[best], rel=1e-4)


def plain_search(log_probs, eos, n_beams, n_tokens):
    """A beam search over texts as tuples; returns the best with its score."""
    live, over = {(): 0.0}, {}
    for n in range(1, n_tokens + 1):
        grown = {(*ids, t): s + float(p) for ids, s in live.items() for t, p in enumerate(log_probs(ids))}
        ranked = sorted(grown, key=grown.__getitem__, reverse=True)[: 2 * n_beams]
        over |= {ids: grown[ids] / n for ids in ranked[:n_beams] if ids[-1] == eos or n == n_tokens}
        live = {ids: grown[ids] for ids in [ids for ids in ranked if ids[-1] != eos][:n_beams]}
    return max(over.items(), key=lambda item: item[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["slots", "apart", "mod"])
def test_on_latents_and_depths_too_texts_are_those_of_a_search_without_a_cache(name):
    model, _ = made(name)
    found = model.generate(POOL, max_new_tokens=4, beams=3, batch_size=12)
    alone = [model.generate([question], max_new_tokens=4, beams=3)[0] for question in POOL]
    assert [one.ids for one in found] == [one.ids for one in alone]
    greedy = model.generate(POOL, max_new_tokens=4, likelihoods=True)
    for one, other in zip(found, greedy):
        if one.ids == other.ids:
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-4)
    if name == "slots":
        assert any(one.ids != other.ids for one, other in zip(found, greedy))
        ids, score = plain_search(log_probs_of(model, POOL[0]), model.encoder.eos_id, 3, 4)
        assert found[0].ids == list(ids) and found[0].log_likelihood / len(ids) == pytest.approx(score, rel=1e-4)


def test_one_beam_is_greedy_and_a_search_is_charged_for_all_its_texts():
    model, alone = made("slots")
    assert [one.ids for one in model.generate(POOL, max_new_tokens=14, beams=1)] == [ids for ids, *_ in alone]
    with passes(model) as seen:
        (one,) = model.generate(POOL[:1], max_new_tokens=5, beams=3)
    assert one.cost.passes == sum(len(embeds) for embeds in seen)
    assert one.cost.positions == sum(embeds.shape[0] * embeds.shape[1] for embeds in seen)
    assert one.cost.logits == 1 + sum(len(embeds) for embeds in seen if len(embeds) > 1)
    assert one.cost.loops == 2 and sum(one.cost.seconds.values()) > 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cot", {"temperature": 0.5}, "draws nothing"),
        ("cot", {"trace": True}, "records no trace"),
        ("cot", {"beams": 0}, "beams is 0, but must be a whole number, at least 1"),
        ("spiral", {}, "rows wait"),
        ("tah", {}, "rows wait"),
    ],
)
def test_what_cannot_be_searched_is_refused(name, options, words):
    with pytest.raises(InputError, match=words):
        made(name)[0].generate(["1"], **{"beams": 2, **options})


def test_a_classifier_is_not_searched():
    linear = tiny_model(Slr(n_slots=2, max_loops=1, decoder={"kind": "linear", "classes": ("0", "1")}))
    with pytest.raises(InputError, match="answers by a class"):
        linear.generate(["1"], beams=2)

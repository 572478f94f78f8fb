"""Several attempts at one question: whose draws are whose, what they cost together, and which answer counts."""

import math

import pytest
import torch

from innerloop import Cot, Gsm8k, InputError, NoCot, Slr, TestTimeCompute
from innerloop.decoder.cost import Cost, total_cost
from innerloop.engine import decoding
from innerloop.engine.decoding import DecodeBatch
from innerloop.engine.generation import Generation
from innerloop.measure import evaluate
from innerloop.methods import SpiralThinker
from innerloop.tasks import Chain
from tests.methods.reference import Reference
from tests.methods.tools import QUESTIONS, lean_towards_end, passes, sharp_model
from tests.models import chain_examples, tiny_model
from tests.test_engine_continuous import made

N = 5
ASKED = QUESTIONS[:3]
DRAWN = {"max_new_tokens": N, "temperature": 1.0, "seed": 3}


@pytest.mark.parametrize("name", ["cot", "slots", "apart", "tah", "spiral"])
def test_a_sample_depends_on_the_seed_its_question_and_its_number_alone(name):
    """In batches of one each sample is read for itself, so what is read once for all changes no token."""
    model, _ = made(name)
    alone = model.generate(ASKED, samples=3, batch_size=1, **DRAWN)
    together = model.generate(ASKED, samples=3, batch_size=5, **DRAWN)
    assert ids_of(together) == ids_of(alone)
    two = [one for i, one in enumerate(alone) if i % 3 < 2]
    assert ids_of(model.generate(ASKED, samples=2, **DRAWN)) == ids_of(two)
    assert ids_of(model.generate(ASKED, **DRAWN)) == ids_of(alone[::3])
    assert len({tuple(one.ids) for one in alone}) > len(ASKED)


@pytest.mark.parametrize("name", ["cot", "slots", "looped"])
def test_a_question_is_read_and_thought_about_once_for_all_its_samples_and_charged_once(name):
    model, _ = made(name)
    n_read, head = sum(map(len, model.prompts(ASKED))), 2 * model.backbone.width * model.backbone.config.vocab_size
    with passes(model) as seen:
        shared = model.generate(
            ASKED, samples=3, batch_size=5, **DRAWN
        )  # a prefill batch has room for one question and a part
    apart = model.generate(ASKED, samples=3, batch_size=1, **DRAWN)
    assert name == "looped" or all(len(embeds) == 1 for embeds in seen if embeds.shape[1] > 1)
    whole, other = (total_cost([one.cost for one in found]) for found in (shared, apart))
    once = total_cost([one.cost for one in model.generate(ASKED, max_new_tokens=1)])
    assert other.positions - whole.positions == 2 * once.positions >= 2 * n_read
    assert other.passes - whole.passes == 2 * once.passes and whole.logits == other.logits
    assert other.flops - whole.flops == pytest.approx(2 * (once.flops - head * len(ASKED)))
    latents = sum(model.n_thought_positions(row, row.n_loops) for row in model.prompts(ASKED))
    assert whole.loops == once.loops and other.thought_tokens - whole.thought_tokens == 2 * latents * (name != "looped")
    three = [shared[i : i + 3] for i in range(0, 9, 3)]
    assert all(sorted(one.cost.loops for one in tried)[:2] == [0, 0] for tried in three)
    twice = model.generate([ASKED[0]] * 2, samples=2, **DRAWN)  # a question that a data set has twice
    assert [one.cost.loops for one in twice] == [three[0][0].cost.loops, 0] * 2


def ids_of(found) -> list:
    return [one.ids for one in found]


@torch.no_grad()
@pytest.mark.parametrize("method", [Cot(), Slr(n_slots=2, max_loops=2)], ids=["cot", "slr"])
def test_likelihoods_are_those_of_the_text_under_the_model_whatever_the_temperature(method):
    model = lean_towards_end(sharp_model(method), 1.0)
    slow, never = Reference(model), model.suppressed_ids().tolist()
    found = model.generate(ASKED, samples=2, likelihoods=True, batch_size=3, **DRAWN | {"temperature": 1.7})
    for i, one in enumerate(found):
        start = slow.think(ASKED[i // 2], slow.last_stage)[0]
        logits = slow.read(torch.cat([start, slow.embed(one.ids)]))[1][len(start) - 1 : -1]
        logits[:, never] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None]).sum()
        assert one.log_likelihood == pytest.approx(float(expected), rel=1e-4)
    assert model.generate(ASKED, max_new_tokens=1)[0].log_likelihood is None


def test_a_token_that_must_be_written_has_no_likelihood_even_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch):
    method = SpiralThinker(pattern="even", latents_per_block=2, max_loops=1, max_blocks=2, force_block_after_text=True)
    model, found = tiny_model(method, "gpt2").double(), []
    eot, bol, other = model.tokenizer.convert_tokens_to_ids(["<eot>", "<bol>", "+"])
    for second in (bol, other):
        script = iter([eot, second, other])
        monkeypatch.setattr(decoding, "choose", lambda *_, script=script: torch.tensor([next(script)]))
        found += model.generate(ASKED[:1], max_new_tokens=3, likelihoods=True)
    assert [one.ids for one in found] == [[eot, bol, other]] * 2
    assert found[0].log_likelihood == found[1].log_likelihood < 0


# What counts


def said(*answers, likely=(), costs=()):
    """Return texts with answers, None for a text without one."""
    texts = ["no idea" if a is None else f"step {i}\n### {a}" for i, a in enumerate(answers)]
    found = [Generation(t, None, Cost(), ids=[1] * (i + 1)) for i, t in enumerate(texts)]
    for one, value in zip(found, likely):
        one.log_likelihood = value
    return found


@pytest.mark.parametrize(
    ("task", "answers", "chosen"),
    [
        (Chain(), ["1", "2", "2"], 1),
        (Chain(), ["3", "1", "1", "3"], 0),  # as many votes: who came first
        (Chain(), ["1", "3", "3", "1", "2", "2"], 0),
        (Chain(), [None, None, None, "4"], 3),  # no answer, no vote
        (Chain(), [None, None], 0),
        (Gsm8k(), ["3", "1,000", "1000.0"], 1),  # the same to the task
        (Gsm8k(), ["3.0", "1", "1", "3"], 0),
        (Chain(), ["2"], 0),
    ],
)
def test_the_answer_of_most_votes_counts(task, answers, chosen):
    tried = said(*answers)
    one, found = TestTimeCompute(samples=max(len(answers), 2)).choose(task, tried)
    assert one is tried[chosen] and [answer is None for answer in found] == [answer is None for answer in answers]


@pytest.mark.parametrize(
    ("answers", "likely", "chosen"),
    [
        (["1", "2", "2"], [-1.0, -4.0, -2.7], 2),  # -1, -2 and -0.9 a token
        (["1", "2"], [-1.0, -2.0], 0),
        ([None, "2"], [-0.1, -9.0], 1),
        ([None, None], [-1.0, -0.5], 1),
    ],
)
def test_the_text_that_is_likeliest_for_its_length_is_picked(answers, likely, chosen):
    tried = said(*answers, likely=likely)
    assert TestTimeCompute(samples=2, pick="likelihood").choose(Chain(), tried)[0] is tried[chosen]


def knowing(model, monkeypatch, shares):
    """Let a model write ``###``, one of some words by their shares, and the end."""
    words = {"###": {"###": 1.0}, "word": shares, "end": {model.tokenizer.eos_token: 1.0}}
    table = torch.full((N, len(model.tokenizer)), -math.inf)
    for i, known in enumerate(words.values()):
        for word, share in known.items():
            table[i, model.tokenizer.encode(word, add_special_tokens=False)] = math.log(share)
    monkeypatch.setattr(DecodeBatch, "allowed", lambda self: table[self.n_written_R])
    return model


@pytest.mark.parametrize("method", [NoCot(), Slr(n_slots=2, max_loops=1)], ids=["text", "latents"])
def test_a_model_that_knows_its_odds_is_voted_for_and_picked_by_them(method, monkeypatch):
    shares = {"1": 0.2, "2": 0.5, "3": 0.3}
    model = knowing(tiny_model(method), monkeypatch, shares)
    examples, n = chain_examples(3), 200
    (*_, last) = evaluate(model, Chain(), examples, attempts=TestTimeCompute(n, temperature=1.0), seed=1)
    assert last.predicted == "2" and len(last.samples) == n
    for word, share in shares.items():
        assert last.samples.count(word) / n == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))
    picked = evaluate(model, Chain(), examples, attempts=TestTimeCompute(8, "likelihood", 1.0))
    assert all(p.predicted == max(p.samples, key=shares.__getitem__) for p in picked)
    tried = TestTimeCompute(8, "likelihood", 0.5).answer(model, [examples[0].question])[0]
    assert [one.log_likelihood for one in tried] == pytest.approx([math.log(shares[one.answer]) for one in tried])


def test_one_greedy_attempt_is_a_plain_evaluation_and_several_cost_their_sum():
    model, _ = made("slots")
    examples, told = chain_examples(5), []
    plain = evaluate(model, Chain(), examples, max_new_tokens=N)
    once = evaluate(model, Chain(), examples, N, attempts=TestTimeCompute(samples=1, temperature=0.0), seed=9)
    assert [(p.text, p.predicted, p.cost.passes, p.samples) for p in once] == [
        (p.text, p.predicted, p.cost.passes, None) for p in plain
    ]
    many = TestTimeCompute(samples=3, temperature=1.0)
    found = evaluate(model, Chain(), examples, N, batch_size=4, attempts=many, seed=2, progress=told.append)
    tried = many.answer(model, [e.question for e in examples], seed=2, max_new_tokens=N)
    assert sum(told) == len(examples)
    for prediction, three in zip(found, tried):
        assert prediction.text in [one.text for one in three] and len(prediction.samples) == 3
        assert prediction.cost.positions == sum(one.cost.positions for one in three)
    first, second = Cost(1, 2, 3.0, 4, 5, {"prefill": 1.0, "thought": 0.5, "answer": 2.0}, 6, 7), Cost(10, 20, 30.0, 40)
    assert total_cost([first, second]) == Cost(11, 22, 33.0, 44, 5, first.seconds, 6, 7)
    assert first.passes == 1 and total_cost([]) == Cost()
    assert (
        many.asked(2) == {"samples": 3, "pick": "vote", "temperature": 1.0, "seed": 2}
        and TestTimeCompute().asked(0) == {}
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": 4, "temperature": 0.0}, "are all the same"),
        ({"temperature": -1.0}, "temperature is -1.0, but must be a number, at least 0"),
        ({"beams": 4, "samples": 2}, "either beams, or samples"),
        ({"beams": 4, "temperature": 0.5}, "either beams, or samples"),
        ({"pick": "likelihood"}, "chooses among samples"),
        ({"pick": "votes", "samples": 2}, "did you mean 'vote'"),
        ({"starts": 0}, "starts is 0"),
        ({"starts": 2, "samples": 2}, "give either starts, or samples or beams"),
        ({"starts": 2, "beams": 2}, "give either starts, or samples or beams"),
        ({"pick": "convergence", "samples": 2}, "chooses among starts"),
    ],
)
def test_attempts_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        TestTimeCompute(**fields)


def test_questions_that_fail_do_so_in_each_sample_and_classes_are_not_drawn():
    model = tiny_model(Cot(), max_position_embeddings=16)
    found = model.generate(["1", " ".join("1" * 30)], samples=2, strict=False, max_new_tokens=2, temperature=1.0)
    assert [one.error is None for one in found] == [True, True, False, False]
    linear = tiny_model(Slr(n_slots=2, max_loops=1, decoder={"kind": "linear", "classes": ("0", "1")}))
    with pytest.raises(InputError, match="answers by a class"):
        linear.generate(["1"], samples=2, temperature=1.0)
    with pytest.raises(InputError, match="above 0 for several"):
        model.generate(["1"], samples=2)
    with pytest.raises(InputError, match="seed is -1"):
        model.generate(["1"], temperature=1.0, seed=-1)

"""Answers that have begun go on from there, and what written steps are worth is measured that way."""

import re

import pytest
import torch

from innerloop import Cot, InputError, Llada, Slr
from innerloop.measure.accuracy import Prediction, evaluate
from innerloop.measure.subject import Subject
from innerloop.measure.written import SHARES, writes_steps, written_steps
from innerloop.tasks import Chain
from innerloop.text.row import Kind
from tests.models import ARCHS, tiny_model

TASK = Chain(n_ops=3, n_train=8, n_test=24)
EXAMPLES = TASK.examples("test")
ASKED = [example.question for example in EXAMPLES]
BEGUN = [list(example.steps[: i % 4]) + ["###"] * (i % 2) for i, example in enumerate(EXAMPLES)]


def greedy(model, ids: list[int], n: int) -> list[int]:
    """Write tokens with everything read again for each."""
    written: list[int] = []
    for _ in range(n):
        logits = model.backbone.lm(torch.tensor([ids + written])).logits[0, -1]
        logits[model.suppressed_ids()] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] == model.encoder.eos_id:
            break
    return written


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch in ("gpt2", "llama")])
def test_an_answer_goes_on_from_what_it_has_begun_with(arch: str):
    model = tiny_model(Cot(), arch)
    found = model.generate(ASKED[:8], begun=BEGUN[:8], max_new_tokens=5)
    for example, begun, one in zip(EXAMPLES, BEGUN, found):
        row = model.method.lay_out(example, model.encoder)
        ids = list(row.prefix[0].ids) + [i for span in row.suffix[: len(begun)] for i in span.ids]
        if begun and begun[-1] == "###":
            ids = ids[: -len(row.suffix[len(begun) - 1].ids)] + list(model.encoder.answer_prefix_ids())
        with torch.no_grad():
            assert one.ids == greedy(model, ids, 5)


@pytest.mark.parametrize("method", [Cot(), Cot(with_markers=True)], ids=["cot", "markers"])
def test_a_batch_goes_on_as_each_alone(method):
    model = tiny_model(method)
    together = [one.ids for one in model.generate(ASKED[:6], begun=BEGUN[:6], max_new_tokens=4, batch_size=4)]
    alone = [model.generate([q], begun=[b], max_new_tokens=4)[0].ids for q, b in zip(ASKED[:6], BEGUN)]
    assert together == alone
    plain = [one.ids for one in model.generate(ASKED[:6], max_new_tokens=4)]
    assert plain[0] == together[0] and plain != together  # the first has not begun


def test_what_goes_on_from_its_own_beginning_is_the_same():
    model = tiny_model(Cot())
    row = model.method.lay_out(EXAMPLES[0], model.encoder)
    spans = model.encoder.begun([*EXAMPLES[0].steps, "###"])
    assert [span.ids for span in spans[:-1]] == [span.ids for span in row.suffix[:-1]]
    assert spans[-1].kind is Kind.ANSWER and row.suffix[-1].ids[: len(spans[-1].ids)] == spans[-1].ids


@pytest.mark.parametrize(
    ("method", "begun", "words"),
    [
        (Cot(), [["###", "1 + 1 = 2"]], "an answer that has begun ends with ###"),
        (Cot(), [[], []], "begun: of 2 questions, but 1 are asked"),
        (Llada(gen_length=8), [["1 + 1 = 2"]], "'llada' fills a canvas"),
        (Slr(n_slots=2), [["1 + 1 = 2"]], "'slr' thinks before it writes"),
    ],
)
def test_what_cannot_have_begun_is_refused(method, begun, words: str):
    with pytest.raises(InputError, match=re.escape(words)):
        tiny_model(method).generate(ASKED[:1], begun=begun)


def test_accuracy_is_of_the_whole_answer():
    model = tiny_model(Cot())
    begun = [[*example.steps, "###"] for example in EXAMPLES]
    found = evaluate(model, TASK, EXAMPLES, 1, begun=begun)
    assert all(p.text.startswith(f"{e.steps[0]}\n") and "\n### " in p.text for p, e in zip(found, EXAMPLES))


class Reads(Subject):
    """Answers with the result of the last step that it was shown, and knows no answer without one."""

    def _evaluate(self, examples, begun=None, **_):
        if begun is None:
            return [self._said(e, [*e.steps, f"### {e.answer}"]) for e in examples]
        return [self._said(e, self._going_on(list(b))) for e, b in zip(examples, begun)]

    def _going_on(self, begun: list[str]) -> list[str]:
        steps = [text for text in begun if text != "###"]
        return [*steps, f"### {steps[-1].split()[-1] if steps else 'none'}"]

    def _said(self, example, lines: list[str]) -> Prediction:
        predicted = lines[-1].removeprefix("### ")
        right = predicted == example.answer
        return Prediction(example.id, example.question, "\n".join(lines), predicted, example.answer, right, None)


def test_steps_that_are_all_that_is_read_are_found_to_be():
    found = written_steps(Reads(tiny_model(Cot()), TASK, EXAMPLES))
    assert found is not None and found.n == len(EXAMPLES) and found.n_steps == 3
    assert list(found.early) == list(SHARES) and found.early[0.0].same_answers == 0
    assert found.early[1.0].same_answers == 1 and found.early[1.0].compared.difference == 0
    assert found.exchanged.donor_answers == 1 and found.exchanged.follows
    assert found.mistaken.costs and found.mistaken.same_answers < 0.6
    assert "100% become the donor's" in found.sentence
    assert found.as_dict()["early"]["0.5"]["same_answers"] == found.early[0.5].same_answers


def test_only_what_writes_steps_is_asked_for_them():
    assert writes_steps(tiny_model(Cot())) and not writes_steps(tiny_model(Slr()))
    assert not writes_steps(tiny_model(Llada(gen_length=8)))
    assert written_steps(Subject(tiny_model(Cot()), TASK, EXAMPLES[:4], max_new_tokens=2)) is None  # it writes none

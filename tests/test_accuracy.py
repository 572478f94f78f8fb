"""Accuracy: the verdict against the task, the cost against the rows."""

import pytest

from innerloop.decoder.cost import Cost, mean_cost, total_cost
from innerloop.engine.generation import Generation
from innerloop.errors import InputError
from innerloop.measure import evaluate, result_of, wilson
from innerloop.methods import Cot, NoCot
from innerloop.tasks import Chain, Gsm8k
from innerloop.text.examples import Example
from tests.models import chain_examples, tiny_model


def scripted(model, texts: list[str]):
    """Make a model answer with given texts."""
    costs = [Cost(passes=i, positions=2 * i) for i in range(len(texts))]
    model.generate = lambda questions, **options: [Generation(t, None, c) for t, c in zip(texts, costs)]
    return model


def test_predictions_are_checked_and_unparsable_ones_counted():
    examples = list(chain_examples(4, 3))
    right = [f"### {example.answer}" for example in examples]
    texts = [right[0], f"### {int(examples[1].answer) + 1}", "no answer", f"x\n{right[3]}"]
    model = scripted(tiny_model(NoCot()), texts)
    predictions = evaluate(model, Chain(n_ops=3), examples)
    assert [p.correct for p in predictions] == [True, False, False, True]
    result = result_of(model, Chain(n_ops=3), "train", predictions, seed=3, name="here")
    assert (result["n"], result["accuracy"], result["unparsable"], result["seed"]) == (4, 0.5, 1, 3)
    assert result["ci95"] == list(wilson(2, 4))
    assert result["cost"]["passes"] == 1.5 and result["cost"]["positions"] == 3.0
    assert "accuracy_by_match" not in result  # which a task has that matches in two ways
    model = scripted(model, [f"### {examples[0].answer}.0", f"### {examples[1].answer}"])
    result = result_of(model, Gsm8k(), "train", evaluate(model, Gsm8k(), examples[:2]), None, "here")
    assert (result["accuracy"], result["accuracy_by_match"]) == (1.0, {"number": 1.0, "string": 0.5})


def test_costs_are_averaged_over_examples():
    costs = [Cost(1, 2, 3.0, 4, 5, {"prefill": 1.0, "thought": 0.0, "answer": 2.0}), Cost(3, 4, 5.0, 6, 9, written=8)]
    mean = mean_cost(costs)
    assert mean == {
        "passes": 2, "positions": 3, "flops": 4, "thought_tokens": 5, "loops": 7, "written": 4,
        "seconds": {"prefill": 0.5, "thought": 0.0, "answer": 1.0},
    }  # fmt: skip


def test_passes_of_several_streams_are_also_counted_by_stream():
    wide = [Cost(2, 2, streams=4), Cost(4, 2, streams=4)]
    assert mean_cost(wide)["passes"] == 3 and mean_cost(wide)["stream_passes"] == 12
    assert total_cost(wide).stream_passes == 24


def test_a_question_that_is_too_long_counts_as_wrong_and_says_so():
    model = tiny_model(Cot(), max_position_embeddings=24)
    task = Chain(n_ops=1, modulus=5, n_train=4, n_valid=2, n_test=2)
    examples = [Example("2", (), "2"), Example(" ; ".join(["1"] * 30), (), "1")]
    predictions = evaluate(model, task, examples, max_new_tokens=3)
    assert predictions[0].error is None and "at most 24" in predictions[1].error and not predictions[1].correct
    result = result_of(model, task, "test", predictions, None, "m")
    assert (result["n"], result["accuracy"], result["failed"]) == (2, predictions[0].correct / 2, 1)
    assert result["cost"] == mean_cost([predictions[0].cost]) and result["cost"]["passes"] > 0
    assert "failed" not in result_of(model, task, "test", predictions[:1], None, "m")
    with pytest.raises(InputError, match="not one example could be answered"):
        evaluate(model, task, examples[1:])


def test_an_answer_that_takes_too_long_to_compare_is_wrong_and_counted():
    class Hard(Chain):
        def compare(self, predicted, gold):
            return None if predicted == "hard" else super().compare(predicted, gold)

    model = scripted(tiny_model(NoCot()), ["### hard", "### 1", "no answer"])
    predictions = evaluate(model, Hard(), [Example("3 ; + 4", (), "1")] * 3)
    assert [(p.correct, p.timed_out) for p in predictions] == [(False, True), (True, False), (False, False)]
    result = result_of(model, Hard(), "test", predictions, None, "here")
    assert (result["timed_out"], result["unparsable"], result["accuracy"]) == (1, 1, 1 / 3)
    assert "timed_out" not in result_of(model, Hard(), "test", predictions[1:], None, "here")

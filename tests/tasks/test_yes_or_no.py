"""ProntoQA and StrategyQA: answers of two words."""

import pytest

from innerloop.tasks import ProntoQA, StrategyQA


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        (ProntoQA, "Max is not wooden.\n### True", "True"),
        (ProntoQA, "### false.", "False"),
        (ProntoQA, "### FALSE\nTrue", "False"),
        (ProntoQA, "### perhaps", None),
        (ProntoQA, "### True or False", None),
        (ProntoQA, "True", None),
        (StrategyQA, "### Yes", "yes"),
        (StrategyQA, "fact\n### no.", "no"),
        (StrategyQA, "### maybe", None),
        (StrategyQA, "yes", None),
    ],
)
def test_extract(task, text, answer):
    assert task().extract(text) == answer


def test_check_ignores_case():
    assert ProntoQA().is_correct("True", "true") and not ProntoQA().is_correct("True", "False")
    assert StrategyQA().is_correct("yes", "Yes") and not StrategyQA().is_correct("yes", "no")


def test_the_last_step_decides_the_real_answers(shared_data):
    """The answer follows from the signs of the conclusion and of the statement asked about."""
    for example in ProntoQA(test=str(shared_data / "prontoqa" / "test.jsonl")).examples("test"):
        asked = example.question.split("True or false: ")[1]
        assert (" not " in asked) == (" not " in example.steps[-1]) or example.answer == "False"
        assert (asked == example.steps[-1]) == (example.answer == "True")


def test_published_file(fixtures):
    first, second = StrategyQA(train=str(fixtures / "strategyqa.json")).examples("train")
    assert (first.id, first.answer, second.answer) == ("a1", "no", "yes")
    assert first.steps == ("Casio makes electronics.", "Petco sells pet supplies.")
    told = {"term": "Casio", "description": "Japanese electronics company"}
    assert first.meta == {**told, "decomposition": ["What does Casio make?"]}

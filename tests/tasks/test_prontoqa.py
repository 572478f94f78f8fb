import pytest

from innerloop.tasks import ProntoQA


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Max is not wooden.\n### True", "True"),
        ("### false.", "False"),
        ("### FALSE\nTrue", "False"),
        ("### perhaps", None),
        ("### True or False", None),
        ("True", None),
    ],
)
def test_extract(text, answer):
    assert ProntoQA().extract(text) == answer


def test_check_ignores_case():
    task = ProntoQA()
    assert task.is_correct("True", "true")
    assert not task.is_correct("True", "False")


def test_the_last_step_decides_the_real_answers(shared_data):
    """The answer follows from the signs of the conclusion and of the statement asked about."""
    for example in ProntoQA(test=str(shared_data / "prontoqa" / "test.jsonl")).examples("test"):
        asked = example.question.split("True or false: ")[1]
        assert (" not " in asked) == (" not " in example.steps[-1]) or example.answer == "False"
        assert (asked == example.steps[-1]) == (example.answer == "True")

import pytest

from innerloop.tasks import StrategyQA


def test_published_file(fixtures):
    first, second = StrategyQA(train=str(fixtures / "strategyqa.json")).examples("train")
    assert (first.id, first.answer, second.answer) == ("a1", "no", "yes")
    assert first.steps == ("Casio makes electronics.", "Petco sells pet supplies.")
    assert first.meta == {
        "term": "Casio",
        "description": "Japanese electronics company",
        "decomposition": ["What does Casio make?"],
    }


@pytest.mark.parametrize(
    "text, answer", [("### Yes", "yes"), ("fact\n### no.", "no"), ("### maybe", None), ("yes", None)]
)
def test_extract(text, answer):
    assert StrategyQA().extract(text) == answer


def test_check_ignores_case():
    assert StrategyQA().is_correct("yes", "Yes")
    assert not StrategyQA().is_correct("yes", "no")

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from innerloop.errors import InputError
from innerloop.tasks import Math
from innerloop.tasks.competition_math import last_box


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so\n### \\frac{1}{2}", "\\frac{1}{2}"),
        ("### \\boxed{5}", "5"),
        ("\\boxed{3} ### 4\nmore", "4"),
        ("\\boxed{3} ###", None),
        ("first \\boxed{1}, then \\boxed{\\frac{\\sqrt{2}}{3}}.", "\\frac{\\sqrt{2}}{3}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1", None),
        ("\\boxed{}", None),
        ("the answer is 4", None),
    ],
)
def test_extract(text, answer):
    assert Math().extract(text) == answer


@pytest.mark.parametrize(
    "predicted, gold, right",
    [
        ("anything \\odd", "anything \\odd", True),
        ("0.5", "\\frac12", True),
        ("1+\\sqrt 2", "\\sqrt{2}+1", True),
        ("(3, -1)", "(3,-1)", True),
        ("(-1, 3)", "(3,-1)", False),
        ("$42409$", "\\$42409", True),
        ("6", "5", False),
        ("", "5", False),
    ],
)
def test_answers_are_compared_as_mathematics(predicted, gold, right):
    pytest.importorskip("math_verify")
    assert Math().is_correct(predicted, gold) is right


def test_comparison_works_outside_the_main_thread():
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(Math().is_correct, "0.5", "\\frac{1}{2}").result()


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert Math().is_correct("5", "5")
    with pytest.raises(InputError, match=r"pip install 'innerloop\[eval\]'"):
        Math().is_correct("0.5", "\\frac12")
    with pytest.raises(InputError, match=r"pip install 'innerloop\[eval\]'"):  # before a model is asked anything
        Math(test="nowhere.jsonl").examples("test")


def test_published_rows(tmp_path):
    sentences = (
        "We have $$x = 2.$$",
        "Then $f(x) = 3. 5$ in \\[a. b\\] again.",
        "So $y=2.$",
        "And",  # before a blank line
        "$\\$3. 5$ is it: \\boxed{\\text{It is}}.",
    )
    solution = " ".join(sentences).replace("And ", "And\n\n").replace("in ", "in\n")
    rows = [
        {"problem": "P?", "level": "Level 1", "type": "Algebra", "solution": solution},
        {"problem": "Q?", "solution": "No box.", "answer": "7", "unique_id": "test/7.json", "subject": "Algebra"},
    ]
    path = tmp_path / "test.json"
    path.write_text(json.dumps(rows))
    first, second = Math(test=str(path)).examples("test")
    assert (first.question, first.answer) == ("P?", "\\text{It is}")
    assert first.meta == {"level": "Level 1", "type": "Algebra"}
    assert first.steps == sentences
    assert (second.id, second.answer, second.steps) == ("test/7.json", "7", ("No box.",))
    path.write_text(json.dumps([{"problem": "P?", "solution": "no box"}]))
    with pytest.raises(InputError, match="row 1: the solution has no"):
        Math(test=str(path)).examples("test")


def test_steps_of_real_solutions_end_in_the_box(shared_data):
    for example in Math(valid=str(shared_data / "math" / "valid.jsonl")).examples("valid", limit=100):
        assert last_box(" ".join(example.steps)) == example.answer

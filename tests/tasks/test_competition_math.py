import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from time import process_time

import pytest

from innerloop.errors import InputError
from innerloop.tasks import Math, symbolic
from innerloop.tasks.competition_math import last_box
from innerloop.tasks.sentences import sentences


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


TOWER = "2^{2^{2^{2^{2^{2}}}}}"  # which sympy would write out


@pytest.fixture
def hurried(monkeypatch):
    """Comparisons have a quarter of a second."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(symbolic, "SECONDS", 0.25)
    symbolic.same_value.cache_clear()
    yield
    symbolic.same_value.cache_clear()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_comparison_that_takes_too_long_is_given_up_in_any_thread_and_the_next_one_is_made(hurried, threads):
    asked = [(TOWER, "5"), ("0.25", "\\frac{1}{4}"), ("7", "5")]
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda pair: Math().compare(*pair), asked))
    else:
        found = [Math().compare(*pair) for pair in asked]
    assert found == [None, True, False]
    assert not Math().is_correct(TOWER, "5")


def test_time_on_the_clock_changes_no_verdict(hurried):
    symbolic._COMPARER.stop()
    assert Math().is_correct("0.5", "\\frac{1}{2}")  # though the process has not even begun to be started
    os.kill(symbolic._COMPARER.process.pid, 19)
    resume = subprocess.Popen(["sh", "-c", f"sleep 0.6; kill -CONT {symbolic._COMPARER.process.pid}"])
    assert Math().is_correct("0.125", "\\frac{1}{8}")
    assert resume.wait() == 0


def test_a_process_that_somebody_ends_is_started_again(hurried):
    assert Math().is_correct("1+1", "2")
    symbolic._COMPARER.process.kill()
    assert Math().is_correct("1+2", "3")


def test_long_answers_are_compared_as_text_alone():
    long = "1" * 100_000
    assert Math().compare(long, long) is True
    assert Math().compare(f"{long}1", long) is Math().compare("5", long) is False


@pytest.mark.parametrize(
    "text, found",
    [
        ("a.\n\n\n\nb", ["a.", "b"]),
        ("is $1. 2$ so? $$3. 4.$$ a", ["is $1. 2$ so?", "$$3. 4.$$", "a"]),
        ("\\[a. b.\\] \\begin{x}c. d\\end{x}", ["\\[a. b.\\]", "\\begin{x}c. d\\end{x}"]),
        ("$ a. b", ["$ a.", "b"]),
        ("\\$ a. $b\\$. c.$ d", ["\\$ a.", "$b\\$. c.$", "d"]),
        ("\\begin{x} a. \\end{y} b", ["\\begin{x} a.", "\\end{y} b"]),
        (" ", []),
    ],
)  # fmt: skip
def test_sentences_end_outside_mathematics(text, found):
    assert sentences(text) == found


@pytest.mark.parametrize("unit", ["$ ", "\\[", "\\begin{a}", "\n", "$", "a. ", "\\", "$a$"], ids=repr)
def test_sentences_are_found_in_linear_time(unit):
    start = process_time()
    sentences("x" + unit * (100_000 // len(unit)) + "y")
    assert process_time() - start < 1


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
    path.write_text(json.dumps([{"problem": "P?", "solution": "is \\boxed{90\\text{ square\nunits}}"}]))
    assert Math(test=str(path)).examples("test")[0].answer == "90\\text{ square units}"
    path.write_text(json.dumps([{"problem": "P?", "solution": "no box"}]))
    with pytest.raises(InputError, match="row 1: the solution has no"):
        Math(test=str(path)).examples("test")


def test_steps_of_real_solutions_end_in_the_box(shared_data):
    for example in Math(valid=str(shared_data / "math" / "valid.jsonl")).examples("valid", limit=100):
        assert last_box(" ".join(example.steps)) == example.answer

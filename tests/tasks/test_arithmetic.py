import json
from time import process_time

import pytest

from innerloop.tasks import Gsm8k, GsmHard, MultiArith, Svamp
from innerloop.tasks.arithmetic import plain_number


@pytest.mark.parametrize(
    "text, number, string",
    [
        ("<<4-2=2>>\n### 2", "2", "2"),
        ("### 1,234", "1234", "1234"),
        ("### $1,234.50.", "1234.50", "$1234.50."),
        ("#### -7", "-7", "-7"),
        ("### -$5", "-5", "-$5"),
        ("### 30%", "30", "30%"),
        ("### .5", ".5", ".5"),
        ("### 1 000 ", "1000", "1 000"),
        ("### 2 # 3", "3", "3"),
        ("### 4\nso it is 5", "4", "4\nso it is 5"),
        ("### four", None, "four"),
        ("### 1/2", None, "1/2"),
        ("### 4 apples", None, "4 apples"),
        ("it makes <<2*3=6>> 6 apples.", "6", None),
        ("it is 1,200.5, or -3.", "-3", None),
        ("<<2*3=6>> ###", "6", None),
        ("no idea", None, None),
        ("", None, None),
    ],
)
def test_extraction_under_both_matches(text, number, string):
    assert Gsm8k(match="number").extract(text) == number
    assert Gsm8k(match="string").extract(text) == string


@pytest.mark.parametrize(
    "predicted, gold, as_number, as_string",
    [
        ("5", "5", True, True),
        ("5.0", "5", True, False),
        ("1234", "1,234", True, True),
        ("5", "6", False, False),
        ("-5", "5", False, False),
        ("2.5e3", "2500", True, False),
        ("0.1", "1/10", False, False),
        ("1e309", "1e400", False, False),
        ("9007199254740993", "9007199254740992", False, False),
        ("0.1", "0.10000000000000000001", False, False),
        ("1e400", "10e399", True, False),
        ("1e999999999999", "1", False, False),
        ("1e" + "9" * 20, "1e" + "8" * 20, False, False),
        (".50", "0.5", True, False),
    ],
)
def test_both_matches(predicted, gold, as_number, as_string):
    assert Svamp(match="number").is_correct(predicted, gold) is as_number
    assert Svamp(match="string").is_correct(predicted, gold) is as_string


@pytest.mark.parametrize("text", ["1" * 10**5 + "x", "1" * 10**5, "1," * 10**5, "-$" * 10**5], ids=lambda t: t[-3:])
def test_long_texts_are_no_numbers_and_take_no_time(text):
    start = process_time()
    assert plain_number(text) is None
    assert Svamp().extract(f"### {text}") is None
    Svamp().extract(text)
    assert process_time() - start < 0.5


@pytest.mark.parametrize("text", ["inf", "nan", "1e", "--5", "5-", "1.2.3", "", "$", "x5"])
def test_what_is_no_number(text):
    assert plain_number(text) is None


ROWS = [
    (GsmHard, {"input": " Q? ", "code": "def solution(): ...", "target": 12345678.0}, "Q?", "12345678"),
    (GsmHard, {"input": "Q?", "target": -0.25}, "Q?", "-0.25"),
    (Svamp, {"ID": "chal-1", "Body": "A had 3.", "Question": "How many?", "Answer": 8.0}, "A had 3. How many?", "8"),
    (Svamp, {"Body": "A", "Question": "B?", "question_concat": "A, B?", "Answer": "8.0"}, "A, B?", "8"),
    (MultiArith, {"question": "Q?", "final_ans": "1,054"}, "Q?", "1054"),
    (MultiArith, {"iIndex": 0, "sQuestion": " Q?", "lSolutions": [54.0], "lEquations": ["X=1"]}, "Q?", "54"),
    (MultiArith, {"question": "Q?", "steps": [], "answer": "54"}, "Q?", "54"),
]


@pytest.mark.parametrize("task, row, question, answer", ROWS)
def test_published_rows(tmp_path, task, row, question, answer):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([row]))
    (example,) = task(test=str(path)).examples("test")
    assert (example.question, example.steps, example.answer) == (question, (), answer)
    assert example.id == row.get("ID", "test-1")
    assert task().is_correct(task().extract(f"### {answer}"), example.answer)

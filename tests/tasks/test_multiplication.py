import pytest

from innerloop.errors import InputError
from innerloop.tasks import Mult4x4, Mult5x5, Multiplication
from innerloop.text.encoder import PromptEncoder
from innerloop.text.tokenizer import train_tokenizer


def number(digits):
    """Read digits written least significant first."""
    return int("".join(reversed(digits.split())))


def steps_of(question):
    """Return the chain of thought of the authors' data."""
    a, b = question.split(" * ")
    n, total, steps = len(a.split()), 0, []
    for i, digit in enumerate(b.split()):
        product = number(a) * int(digit)
        total += product * 10**i
        step = ["0"] * i + [*f"{product:0{n + 1}}"][::-1]
        so_far = ["(", *[*f"{total:0{n + 1 + i}}"][::-1], ")"]
        steps.append(" ".join(step if i in (0, n - 1) else step + so_far))
    return steps


@pytest.mark.parametrize("n_digits", [1, 2, 3, 4, 7])
def test_what_is_made_is_long_multiplication(n_digits):
    task = Multiplication(n_digits=n_digits)
    for example in task.examples("train", 100):
        a, b = map(number, example.question.split(" * "))
        assert len(str(a)) == len(str(b)) == n_digits and len(example.answer.split()) == 2 * n_digits
        assert a * b == number(example.answer)
        assert list(example.steps) == steps_of(example.question)


@pytest.mark.parametrize("task, folder", [(Mult4x4, "mult4x4"), (Mult5x5, "mult5x5")])
def test_the_form_is_that_of_the_authors_data(shared_data, task, folder):
    for example in task(valid=str(shared_data / folder / "valid.jsonl")).examples("valid", limit=200):
        assert list(example.steps) == steps_of(example.question)


def test_original_multiplication_line(fixtures):
    (example,) = Multiplication(test=str(fixtures / "mult4x4.txt")).examples("test")
    assert list(example.steps) == steps_of(example.question)
    assert number(example.answer) == 2365 * 4347 and example.steps[1] == "0 0 6 4 9 0 ( 5 5 1 1 1 1 )"


def test_files_are_read_where_they_are_named_and_the_other_splits_are_made(fixtures):
    task = Multiplication(test=str(fixtures / "mult4x4.txt"), n_train=9)
    assert len(task.examples("train")) == 9 and len(task.examples("test")) == 1
    assert Mult4x4().examples("test", 3)[0].question == Mult4x4(test=None).examples("test", 1)[0].question
    with pytest.raises(InputError, match="has no test split"):
        Multiplication(train=str(fixtures / "mult4x4.txt")).examples("test")


def test_few_questions_repeat_in_training_alone():
    task = Multiplication(n_digits=2, n_train=9000, n_valid=300, n_test=300)
    train, valid, test = ({e.question for e in task.examples(split)} for split in ("train", "valid", "test"))
    assert (len(valid), len(test)) == (300, 300) and len(train) < 8100
    assert not train & valid and not train & test and not valid & test


def test_answers_are_compared_by_digits():
    task, (example,) = Multiplication(), Multiplication(n_digits=3).examples("test", 1)
    assert task.is_correct(example.answer, example.answer)
    assert task.is_correct(example.answer.replace(" ", ""), example.answer)
    assert not task.is_correct(example.answer[:-1] + "x", example.answer)
    assert not task.is_correct(example.answer[::-1], "1 2 3")


def test_a_digit_is_a_token_and_what_a_method_may_write_is_enough():
    task = Multiplication(n_digits=4, n_train=50)
    encoder = PromptEncoder(train_tokenizer(task.examples("train")))
    for example in task.examples("train", 5):
        assert len(encoder.question(example.question).ids) == 2 * 4 + 2
        written = sum(len(span.ids) for span in (*encoder.steps(example), encoder.answer(example.answer)))
        assert written <= task.max_new_tokens

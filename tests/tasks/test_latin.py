import random

import pytest

from innerloop.errors import InputError
from innerloop.tasks import TASKS, Latin
from innerloop.tasks.latin import random_square, solutions, written


@pytest.mark.parametrize("order, n_clues", [(4, None), (4, 6), (5, 12), (6, 20)])
def test_every_question_has_the_one_answer_that_it_is_given(order, n_clues):
    task = Latin(order=order, n_clues=n_clues, n_train=20)
    for example in task.examples("train"):
        cells, answer = ([w for w in text.split() if w != "/"] for text in (example.question, example.answer))
        assert sum(word != "." for word in cells) == task.given == example.meta["n_clues"]
        assert all(word in (".", symbol) for word, symbol in zip(cells, answer, strict=True))
        assert solutions([0 if word == "." else int(word) for word in cells], order, 2) == [list(map(int, answer))]
        rows = [answer[i : i + order] for i in range(0, order**2, order)]
        assert all(sorted(line) == sorted(answer[:order]) for line in (*rows, *zip(*rows)))
        assert len(example.answer) + 6 <= task.max_new_tokens
        assert example.steps == ()


def test_splits_share_no_question_and_a_limit_gives_the_first():
    task = Latin(n_train=300, n_valid=40, n_test=40)
    splits = {split: [example.question for example in task.examples(split)] for split in ("train", "valid", "test")}
    assert len({question for found in splits.values() for question in found}) == 380
    assert [example.question for example in task.examples("train", 5)] == splits["train"][:5]
    assert [example.question for example in Latin(n_train=300, seed=1).examples("train", 5)] != splits["train"][:5]
    assert TASKS["latin"] is Latin


def test_squares_are_counted_and_drawn():
    assert len(solutions([0] * 16, 4, 1000)) == 576
    assert len({tuple(random_square(4, random.Random(seed))) for seed in range(300)}) > 150
    assert written([1, 0, 0, 2], 2) == "1 . / . 2"
    assert Latin().is_correct("1 2/ 2 1", "1 2 / 2 1") and not Latin().is_correct("2 1 / 1 2", "1 2 / 2 1")


@pytest.mark.parametrize(
    "options, told",
    [
        ({"order": 3}, "order is 3, but must be a whole number between 4 and 6"),
        ({"n_clues": 5}, "n_clues is 5, but must be from 6"),
        ({"n_clues": 16}, "to 15"),
        ({"n_test": 0}, "n_test is 0, but must be a whole number, at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(options, told):
    with pytest.raises(InputError, match=told):
        Latin(**options)


def test_more_questions_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr("innerloop.tasks.made.MANY_DRAWS", 50)
    with pytest.raises(InputError, match=r"hardly more than .* lower n_valid"):
        Latin(n_clues=15, n_valid=5000).examples("valid")

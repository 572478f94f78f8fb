from itertools import permutations

import pytest

from innerloop.errors import InputError
from innerloop.tasks import Tracking
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import ANSWER_PREFIX
from innerloop.text.tokenizer import train_tokenizer

SPLITS = ("train", "valid", "test")


def places_after(question: str) -> list[str]:
    """Swap what is at the places of a table, and return where the ball is after each swap."""
    first, *swaps = question.split()
    table = {place: "ball" if place == first else "nothing" for place in "abcdefghijklmnopqrstuvwxyz"}
    after = []
    for one, other in swaps:
        table[one], table[other] = table[other], table[one]
        after.append(next(place for place, held in table.items() if held == "ball"))
    return after


@pytest.mark.parametrize("n_swaps, min_swaps, n_places", [(1, None, 3), (8, None, 4), (8, 1, 4), (30, 20, 5)])
def test_answers_are_those_of_a_table_that_is_swapped(n_swaps, min_swaps, n_places):
    task = Tracking(n_swaps=n_swaps, min_swaps=min_swaps, n_places=n_places, n_train=50, n_test=1)
    for example in [*task.examples("train"), *task.examples("test")]:
        assert list(example.steps) == places_after(example.question)
        assert example.answer == example.steps[-1]
        assert len(example.steps) == example.meta["n_swaps"]
        assert (min_swaps or n_swaps) <= len(example.steps) <= n_swaps
        assert {*example.question.replace(" ", "")} <= {*"abcdefghijklmnopqrstuvwxyz"[:n_places]}
        assert task.is_correct(
            task.extract("\n".join((*example.steps, ANSWER_PREFIX + example.answer))), example.answer
        )
        assert not task.is_correct("z", example.answer)


def test_short_questions_repeat_in_training_alone():
    task = Tracking(n_swaps=4, min_swaps=1, n_train=3000, n_valid=60, n_test=60)
    train, valid, test = ([example.question for example in task.examples(split)] for split in SPLITS)
    assert len({*train}) < len(train) == 3000
    assert len({*valid, *test}) == 120
    assert not {*train} & {*valid, *test}


def test_lengths_and_answers_are_drawn_evenly():
    examples = Tracking(n_swaps=5, min_swaps=1, n_train=5000).examples("train")
    lengths = [len(example.steps) for example in examples]
    answers = [example.answer for example in examples]
    assert all(850 < lengths.count(length) < 1150 for length in range(1, 6))
    assert all(1100 < answers.count(place) < 1400 for place in "abcd")


def test_a_swap_is_one_token_and_what_a_method_may_write_is_enough():
    task = Tracking(n_swaps=30, n_train=300)
    encoder = PromptEncoder(train_tokenizer(task.examples("train")))
    for example in task.examples("train", 20):
        assert len(encoder.question(example.question).ids) == 1 + 30 + 1
        written = sum(len(span.ids) for span in (*encoder.steps(example), encoder.answer(example.answer)))
        assert written <= task.max_new_tokens
    assert len({*encoder.tokenizer.get_vocab()} & {" " + "".join(pair) for pair in permutations("abcd", 2)}) == 6


@pytest.mark.parametrize(
    "options, told",
    [
        ({"n_swaps": 0}, "n_swaps is 0, but must be a whole number"),
        ({"n_places": 2}, "n_places is 2, but must be a whole number between 3 and 26"),
        ({"n_swaps": 2, "min_swaps": 3}, r"min_swaps is 3, but must be from 1 to n_swaps \(2\)"),
    ],
)
def test_what_cannot_be_made_is_refused(options, told):
    with pytest.raises(InputError, match=told):
        Tracking(**options)


def test_more_questions_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr("innerloop.tasks.made.MANY_DRAWS", 50)
    with pytest.raises(InputError, match=r"hardly more than .* lower n_valid"):
        Tracking(n_swaps=2, n_valid=500).examples("valid")

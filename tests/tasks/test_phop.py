from collections import Counter

import pytest

from innerloop.errors import InputError
from innerloop.tasks import PHop


def followed(question):
    """Jump as arXiv 2402.09268 defines it: to the largest j <= i with x[j-1] = x[i]."""
    p, letters = question.split("-hop: ")
    letters = letters.split()
    at, visited = len(letters) - 1, []
    for _ in range(int(p)):
        at = max(j for j in range(1, at + 1) if letters[j - 1] == letters[at])
        visited.append(at)
    return [letters[at] for at in visited], visited


@pytest.mark.parametrize("n_hops, min_hops, alphabet, length", [(1, None, 3, 6), (4, None, 4, 32), (6, 1, 5, 40)])
def test_steps_are_the_letters_that_jumps_lead_to(n_hops, min_hops, alphabet, length):
    task = PHop(n_hops=n_hops, min_hops=min_hops, alphabet=alphabet, length=length, n_train=50, n_test=1)
    for example in [*task.examples("train"), *task.examples("test")]:
        letters, visited = followed(example.question)
        assert list(example.steps) == letters and example.answer == letters[-1]
        assert len({*visited}) == len(visited) == example.meta["n_hops"]  # every jump leads back
        assert (min_hops or n_hops) <= len(visited) <= n_hops
        assert len(example.question.split()) == 1 + length


def test_answers_follow_the_jumps_in_files_too(shared_data):
    task = PHop(valid=str(shared_data / "phop" / "valid.jsonl"))
    for example in task.examples("valid", limit=100):
        assert example.answer == followed(example.question)[0][-1]
        assert task.is_correct(task.extract(f"### {example.answer}"), example.answer)


def test_jumps_and_answers_are_drawn_evenly():
    examples = PHop(n_hops=4, min_hops=1, length=20, n_train=2000).examples("train")
    hops, answers = Counter(len(e.steps) for e in examples), Counter(e.answer for e in examples)
    assert all(420 < hops[n] < 580 for n in range(1, 5))
    assert all(420 < answers[letter] < 580 for letter in "abcd")


@pytest.mark.parametrize(
    "options, told",
    [
        ({"n_hops": 2, "min_hops": 3}, r"min_hops is 3, but must be from 1 to n_hops \(2\)"),
        ({"n_hops": 8, "length": 20}, "few rows of 20 of 4 letters have 8 jumps: give at least 36 as length"),
        ({"alphabet": 2}, "alphabet is 2, but must be a whole number between 3 and 26"),
    ],
)
def test_what_cannot_be_made_is_refused(options, told):
    with pytest.raises(InputError, match=told):
        PHop(**options)

"""Tasks that are made on the spot: star graphs, Countdown, pairs told in one direction."""

import pytest

from innerloop.errors import InputError
from innerloop.tasks import TASKS, Countdown, Latin, Multiplication, PHop, Reversal, Star, Tracking

SMALL = {"n_train": 200, "n_valid": 40, "n_test": 40}
MADE = [Latin(**SMALL), Star(**SMALL), Countdown(**SMALL), Tracking(**SMALL), Multiplication(**SMALL), PHop(**SMALL)]


@pytest.mark.parametrize("task", MADE, ids=lambda task: task.name)
def test_splits_share_no_question_and_a_limit_gives_the_first(task):
    splits = {split: task.examples(split) for split in ("train", "valid", "test")}
    assert len({example.question for found in splits.values() for example in found}) == 280
    assert task.examples("train", 5) == splits["train"][:5]
    assert type(task)(**SMALL, seed=1).examples("train", 5) != splits["train"][:5]
    assert splits["test"][3].id == f"{task.name}-test-00003" and TASKS[task.name] is type(task)
    for example in splits["test"]:
        task.check_answer(example.answer)
        written = "".join(f"{step}\n" for step in example.steps) + f"### {example.answer}"
        assert len(written) < task.max_new_tokens  # a token a character is the most it can take


@pytest.mark.parametrize("n_arms, path_length", [(2, 3), (2, 6), (5, 4)])
def test_a_star_has_one_way_and_its_steps_lead_back(n_arms, path_length):
    for example in Star(n_arms=n_arms, path_length=path_length, n_nodes=30).examples("test", 20):
        edges, _, ends = example.question.partition(" / ")
        pairs = [tuple(edge.split()) for edge in edges.split(" , ")]
        start, goal = ends.split()
        assert len(pairs) == len(set(pairs)) == n_arms * (path_length - 1)
        assert sum(a == start for a, _ in pairs) == n_arms and len({b for _, b in pairs}) == len(pairs)
        before = {b: a for a, b in pairs}
        way = [goal]
        while way[-1] != start:
            way.append(before[way[-1]])
        assert example.answer.split() == way[::-1] and len(way) == path_length
        assert list(example.steps) == way[1:-1]


def test_the_first_node_can_be_judged_alone():
    whole, first = Star(), Star(judged="first")
    assert whole.is_correct("1  2 3", "1 2 3") and not whole.is_correct("1 2 4", "1 2 3")
    assert first.is_correct("1 2 4", "1 2 3") and not first.is_correct("1 3 2", "1 2 3")
    assert not first.is_correct("1", "1 2 3")
    assert whole.examples("test", 3) == first.examples("test", 3)


def test_every_countdown_is_solved_and_uses_each_number_once():
    task = Countdown(n_numbers=4)
    for example in task.examples("train", 200):
        given, _, target = example.question.partition(" : ")
        made, left = [], given.split()
        for a, operation, b, _, result in (equation.split() for equation in example.answer.split(" , ")):
            assert eval(f"{a} {operation} {b}") == int(result)
            for number in (a, b):
                left.remove(number)
            left.append(result)
            made.append(result)
        assert left == [target] and 1 < int(target) <= 100


@pytest.mark.parametrize(
    "written, is_right",
    [
        ("3 * 5 = 15 , 15 + 7 = 22", True),
        ("5 * 3 = 15 , 7 + 15 = 22", True),
        ("3 * 5 = 15,15 + 7 = 22", True),
        ("3 * 5 = 16 , 16 + 7 = 23", False),  # wrong sums
        ("3 * 5 = 15 , 15 + 7 = 23", False),
        ("15 + 7 = 22", False),  # of a number that was not given
        ("3 + 5 = 8 , 8 + 14 = 22", False),
        ("3 * 5 = 15 , 15 + 7 = 22 , 22 + 3 = 25", False),  # a number twice, and another target
        ("3 + 7 = 10 , 3 * 5 = 15 , 15 + 7 = 22", False),  # an unused result
        ("22 = 22", False),
        ("3 * 5 = " + "9" * 5000, False),
        ("", False),
    ],
)
def test_any_right_way_counts(written, is_right):
    assert Countdown().is_correct(written, "3 * 5 = 15 , 15 + 7 = 22") is is_right


def test_differences_and_quotients_are_whole_and_not_below_zero():
    gold = "8 - 2 = 6 , 6 / 3 = 2"
    assert Countdown().is_correct(gold, gold)
    assert not Countdown().is_correct("2 - 8 = 6 , 6 / 3 = 2", gold)
    assert not Countdown().is_correct("8 / 3 = 2 , 2 - 2 = 0", gold)


def test_pairs_are_told_forward_and_half_are_asked_in_both_directions():
    task = Reversal(n_pairs=40, n_train=4000)
    rows = {(example.question, example.answer) for example in task.examples("train")}
    told = {answer for question, answer in rows if question == "tell"}
    asked = {question for question, _ in rows if question != "tell"}
    assert len(told) == 40 and len(asked) == 40
    held = {split: task.examples(split) for split in ("valid", "test")}
    assert [len(found) for found in held.values()] == [10, 10]
    forward = Reversal(n_pairs=40, asked="forward").examples("test")
    for back, ahead in zip(held["test"], forward, strict=True):
        a, b = ahead.question.removesuffix(" is what"), back.question.removeprefix("what is ")
        assert (ahead.answer, back.answer) == (b, a)
        assert f"{a} is {b}" in told and f"{b} is {a}" not in told
        assert ahead.question not in asked and back.question not in asked
    assert not {e.question for e in held["valid"]} & {e.question for e in held["test"]}
    assert task.examples("train", 3) == task.examples("train")[:3]


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Star(n_arms=5, n_nodes=20), "the nodes of such a star are 21: give at least so many"),
        (lambda: Star(path_length=2), "path_length is 2, but must be a whole number between 3"),
        (lambda: Star(judged="last"), "judged is last, but must be one of path, first"),
        (lambda: Countdown(n_numbers=1), "n_numbers is 1, but must be"),
        (lambda: Countdown(n_numbers=2, largest=2, n_test=900).examples("test"), "hardly more than .* lower n_test"),
        (lambda: Reversal(n_pairs=40, n_words=8), "8 words make 64 names, not 80: raise n_words"),
        (lambda: Reversal(asked="both"), "asked is both, but must be one of forward, backward"),
    ],
)
def test_what_cannot_be_made_is_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()

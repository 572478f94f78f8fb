import re
from collections import Counter
from itertools import combinations

import pytest

from innerloop.errors import InputError
from innerloop.tasks import Chain

SMALL = {"n_train": 2000, "n_valid": 100, "n_test": 200}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_ops": 3, "ops_per_step": 2, "n_valid": 20},
        {"n_ops": 2, "ops_per_step": 2, "n_valid": 20, "operations": "+", "n_train": 400, "n_test": 40},
    ],
    ids=str,
)
def test_questions_steps_and_answers_follow_the_arithmetic(options):
    task, sizes = Chain(**SMALL | options), Counter()
    for example in task.examples("train"):
        first, *clauses = example.question.split(" ; ")
        number = int(first)
        assert 0 <= number < 5
        for clause, step in zip(clauses, example.steps, strict=True):
            written = str(number)
            for operation, operand in re.findall(r"([-+*]) (\d)", clause):
                number = eval(f"({number} {operation} {operand}) % 5")
                written += f" {operation} {operand} = {number}"
            assert step == written
            sizes[step.count("=")] += 1
        assert example.answer == str(number)
        assert sum(len(step) + 1 for step in example.steps) + 6 <= task.max_new_tokens
        assert len(example.steps) == example.meta["n_ops"] == task.n_ops
    assert set(sizes) == set(range(1, task.ops_per_step + 1))
    assert len(sizes) == 1 or "operations" in options or 0.9 < sizes[1] / sizes[2] < 1.1  # all, where there are few


def test_sizes_ids_and_no_question_twice():
    task = Chain(**SMALL)
    for split, size in (("train", 2000), ("valid", 100), ("test", 200)):
        examples = task.examples(split)
        assert len({e.question for e in examples}) == len({e.id for e in examples}) == len(examples) == size


@pytest.mark.parametrize("options", [{}, {"min_ops": 2}, {"n_ops": 3, "n_train": 4000, "n_valid": 500, "n_test": 500}])
def test_splits_are_disjoint_whatever_the_seed(options):
    questions = {}
    for split in ("train", "valid", "test"):
        questions[split] = {e.question for seed in (0, 1) for e in Chain(**SMALL | options, seed=seed).examples(split)}
    assert not any(questions[a] & questions[b] for a, b in combinations(questions, 2))


@pytest.mark.parametrize("options", [{}, {"n_ops": 3}], ids=["drawn", "listed"])
def test_a_seed_and_a_limit_fix_the_examples(options):
    examples = Chain(**SMALL | options).examples("train")
    assert Chain(**SMALL | options).examples("train") == examples
    assert Chain(**SMALL | options).examples("train", limit=50) == examples[:50]
    other = Chain(**SMALL | options, seed=1).examples("train", limit=50)
    assert [e.question for e in other] != [e.question for e in examples[:50]]
    assert not {e.answer for e in examples} ^ set("01234")


def test_lengths_are_uniform_between_the_bounds():
    lengths = Counter(e.meta["n_ops"] for e in Chain(n_ops=6, min_ops=3, n_train=4000).examples("train"))
    assert set(lengths) == {3, 4, 5, 6}
    assert all(abs(n - 1000) < 100 for n in lengths.values())
    # Short chains run out, which leaves more of the others, and never fewer examples than asked for.
    lengths = Counter(e.meta["n_ops"] for e in Chain(n_ops=5, min_ops=1, n_train=10_000).examples("train"))
    assert lengths[1] <= 55 and lengths[2] <= 605 and sum(lengths.values()) == 10_000


@pytest.mark.parametrize(
    "modulus, factors", [(2, {1}), (3, {2}), (5, {2, 3, 4}), (6, {5}), (9, {2, 4, 5, 7, 8}), (10, {3, 7, 9})]
)
def test_every_operation_is_a_bijection_and_changes_the_number(modulus, factors):
    clauses = set()
    for seed in range(60):
        task = Chain(modulus=modulus, n_ops=8, n_train=1, seed=seed)
        clauses |= set(task.examples("train")[0].question.split(" ; ")[1:])
    assert {int(c[2:]) for c in clauses if c[0] == "*"} == factors
    assert {int(c[2:]) for c in clauses if c[0] != "*"} == set(range(1, modulus))
    for clause in clauses:
        assert len({eval(f"({n} {clause}) % {modulus}") for n in range(modulus)}) == modulus


def test_only_the_named_operations_occur():
    examples = Chain(**SMALL, operations="-", n_ops=7).examples("train")
    assert {c[0] for e in examples for c in e.question.split(" ; ")[1:]} == {"-"}


def test_too_small_a_space_names_the_number_and_the_fields():
    task = Chain(n_ops=2, n_train=10_000)
    assert task.n_questions() == 5 * 11**2
    with pytest.raises(InputError) as caught:
        task.examples("train")
    found = int(re.search(r"only (\d+) different train questions, not 10000", str(caught.value))[1])
    assert "raise n_ops or modulus, or lower n_train" in str(caught.value)
    assert len(Chain(n_ops=2, n_train=found).examples("train")) == found
    with pytest.raises(InputError):
        Chain(n_ops=2, n_train=found + 1).examples("train")


def test_what_is_asked_for_is_made_though_there_are_not_as_many_as_the_task_says():
    task = Chain(n_ops=3)  # of whose questions some 700 are for testing
    every = Chain(n_ops=3, n_test=600).examples("test")
    assert task.examples("test", limit=100) == every[:100]
    task.check("test", limit=100)
    for ask in (task.examples, task.check):
        with pytest.raises(InputError, match=r"different test questions, not 1000: .* lower n_test or the limit"):
            ask("test")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_ops": 0}, "n_ops is 0, but must be a whole number, at least 1"),
        ({"modulus": 1}, "modulus is 1, but must be a whole number, at least 2"),
        ({"n_test": 0}, "n_test is 0, but must be a whole number, at least 1"),
        ({"min_ops": 6}, r"min_ops is 6, but must be from 1 to n_ops \(5\)"),
        ({"min_ops": 0}, "min_ops is 0"),
        ({"operations": "+/"}, r"operations is '\+/', but must be some of '\+-\*', each once"),
        ({"operations": "++"}, "each once"),
        ({"operations": ""}, "operations is ''"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        Chain(**options)


@pytest.mark.parametrize("options", [{}, {"n_ops": 12, "modulus": 101}])
def test_budget_is_enough_for_a_tokenizer_of_characters(options):
    task = Chain(**options)
    longest = max(len("\n".join([*e.steps, f"### {e.answer}"])) for e in task.examples("test"))
    assert longest + 1 <= task.max_new_tokens <= 1.3 * longest


def test_the_first_example_never_changes_nor_does_the_check_of_answers():
    task = Chain()
    (example,) = task.examples("test", limit=1)
    assert (example.question, example.answer) == ("1 ; + 1 ; * 4 ; - 3 ; + 3 ; + 4", "2")
    assert task.extract("3 + 4 = 2\n### 2") == "2"
    assert task.is_correct("2", "2") and not task.is_correct("3", "2")
    assert task.extract("3 + 4 = 2") is None


def test_steps_may_be_their_results_alone():
    tasks = (Chain(n_ops=3, n_train=20, n_valid=1, n_test=1, steps=steps) for steps in ("equations", "results"))
    for long, short in zip(*(task.examples("train") for task in tasks), strict=True):
        assert (long.question, long.answer) == (short.question, short.answer)
        assert [step.split(" = ")[-1] for step in long.steps] == list(short.steps)
        assert short.steps[-1] == short.answer
    with pytest.raises(InputError, match="steps is words, but must be one of equations, results"):
        Chain(steps="words")

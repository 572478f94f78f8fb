import json
from dataclasses import fields

import pytest

from innerloop.errors import InputError
from innerloop.tasks import TASKS, FileTask, Gsm8k, ProntoQA, ProsQA, Task, task_named
from innerloop.tasks.task import after_mark, split_of
from innerloop.text.examples import ANSWER_PREFIX, Example, write_examples

GSM8K = {"train": 6973, "valid": 500, "test": 659}
REAL_FILES = [
    ("gsm8k", "gsm8k_eq", GSM8K),
    ("gsm8k", "gsm8k_nl", GSM8K),
    ("prontoqa", "prontoqa", {"train": 9000, "valid": 200, "test": 800}),
    ("prosqa", "prosqa", {"valid": 300}),
    ("strategyqa", "strategyqa", {"train": 1854, "valid": 206}),
    ("math", "math", {"valid": 500, "test": 4500}),
    ("mult4x4", "mult4x4", {"valid": 1000, "test": 1000}),
    ("mult5x5", "mult5x5", {"valid": 1000, "test": 1000}),
    ("igsm", "igsm", {"valid": 500, "test": 1000}),
    ("phop", "phop", {"train": 8000, "valid": 400, "test": 1000}),
]


def test_tasks_are_listed_by_name():
    assert task_named("gsm8k") is Gsm8k
    assert set(TASKS) >= {"chain", "prosqa", "prontoqa", "gsm8k", "math", "strategyqa", "gsm_hard", "svamp"}
    for name, task in TASKS.items():
        assert issubclass(task, Task)
        assert task.name == name
        assert task.summary and task.version >= 1
        assert task() == task()
    with pytest.raises(InputError, match=r"no task 'gms8k' \(did you mean 'gsm8k'\?\): choose one of chain, "):
        task_named("gms8k")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_every_field_has_its_line_of_help(task):
    documented = "".join(base.__doc__ for base in task.__mro__ if issubclass(base, Task))
    assert [f.name for f in fields(task) if f"        {f.name}: " not in documented] == []


@pytest.mark.parametrize("name, folder, counts", REAL_FILES, ids=[folder for _, folder, _ in REAL_FILES])
def test_real_files_are_read_and_their_answers_pass_the_check(shared_data, name, folder, counts):
    files = {path.name.split(".")[0]: str(path) for path in (shared_data / folder).glob("*.jsonl*")}
    task = task_named(name)(**{split: files[split] for split in counts})
    for split, count in counts.items():
        examples = task.examples(split)
        assert len(examples) == count
        for example in examples[:300]:
            written = "\n".join([*example.steps, f"### {example.answer}"])
            predicted = task.extract(written)
            assert predicted is not None and task.is_correct(predicted, example.answer), example.id


def test_splits_without_a_source_and_unknown_splits(tmp_path):
    with pytest.raises(InputError) as caught:
        Gsm8k().examples("train")
    hint = "give task.train=FILE (.jsonl) or a Hub data set such as openai/gsm8k:main"
    assert str(caught.value) == f"task 'gsm8k' has no train split: {hint}"
    with pytest.raises(InputError, match=r"'prontoqa' has no valid split: give task\.valid=FILE \(\.jsonl\)$"):
        ProntoQA(train="x.jsonl").examples("valid")
    with pytest.raises(InputError, match=r"no split 'tset' \(did you mean 'test'\?\): choose train, valid or test"):
        ProntoQA(test="x.jsonl").examples("tset")


def test_relative_paths_and_limit(tmp_path, monkeypatch):
    examples = [Example("q", (), str(i), str(i)) for i in range(5)]
    write_examples(examples, tmp_path / "test.jsonl")
    monkeypatch.chdir(tmp_path)
    assert Gsm8k(test="test.jsonl").examples("test") == examples
    assert Gsm8k(test="test.jsonl").examples("test", limit=2) == examples[:2]


def test_a_new_task_needs_a_name_only(tmp_path):
    class Riddle(FileTask):
        name = "riddle"
        summary = "riddles"

    write_examples([Example("q", (), "An egg", "1")], tmp_path / "test.jsonl")
    riddle = Riddle(test=str(tmp_path / "test.jsonl"))
    assert riddle.examples("test")[0].answer == "An egg"
    assert riddle.is_correct(riddle.extract("think\n### An egg \nmore"), "An egg")
    assert not riddle.is_correct("an egg", "An egg")


@pytest.mark.parametrize(
    "text, answer",
    [
        ("### 4", "4"),
        ("a # b\n#### Tom is a lempus.\nTom", "Tom is a lempus."),
        ("###\n\n 7 ", "7"),
        ("so\n### C#", "C#"),
        ("### #1", "#1"),
        ("### F# minor", "F# minor"),
        ("a step\n ### a ### b\nmore", "a ### b"),
        ("### one\u2028two\x85\nthree", "one\u2028two"),
        ("first ### 4", "4"),
        ("### 4\n###", None),
        ("###", None),
        ("no mark", None),
        ("", None),
    ],
)
def test_after_mark(text, answer):
    assert after_mark(text) == answer


WORDS = ["C#", "#1", "F# minor", "a ### b", "## x", " b ", "one\u2028two", "4", "1/2"]
NUMBERS = ["4", "-1,234.50", "$5", "30%", "1e400"]
READABLE = {
    **{name: WORDS for name in ("plain", "phop")},
    **{name: NUMBERS for name in ("gsm8k", "gsm_hard", "svamp", "multi_arith", "igsm")},
    "math": ["\\frac{1}{2}", "90\\text{ square\nunits}", "\\#1"],
    "prosqa": ["Tom is a lempus."],
    "prontoqa": ["True", "false", "FALSE"],
    "strategyqa": ["yes", "No"],
    **{name: ["1 2 3"] for name in ("mult4x4", "mult5x5")},
}
UNREADABLE = [
    ("plain", "one\ntwo", "is read as 'one' where it is written, so write one line of text"),
    ("gsm8k", "1/2", "'1/2' is read as nothing where it is written, so write a number"),
    ("gsm_hard", "9" * 2000, f"the answer '{'9' * 60}…' is read as nothing"),
    ("igsm", "1e" + "9" * 30, "write a number"),
    ("prontoqa", "maybe", "write True or False"),
    ("strategyqa", "it depends", "write yes or no"),
]


def rows_of(folder, *answers):
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps({"question": "q", "steps": [], "answer": a}) + "\n" for a in answers))
    return str(path)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "text"])
def test_every_task_reads_back_what_a_model_that_is_right_would_write(tmp_path, name):
    made = {} if name not in READABLE else {"test": rows_of(tmp_path, *READABLE[name])}
    task = task_named(name)(**made)
    for example in task.examples("test", limit=20):
        predicted = task.extract(f"a step # 1\n{ANSWER_PREFIX}{example.answer}")
        assert task.is_correct(predicted, example.answer), example.answer


@pytest.mark.parametrize("name, answer, words", UNREADABLE, ids=[name for name, *_ in UNREADABLE])
def test_an_answer_that_no_model_could_give_is_reported_with_its_line(tmp_path, name, answer, words):
    good = READABLE[name][0]
    with pytest.raises(InputError, match="1 bad line") as caught:
        task_named(name)(test=rows_of(tmp_path, good, answer, good)).examples("test")
    assert "line 2: no model could be right" in str(caught.value) and words in str(caught.value)


def test_questions_that_splits_share_are_counted(tmp_path):
    for name, questions in {"train": ["a", "b", "c"], "valid": ["d", " a"], "test": ["b  ", "c", "e"]}.items():
        write_examples([Example(question, (), "1") for question in questions], tmp_path / f"{name}.jsonl")
    task = Gsm8k(**{split: str(tmp_path / f"{split}.jsonl") for split in ("train", "valid", "test")})
    in_train, rest = "questions are also in train", "what is measured on them is no measure of new ones"
    both = f"1 of 2 valid {in_train}, 2 of 3 test {in_train}: {rest}"
    assert task.overlap({"train": task.examples("train")}) == both
    assert task.overlap({"test": task.examples("test")}) == f"2 of 3 test {in_train}: {rest}"  # nothing of valid
    assert Gsm8k(train=task.train, test="none.jsonl").overlap({"train": task.examples("train")}) is None
    made = ProsQA(n_train=9)
    assert made.overlap({split: made.examples(split, 9) for split in ("train", "test")}) is None


def test_generated_questions_go_to_the_splits_by_shares():
    splits = [split_of(f"question {i}") for i in range(20_000)]
    assert splits.count("train") / 20_000 == pytest.approx(0.8, abs=0.01)
    assert splits.count("valid") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert split_of("3 ; + 4") == "train"  # fixed for ever: changing it would mix splits of old and new runs

from dataclasses import fields

import pytest

from innerloop.errors import InputError
from innerloop.tasks import TASKS, FileTask, Gsm8k, ProntoQA, Task, task_named
from innerloop.tasks.task import after_mark, split_of
from innerloop.text.examples import Example, write_examples

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
        ("###", None),
        ("no mark", None),
        ("", None),
    ],
)
def test_after_mark(text, answer):
    assert after_mark(text) == answer


def test_generated_questions_go_to_the_splits_by_shares():
    splits = [split_of(f"question {i}") for i in range(20_000)]
    assert splits.count("train") / 20_000 == pytest.approx(0.8, abs=0.01)
    assert splits.count("valid") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert split_of("3 ; + 4") == "train"  # fixed for ever: changing it would mix splits of old and new runs

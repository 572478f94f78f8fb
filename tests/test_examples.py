import gzip
import json
from pathlib import Path

import datasets
import pytest

from innerloop.errors import InputError
from innerloop.experiments.summary import PREDICTIONS, read_questions
from innerloop.measure.statistics import read_correct
from innerloop.tasks import Plain
from innerloop.text.examples import Example, from_rows, read_examples, to_dataset, write_examples

EXAMPLES = [
    Example("How many?", ("1+1=2", "2+1=3"), "3", "a", {"level": 2, "edges": [[0, 1], [1, 2]]}),
    Example("Où est « Zoé » ?\u2028", (), "là", "b"),
    Example("Who?", ("line",), "Tom", "c", {"other": None}),
]


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def row(**fields):
    return json.dumps({"question": "q", "steps": ["s"], "answer": "a"} | fields)


def problems_of(path, **options):
    with pytest.raises(InputError) as caught:
        read_examples(path, **options)
    return str(caught.value)


def test_example_is_hashable_and_equal_by_content():
    same = Example("How many?", ["1+1=2", "2+1=3"], "3", "a", {"level": 2, "edges": [[0, 1], [1, 2]]})
    assert same == EXAMPLES[0]
    assert {EXAMPLES[0]: "found"}[same] == "found"
    assert same != Example("How many?", same.steps, "3", "a", {"level": 3})


@pytest.mark.parametrize("name", ["rows.jsonl", "deep/er/rows.jsonl.gz"])
def test_jsonl_round_trip(tmp_path, name):
    path = tmp_path / name
    write_examples(EXAMPLES, path)
    assert read_examples(path) == EXAMPLES
    assert read_examples(str(path), limit=2) == EXAMPLES[:2]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_packed_files_are_the_same_bytes_whenever_and_wherever_written(tmp_path, monkeypatch):
    write_examples(EXAMPLES, tmp_path / "one.jsonl.gz")
    monkeypatch.setattr("time.time", lambda: 1e9)
    write_examples(EXAMPLES, tmp_path / "two.jsonl.gz")
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    lines = gzip.decompress((tmp_path / "two.jsonl.gz").read_bytes()).decode().split("\n")
    assert json.loads(lines[1]) == {"id": "b", "question": "Où est « Zoé » ?\u2028", "steps": [], "answer": "là"}


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_examples(EXAMPLES, path)
    with pytest.raises(TypeError):
        write_examples([EXAMPLES[0], Example("q", (), "a", meta={"bad": object()})], path)
    assert read_examples(path) == EXAMPLES
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match=r"name the file \.jsonl or \.jsonl\.gz"):
        write_examples(EXAMPLES, tmp_path / "rows.csv")


def test_data_sets_are_written_and_read_with_structured_meta():
    dataset = to_dataset(EXAMPLES)
    assert dataset.column_names == ["id", "question", "steps", "answer", "meta"]
    assert from_rows(dataset, "rows") == EXAMPLES
    dataset = datasets.Dataset.from_list([{"question": "q", "steps": ["s"], "answer": 4, "meta": {"p": 2}, "more": 1}])
    assert from_rows(dataset, "train") == [Example("q", ("s",), "4", "train-1", {"p": 2, "more": 1})]


def test_defaults_and_conversions(tmp_path):
    path = write_lines(
        tmp_path / "some.set.jsonl",
        b"\xef\xbb\xbf" + row(answer=12).encode(),
        "",
        row(answer=0.5, id=7),
        row(id="", level=3, meta={"kind": "x"}) + "\r",
    )
    first, second, third = read_examples(path)
    assert (first.id, first.answer) == ("some.set-1", "12")
    assert (second.id, second.answer) == ("7", "0.5")
    assert (third.id, third.meta) == ("some.set-4", {"level": 3, "kind": "x"})


BAD = [
    (row(id="x"), None),
    ('{"question": "q", ', "broken JSON ("),
    ("[1, 2]", "not an object {...}"),
    ('{"steps": [], "answer": "a"}', "no 'question'"),
    (row(question="  "), "'question' is empty"),
    (row(answer=""), "'answer' is empty"),
    (row(answer=None), "no 'answer'"),
    (row(answer=True), "'answer' is not text"),
    (row(steps="one"), "'steps' is not a list of strings"),
    (row(steps=["one", 2]), "'steps' is not a list of strings"),
    ('{"question": "q", "answer": "a"}', "no 'steps' (write [] where there are none)"),
    (row(id="x"), "id 'x' is already that of line 1"),
    (row(question=5, answer=[]), "'question' is not text; 'answer' is not text"),
    (row(meta=[1]), "'meta' is not an object"),
    (row(id=1.5), "'id' is not text"),
    (row(answer=float("nan")), "broken JSON (NaN is no JSON value)"),
    (b'{"question": "\xff"}', "not UTF-8 text"),
    (row(question="a\ud800b"), "'question' holds half of a surrogate pair, which is no text"),
    (
        row(steps=["a", "\udfff"], answer="\ud83d"),
        "'steps' holds half of a surrogate pair, which is no text; 'answer' holds",
    ),
    (row(meta={"a": [{"\ud800": 1}]}), "'meta' holds half"),
    (row(id="y"), None),
]


ENDS_NO_LINE = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("sign", ENDS_NO_LINE, ids=ascii)
def test_only_a_newline_ends_a_line(tmp_path, sign):
    example = Example(f"one{sign}two \U0001f600", (f"a{sign}b",), f"x{sign}y", f"i{sign}d")
    write_examples([example] * 1, tmp_path / "a.jsonl")
    assert Plain(test=str(tmp_path / "a.jsonl")).examples("test") == [example]
    line = json.dumps(
        {"id": example.id, "question": example.question, "gold": "x", "correct": True}, ensure_ascii=False
    )
    (tmp_path / PREDICTIONS).write_text(f"{line}\n", encoding="utf-8")
    assert read_questions(tmp_path) == [(example.id, example.question, "x")]
    assert read_correct(tmp_path / PREDICTIONS) == {example.id: True}


def test_no_file_splits_text_by_what_else_may_end_lines():
    files = (Path(__file__).parents[1] / "src").rglob("*.py")
    assert [path.name for path in files if ".splitlines(" in path.read_text()] == []


def test_all_bad_lines_are_reported_at_once(tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", *(line for line, _ in BAD))
    message = problems_of(path)
    assert message.startswith(f"19 bad lines in {path}:\n")
    for number, (_, reason) in enumerate(BAD, 1):
        assert reason is None or f"\n  line {number}: {reason}" in message
    assert read_examples(path, limit=1)[0].id == "x"


def test_long_lists_of_problems_are_cut(tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", *["nothing"] * 50, row(answer=None))
    lines = problems_of(path).splitlines()
    assert lines[0].startswith("51 bad lines")
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 31 more"


def test_what_is_wrong_with_every_line_is_told_once(tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", *["nothing"] * 50)
    assert problems_of(path).splitlines()[1:] == [
        "  each line: broken JSON (Expecting value: line 1 column 1 (char 0))"
    ]


def test_one_bad_row_of_a_data_set_names_its_origin():
    rows = [json.loads(row()), json.loads(row(answer=""))]
    with pytest.raises(InputError, match=r"1 bad row in my/set:\n  row 2: 'answer' is empty"):
        from_rows(rows, "my/set")


def test_missing_and_unreadable_files(tmp_path):
    write_examples(EXAMPLES, tmp_path / "valid.jsonl.gz")
    packed = (tmp_path / "valid.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "folder.jsonl").mkdir()
    write_lines(tmp_path / "empty.jsonl"), write_lines(tmp_path / "rows.xlsx", "a,b")
    write_lines(tmp_path / "plain.jsonl.gz", row())
    for name, problem in {
        "vaild.jsonl.gz": f"no such file: {tmp_path / 'vaild.jsonl.gz'} (did you mean 'valid.jsonl.gz'?)",
        "none/valid.jsonl": "there is no folder",
        "valid": "did you mean 'valid.jsonl.gz'?",
        "empty.jsonl": "holds no examples",
        "rows.xlsx": "cannot tell what",
        "plain.jsonl.gz": "cannot read",
        "cut.jsonl.gz": "cannot read",
        "folder.jsonl": "cannot read",
    }.items():
        assert problem in problems_of(tmp_path / name)
    assert "limit is 0" in problems_of(tmp_path / "valid.jsonl.gz", limit=0)


def test_json_list_and_text_lines(tmp_path):
    rows = write_lines(tmp_path / "rows.json", f"[\n{row(id='x')},\n{row(root=4)}]")
    assert read_examples(rows) == [Example("q", ("s",), "a", "x"), Example("q", ("s",), "a", "rows-2", {"root": 4})]
    assert "must hold one list" in problems_of(write_lines(tmp_path / "one.json", row()))
    assert "broken JSON" in problems_of(write_lines(tmp_path / "bad.json", "[1"))
    assert "row 1: not an object" in problems_of(write_lines(tmp_path / "ints.json", "[1]"))

    def parse(fields):
        if " " not in fields["text"]:
            raise InputError("no space")
        question, answer = fields["text"].split(" ")
        return {"question": question, "steps": [], "answer": answer}

    text = write_lines(tmp_path / "rows.txt", "why so", "", "when now")
    assert [e.answer for e in read_examples(text, parse_row=parse)] == ["so", "now"]
    assert "each line: no 'question'" in problems_of(text)
    assert "line 2: no space" in problems_of(write_lines(tmp_path / "bad.txt", "a b", "c"), parse_row=parse)


def hub_of(monkeypatch, **splits):
    """Stand in for the Hub with a data set of these splits, and note how it is asked."""
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        loaded = {name: to_dataset([example]) for name, example in splits.items()}
        return loaded[split] if split else datasets.DatasetDict(loaded)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_hub_names_splits_and_configs(monkeypatch):
    asked = hub_of(monkeypatch, train=EXAMPLES[0], validation=EXAMPLES[1])
    assert read_examples("owner/name", "train") == [EXAMPLES[0]]
    assert read_examples("owner/name:main", "valid") == [EXAMPLES[1]]
    assert read_examples("owner/name:main:train", "test") == [EXAMPLES[0]]
    assert read_examples("owner/name::train", "test") == [EXAMPLES[0]]
    name, no_split = "owner/name", "has no split 'test': name one of train, validation as 'owner/name::SPLIT'"
    assert asked == [(name, None, None), (name, "main", None), (name, "main", "train"), (name, None, "train")]
    assert no_split in problems_of(name, split="test")
    assert "has several splits" in problems_of("owner/name")
    hub_of(monkeypatch, train=EXAMPLES[0])
    assert read_examples("name") == [EXAMPLES[0]]


def test_hub_failure_is_one_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert problems_of("owner/name", split="train") == (
        "cannot load data set 'owner/name' (no network); give a .jsonl file or a Hub name"
    )

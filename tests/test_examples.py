import gzip
import json

import datasets
import pytest

from innerloop.errors import InputError
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


def test_write_refuses_other_names(tmp_path):
    with pytest.raises(InputError, match=r"name the file \.jsonl or \.jsonl\.gz"):
        write_examples(EXAMPLES, tmp_path / "rows.csv")


def test_data_set_round_trip():
    dataset = to_dataset(EXAMPLES)
    assert dataset.column_names == ["id", "question", "steps", "answer", "meta"]
    assert from_rows(dataset, "rows") == EXAMPLES


def test_data_set_with_structured_meta_is_read():
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


def test_all_bad_lines_are_reported_at_once(tmp_path):
    path = write_lines(
        tmp_path / "bad.jsonl",
        row(id="x"),
        '{"question": "q", ',
        "[1, 2]",
        '{"steps": [], "answer": "a"}',
        row(question="  "),
        row(answer=""),
        row(answer=None),
        row(answer=True),
        row(steps="one"),
        row(steps=["one", 2]),
        '{"question": "q", "answer": "a"}',
        row(id="x"),
        row(question=5, answer=[]),
        row(meta=[1]),
        row(id=1.5),
        row(answer=float("nan")),
        b'{"question": "\xff"}',
        row(id="y"),
    )
    message = problems_of(path)
    assert message.startswith(f"16 bad lines in {path}:\n")
    for line, reason in {
        2: "broken JSON (",
        3: "not an object {...}",
        4: "no 'question'",
        5: "'question' is empty",
        6: "'answer' is empty",
        7: "no 'answer'",
        8: "'answer' is not text",
        9: "'steps' is not a list of strings",
        10: "'steps' is not a list of strings",
        11: "no 'steps' (write [] where there are none)",
        12: "id 'x' is already that of line 1",
        13: "'question' is not text; 'answer' is not text",
        14: "'meta' is not an object",
        15: "'id' is not text",
        16: "broken JSON (NaN is no JSON value)",
        17: "not UTF-8 text",
    }.items():
        assert f"\n  line {line}: {reason}" in message
    assert read_examples(path, limit=1)[0].id == "x"


def test_long_lists_of_problems_are_cut(tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", *["nothing"] * 50)
    lines = problems_of(path).splitlines()
    assert lines[0].startswith("50 bad lines")
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 30 more"


def test_one_bad_row_of_a_data_set_names_its_origin():
    with pytest.raises(InputError, match=r"1 bad row in my/set:\n  row 2: 'answer' is empty"):
        from_rows(
            [{"question": "q", "steps": [], "answer": "a"}, {"question": "q", "steps": [], "answer": ""}], "my/set"
        )


def test_missing_and_unreadable_files(tmp_path):
    write_examples(EXAMPLES, tmp_path / "valid.jsonl.gz")
    assert f"no such file: {tmp_path / 'vaild.jsonl.gz'} (did you mean 'valid.jsonl.gz'?)" in problems_of(
        tmp_path / "vaild.jsonl.gz"
    )
    assert "there is no folder" in problems_of(tmp_path / "none" / "valid.jsonl")
    assert "did you mean 'valid.jsonl.gz'?" in problems_of(f"{tmp_path}/valid")
    assert "holds no examples" in problems_of(write_lines(tmp_path / "empty.jsonl"))
    assert "cannot tell what" in problems_of(write_lines(tmp_path / "rows.csv", "a,b"))
    assert "cannot read" in problems_of(write_lines(tmp_path / "plain.jsonl.gz", row()))
    packed = (tmp_path / "valid.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert "cannot read" in problems_of(tmp_path / "cut.jsonl.gz")
    (tmp_path / "folder.jsonl").mkdir()
    assert "cannot read" in problems_of(tmp_path / "folder.jsonl")
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
    assert "line 1: no 'question'" in problems_of(text)
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
    assert asked == [
        ("owner/name", None, None),
        ("owner/name", "main", None),
        ("owner/name", "main", "train"),
        ("owner/name", None, "train"),
    ]
    assert "has no split 'test': name one of train, validation as 'owner/name::SPLIT'" in problems_of(
        "owner/name", split="test"
    )
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

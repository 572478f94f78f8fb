"""Data as people have them: tables, foreign column names, steps that are one text."""

import csv
import datetime
import gzip
import json
from pathlib import Path

import datasets
import pytest

from innerloop.cli.main import main
from innerloop.errors import InputError
from innerloop.tasks import Gsm8k, Plain
from innerloop.text.examples import Example, read_examples
from innerloop.train.recipe import parse_recipe

ROWS = [
    {"prompt": "2 + 3, then times 4?", "reasoning": "2 + 3 = 5\n\n 5 * 4 = 20 ", "target": "20"},
    {"prompt": 'Who said "no; never"?', "reasoning": "", "target": "Ann, then Ben"},
]
COLUMNS = {"question": "prompt", "steps": "reasoning", "answer": "target"}
EXAMPLES = [(ROWS[0]["prompt"], ("2 + 3 = 5", "5 * 4 = 20"), "20"), (ROWS[1]["prompt"], (), "Ann, then Ben")]


def write_csv(path, delimiter=",", rows=ROWS, encoding="utf-8"):
    with (
        gzip.open(path, "wt", newline="")
        if path.suffix == ".gz"
        else path.open("w", newline="", encoding=encoding) as file
    ):
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "rows.csv": write_csv,
    "rows.csv.gz": write_csv,
    "semicolons.csv": lambda path: write_csv(path, ";", encoding="utf-8-sig"),
    "tabs.csv": lambda path: write_csv(path, "\t"),
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(str(path)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
}


def content(examples):
    return [(example.question, example.steps, example.answer) for example in examples]


@pytest.fixture(params=WRITERS)
def path(request, tmp_path):
    WRITERS[request.param](tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("steps_split", ["\n", "\\n"])
def test_every_kind_of_file_is_read_under_our_names(path, steps_split):
    task = Plain(train=str(path), columns=COLUMNS, steps_split=steps_split)
    assert content(task.examples("train")) == EXAMPLES
    assert content(task.examples("train", 1)) == EXAMPLES[:1]


def test_what_is_missing_is_told_with_the_columns_that_are_there(path):
    with pytest.raises(InputError) as caught:
        Plain(train=str(path)).examples("train")
    assert caught.value.args[0].endswith(
        "each line: no 'question'; no 'answer'; no 'steps' (write [] where there are none); it has prompt, reasoning, "
        "target: say which is which, as columns: {question: prompt}".replace(
            "line", "line" if ".jsonl" in path.name else "row"
        )
    )


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json"])
def test_a_column_that_is_not_there_is_told_with_the_nearest(tmp_path, name):
    WRITERS[name](tmp_path / name)
    with pytest.raises(
        InputError, match=r"columns.question: .* has no column 'promt' \(did you mean 'prompt'\?\); it has"
    ):
        read_examples(tmp_path / name, columns={"question": "promt"})


def test_a_hub_data_set_has_columns_too(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    assert content(Plain(test="owner/name", columns=COLUMNS, steps_split="\n").examples("test")) == EXAMPLES
    with pytest.raises(InputError, match="owner/name has no column 'x'; it has prompt, reasoning, target"):
        Plain(test="owner/name", columns={"question": "x"}).examples("test")


def test_a_table_may_have_no_steps_and_its_other_columns_are_kept(tmp_path):
    day = datetime.date(2024, 5, 1)
    rows = [{"q": "one?", "answer": 1, "day": day, "png": b"x", "empty": float("nan")}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    task = Plain(train=str(tmp_path / "a.parquet"), columns={"question": "q", "steps": None})
    assert task.examples("train") == [Example("one?", (), "1", "a-1", {"day": "2024-05-01", "empty": None})]


def test_an_original_form_is_parsed_after_its_columns_are_renamed(tmp_path):
    rows = [{"problem": "Half of 48?", "solution": "<<48/2=24>>24\n#### 24"}]
    write_csv(tmp_path / "a.csv", rows=rows)
    task = Gsm8k(train=str(tmp_path / "a.csv"), columns={"question": "problem", "answer": "solution"})
    assert content(task.examples("train")) == [("Half of 48?", ("<<48/2=24>>",), "24")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,a\n1,2\n", "names a column 'a' twice"),
        ('question,steps,answer\nq,"s,a\n', "unexpected end of data; save it as comma-separated UTF-8"),
        ("question,steps,answer\nq,s\n", "row 1: 2 cells, but the first line names 3 columns; is a quote missing?"),
        ("question,steps,answer\nq,s,a\n", "'steps' is not a list of strings; steps_split says what stands between"),
        ("question,steps,answer\nq,é,a\n", "can't decode byte"),
        ("", "holds no examples"),
    ],
)
def test_a_broken_table_is_one_sentence(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        read_examples(tmp_path / "a.csv")
    assert message in str(caught.value)


def test_broken_parquet_is_one_sentence(tmp_path):
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        read_examples(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"querstion": "a"}, r"columns has no 'querstion' \(did you mean 'question'\?\)"),
        ({"answer": None}, "columns.answer is empty"),
        ({"answer": 3}, "columns.answer is 3, but must be text"),
    ],
)
def test_a_wrong_map_is_refused_when_it_is_made(columns, message):
    with pytest.raises(InputError, match=message):
        Plain(columns=columns)


def test_a_recipe_keeps_the_map(tmp_path):
    raw = {"task": {"name": "plain", "train": "a.csv", "columns": COLUMNS, "steps_split": "\n"}, "method": "cot"}
    recipe = parse_recipe({**raw, "backbone": {"model": "m"}, "out": "o"})
    assert recipe.task == Plain(train="a.csv", columns=COLUMNS, steps_split="\n")
    assert parse_recipe(recipe.as_dict()) == recipe


def test_data_make_converts(path, tmp_path, capsys):
    names = "{question: prompt, steps: reasoning, answer: target}"
    main(
        [
            "data",
            "make",
            "plain",
            "--train",
            str(path),
            "--columns",
            names,
            "--steps_split",
            "\\n",
            "--out",
            str(tmp_path),
        ]
    )
    assert "2 examples" in " ".join(capsys.readouterr().out.split())
    assert content(read_examples(Path(tmp_path, "train.jsonl"))) == EXAMPLES


def test_data_show_lays_out_a_table(path, capsys):
    names = "{question: prompt, steps: reasoning, answer: target}"
    assert main(["data", "show", str(path), "--columns", names, "--steps_split", "\\n"]) == 0
    assert "times" in capsys.readouterr().out

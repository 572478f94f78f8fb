"""Running text: how it is cut, read and spelled."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from innerloop.errors import InputError
from innerloop.methods import NoCot
from innerloop.tasks import Text
from innerloop.text.encoder import PromptEncoder
from innerloop.text.row import IGNORE
from innerloop.text.tokenizer import train_tokenizer

LINES = ["one two three", "four  five six seven", "eight nine ten"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text("\n\n".join(LINES) + "\n")
    return tmp_path / "book.txt"


def test_a_text_is_cut_into_whole_chunks_across_its_lines(path: Path):
    examples = Text(train=str(path), n_words=6, n_continued=2).examples("train")
    assert [(e.question, e.answer) for e in examples] == [("one two three\nfour", "  five six")]
    assert examples[0].steps == () and examples[0].id == "book-1"
    task = Text(train=str(path), n_words=4, n_continued=1)
    assert [e.question + e.answer for e in task.examples("train")] == ["one two three\nfour", "five six seven\neight"]
    assert len(task.examples("train", limit=1)) == 1


def test_rows_are_texts_of_their_own(tmp_path: Path):
    rows = [{"body": "a b c d", "label": 1}, {"body": "e f"}, {"body": ""}, {"body": "g h i j k"}]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    task = Text(test=str(tmp_path / "rows.jsonl.gz"), column="body", n_words=3, n_continued=1)
    assert [(e.question, e.answer) for e in task.examples("test")] == [("a b", " c"), ("g h", " i")]
    with pytest.raises(InputError, match=r"no 'text' that is text; task\.column says what it is called"):
        Text(test=str(tmp_path / "rows.jsonl.gz")).examples("test")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_words": 4, "n_continued": 4}, "n_continued is 4, but a chunk of 4 words"),
        ({"n_continued": 0}, "n_continued is 0"),
        ({"n_words": 40}, "no text in .*book.txt has 40 words: lower task.n_words"),
        ({"valid": None}, "has no valid split"),
    ],
)
def test_what_cannot_be_cut_is_refused(fields, words, path: Path):
    with pytest.raises(InputError, match=words):
        Text(**{"train": str(path), **fields}).examples("valid" if "valid" in fields else "train")


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer that keeps the space before a word in it and adds none, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("kind", ["word", "byte"])
def test_a_chunk_is_spelled_as_if_it_had_not_been_cut_and_learned_from_its_second_token_on(kind, path: Path):
    task = Text(train=str(path), n_words=6, n_continued=2)
    (example,) = task.examples("train")
    tokenizer = train_tokenizer([example]) if kind == "word" else byte_level()
    row = NoCot().lay_out(example, PromptEncoder(tokenizer, running_text=True))
    whole = tokenizer.encode(example.question + example.answer)
    assert row.ids() == whole and row.labels() == [IGNORE, *whole[1:]]
    assert len(set(row.ids())) > 4 and tokenizer.eos_token_id not in row.ids()

"""Running text, for pre-training: chunks of some words, each a beginning and how it goes on.

    question  It was the best of times, it was       answer  the worst of times,

Whatever a method does between question and answer happens inside the chunk: with SLR its latents are refined where the
text is cut. All of the text is learned, not the answer alone, and nothing but text is read.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from innerloop.checks.values import Places
from innerloop.errors import InputError, refuse
from innerloop.phases.phase import phase
from innerloop.tasks.task import FileTask, check_split
from innerloop.text.examples import Example, check_limit


@dataclass(frozen=True)
class Text(FileTask):
    """Chunks of running text. A .txt file is one text, without its blank lines; else every row is one.

    Args:
        train: file (.txt, .jsonl, .json, .csv, also .gz, .parquet) or a data set on the
            Hub (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT)
        valid: the same for validation
        test: the same for testing
        column: what rows call their text
        n_words: words of a chunk; what is left of a text at its end is left out
        n_continued: so many of them, the last, are what the text goes on with
    """

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "chunks of running text, for pre-training; measured by how well it is predicted"
    running_text: ClassVar[bool] = True

    column: str = "text"
    n_words: Places = 48
    n_continued: Places = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.n_continued >= self.n_words,
                f"text: n_continued is {self.n_continued}, but a chunk of {self.n_words} words must begin and go on: "
                "choose a value from 1 to n_words - 1",
            )
        )

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Read the texts of a split and cut them into chunks."""
        check_limit(limit)
        texts = [row.meta["text"] for row in super().examples(split)]
        source = str(getattr(self, check_split(split)))
        if source.removesuffix(".gz").endswith(".txt"):
            texts = ["\n".join(texts)]
        chunks = (chunk for text in texts for chunk in self._chunks(text))
        stem = Path(source).name.partition(".")[0]
        with phase("cutting texts into chunks"):
            found = [
                Example(begins, (), goes_on, f"{stem}-{i}")
                for i, (begins, goes_on) in enumerate(chunks, 1)
                if limit is None or i <= limit
            ]
        if not found:
            raise InputError(f"no text in {source} has {self.n_words} words: lower task.n_words")
        return found

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take the text of a row, which may be empty: data sets have such rows."""
        if not isinstance(row.get(self.column), str):
            raise InputError(f"no '{self.column}' that is text; task.column says what it is called")
        return {"question": "-", "steps": [], "answer": "-", "meta": {"text": row[self.column]}}

    def _chunks(self, text: str) -> Iterator[tuple[str, str]]:
        """Cut a text; what it goes on with begins with the space that comes before its first word."""
        words = list(re.finditer(r"\S+", text))
        for last in range(self.n_words - 1, len(words), self.n_words):
            start, cut = words[last - self.n_words + 1].start(), words[last - self.n_continued].end()
            yield text[start:cut], text[cut : words[last].end()]

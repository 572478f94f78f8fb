"""What a task is: where its examples come from, and how an answer is found in generated text and checked.

Generated text ends in ``### ANSWER``, after the written steps if there are any, one a line.
"""

import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar

from innerloop.checks.settings import Checked
from innerloop.checks.values import fitted
from innerloop.errors import InputError, InputNote, nearest, refuse
from innerloop.text.examples import ANSWER_PREFIX, FIELDS, Example, n_shared, read_examples

SPLITS = ("train", "valid", "test")
COLUMNS = (*FIELDS, "text")  # what a column map may name; text is a row of the original forms
MARK = re.compile(r"(?:^|\n)[ \t]*#{3,}")  # where a line begins, so that an answer may hold signs of its own
SAID = re.compile(r"[Tt]he answer is:?[ \t]")  # as CODI's models end
MOST_COMPARED = 1000  # letters of an answer that is more than text to be compared: no right one is as long
MOST_SHOWN = 60  # letters of an answer in a message


@dataclass(frozen=True)
class Task(Checked, ABC):
    """A kind of problem. The fields of a subclass are its options in a recipe."""

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int] = 1  # rises when the same options would give other examples or another verdict
    running_text: ClassVar[bool] = False  # examples are pieces of text: the answer goes on where the question ends
    answer_form: ClassVar[str] = "one line of text"  # what an answer must be, in words
    max_new_tokens: ClassVar[int] = 64  # enough for the written steps and the answer; read it from the instance

    @abstractmethod
    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Return the examples of a split ("train", "valid" or "test"), at most ``limit``."""

    def overlap(self, known: Mapping[str, list[Example]]) -> str | None:
        """Say in one sentence which splits share questions with ``known``, and how many; of splits made here, none do.

        Args:
            known: examples of splits, by name.
        """
        return None

    def check(self, split: str, limit: int | None = None) -> None:
        """Refuse a split that cannot be made or read, as far as its first example shows."""
        self.examples(split, 1)

    def extract(self, text: str) -> str | None:
        """Return the predicted answer in generated text, or None where there is none."""
        return after_mark(text)

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Say whether an extracted answer is right."""
        return predicted.strip() == gold.strip()

    def compare(self, predicted: str, gold: str) -> bool | None:
        """Say whether an extracted answer is right; None where that takes too long to tell, which counts as wrong."""
        return self.is_correct(predicted, gold)

    def check_answer(self, answer: str) -> None:
        """Refuse a gold answer that would not be judged right where a model writes it."""
        predicted = self.extract(ANSWER_PREFIX + answer)
        if predicted is None or not self.is_correct(predicted, answer):
            read = "nothing" if predicted is None else f"'{_shortened(predicted)}'"
            raise InputError(
                f"no model could be right: the answer '{_shortened(answer)}' is read as {read} where it is written, "
                f"so write {self.answer_form}"
            )


@dataclass(frozen=True)
class FileTask(Task):
    """A task whose examples are read from a file or from a data set on the Hub.

    Args:
        train: file (.jsonl, .json, .csv, .txt, also .gz, .parquet) or a data set on the
            Hub (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT)
        valid: the same for validation
        test: the same for testing
        columns: what the data call ours: {question: prompt, steps: reasoning, answer: target}; steps: null for none
        steps_split: what stands between steps that are one text, such as a newline
    """

    hub: ClassVar[str] = ""  # a data set on the Hub that parse_row can read

    train: str | None = None
    valid: str | None = None
    test: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict, hash=False)
    steps_split: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for ours, theirs in self.columns.items():
            if ours not in COLUMNS:
                raise InputError(f"columns has no '{ours}'{nearest(str(ours), COLUMNS)}; it maps {', '.join(COLUMNS)}")
            if theirs is None and ours != "steps":
                raise InputError(f"columns.{ours} is empty: name the column that the data have; only steps may be null")
            fitted(f"columns.{ours}", theirs, str | None)
        refuse((self.steps_split == "", 'steps_split is empty: write what stands between two steps, such as "\\n"'))

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Read the examples of a split."""
        source = getattr(self, check_split(split))
        if source is None:
            example = f" or a Hub data set such as {self.hub}" if self.hub else ""
            raise InputError(f"task '{self.name}' has no {split} split: give task.{split}=FILE (.jsonl){example}")
        return read_examples(source, split, limit, self._checked_row, self.columns, self.steps_split)

    def overlap(self, known: Mapping[str, list[Example]]) -> str | None:
        """Say what is shared; splits that are not known are read where they are files that are there."""
        splits = dict(known)
        for split in SPLITS:
            source = getattr(self, split)
            if split not in splits and source is not None and os.path.isfile(source):
                with suppress(InputError):  # which is told where the split is asked for
                    splits[split] = self.examples(split)
        asked = [split for split in SPLITS if split in splits]
        shared = [
            f"{n} of {len(splits[b])} {b} questions are also in {a}"
            for i, a in enumerate(asked)
            for b in asked[i + 1 :]
            if {a, b} & known.keys() and (n := n_shared(splits[b], splits[a]))
        ]
        return f"{', '.join(shared)}: what is measured on them is no measure of new ones" if shared else None

    def _checked_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        parsed = self.parse_row(row)
        answer = parsed.get("answer")
        if isinstance(answer, str | int | float) and str(answer).strip():  # else reading says what is wrong with it
            self.check_answer(str(answer))
        return parsed

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turn a row of an original format into one with question, steps and answer; leave other rows as they are."""
        return row


def warn_of_overlap(task: Task, known: Mapping[str, list[Example]]) -> None:
    """Warn of questions that splits share; ``known`` are the examples of some, by name."""
    if (shared := task.overlap(known)) is not None:
        warnings.warn(shared, InputNote, stacklevel=2)


def after_mark(text: str) -> str | None:
    """Return the first line after the last ``###`` that begins a line, or else after the last '#'; or None.

    Where there is neither, it is what comes after "The answer is:".

    So ``### C#`` is read as ``C#``, and ``### a ### b`` as ``a ### b``.
    """
    marks = list(MARK.finditer(text))
    if not marks and "#" not in text and (said := SAID.search(text)):
        return first_line(text[said.end() :]) or None
    return first_line(text[marks[-1].end() :] if marks else text.rpartition("#")[2] if "#" in text else "") or None


def first_line(text: str) -> str:
    """Return the first line that is not blank; only a newline ends a line."""
    return text.strip().partition("\n")[0].strip()


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def check_split(split: str) -> str:
    """Return ``split`` if there is one of that name."""
    if split not in SPLITS:
        raise InputError(f"no split '{split}'{nearest(split, SPLITS)}: choose train, valid or test")
    return split


def split_of(question: str) -> str:
    """Return the split that a generated question belongs to: 80 % train, 10 % valid, 10 % test.

    It depends on the text alone, so generated splits cannot share a question, whatever their seeds.
    """
    bucket = int.from_bytes(blake2b(question.encode(), digest_size=8).digest(), "big") % 10
    return {0: "test", 1: "valid"}.get(bucket, "train")

"""What a task is: where its examples come from, and how an answer is found in generated text and checked.

Generated text ends in ``### ANSWER``, after the written steps if there are any, one a line.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

from innerloop.checks.settings import Checked
from innerloop.errors import InputError, nearest
from innerloop.text.examples import Example, read_examples

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Task(Checked, ABC):
    """A kind of problem. The fields of a subclass are its options in a recipe."""

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int] = 1  # rises when the same options would give other examples or another verdict
    running_text: ClassVar[bool] = False  # examples are pieces of text: the answer goes on where the question ends
    max_new_tokens: ClassVar[int] = 64  # enough for the written steps and the answer; read it from the instance

    @abstractmethod
    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Return the examples of a split ("train", "valid" or "test"), at most ``limit``."""

    def extract(self, text: str) -> str | None:
        """Return the predicted answer in generated text, or None where there is none."""
        return after_mark(text)

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Say whether an extracted answer is right."""
        return predicted.strip() == gold.strip()


@dataclass(frozen=True)
class FileTask(Task):
    """A task whose examples are read from a file or from a data set on the Hub.

    Args:
        train: file (.jsonl, .json or .txt, also .gz) or Hub data set (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT)
        valid: the same for validation
        test: the same for testing
    """

    hub: ClassVar[str] = ""  # a data set on the Hub that parse_row can read

    train: str | None = None
    valid: str | None = None
    test: str | None = None

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Read the examples of a split."""
        source = getattr(self, check_split(split))
        if source is None:
            example = f" or a Hub data set such as {self.hub}" if self.hub else ""
            raise InputError(f"task '{self.name}' has no {split} split: give task.{split}=FILE (.jsonl){example}")
        return read_examples(source, split, limit, self.parse_row)

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Turn a row of an original format into one with question, steps and answer; leave other rows as they are."""
        return row


def after_mark(text: str) -> str | None:
    """Return the first line after the last '#', or None where there is no '#' or nothing after it."""
    _, mark, answer = text.rpartition("#")
    lines = answer.strip().splitlines()
    return lines[0].strip() if mark and lines else None


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

"""Your own examples: any JSONL of questions, steps and answers; an answer is right when it is the same text."""

from dataclasses import dataclass
from typing import ClassVar

from innerloop.tasks.task import FileTask


@dataclass(frozen=True)
class Plain(FileTask):
    """Examples as they are.

    Args:
        train: file (.jsonl, .json, .csv, .txt, also .gz, .parquet) or a data set on the
            Hub (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT)
        valid: the same for validation
        test: the same for testing
    """

    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "your own {question, steps, answer} examples; an answer must be the same text"
    version: ClassVar[int] = 2
    max_new_tokens: ClassVar[int] = 128

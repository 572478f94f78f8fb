"""ProntoQA: is a statement about a person true, by a chain of rules? Answers are True and False.

Saparov & He, "Language Models Are Greedy Reasoners", arXiv 2210.01240; the 5-hop set is the one Coconut uses.
"""

from dataclasses import dataclass
from typing import ClassVar

from innerloop.tasks.task import FileTask, after_mark

ANSWERS = {"true": "True", "false": "False"}


@dataclass(frozen=True)
class ProntoQA(FileTask):
    """ProntoQA: true or false, by a chain of rules about made-up kinds."""

    name: ClassVar[str] = "prontoqa"
    summary: ClassVar[str] = "true or false, by a chain of rules about made-up kinds"
    answer_form: ClassVar[str] = "True or False"
    max_new_tokens: ClassVar[int] = 128

    def extract(self, text: str) -> str | None:
        """Return "True" or "False"; None where the text says neither."""
        return ANSWERS.get((after_mark(text) or "").removesuffix(".").casefold())

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare without case."""
        return predicted.strip().casefold() == gold.strip().casefold()

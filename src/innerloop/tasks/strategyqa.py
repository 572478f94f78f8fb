"""StrategyQA: questions whose steps are implicit. Answers are yes and no.

Geva et al., "Did Aristotle Use a Laptop?", arXiv 2101.02235.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from innerloop.tasks.task import FileTask, after_mark

ANSWERS = ("yes", "no")


@dataclass(frozen=True)
class StrategyQA(FileTask):
    """StrategyQA: yes or no, by facts that the question does not name. The published .json files are read as well."""

    name: ClassVar[str] = "strategyqa"
    summary: ClassVar[str] = "yes or no, by facts that the question does not name"
    answer_form: ClassVar[str] = "yes or no"
    max_new_tokens: ClassVar[int] = 256

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read a published row: its facts are the steps, its truth value becomes yes or no."""
        if not isinstance(row.get("answer"), bool) or "facts" not in row:
            return row
        rest = {name: value for name, value in row.items() if name not in ("qid", "facts")}
        answer = "yes" if row["answer"] else "no"
        return {**rest, "id": row.get("qid"), "steps": row["facts"], "answer": answer}

    def extract(self, text: str) -> str | None:
        """Return "yes" or "no"; None where the text says neither."""
        answer = (after_mark(text) or "").removesuffix(".").casefold()
        return answer if answer in ANSWERS else None

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare without case."""
        return predicted.strip().casefold() == gold.strip().casefold()

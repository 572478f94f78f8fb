"""MATH: competition problems with LaTeX answers, compared as mathematics by math-verify (the ``eval`` extra).

Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from innerloop.errors import InputError, check_installed
from innerloop.tasks import symbolic
from innerloop.tasks.sentences import sentences
from innerloop.tasks.task import MOST_COMPARED, FileTask, after_mark
from innerloop.text.examples import Example

BOX = "\\boxed{"


@dataclass(frozen=True)
class Math(FileTask):
    """MATH: competition problems; rows {"problem", "solution"} are read as published, their sentences as steps."""

    name: ClassVar[str] = "math"
    summary: ClassVar[str] = "competition problems with LaTeX answers (MATH)"
    version: ClassVar[int] = 2
    max_new_tokens: ClassVar[int] = 512
    answer_form: ClassVar[str] = "a formula in one line"
    hub: ClassVar[str] = "HuggingFaceH4/MATH-500"

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read a published row; the answer is the last box of the solution unless the row names it."""
        if not isinstance(row.get("problem"), str) or not isinstance(row.get("solution"), str):
            return {**row, "answer": _in_one_line(row.get("answer"))}
        answer = row.get("answer") or last_box(row["solution"])
        if answer is None:
            raise InputError("the solution has no \\boxed{ANSWER}")
        rest = {name: value for name, value in row.items() if name not in ("problem", "solution", "unique_id")}
        return {
            **rest,
            "id": row.get("unique_id"),
            "question": row["problem"],
            "steps": sentences(row["solution"]),
            "answer": _in_one_line(answer),
        }

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """Read the examples of a split; those that will be answered need what answers are compared by."""
        if split != "train":
            _check_installed()
        return super().examples(split, limit)

    def extract(self, text: str) -> str | None:
        """Return what follows the last '###', or what the last box holds."""
        if "###" in text:
            answer = after_mark(text)
            return answer and (last_box(answer) or answer)
        return last_box(text)

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare as text, then as mathematics."""
        return self.compare(predicted, gold) is True

    def compare(self, predicted: str, gold: str) -> bool | None:
        """Compare as text, then as mathematics; None where that takes too long."""
        if predicted.strip() == gold.strip():
            return True
        _check_installed()
        return max(len(predicted), len(gold)) <= MOST_COMPARED and symbolic.same_value(gold, predicted)


def _in_one_line(answer: Any) -> Any:
    return " ".join(answer.split()) if isinstance(answer, str) else answer  # LaTeX knows no lines


def _check_installed() -> None:
    check_installed("task 'math' compares answers by math-verify", "eval", "math_verify")


def last_box(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` in ``text`` holds; None if there is none or it is never closed."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth = 1
    for end in range(start + len(BOX), len(text)):
        escaped = text[end - 1] == "\\"
        depth += 0 if escaped else {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(BOX) : end].strip() or None
    return None

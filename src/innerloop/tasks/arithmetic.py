"""Word problems with a number as answer: the check they share, and the sets that test outside GSM8K's domain.

GSM-Hard arXiv 2211.10435, SVAMP arXiv 2103.07191, MultiArith arXiv 1608.01413. They have no steps and only test:

    GsmHard(test="gsmhardv2.jsonl").examples("test")
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, Literal

from innerloop.tasks.task import MOST_COMPARED, FileTask, first_line

Match = Literal["number", "string"]
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
IN_TEXT = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class NumberTask(FileTask):
    """A task whose answers are numbers.

    Args:
        match: number = equal as numbers, taken after '###' or else the last number written (LOTUS);
            string = equal as text, taken after the last '#', without commas and outer spaces (Coconut)
    """

    version: ClassVar[int] = 2
    answer_form: ClassVar[str] = "a number"

    match: Match = "number"

    def extract(self, text: str) -> str | None:
        """Return the number predicted in generated text; None where there is none."""
        _, mark, end = text.rpartition("#")  # no number holds one
        if self.match == "string":
            return (plain_text(end) or None) if mark else None
        if mark and end.strip():
            return plain_number(first_line(end))
        written = IN_TEXT.findall(text)
        return plain_number(written[-1]) if written else None

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare two numbers, as numbers or as text."""
        if self.match == "string":
            return plain_text(predicted) == plain_text(gold)
        number, gold_number = _exact(predicted), _exact(gold)
        return number is not None and number == gold_number


@dataclass(frozen=True)
class GsmHard(NumberTask):
    """GSM-Hard: GSM8K's test questions with large numbers; rows {"input", "target"} are read as published."""

    name: ClassVar[str] = "gsm_hard"
    summary: ClassVar[str] = "GSM8K's test questions with large numbers"
    hub: ClassVar[str] = "reasoning-machines/gsm-hard::train"

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read a published row."""
        if "input" not in row or "target" not in row:
            return row
        return _without_steps(row["input"], row["target"])


@dataclass(frozen=True)
class Svamp(NumberTask):
    """SVAMP: one- and two-step problems with misleading wording; rows {"Body", "Question", "Answer"} are read."""

    name: ClassVar[str] = "svamp"
    summary: ClassVar[str] = "short problems with misleading wording"
    hub: ClassVar[str] = "ChilleD/SVAMP::train+test"

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read a published row."""
        if not {"Body", "Question", "Answer"} <= row.keys():
            return row
        question = row.get("question_concat") or f"{row['Body']} {row['Question']}"
        return {**_without_steps(question, row["Answer"]), "id": row.get("ID")}


@dataclass(frozen=True)
class MultiArith(NumberTask):
    """MultiArith: two-step problems; rows {"question", "final_ans"} and {"sQuestion", "lSolutions"} are read."""

    name: ClassVar[str] = "multi_arith"
    summary: ClassVar[str] = "two-step problems with small numbers"
    hub: ClassVar[str] = "ChilleD/MultiArith"

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read a published row."""
        if "final_ans" in row:
            return _without_steps(row.get("question"), row["final_ans"])
        if isinstance(row.get("lSolutions"), list) and len(row["lSolutions"]) == 1:
            return _without_steps(row.get("sQuestion"), row["lSolutions"][0])
        return row


def plain_text(text: str) -> str:
    """Return ``text`` without commas and outer spaces."""
    return text.replace(",", "").strip()


def plain_number(text: str) -> str | None:
    """Return the number that ``text`` is, without commas, spaces, a dollar or percent sign and a final full stop.

    None if it is anything more than that, such as fractions ("1/2"), units and words, or longer than any number that is
    asked for.
    """
    if len(text) > MOST_COMPARED:
        return None
    bare = re.sub(r"[,\s$%]", "", text).removesuffix(".")
    return bare if NUMBER.fullmatch(bare) else None


def _exact(text: str) -> Decimal | None:
    """Return the number that ``text`` is, digit for digit; None where it is none, or beyond a Decimal's exponents."""
    number = plain_number(text)
    try:
        return None if number is None else Decimal(number)
    except InvalidOperation:
        return None


def _without_steps(question: Any, answer: Any) -> Mapping[str, Any]:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # 8.0 is written 8
    return {
        "question": question.strip() if isinstance(question, str) else question,
        "steps": [],
        "answer": plain_text(answer).removesuffix(".0") if isinstance(answer, str) else answer,
    }

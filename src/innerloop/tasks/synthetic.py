"""Synthetic sets that are only read: long multiplication, iGSM, and p-hop induction.

Multiplication is that of iCoT (arXiv 2405.14838), iGSM arXiv 2407.20311, p-hop induction arXiv 2402.09268.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from innerloop.tasks.arithmetic import NumberTask
from innerloop.tasks.gsm8k import split_chain_line
from innerloop.tasks.task import FileTask


@dataclass(frozen=True)
class Mult4x4(FileTask):
    """Products of two 4-digit numbers, least significant digit first; lines of the iCoT data are read as well."""

    name: ClassVar[str] = "mult4x4"
    summary: ClassVar[str] = "4 by 4 digit multiplication, digits reversed"
    max_new_tokens: ClassVar[int] = 192

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read an original line: ``a * b||partial products joined by " + " #### product``."""
        if not isinstance(row.get("text"), str) or "question" in row:
            return row
        question, chain, answer = split_chain_line(row["text"])
        return {"question": question, "steps": chain.split(" + "), "answer": answer}

    def is_correct(self, predicted: str, gold: str) -> bool:
        """Compare the digits, however they are spaced."""
        return "".join(predicted.split()) == "".join(gold.split())


@dataclass(frozen=True)
class Mult5x5(Mult4x4):
    """Products of two 5-digit numbers, least significant digit first; lines of the iCoT data are read as well."""

    name: ClassVar[str] = "mult5x5"
    summary: ClassVar[str] = "5 by 5 digit multiplication, digits reversed"


@dataclass(frozen=True)
class Igsm(NumberTask):
    """iGSM: made-up dependency graphs told as word problems, modulo 23."""

    name: ClassVar[str] = "igsm"
    summary: ClassVar[str] = "made-up word problems over a dependency graph, modulo 23"
    max_new_tokens: ClassVar[int] = 512


@dataclass(frozen=True)
class PHop(FileTask):
    """p-hop induction: from the last letter, p times jump to just after the letter's last earlier occurrence."""

    name: ClassVar[str] = "phop"
    summary: ClassVar[str] = "p jumps back through a row of letters"
    max_new_tokens: ClassVar[int] = 128

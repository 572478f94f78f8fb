"""GSM8K: grade-school word problems, in its original form, as GSM8K-Aug lines, or as rows with steps.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168; GSM8K-Aug: arXiv 2311.01460.

    Gsm8k(train="train.jsonl", steps="equations").examples("train")
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from innerloop.errors import InputError
from innerloop.tasks.arithmetic import NumberTask, plain_text

Steps = Literal["equations", "text"]
ANNOTATION = re.compile(r"<<[^<>]*>>")
TEXT_BUDGET = 256  # new tokens for steps in words; equations fit the default


@dataclass(frozen=True)
class Gsm8k(NumberTask):
    """GSM8K: grade-school word problems. Rows that already have steps keep them.

    Args:
        steps: what becomes the steps of an original solution: equations = its annotations (<<48/2=24>>), text = its
            lines without them
    """

    name: ClassVar[str] = "gsm8k"
    summary: ClassVar[str] = "grade-school word problems (GSM8K, GSM8K-Aug)"
    hub: ClassVar[str] = "openai/gsm8k:main"

    steps: Steps = "equations"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps == "text":
            object.__setattr__(self, "max_new_tokens", TEXT_BUDGET)

    def parse_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Read an original row (question, answer) or a GSM8K-Aug line (text); other rows have steps already."""
        if isinstance(row.get("text"), str) and "question" not in row:
            return self._parse_aug(row["text"])
        if isinstance(row.get("answer"), str) and "steps" not in row:
            return {**row, **self._parse_solution(row["answer"])}
        return row

    def _parse_solution(self, solution: str) -> Mapping[str, Any]:
        text, mark, answer = solution.rpartition("####")
        if not mark:
            raise InputError("the solution has no '#### ANSWER', and the row has no 'steps'")
        if self.steps == "equations":
            steps = ANNOTATION.findall(text)
        else:
            lines = (ANNOTATION.sub("", line).strip() for line in text.split("\n"))
            steps = [line for line in lines if line]
        return {"steps": steps, "answer": plain_text(answer)}

    def _parse_aug(self, line: str) -> Mapping[str, Any]:
        question, chain, answer = split_chain_line(line)
        equations = ANNOTATION.findall(chain)
        if self.steps == "text":
            raise InputError("GSM8K-Aug lines hold equations only: set task.steps=equations")
        if ANNOTATION.sub("", chain).strip():
            raise InputError(f"the chain is not made of <<...>> alone: {chain}")
        return {"question": question, "steps": equations, "answer": plain_text(answer)}


def split_chain_line(line: str) -> tuple[str, str, str]:
    """Split a line ``question||chain #### answer``, the form of the iCoT data sets."""
    question, bar, rest = line.partition("||")
    chain, mark, answer = rest.rpartition("####")
    if not bar or not mark:
        raise InputError(f"no '{'||' if not bar else '####'}': a line must be 'question||steps #### answer'")
    return question.strip(), chain.strip(), answer.strip()

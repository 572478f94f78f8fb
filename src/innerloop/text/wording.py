"""The signs between the parts of an example: ours, or those that a released model was trained with."""

from __future__ import annotations

from dataclasses import dataclass

from innerloop.text.examples import ANSWER_PREFIX


@dataclass(frozen=True)
class Wording:
    """What an encoder writes around questions and answers.

    Attributes:
        question_end: what comes between a question and all that follows it.
        answer_prefix: what an answer is written behind.
    """

    question_end: str = "\n"
    answer_prefix: str = ANSWER_PREFIX

    @property
    def mark(self) -> str:
        """What generated text has before its answer."""
        return self.answer_prefix.strip()


OURS = Wording()

"""The signs between the parts of an example: ours, a model's chat, or those that a released model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from innerloop.errors import InputError
from innerloop.text.examples import ANSWER_PREFIX

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

Chat = bool | Literal["auto"]
A_QUESTION = "A-QUESTION"  # which no template changes


@dataclass(frozen=True)
class Wording:
    """What an encoder writes around questions and answers.

    Attributes:
        question_end: what comes between a question and all that follows it.
        answer_prefix: what an answer is written behind.
        question_start: of a chat, what comes before a question.
        chat: a question is a turn of a chat: what stands around it is read with its special tokens.
    """

    question_end: str = "\n"
    answer_prefix: str = ANSWER_PREFIX
    question_start: str = ""
    chat: bool = False

    @property
    def mark(self) -> str:
        """What generated text has before its answer."""
        return self.answer_prefix.strip()


OURS = Wording()


def wording_of(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Wording:
    """Return the wording of a model that no run of ours, and nobody who released it, has given one.

    Args:
        tokenizer: the model's.
        chat: whether questions are asked through its chat template; auto: if it has one.

    Raises:
        InputError: it has none, or one that does not show a question as it is.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat is False or (chat == "auto" and not template):
        return OURS
    if not template:
        raise InputError("chat is true, but the model has no chat template: set chat to auto or false")
    turn = [{"role": "user", "content": A_QUESTION}]
    try:
        shown = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may fail in any way
        shown, why = "", f" ({' '.join(str(error).split())[:100]})"
    else:
        why = ""
    if not isinstance(shown, str) or shown.count(A_QUESTION) != 1:
        raise InputError(f"the model's chat template does not show a question as it is{why}: set chat to false")
    start, end = shown.split(A_QUESTION)
    return Wording(question_end=end, question_start=start, chat=True)

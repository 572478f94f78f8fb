"""How the parts of an example are encoded in a tokenizer's ids: questions, steps, answers, markers; or running text."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from innerloop.errors import InputError, InputNote
from innerloop.text.examples import Example
from innerloop.text.row import LAT, Kind, Span
from innerloop.text.wording import OURS, Wording

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

A_WORD = "a"  # any: what comes after it is encoded as in the middle of a text


N_REMEMBERED = 2**15  # texts whose tokens an encoder keeps


class PromptEncoder:
    """Encodes the parts of an example in a tokenizer's ids.

    Strings are remembered, because every example is laid out anew at every epoch and stage.

    Args:
        tokenizer: the tokenizer.
        running_text: question and answer are a text and how it goes on: there is no newline, mark or end between and
            after them, and the question's tokens are learned too, all but the first.
        wording: the signs between the parts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, running_text: bool = False, wording: Wording = OURS):
        self.tokenizer = tokenizer
        self.wording = wording
        self.running_text = running_text
        known = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
        self._special = re.compile("|".join(map(re.escape, sorted(known, reverse=True))) or "(?!)")
        self._memory: dict[tuple[str, bool], tuple[int, ...]] = {}
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token before using it")
        self.eos_id: int = tokenizer.eos_token_id

    def reading(self, running_text: bool) -> PromptEncoder:
        """Return an encoder of the same words that reads running text, or questions with answers."""
        return PromptEncoder(self.tokenizer, running_text, self.wording)

    @property
    def pad_id(self) -> int:
        """What fills padded columns; any id serves, because masks are built from lengths, never from ids."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def marker(self, text: str, n: int = 1) -> Span:
        """Return ``n`` copies of a marker as one span: latent slots for <lat>, else a marker."""
        marker_id = self.tokenizer.convert_tokens_to_ids(text)
        return Span((marker_id,) * n, Kind.LATENT if text == LAT else Kind.MARKER)

    def question(self, text: str) -> Span:
        """Encode a question, with the beginning-of-sequence token if the tokenizer adds one, or as a turn of a chat."""
        if not self.running_text and (marked := self._special.search(text)):
            warnings.warn(
                f"a question has {marked[0]}, which is read letter by letter and not as the special token: give the "
                "bare question",
                InputNote,
                stacklevel=2,
            )
        if self.wording.chat and not self.running_text:
            start, end = (self._around(part) for part in (self.wording.question_start, self.wording.question_end))
            return Span((*start, *self._ids(text, special=False), *end), Kind.QUESTION)
        ids = self._ids(text if self.running_text else text + self.wording.question_end, special=True)
        ids = ids[:-1] if ids and ids[-1] == self.eos_id else ids
        return Span(ids, Kind.QUESTION, supervised=self.running_text)

    def step(self, text: str, index: int) -> Span:
        """Encode step ``index`` (0-based), ended by a newline."""
        return Span(self._ids(text + "\n", special=False), Kind.STEP, supervised=True, step=index)

    def steps(self, example: Example, first: int = 0) -> list[Span]:
        """Encode the steps from index ``first`` on."""
        return [self.step(text, i) for i, text in enumerate(example.steps) if i >= first]

    def answer(self, text: str) -> Span:
        """Encode the answer, ``### A`` or as the wording says, and the end of sequence; or what a text goes on with."""
        if self.running_text:
            before, whole = (self._ids(words, special=False) for words in (A_WORD, A_WORD + text))
            return Span(whole[len(before) :], Kind.ANSWER, supervised=True)
        ids = self._ids(self.wording.answer_prefix + text, special=False)
        return Span((*ids, self.eos_id), Kind.ANSWER, supervised=True)

    def answer_prefix_ids(self) -> tuple[int, ...]:
        """Encode what every answer begins with."""
        return () if self.running_text else self._ids(self.wording.mark, special=False)

    def begun(self, texts: Sequence[str]) -> list[Span]:
        """Encode what an answer has begun with: steps, and at most the mark of the answer, which ends them.

        Raises:
            InputError: something comes after the mark.
        """
        if self.wording.mark in texts[:-1]:
            raise InputError(f"an answer that has begun ends with {self.wording.mark}, where it holds that")
        is_marked = bool(texts) and texts[-1] == self.wording.mark
        steps = [self.step(text, i) for i, text in enumerate(texts[:-1] if is_marked else texts)]
        return [*steps, Span(self.answer_prefix_ids(), Kind.ANSWER)] if is_marked else steps

    def aux_target(self, text: str) -> tuple[int, ...]:
        """Encode what an auxiliary decoder must tell, with the end of sequence; nothing for no text."""
        return (*self._ids(text, special=False), self.eos_id) if text else ()

    def n_before_answer(self, text: str) -> int:
        """Return how many tokens of an encoded answer come before what is the answer's own, such as its digits."""
        prefix = self.wording.answer_prefix
        stem, whole = self._ids(prefix, special=False), self._ids(prefix + text, special=False)
        return next((i for i, (a, b) in enumerate(zip(stem, whole)) if a != b), min(len(stem), len(whole)))

    def _around(self, text: str) -> tuple[int, ...]:
        """Encode what a chat writes around a question: its special tokens are read as such."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _ids(self, text: str, special: bool) -> tuple[int, ...]:
        key = (text, special)
        if key not in self._memory:
            if len(self._memory) >= N_REMEMBERED:  # a stream of questions must fill nothing
                del self._memory[next(iter(self._memory))]
            self._memory[key] = tuple(
                self.tokenizer.encode(text, add_special_tokens=special, split_special_tokens=True)
            )
        return self._memory[key]

"""Explicit chain of thought and its absence: the two ends every latent method is measured between (cot.md)."""

from dataclasses import dataclass
from typing import ClassVar

from innerloop.config.method import Method, WritingMethod
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import BOT, EOT, Row


@dataclass(frozen=True)
class NoCot(Method):
    """The answer is written directly after the question: ``[Q][### A][eos]``."""

    name: ClassVar[str] = "no_cot"
    family: ClassVar[str] = "text"
    paper: ClassVar[str] = "baseline"
    summary: ClassVar[str] = "writes the answer at once"

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q] | | [### A][eos]``."""
        return Row([encoder.question(example.question)], [], [encoder.answer(example.answer)])

    def prompt(self, question: str, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q]``."""
        return Row([encoder.question(question)])


@dataclass(frozen=True)
class Cot(WritingMethod):
    """All steps are written, then the answer: ``[Q][T_1]..[T_m][### A][eos]``.

    Args:
        with_markers: put <bot><eot> after the question: stage 0 of Coconut and LOTUS.
    """

    name: ClassVar[str] = "cot"
    paper: ClassVar[str] = "arXiv 2201.11903"
    summary: ClassVar[str] = "writes every step, then the answer"
    needs: ClassVar[str] = "question, steps, answer"

    with_markers: bool = False

    @property
    def needs_steps(self) -> bool:
        """It writes them."""
        return True

    @property
    def markers(self) -> tuple[str, ...]:
        """<bot> and <eot>, if asked for."""
        return (BOT, EOT) if self.with_markers else ()

    def prompt(self, question: str, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q]``, followed by the markers if there are any."""
        return Row([encoder.question(question)], [], [encoder.marker(text) for text in self.markers])

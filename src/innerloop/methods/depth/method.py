"""What a method of the depth family is: a decoder whose tokens have unlike depth writes the steps and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

from innerloop.config.method import Method
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import Row

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from innerloop.decoder.backbone import Backbone
    from innerloop.loop.loop import InnerLoop
    from innerloop.passes.ragged import DepthForward


class DepthMethod(Method):
    """A method that writes every step, then the answer, by a model whose tokens have unlike depth."""

    family: ClassVar[str] = "depth"
    needs: ClassVar[str] = "question, steps, answer"

    forward: ClassVar[str] = ""
    """The class of its passes as ``module:Class``, imported when a model is made: settings alone need no torch."""

    passes_do: ClassVar[str] = "repeats or skips its layers"
    """What its passes do that the decoder's own do not, in words; empty where they are the same."""

    write_steps: bool = True
    """Off: the answer alone is written, so that all thinking happens inside the tokens."""

    @property
    def needs_steps(self) -> bool:
        """Examples without steps are written as they are."""
        return False

    def depth(self) -> int | None:
        """Return how often a pass iterates; None where the method has no such number."""
        return None

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q] | | [T_1]..[T_m][### A][eos]``."""
        row = self.prompt(example.question, encoder, stage)
        row.suffix += [*(encoder.steps(example) if self.write_steps else ()), encoder.answer(example.answer)]
        return row

    def prompt(self, question: str, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q]``."""
        return Row([encoder.question(question)], depth=self.depth())

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward | None:
        """Make what makes the passes in the decoder's stead, a `forward`; None: the decoder itself does."""
        module, _, name = self.forward.partition(":")
        return getattr(import_module(module), name)(self, backbone, loop) if module else None

    def begin(self, backbone: Backbone) -> None:
        """Fit the fresh weights of a decoder made from scratch to the method."""

    def convert(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Tensor] | None:
        """Rebuild a pretrained decoder into the shape that the method needs; saved runs have it already.

        What is returned is what the method's parts (`LatentModel.parts`) start from, by name.
        """
        return None

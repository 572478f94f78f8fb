"""`LatentModel`: a decoder that reasons by a method, as users have it: it learns, answers, is saved and loaded.

model = LatentModel.from_pretrained("HuggingFaceTB/SmolLM2-135M", method=Coconut())
model.loss(examples).loss.backward()
model.generate(["How many legs have 3 cats?"])[0].text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from innerloop.config.method import Method
from innerloop.engine.generate import generate
from innerloop.engine.generation import Generation
from innerloop.model import loading
from innerloop.model.model import LatentCore
from innerloop.text.examples import Example
from innerloop.text.tokenizer import train_tokenizer


class LatentModel(LatentCore):
    """Any decoder that reasons by any method."""

    def generate(self, questions: Sequence[str], **options: Any) -> list[Generation]:
        """Answer questions; see `innerloop.engine.generate` for the options."""
        return generate(self, questions, **options)

    @classmethod
    def from_pretrained(cls, path: str | Path, method: Method | None = None, **options: Any) -> Self:
        """Load a saved run, or put a method on any Hugging Face model; see `innerloop.model.loading.load`."""
        return loading.load(cls, path, method, **options)

    @classmethod
    def from_scratch(
        cls, settings: Mapping[str, Any], examples: Sequence[Example], method: Method, seed: int = 0
    ) -> Self:
        """Make a backbone with fresh weights and a word tokenizer trained on the text of examples.

        Args:
            settings: ``type`` (a transformers model type such as llama or gpt2) and fields of its configuration.
            examples: whose words the tokenizer learns.
            method: how to reason.
            seed: of the initial weights.
        """
        return loading.from_scratch(cls, settings, train_tokenizer(examples), method, seed)

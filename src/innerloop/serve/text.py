"""The text of one answer while it is written: what may be told of it already, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from innerloop.engine.events import Event
from innerloop.engine.generation import Generation
from innerloop.engine.requests import Alternatives
from innerloop.loop.trace import HIDDEN

HALF = "�"  # stands for a character of which only some bytes are there


class Writing:
    """One answer while it is written.

    Args:
        tokenizer: of the model.
        eos_id: the end of sequence.
        stops: texts that end it, and are not told.

    Attributes:
        told: the text that has been told.
        ids: the tokens written, with their ``log_probs`` and ``alternatives`` where asked for.
        reason: why it ended, as OpenAI clients call it; empty: it goes on.
        generation: the answer, where it came to its end by itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_id: int, stops: Sequence[str]):
        self.tokenizer, self.eos_id, self.stops = tokenizer, eos_id, list(stops)
        self.told, self.ids, self.reason = "", list[int](), ""
        self.log_probs: list[float] = []
        self.alternatives: list[Alternatives] = []
        self.generation: Generation | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be told."""
        return bool(self.reason)

    def take(self, event: Event) -> str:
        """Take an event in; return the text that may be told now."""
        if self.is_over:
            return ""
        self.ids += event.ids
        self.log_probs += event.log_probs
        self.alternatives += event.alternatives
        if event.generation is not None:
            self.generation, self.ids = event.generation, event.generation.ids
            return self._tell(event.generation.text, ends="stop" if event.generation.ended else "length")
        ids = self.ids if event.canvas is None else self._final(event)
        return self._tell(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _final(self, event: Event) -> list[int]:
        """Return the beginning of a canvas that stays as it is."""
        assert event.canvas is not None
        ids = [i for i in event.canvas[: event.n_final] if i != HIDDEN]
        return ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids

    def _tell(self, text: str, ends: str = "") -> str:
        """Return what of a text has not been told and may be, now that it is ``text`` so far, or in the end."""
        places = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            text, self.reason = text[: min(places)], "stop"
        elif ends:
            self.reason = ends
        else:
            text = text[: len(text) - self._held(text)]
        new = text[len(self.told) :]
        self.told += new
        return new

    def _held(self, text: str) -> int:
        """Return how many characters at the end may still become others, or the beginning of what ends the text."""
        held = len(text) - len(text.rstrip(HALF))
        for stop in self.stops:
            held = max(held, *(n for n in range(len(stop)) if text.endswith(stop[:n])))
        return held

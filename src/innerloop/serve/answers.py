"""Answers as OpenAI's clients read them: choices, chunks, log-probabilities, usage; and what is ours beside them.

What is ours stands under ``innerloop``: the answer behind the mark, costs, the seed, and with ``trace`` what latents
show. ``reasoning`` is made of read-outs of latents: words by which the head would name them, not what a model says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from innerloop.decoder.cost import Cost, total_cost
from innerloop.engine.events import Event
from innerloop.engine.generation import Generation
from innerloop.engine.requests import Alternatives
from innerloop.lens.grid import cells_of, loops_of
from innerloop.loop.trace import HIDDEN, Trace
from innerloop.serve.text import Writing
from innerloop.text.codec import to_json
from innerloop.text.tokenizer import token_names

LABEL = "[read-outs of the latents, not what the model says]\n"


class Answers:
    """What is sent for one request.

    Args:
        name: the model's.
        tokenizer: its tokenizer.
        is_chat: whether the client speaks of chats.
        n_alternatives: how many alternatives to each token are told; None: no log-probabilities.
        seed: of the draws.
    """

    def __init__(self, name: str, tokenizer: Any, is_chat: bool, n_alternatives: int | None, seed: int):
        self.name, self.tokenizer, self.is_chat, self.seed = name, tokenizer, is_chat, seed
        self.n_alternatives = n_alternatives
        self.told: set[int] = set()  # answers of which some iteration has been told
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        object_ = (
            {"chat": "chat.completion", "chunk": "chat.completion.chunk"}[kind] if self.is_chat else "text_completion"
        )
        about = {"id": self.id, "object": object_, "created": self.created, "model": self.name}
        return {**about, "choices": choices, **more}

    def chunk(self, index: int, writing: Writing, text: str, new: slice, **more: Any) -> dict[str, Any]:
        """Return an event of a stream: a piece of text, with what belongs to the tokens ``new``."""
        logprobs = self._log_probs(writing, new) if self.n_alternatives is not None and writing.ids[new] else None
        about = {"index": index, "finish_reason": writing.reason or None, "logprobs": logprobs}
        delta = {"delta": {"content": text} if text else {}} if self.is_chat else {"text": text}
        return self._body("chunk", [{**about, **delta}], **more)

    def first(self, index: int) -> dict[str, Any]:
        """Return the event that begins an answer of a chat."""
        delta = {"role": "assistant", "content": ""}
        return self._body("chunk", [{"index": index, "delta": delta, "finish_reason": None}])

    def loop(self, index: int, trace: Trace) -> dict[str, Any]:
        """Return an event with what latents show after one iteration: as text, and cell by cell."""
        is_first = index not in self.told
        self.told.add(index)
        return self._shown(index, reasoning(self.tokenizer, trace, is_first), {"loop": self._lines(trace)[0]})

    def thought(self, index: int, trace: Trace) -> dict[str, Any]:
        """Return an event with what latents show: cell by cell, and as text if that has not been told."""
        text = "" if index in self.told else reasoning(self.tokenizer, trace)
        return self._shown(index, text, self.shown(trace))

    def _shown(self, index: int, text: str, ours: dict[str, Any]) -> dict[str, Any]:
        delta: dict[str, Any] = {"text": ""}
        if self.is_chat:
            delta = {"delta": {"reasoning": text} if text else {}}
        return self._body("chunk", [{"index": index, "finish_reason": None, **delta}], innerloop=ours)

    def canvas(self, index: int, event: Event) -> dict[str, Any]:
        """Return an event with a whole canvas; null stands where a mask is."""
        assert event.canvas is not None
        names = token_names(self.tokenizer, [max(i, 0) for i in event.canvas])
        words = [None if i == HIDDEN else name for i, name in zip(event.canvas, names)]
        delta: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        told = {"canvas": words, "n_final": event.n_final}
        return self._body("chunk", [{"index": index, "finish_reason": None, **delta}], innerloop=told)

    def usage(self, n_read: int, costs: Sequence[Cost], **more: Any) -> dict[str, Any]:
        """Return the last event of a stream: what the request cost."""
        return self._body("chunk", [], usage=usage_of(n_read, costs), **more)

    def shown(self, trace: Trace) -> dict[str, Any]:
        """Return what latents show, iteration by iteration, as the lens has it."""
        return {"thought": self._lines(trace), "statistics": to_json(loops_of(trace))}

    def _lines(self, trace: Trace) -> list[dict[str, Any]]:
        return [{"loop": entry.loop, "cells": to_json(cells_of(self.tokenizer, entry))} for entry in trace.iterations]

    def whole(self, writings: Sequence[Writing], n_read: int, costs: Sequence[Cost]) -> dict[str, Any]:
        """Return all answers at once."""
        choices = []
        for index, writing in enumerate(writings):
            logprobs = self._log_probs(writing, slice(None)) if self.n_alternatives is not None else None
            choice: dict[str, Any] = {"index": index, "finish_reason": writing.reason, "logprobs": logprobs}
            trace = None if writing.generation is None else writing.generation.trace
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": writing.told, "refusal": None}
                if trace is not None and trace.iterations:
                    choice["message"]["reasoning"] = reasoning(self.tokenizer, trace)
            else:
                choice["text"] = writing.told
            choice["innerloop"] = self.about(writing) | ({} if trace is None else self.shown(trace))
            choices.append(choice)
        return self._body("chat", choices, usage=usage_of(n_read, costs))

    def about(self, writing: Writing) -> dict[str, Any]:
        """Return what is ours of an answer."""
        answer = None if writing.generation is None else writing.generation.answer
        return {"answer": answer, "seed": self.seed}

    def _log_probs(self, writing: Writing, part: slice) -> dict[str, Any]:
        ids, likely, others = writing.ids[part], writing.log_probs[part], writing.alternatives[part]
        others = others or [()] * len(ids)
        if self.is_chat:
            return {"content": [{**self._token(i, p), "top_logprobs": [self._token(*one) for one in more]}
                                for i, p, more in zip(ids, likely, others)], "refusal": None}  # fmt: skip
        names = [self._word(i) for i in ids]
        return {"tokens": names, "token_logprobs": likely, "top_logprobs": [self._by_word(more) for more in others],
                "text_offset": _offsets(names)}  # fmt: skip

    def _token(self, token: int, likely: float) -> dict[str, Any]:
        word = self._word(token)
        return {"token": word, "logprob": max(likely, -9999.0), "bytes": list(word.encode())}

    def _by_word(self, more: Alternatives) -> dict[str, float]:
        return {self._word(i): max(p, -9999.0) for i, p in more}

    def _word(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def usage_of(n_read: int, costs: Sequence[Cost]) -> dict[str, Any]:
    """Return what answers cost, in tokens as OpenAI's clients count them, and in what the model did."""
    whole = total_cost(costs)
    n_latents, seconds = whole.thought_tokens, sum(whole.seconds.values())
    ours = {"passes": whole.passes, "positions": whole.positions, "thought_positions": n_latents, "loops": whole.loops}
    return {
        "prompt_tokens": n_read,
        "completion_tokens": whole.written,
        "total_tokens": n_read + whole.written,
        "completion_tokens_details": {"reasoning_tokens": n_latents},
        "innerloop": {**ours, "flops": whole.flops, "seconds": seconds},
    }


def reasoning(tokenizer: Any, trace: Trace, is_labelled: bool = True) -> str:
    """Return what latents show in words, a line for each iteration, labelled as what it is."""
    lines = []
    for entry in trace.iterations:
        words = [cell.top[0][0] for cell in cells_of(tokenizer, entry)]
        lines.append(f"loop {entry.loop}: {' '.join(words)}\n")
    return (LABEL if is_labelled else "") + "".join(lines) if lines else ""


def errors_of(generations: Iterable[Generation]) -> str | None:
    """Return why an answer could not be given, if one could not."""
    return next((one.error for one in generations if one.error is not None), None)


def _offsets(words: Sequence[str]) -> list[int]:
    found, at = [], 0
    for word in words:
        found.append(at)
        at += len(word)
    return found

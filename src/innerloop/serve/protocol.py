"""What clients may ask: the fields of OpenAI's completions and chat completions that have a meaning here, and ours.

What would change an answer and cannot be done is refused, never left out in silence.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from innerloop.errors import InputError

MOST_CHARACTERS = 1_000_000
Temperature = Annotated[float, Field(ge=0, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
One = Annotated[float, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
Question = Annotated[str, Field(max_length=MOST_CHARACTERS)]


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None


class StopRule(BaseModel):
    """Settings of the rule that ends a loop; see docs/serve.md."""

    model_config = ConfigDict(extra="allow")
    rule: str


class Asked(BaseModel, ABC):
    """What both kinds of requests have in common; ``loops``, ``stop_rule`` and ``trace`` are ours."""

    model_config = ConfigDict(extra="forbid")
    model: str
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_p: One | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    loops: Annotated[int, Field(ge=0, le=10_000)] | None = None
    stop_rule: StopRule | None = None
    trace: bool | None = None

    @property
    @abstractmethod
    def questions(self) -> list[str]:
        """What is asked."""

    @property
    def most_tokens(self) -> int | None:
        """How many tokens may be written; None: as many as the server lets."""
        return self.max_tokens

    @property
    @abstractmethod
    def n_alternatives(self) -> int | None:
        """How many alternatives to each token are told beside its log-probability; None: not that either."""

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def tells_usage(self) -> bool:
        """Whether the last event of a stream says what the answer cost."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self, most: int) -> dict[str, Any]:
        """Return the options of the engine, in which no more than ``most`` tokens may be written."""
        if (asked := self.most_tokens) is not None and asked > most:
            raise InputError(f"{asked} tokens are asked for, but this server writes at most {most}: ask for fewer")
        warm = self.temperature or 0.0
        seed = self.seed if self.seed is not None else secrets.randbelow(2**32) if warm > 0 else 0
        found: dict[str, Any] = {"max_new_tokens": asked or most, "temperature": warm, "seed": seed}
        if self.n is not None:
            found["samples"] = self.n
        if self.n_alternatives is not None:
            found |= {"likelihoods": True, "alternatives": self.n_alternatives}
        if self.loops is not None:
            found["loops"] = self.loops
        if self.stop_rule is not None:
            found["stop"] = self.stop_rule.model_dump()
        if self.trace:
            found["trace"] = True
        return found


class CompletionAsked(Asked):
    """A request for completions of texts."""

    prompt: Question | Annotated[list[Question], Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def questions(self) -> list[str]:
        """What is asked."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def n_alternatives(self) -> int | None:
        """How many alternatives to each token are told."""
        return self.logprobs


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Question


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(extra="ignore")
    role: str
    content: Question | list[Part]


class ChatAsked(Asked):
    """A request for answers to a question."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """How many tokens may be written."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def questions(self) -> list[str]:
        """What is asked: the one message of a user."""
        if [message.role for message in self.messages] != ["user"]:
            raise InputError("this model answers questions, each by itself: send one message, of the role user")
        content = self.messages[0].content
        return [content if isinstance(content, str) else "".join(part.text for part in content)]

    @property
    def n_alternatives(self) -> int | None:
        """How many alternatives to each token are told."""
        if self.top_logprobs and not self.logprobs:
            raise InputError("top_logprobs come with logprobs: set logprobs to true")
        return (self.top_logprobs or 0) if self.logprobs else None

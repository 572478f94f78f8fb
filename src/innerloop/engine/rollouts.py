"""Rollouts: samples of a model's answers, kept so that it can go through them again and learn from them.

    policy = WritingPolicy(model, temperature=1.0)
    rollouts = policy.roll_out(["3 ; + 4"], samples=8, seed=0, max_new_tokens=32)    # the question is read once
    batch = policy.batch(rollouts)
    log_probs_U = policy.replay(model, batch)      # with a gradient, in one pass; those of the rollout

What a trainer needs of a policy is `Policy`; how samples are drawn, and what of them must be kept, is its own.

Shapes: `U` actions (written tokens), rollout by rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from innerloop.decoder.token_losses import token_losses
from innerloop.engine.at_work import evaluating
from innerloop.engine.drawing import without
from innerloop.engine.generate import generate
from innerloop.engine.generation import Generation
from innerloop.errors import refuse
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.model.model import LatentCore
from innerloop.passes.hybrid import Fed
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from innerloop.text.row import Kind, Row, Span


@dataclass(frozen=True)
class Rollout:
    """One sample of the answers to a question.

    Attributes:
        question: the place of its question among those that were asked.
        row: what was read before it.
        generation: what was written, with the log-probability of each token in the distribution that it was drawn from.
        before: the log-probabilities of what was drawn before the first token.
        n_loops: how often the latents were refined, where that was drawn, or the passes over a canvas.
    """

    question: int
    row: Row
    generation: Generation
    before: tuple[float, ...] = ()
    n_loops: int | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that were written, the end of sequence among them where it was reached."""
        return tuple(self.generation.ids)

    @property
    def columns(self) -> dict[str, float]:
        """What rewards are told of it besides what was written."""
        return {}

    @property
    def log_probs(self) -> list[float]:
        """The log-probability of each action: of each token, and of what was drawn before them."""
        return [*self.before, *self.generation.log_probs]


class Policy(Protocol):
    """What draws rollouts and knows how likely they are.

    Attributes:
        depends: whether what was fed depends on the weights, so that a rollout serves one update alone.
    """

    depends: bool

    def roll_out(
        self,
        questions: Sequence[str],
        samples: int,
        seed: int,
        max_new_tokens: int,
        places: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Return the samples of each question, one question after the other.

        A draw depends on the seed, the question's place and the sample's alone. ``places`` are those of the questions
        among all that are asked, where these are a part of them.
        """

    def batch(self, rollouts: Sequence[Rollout]) -> Any:
        """Return rollouts as tensors; ``n_targets`` says how many actions each has."""

    def replay(self, model: LatentCore, batch: Any, is_reference: bool = False) -> Tensor:
        """Return the log-probability of each action (U,), with a gradient.

        ``is_reference`` says that the model is a frozen one, from which the policy is not to go far.
        """


class WritingPolicy:
    """Writes answers token by token, with the thought before them, if there is one.

    A gradient flows through the thought. Nothing is dropped out, in rollouts and in replays.

    Args:
        model: what writes.
        temperature: of the distribution that tokens are drawn from; log-probabilities are those in it.
        batch_size: rows that are written together.

    Raises:
        InputError: the model's answers cannot be gone through again in one pass.
    """

    def __init__(self, model: LatentCore, temperature: float = 1.0, batch_size: int = 64):
        check_replay(model)
        self.depends = model.hybrid is not None
        self.model, self.temperature, self.batch_size = model, temperature, batch_size

    def roll_out(
        self,
        questions: Sequence[str],
        samples: int,
        seed: int,
        max_new_tokens: int,
        places: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Return the samples of each question; a draw depends on the seed, the question's place and the sample's alone.

        Args:
            questions: what is asked; a question is read once for all of its samples.
            samples: of each question.
            seed: another draws other samples.
            max_new_tokens: the most tokens of one.
            places: the place of each question among all, where these are a part of them.
        """
        found = generate(
            self.model,
            questions,
            places=places,
            samples=samples,
            temperature=self.temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            replayable=True,
        )
        rows = self.model.prompts(questions)
        return [Rollout(i // samples, rows[i // samples], one) for i, one in enumerate(found)]

    def batch(self, rollouts: Sequence[Rollout]) -> Batch:
        """Return rollouts as one batch, whose supervised tokens are those written."""
        batch = self.model.batch([_written(one.row, one.ids) for one in rollouts])
        if self.depends:
            batch.fed = _fed(batch, rollouts, self.model.backbone.width)
        return batch

    def replay(self, model: LatentCore, batch: Batch, is_reference: bool = False) -> Tensor:
        """Return the log-probability of each written token (U,), with a gradient, from one teacher-forced pass."""
        batch = replace(batch, fed=None) if is_reference else batch
        with evaluating(list(model.modules())):
            return self._written(model, batch, model.think(batch))

    def _written(self, model: LatentCore, batch: Batch, thought: Thought) -> Tensor:
        """Return the log-probability of each written token (U,)."""
        suppressed, show = model.suppressed_ids(), model.writing(batch, thought)
        return -token_losses(
            lambda part: without(show(part), suppressed).float() / self.temperature, batch.targets_U, model.loss_chunk
        )

    @property
    def measured(self) -> dict[str, Tensor]:
        """What a replay has measured: the mean share of latents in what was fed."""
        gate = None if self.model.hybrid is None else self.model.hybrid.gate
        return {} if gate is None or gate.hidden_ratio is None else {"hidden_ratio": gate.hidden_ratio.detach()}


def _fed(batch: Batch, rollouts: Sequence[Rollout], width: int) -> Fed:
    """Return what the rollouts were fed, at the columns of the batch's suffix."""
    columns, _ = batch.columns(2)
    latents_BLD = torch.zeros(len(batch), columns.stop - columns.start, width, device=batch.ids_BS.device)
    is_fed_BL = torch.zeros(latents_BLD.shape[:2], dtype=torch.bool, device=latents_BLD.device)
    for r, one in enumerate(rollouts):
        if (fed := one.generation.fed) is not None:
            first = sum(len(span.ids) for span in one.row.suffix)
            latents_BLD[r, first : first + len(fed)] = fed.to(latents_BLD.dtype)
            is_fed_BL[r, first : first + len(fed)] = True
    return Fed(latents_BLD, is_fed_BL)


def _written(row: Row, ids: tuple[int, ...]) -> Row:
    """Return a prompt with what was written after it, which alone is supervised."""
    prefix = [replace(span, supervised=False) for span in row.prefix]
    return replace(row, prefix=prefix, suffix=[*row.suffix, Span(ids, Kind.ANSWER, supervised=True)])


def check_replay(model: LatentCore) -> None:
    """Refuse a model whose answers cannot be gone through again in one pass with the same log-probabilities."""
    method = model.method
    name = f"'{method.name}' with these settings"
    refuse(
        (isinstance(method, DenoisingMethod), f"'{method.name}' fills canvases: take a policy of canvases"),
        (
            method.decoder.kind != "lm_head",
            f"{name} has a decoder of its own, which draws nothing: set decoder.kind to lm_head",
        ),
        (
            method.hybrid is not None and method.hybrid.stop_after > 0,
            f"'{method.name}' stops thinking by a rule, which is not drawn: set stop_after to 0",
        ),
        (model.block() is not None, f"{name} thinks between words, which cannot be gone through again in one pass"),
        (model.encoder.running_text, "running text has no right answers to learn from: choose a task that has"),
    )

"""A model and the examples that it answers again and again: what controls, swaps and probes have in common.

subject = Subject(model, task, task.examples("test"))
controls(subject).sentence, swaps(subject), probes(subject, task.examples("train"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.loop.hooks import hooked
from innerloop.measure.accuracy import Prediction, answered, evaluate
from innerloop.measure.latents import Key, Record, Recorder, Replacement, donors_of, keys_of, unseen
from innerloop.measure.result_cache import ResultCache
from innerloop.passes.thought import Thought
from innerloop.tasks import Task
from innerloop.text.examples import Example


@dataclass
class Subject:
    """What is measured, and how it is asked.

    Args:
        model: the model.
        task: extracts and checks answers.
        examples: what to answer; the more, the narrower the intervals. Those that cannot be answered are left out.
        known: their answers without an edit, where they are known already.
        max_new_tokens: the most tokens to write; None: as the task says.
        batch_size: rows per batch.
        stage: the curriculum's stage whose layout is used; None: the last.
        seed: of all that is drawn: donors, noise, the bootstrap, shuffled labels.
        planned: told how many answers will be written, or probes fitted.
        progress: called with the number of them since the last call.
        cache: keeps every part of a measurement as soon as it is known; those that it knows are not measured again.
    """

    model: LatentModel
    task: Task
    examples: Sequence[Example]
    known: Sequence[Prediction] | None = None
    max_new_tokens: int | None = None
    batch_size: int = 64
    stage: int | None = None
    seed: int = 0
    planned: Callable[[int], None] = lambda n: None
    progress: Callable[[int], None] = lambda n: None
    cache: ResultCache = field(default_factory=ResultCache)

    @property
    def at(self) -> int:
        """The stage whose layout is used."""
        return self.model.method.last_stage if self.stage is None else self.stage

    @property
    def why_unseen(self) -> str | None:
        """Why the latents can be neither replaced nor probed; None where they can."""
        return unseen(self.model, self.stage)

    @cached_property
    def rows(self) -> tuple[list[Example], list[Prediction]]:
        """The examples that can be answered, and their answers without an edit."""
        known = self._evaluate(self.examples) if self.known is None else self.known
        return answered(self.examples, known)

    @cached_property
    def keys(self) -> list[Key]:
        """The prompts of the examples that can be answered."""
        return keys_of(self.model.prompts([example.question for example in self.rows[0]], self.stage))

    @cached_property
    def donors(self) -> dict[Key, Key]:
        """For each prompt another one that lends its latents."""
        return donors_of(self.keys, self.seed)

    @cached_property
    def recorded(self) -> Record:
        """Everything that the latents of the examples that can be answered are fed."""
        return self.record(self.rows[0])

    @cached_property
    def seen(self) -> Record:
        """What the answer sees of that."""
        return self.recorded.seen(self.model.method, self.at)

    def latents(self) -> tuple[int, float]:
        """Return how many latents the answer sees, and how much they differ between examples; a part."""
        found = self.cache("latents", lambda: {"n": self.seen.n_latents, "spread": self.seen.spread()})
        return found["n"], found["spread"]

    def plan(self, names: Sequence[str]) -> None:
        """Tell how many answers the parts that are not known yet will take."""
        self.planned(len(self.cache.missing(names)) * len(self.rows[0]))

    def answer(
        self,
        edit: Replacement | None = None,
        loops: int | None = None,
        begun: Sequence[Sequence[str]] | None = None,
    ) -> list[Prediction]:
        """Answer the examples by the ordinary engine, with an edit, or going on from what was begun."""
        with nullcontext() if edit is None else hooked(self.model.loop, edit):
            return self._evaluate(self.rows[0], loops=loops, begun=begun, progress=self.progress)

    @torch.no_grad()
    def record(self, examples: Sequence[Example], then: Callable[[Thought], None] = lambda thought: None) -> Record:
        """Record everything that the latents of examples are fed.

        The answers are written only for methods that open blocks of latents while they answer; of others ``then`` is
        told every batch's thought, in order.
        """
        recorder, model, was_training = Recorder(), self.model, self.model.training
        rows = model.prompts([example.question for example in examples], self.stage)
        model.eval()
        with hooked(model.loop, recorder):
            if model.block() is not None:
                self._evaluate(examples)
            else:
                for begin in range(0, len(rows), self.batch_size):
                    then(model.think(model.batch(rows[begin : begin + self.batch_size])))
        model.train(was_training)
        return Record(recorder.blocks, keys_of(rows))

    def _evaluate(self, examples: Sequence[Example], **options: Any) -> list[Prediction]:
        asked = (self.max_new_tokens, self.batch_size, self.stage)
        return evaluate(self.model, self.task, examples, *asked, **options)

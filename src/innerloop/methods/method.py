"""What every method is: a layout, loop settings, a curriculum and losses (design: docs/architecture.md).

A method is a frozen dataclass: its fields are the options of its paper, and its few methods say where states sit in the
sequence and how often they are refined. The weights it trains live in the model's loop (`InnerLoop`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.curriculum import Curriculum
from innerloop.examples import Example
from innerloop.layout import BOT, EOT, LAT, Row, Speller
from innerloop.loop import LoopSettings
from innerloop.losses import LossSettings

Scope = Literal["slots", "append", "all", "last"]
FirstState = Literal["embed", "forward"]
PrefixKV = Literal["base", "per_iter"]
AnswerContext = Literal["refeed", "kv_last"]


@dataclass(frozen=True)
class Method:
    """A way to reason. Subclasses are the recipe's ``method: {name: ...}``."""

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str] = "question, answer"

    @property
    def needs_steps(self) -> bool:
        """Whether training examples must have steps: with a curriculum they must."""
        return self.curriculum.max_stage > 0

    @property
    def curriculum(self) -> Curriculum:
        """The schedule over stages; a method without one has a single stage."""
        return self if isinstance(self, Curriculum) else Curriculum()

    @property
    def loop(self) -> LoopSettings:
        """How states are carried over iterations."""
        return self if isinstance(self, LoopSettings) else LoopSettings()

    @property
    def markers(self) -> tuple[str, ...]:
        """The tokens that must exist in the vocabulary; generation never writes them."""
        return ()

    @abstractmethod
    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out a training example at a stage of the curriculum."""

    @abstractmethod
    def prompt(self, question: str, spell: Speller, stage: int) -> Row:
        """Lay out a question to be answered: the row of `lay_out` up to the first written token."""

    def rows(self, examples: Sequence[Example], spell: Speller, stage: int | None = None, seed: str = "") -> list[Row]:
        """Lay out examples at a stage (None: the last); ``seed`` fixes the draws of stage mixing."""
        scheduled, rows, method = self.curriculum.last_stage if stage is None else stage, [], self.sampled(seed)
        for i, example in enumerate(examples):
            drawn = self.curriculum.stage_of(scheduled, len(example.steps), f"{seed}/{i}")
            rows.append(method.lay_out(example, spell, drawn))
        return rows

    @property
    def losses(self) -> LossSettings:
        """The terms of the loss that look inside the loop."""
        return self if isinstance(self, LossSettings) else LossSettings()

    # Where the inner loop works. A method without latents keeps these.
    @property
    def scope(self) -> Scope:
        """What is refined: all latents (slots), the prompt (all), its end (last), or one latent more (append)."""
        return "slots"

    @property
    def first_state(self) -> FirstState:
        """z_0: the embeddings of the region, or what one more pass makes of them (in append: the state of <bot>)."""
        return "embed"

    @property
    def answer_context(self) -> AnswerContext:
        """What the answer attends to: the final state fed once more, or the cache of the last iteration."""
        return "refeed"

    @property
    def prefix_kv(self) -> PrefixKV:
        """Whether the prefix is read once with the base weights, or in every iteration with that iteration's."""
        return "base"

    @property
    def decode_lora(self) -> bool:
        """Whether the answer is read with the last iteration's weights."""
        return False

    @property
    def n_distinct_slots(self) -> int:
        """How many slots have an embedding of their own."""
        return 0

    def sampled(self, seed: str) -> Method:
        """Return the method as one training batch uses it: with its number of iterations drawn, if it draws one."""
        return self

    def n_loops(self, stage: int) -> int:
        """Return the number of iterations at a stage."""
        return 0

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {"answer": 1.0, "gain": self.loop.spectral_weight, **self.losses.loop_term_weights}


@dataclass(frozen=True)
class LatentMethod(Method):
    """A method that thinks in latents between <bot> and <eot>."""

    family: ClassVar[str] = "thought"

    @property
    def markers(self) -> tuple[str, ...]:
        """<bot> opens the thought, <lat> holds a latent's place, <eot> closes it."""
        return (BOT, LAT, EOT)

    @abstractmethod
    def n_latents(self, stage: int) -> int:
        """Return the number of latent positions at a stage."""

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Return ``[Q][<bot>] | [<lat> x k] | [<eot>][T_s+1]..[T_m][### A][eos]`` (coconut.md, section 2)."""
        curriculum = self.curriculum
        row = self.prompt(example.question, spell, stage)
        if stage < curriculum.last_stage:
            row.suffix += spell.steps(example, first=stage)
        row.suffix.append(spell.answer(example.answer))
        return row

    def prompt(self, question: str, spell: Speller, stage: int) -> Row:
        """Return ``[Q][<bot>] | [<lat> x k] | [<eot>]``."""
        k = self.n_latents(stage)
        region = [spell.marker(LAT, k)] if k else []
        prefix, suffix = [spell.question(question), spell.marker(BOT)], [spell.marker(EOT)]
        return Row(prefix, region, suffix, n_loops=self.n_loops(stage))

"""What every method is: a layout, loop settings, a curriculum and losses (design: docs/architecture.md).

A method is a frozen dataclass: its fields are the options of its paper, and its few methods say where states sit in the
sequence and how often they are refined. The weights it trains live in the model's loop (`InnerLoop`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

from innerloop.config.curriculum import Schedule
from innerloop.config.loop import LoopSettings
from innerloop.config.losses import AuxSettings, DecoderSettings, KdSettings, LossSettings
from innerloop.errors import InputError
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import BOT, EOT, LAT, Block, Piece, Row, ShownBlock

Scope = Literal["slots", "append", "all", "last"]
FirstState = Literal["embed", "forward"]
PrefixKV = Literal["base", "per_iter"]
AnswerContext = Literal["refeed", "kv_last"]


class Labeller(Protocol):
    """A model that can label examples: it lays out rows by its method and tells the logits of what they write."""

    method: Method
    spell: Speller
    tokenizer: Any

    def row_logits(self, rows: Sequence[Row]) -> list[Any]:
        """Return for each row the logits (n_supervised, V) of its written tokens, without dropout."""


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
        return self.curriculum.last_stage > 0

    @property
    def curriculum(self) -> Schedule:
        """The schedule over stages; a method without one has a single stage."""
        return self if isinstance(self, Schedule) else Schedule()

    @property
    def loop(self) -> LoopSettings:
        """How states are carried over iterations."""
        return self if isinstance(self, LoopSettings) else LoopSettings()

    @property
    def markers(self) -> tuple[str, ...]:
        """The tokens that must exist in the vocabulary; generation never writes them."""
        return ()

    @property
    def written_markers(self) -> tuple[str, ...]:
        """The markers that may be written after all."""
        return ()

    @property
    def n_ends(self) -> int:
        """How many end-of-sequence tokens a finished answer has."""
        return 1

    def block(self, spell: Speller) -> Block | None:
        """Return the latents that a written token opens, for methods that think between words."""
        return None

    def shown_blocks(self, row: Row, steps: Sequence[Piece] = ()) -> list[ShownBlock]:
        """Return where the latents of a row show steps, block by block; ``steps`` are the gold ones, where known."""
        return []

    @abstractmethod
    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out a training example at a stage of the curriculum."""

    @abstractmethod
    def prompt(self, question: str, spell: Speller, stage: int) -> Row:
        """Lay out a question to be answered: the row of `lay_out` up to the first written token."""

    def rows(self, examples: Sequence[Example], spell: Speller, stage: int | None = None, seed: str = "") -> list[Row]:
        """Lay out examples at a stage (None: the last); ``seed`` fixes the draws of stage mixing, none: no draws."""
        scheduled, rows, method = self.curriculum.last_stage if stage is None else stage, [], self.sampled(seed)
        for i, example in enumerate(examples):
            drawn = self.stage_of(scheduled, len(example.steps), f"{seed}/{i}") if seed else scheduled
            rows.append(method.lay_out(example, spell, drawn))
        return rows

    @property
    def labeller_source(self) -> str | None:
        """Folder of the run that labels training examples before training begins; it is handed to `prepared`."""
        return None

    @property
    def reference_source(self) -> str | None:
        """Folder of the frozen model that reads every training row along; it is handed to the passes that ask it."""
        return None

    def prepared(self, examples: Sequence[Example], labeller: Labeller | None = None) -> list[Example]:
        """Return training examples with what the method must know of them; called once, before training begins.

        ``labeller`` is the model of `labeller_source`, frozen.
        """
        return list(examples)

    def stage_of(self, stage: int, n_steps: int, seed: str) -> int:
        """Draw the stage one example uses when ``stage`` is scheduled; the same ``seed`` draws the same stage."""
        return self.curriculum.stage_of(stage, n_steps, seed)

    def longest(self, example: Example, spell: Speller) -> int:
        """Return the number of positions of the longest row that training may make of an example."""
        return max(self.n_positions(self.lay_out(example, spell, stage)) for stage in self.stages())

    def n_positions(self, row: Row) -> int:
        """Return the most positions that are read at once: by the model, by its teacher, or to tell a step."""
        return max(row.n_positions, self.auxiliary.n_told_positions(row))

    def stages(self) -> Sequence[int]:
        """Return the stages that training may lay out an example at."""
        plan = self.curriculum
        draws = plan.stage_mix != "none" or plan.uniform_prob > 0
        return range(0 if draws else plan.first_stage, plan.last_stage + 1)

    @property
    def losses(self) -> LossSettings:
        """The terms of the loss that look inside the loop."""
        return self if isinstance(self, LossSettings) else LossSettings()

    @property
    def answering(self) -> DecoderSettings:
        """Who answers: the model itself, unless the method says otherwise."""
        return self if isinstance(self, DecoderSettings) else DecoderSettings()

    @property
    def auxiliary(self) -> AuxSettings:
        """Whether latents must tell their steps to an auxiliary decoder."""
        return self if isinstance(self, AuxSettings) else AuxSettings()

    @property
    def distilling(self) -> KdSettings:
        """What is learned of a teacher's predictions."""
        return self if isinstance(self, KdSettings) else KdSettings()

    @property
    def thinks_along(self) -> bool:
        """Whether the teacher thinks in latents along with the model (`distil.py`)."""
        return False

    def followed(self, n_loops: int, n_taught: int) -> list[int | None]:
        """Return which of a thinking teacher's iterations, 0-based, each of ``n_loops`` follows; None: none."""
        return [None] * n_loops

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
    def learns_every_pass(self) -> bool:
        """Whether what is written is learned from every pass over the latents, not from the last alone."""
        return False

    @property
    def soft_thinking(self) -> tuple[float, float]:
        """How much of a state, and of the words that it shows, is fed back (simcot.md, section 5)."""
        return 1.0, 0.0

    @property
    def n_distinct_slots(self) -> int:
        """How many slots have an embedding of their own."""
        return 0

    @property
    def n_iterations(self) -> int:
        """How many iterations have parts of their own, such as timestep embeddings, in the inner loop."""
        return self.n_loops(self.curriculum.last_stage)

    def sampled(self, seed: str) -> Method:
        """Return the method as one training batch uses it: with its number of iterations drawn, if it draws one."""
        return self

    def n_loops(self, stage: int) -> int:
        """Return the number of iterations at a stage."""
        return 0

    def with_loops(self, loops: int) -> Method:
        """Return the method for answering with another number of iterations than it was trained with."""
        if not any(f.name == "max_loops" for f in fields(self)):
            raise InputError(f"'{self.name}' has no max_loops, so the number of loops cannot be set; leave loops out")
        unused = (
            {"hid_weight": 0.0, "hid_width": 0} if isinstance(self, LossSettings) else {}
        )  # what is only trained may refuse so many
        return replace(self, max_loops=loops, **unused)  # type: ignore[call-arg, arg-type]

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        losses = self.losses
        others = {"aux": self.auxiliary.aux_weight, "gain": self.loop.spectral_weight}
        others["kd"] = self.distilling.kd_weight
        return {"answer": losses.answer_weight, **losses.loop_term_weights, **others}


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

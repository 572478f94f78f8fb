"""What every method is: a layout, settings of the loop, a curriculum and losses (design: docs/architecture.md).

A method is a frozen dataclass: its own fields are the symbols of its paper, and each group of settings that it shares
with others is one field more, with the method's own defaults. What it does not have stands here, at its neutral value;
so whoever reads ``method.loop`` or ``method.hid`` need not ask which methods have it. Its few methods say where states
sit in the sequence and how often they are refined. The weights it trains live in the model's loop (`InnerLoop`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Protocol

from innerloop.checks.settings import Checked, check_fields, kinds_of
from innerloop.checks.values import fitted
from innerloop.config.curriculum import Schedule
from innerloop.config.hybrid import Hybrid
from innerloop.config.loop import FixedPointSettings, LoopSettings
from innerloop.config.losses import (
    AuxSettings,
    DecoderSettings,
    DeepSettings,
    ExitSettings,
    HaltSettings,
    HiddenSettings,
    KdSettings,
)
from innerloop.config.plan import Plan
from innerloop.config.stopping import StopSettings
from innerloop.errors import InputError, nearest
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import BOT, EOT, LAT, Block, Row, ShownBlock, Span


class Labeller(Protocol):
    """A model that can label examples: it lays out rows by its method and tells the logits of what they write."""

    method: Method
    encoder: PromptEncoder
    tokenizer: Any

    def row_logits(self, rows: Sequence[Row]) -> list[Any]:
        """Return for each row the logits (n_supervised, V) of its written tokens, without dropout."""


@dataclass(frozen=True)
class Method(Checked, ABC):
    """A way to reason. Subclasses are the recipe's ``method: {name: ...}``.

    A group may be given as a mapping of what differs from the method's default: ``Slr(loop={"residual": "B"})``.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[str] = "question, answer"
    presets: ClassVar[Mapping[str, Method]] = {}

    loop = LoopSettings()
    fixed_point = FixedPointSettings()
    stop = StopSettings()
    hid = HiddenSettings()
    kd = KdSettings()
    deep = DeepSettings()
    halt = HaltSettings()
    aux = AuxSettings()
    decoder = DecoderSettings()
    exits = ExitSettings()
    curriculum = Schedule()
    answer_weight = 1.0
    step_weight = 0.0
    teacher_weight = 0.0
    teacher_passes = 1
    ponder_weight = 0.0
    streams = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Mapping) and is_dataclass(field.default) and not is_dataclass(value):
                raise InputError(
                    f"{field.name} is a group of settings, such as {type(field.default).__name__}(), or a mapping"
                )
            if isinstance(value, Mapping):
                object.__setattr__(self, field.name, _changed(field.default, value, field.name))
        check_fields(self)
        if self.loop.progressive > 0 and self.n_loops(self.last_stage) < 1:
            raise InputError("loop.progressive goes on with a loop that is not there: set max_loops to at least 1")

    # Data

    @property
    def needs_steps(self) -> bool:
        """Whether training examples must have steps: with a curriculum they must."""
        return self.last_stage > 0

    @property
    def teacher(self) -> str | None:
        """Folder of the run whose states, or predictions, are learned; self: the model's own."""
        return self.hid.teacher

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

    # Layout

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

    @abstractmethod
    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out a training example at a stage of the curriculum."""

    @abstractmethod
    def prompt(self, question: str, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out a question to be answered: the row of `lay_out` up to the first written token."""

    def rows(
        self, examples: Sequence[Example], encoder: PromptEncoder, stage: int | None = None, seed: str = ""
    ) -> list[Row]:
        """Lay out examples at a stage (None: the last); ``seed`` fixes the draws of stage mixing, none: no draws."""
        scheduled, rows, method = self.stage_or_last(stage), [], self.sampled(seed)
        n_free = self.loop.draw_free(seed)
        for i, example in enumerate(examples):
            drawn = self.stage_of(scheduled, len(example.steps), f"{seed}/{i}") if seed else scheduled
            row = method.lay_out(example, encoder, drawn)
            rows.append(row if n_free is None else row.going_on(n_free))
        return rows

    def longest(self, example: Example, encoder: PromptEncoder) -> int:
        """Return the number of positions of the longest row that training may make of an example."""
        return max(self.n_positions(self.lay_out(example, encoder, stage)) for stage in self.stages())

    def n_positions(self, row: Row) -> int:
        """Return the most positions that are read at once: by the model, by its teacher, or to tell a step."""
        return max(row.n_positions, self.aux.n_told_positions(row))

    def block(self, encoder: PromptEncoder) -> Block | None:
        """Return the latents that a written token opens, for methods that think between words."""
        return None

    def shown_blocks(self, row: Row, steps: Sequence[Span] = ()) -> list[ShownBlock]:
        """Return where the latents of a row show steps, block by block; ``steps`` are the gold ones, where known."""
        return []

    # Curriculum

    @property
    def last_stage(self) -> int:
        """The stage that training ends in and questions are answered in."""
        return self.curriculum.last_stage

    def stage_or_last(self, stage: int | None) -> int:
        """Return a stage that is asked for, None: the last.

        Raises:
            InputError: there is no such stage.
        """
        if stage is None:
            return self.last_stage
        if stage not in range(self.last_stage + 1):
            raise InputError(f"stage is {stage}, but the stages of '{self.name}' run from 0 to {self.last_stage}")
        return stage

    def stage_at(self, step: int, steps_per_epoch: int) -> int:
        """Return the scheduled stage at an optimizer step (counted from 0)."""
        return self.curriculum.stage_at(step, steps_per_epoch, self.last_stage)

    def stage_of(self, stage: int, n_steps: int, seed: str) -> int:
        """Draw the stage one example uses when ``stage`` is scheduled; the same ``seed`` draws the same stage."""
        return self.curriculum.stage_of(stage, n_steps, seed, self.last_stage)

    def stages(self) -> Sequence[int]:
        """Return the stages that training may lay out an example at."""
        return range(0 if self.curriculum.draws else self.curriculum.first_stage, self.last_stage + 1)

    # The loop

    @property
    def plan(self) -> Plan:
        """Where the inner loop works and what the answer sees."""
        return Plan(is_normed=self.loop.site == "post_norm", detach=self.loop.detach)

    @property
    def n_iterations(self) -> int:
        """How many iterations have parts of their own, such as timestep embeddings, in the inner loop."""
        return self.n_loops(self.last_stage)

    @property
    def n_distinct_slots(self) -> int:
        """How many slots have an embedding of their own."""
        return 0

    @property
    def soft_thinking(self) -> tuple[float, float]:
        """How much of a state, and of the words that it shows, is fed back (simcot.md, section 5)."""
        return 1.0, 0.0

    @property
    def hybrid(self) -> Hybrid | None:
        """What is fed beside or instead of written tokens; None: nothing."""
        return None

    def sampled(self, seed: str) -> Method:
        """Return the method as one training batch uses it: with its number of iterations drawn, if it draws one."""
        return self

    def n_loops(self, stage: int) -> int:
        """Return the number of iterations at a stage."""
        return 0

    @property
    def takes_loops(self) -> bool:
        """Whether questions can be answered with another number of iterations than was trained."""
        return any(f.name == "max_loops" for f in fields(self))

    def with_loops(self, loops: int) -> Method:
        """Return the method for answering with another number of iterations than it was trained with."""
        if not self.takes_loops:
            raise InputError(f"'{self.name}' has no max_loops, so the number of loops cannot be set; leave loops out")
        return replace(self, max_loops=loops)  # type: ignore[call-arg]

    # Loss

    @property
    def learns_every_pass(self) -> bool:
        """Whether what is written is learned from every pass over the latents, not from the last alone."""
        return False

    @property
    def has_latent_teacher(self) -> bool:
        """Whether the teacher thinks in latents along with the model (`distillation.py`)."""
        return False

    def followed(self, n_loops: int, n_taught: int) -> list[int | None]:
        """Return which of a thinking teacher's iterations, 0-based, each of ``n_loops`` follows; None: none."""
        return [None] * n_loops

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {
            "answer": self.answer_weight,
            "step": self.step_weight,
            "hid": self.hid.weight,
            "teacher": self.teacher_weight,
            "deep": self.deep.weight,
            "halt": self.halt.weight,
            "ponder": self.ponder_weight,
            "aux": self.aux.weight,
            "gain": self.fixed_point.spectral_weight,
            "kd": self.kd.weight,
            "exits": self.exits.weight,
            "gate": float(self.exits.gate != "none"),
        }


def _changed(default: Any, changes: Mapping[str, Any], name: str) -> Any:
    """Return a group with some of its fields changed; one of them may be a group itself."""
    known, made = [field.name for field in fields(default)], dict(changes)
    for key, value in changes.items():
        if key not in known:
            raise InputError(f"{name} has no field '{key}'{nearest(str(key), known)}")
        if isinstance(value, Mapping) and is_dataclass(inner := getattr(default, key)):
            made[key] = _changed(inner, value, f"{name}.{key}")
        else:
            fitted(f"{name}.{key}", value, kinds_of(default.__class__)[key])
    return replace(default, **made)


class WritingMethod(Method):
    """A method that writes all steps, then the answer: ``[Q][T_1]..[T_m][### A][eos]``."""

    family: ClassVar[str] = "text"

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q] | | [T_1]..[T_m][### A][eos]``."""
        row = self.prompt(example.question, encoder, stage)
        row.suffix += [*encoder.steps(example), encoder.answer(example.answer)]
        return row

    def prompt(self, question: str, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q]``."""
        return Row([encoder.question(question)])


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

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Return ``[Q][<bot>] | [<lat> x k] | [<eot>][T_s+1]..[T_m][### A][eos]`` (coconut.md, section 2)."""
        row = self.prompt(example.question, encoder, stage)
        if stage < self.last_stage:
            row.suffix += encoder.steps(example, first=stage)
        row.suffix.append(encoder.answer(example.answer))
        return row

    def prompt(self, question: str, encoder: PromptEncoder, stage: int) -> Row:
        """Return ``[Q][<bot>] | [<lat> x k] | [<eot>]``."""
        k = self.n_latents(stage)
        region = [encoder.marker(LAT, k)] if k else []
        prefix, suffix = [encoder.question(question), encoder.marker(BOT)], [encoder.marker(EOT)]
        return Row(prefix, region, suffix, n_loops=self.n_loops(stage))

"""Pause tokens (arXiv 2310.02226): extra positions without content, and nothing else; the zero-iteration control."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.checks.values import SomePlaces
from innerloop.config.curriculum import Schedule, StageUnit
from innerloop.config.method import LatentMethod
from innerloop.errors import InputError
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import BOT, EOT, LAT, Row


@dataclass(frozen=True)
class PauseSchedule(Schedule):
    """Stages of "pause as thought"."""

    first_stage: int = 0
    length: int = 3
    unit: StageUnit = "epoch"
    max_stage: int = 0


@dataclass(frozen=True)
class Pause(LatentMethod):
    """``[Q][<pause> x M][### A][eos]``: one embedding M times; a single pass reads all of it (pause.md).

    With a curriculum (``curriculum.max_stage > 0``) this is Coconut's "pause as thought": at stage s the first s steps
    give way to s * per_stage pauses.

    Args:
        n_pauses: M, the number of pauses in the last stage.
        n_pauses_inference: the number of pauses when answering, if it is to differ.
        with_markers: put <bot> before the pauses and <eot> after them; without, the last pause predicts.
        keep_steps: write the steps after the pauses instead of dropping them (StdPT_PauseFT with CoT).
        placement: pauses after the question (append) or before it (prepend).
        per_stage: pauses that replace one step during a curriculum.
    """

    name: ClassVar[str] = "pause"
    paper: ClassVar[str] = "arXiv 2310.02226"
    summary: ClassVar[str] = "M content-free positions before the answer; the control without iterations"

    n_pauses: SomePlaces = 6
    n_pauses_inference: SomePlaces | None = None
    with_markers: bool = True
    keep_steps: bool = False
    placement: Literal["append", "prepend"] = "append"
    per_stage: SomePlaces = 1
    curriculum: PauseSchedule = PauseSchedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.curriculum.check(self.last_stage)
        if self.last_stage and (self.keep_steps or self.placement == "prepend"):
            raise InputError("a curriculum (curriculum.max_stage > 0) replaces steps by pauses after the question: "
                             "set keep_steps to false and placement to append")  # fmt: skip

    @property
    def needs_steps(self) -> bool:
        """Where steps are kept, or leave one by one."""
        return self.keep_steps or self.last_stage > 0

    @property
    def markers(self) -> tuple[str, ...]:
        """<lat> is the pause token."""
        return (BOT, LAT, EOT) if self.with_markers else (LAT,)

    def n_latents(self, stage: int) -> int:
        """Return M, or s * per_stage on the way there."""
        return self.n_pauses if stage == self.last_stage else min(stage * self.per_stage, self.n_pauses)

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Return ``[Q]([<bot>]) | [<pause> x M] | ([<eot>])([T_s+1]..)[### A][eos]``."""
        row = self._row(example.question, encoder, self.n_latents(stage))
        if self.keep_steps or stage < self.last_stage:
            row.suffix += encoder.steps(example, first=0 if self.keep_steps else stage)
        row.suffix.append(encoder.answer(example.answer))
        return row

    def prompt(self, question: str, encoder: PromptEncoder, stage: int) -> Row:
        """Return the row up to the first written token."""
        override = self.n_pauses_inference if stage == self.last_stage else None
        return self._row(question, encoder, self.n_latents(stage) if override is None else override)

    def _row(self, question: str, encoder: PromptEncoder, n_pauses: int) -> Row:
        asked, pauses = encoder.question(question), [encoder.marker(LAT, n_pauses)] if n_pauses else []
        bot, eot = ([encoder.marker(BOT)], [encoder.marker(EOT)]) if self.with_markers else ([], [])
        if self.placement == "prepend":
            return Row([*bot, *pauses, *eot, asked])
        return Row([asked, *bot], pauses, eot)

"""LOTUS (arXiv 2606.31779): K blocks of c latents looped in parallel, each shown by the model's own head to be a step.

h^(0) = f(E | C);  h^(t) = f(E + h^(t-1) | C), t = 1..R. In the library's loop this is residual `sum`: iteration t takes
z_{t-1} = E + h^(t-2) to u_t = h^(t-1), and the last pass, h^(R), is read together with <eot> (lotus.md, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from innerloop.checks.values import Loops, Places, Weight
from innerloop.config.curriculum import ResetOptimizer, Schedule, StageMix, StageUnit
from innerloop.config.loop import LoopSettings, ResidualKind
from innerloop.config.losses import AuxSettings, Distance, HiddenLayers, HiddenSettings
from innerloop.config.method import LatentMethod
from innerloop.config.stopping import CommonStop
from innerloop.errors import refuse
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, AuxTarget, HiddenTarget, Row, ShownBlock, Span, TokenTarget


@dataclass(frozen=True)
class LotusLoop(LoopSettings):
    """A pass reads the latents' embeddings plus what the pass before made (residual sum), or that alone (none)."""

    residual: ResidualKind = "sum"
    scale: float = 1.0
    shift: bool = False
    progressive: float = 0.0
    free_loops: tuple[Loops, Loops] = (1, 12)


@dataclass(frozen=True)
class LotusStates(HiddenSettings):
    """At the first token that is written, states of every layer are pulled to a chain-of-thought run's, undivided."""

    weight: float = 0.0
    teacher: str | None = None

    distance: ClassVar[Distance] = "smooth_l1_raw"  # type: ignore[misc]

    layers: ClassVar[HiddenLayers] = "all+emb"  # type: ignore[misc]


@dataclass(frozen=True)
class LotusDecoder(AuxSettings):
    """LOTUS-aux: block i must tell step i to an auxiliary decoder; with step_weight 0 this replaces the own head."""

    weight: float = 0.0
    layers: int = 0
    question: bool = False

    norm: ClassVar[Literal["per_row", "token_mean"]] = "token_mean"  # type: ignore[misc]


@dataclass(frozen=True)
class LotusSchedule(Schedule):
    """Stage e has K_e = e blocks."""

    first_stage: int = 0
    length: int = 1
    unit: StageUnit = "epoch"
    mix: StageMix = "none"

    reset_optimizer: ClassVar[ResetOptimizer] = "never"  # type: ignore[misc]


@dataclass(frozen=True)
class Lotus(LatentMethod):
    """``[Q][<bot>] | [<lat> x K_e c] | [<eot>][T_{K_e+1}]..[T_m][### A][eos]``; stage e has K_e = e blocks.

    Steps beyond K stay in the text, and are written when answering.

    Args:
        n_blocks: K.
        latents_per_block: c; block i must show the first c tokens of step i.
        loops_per_block: r; stage e loops R_e = r K_e times.
        max_loops: R of the last stage; None: r K.
        last_pass: the answer sees the pass whose input is E + h^(R-1) (kv), or one more, E + h^(R) (refeed).
        readout_offset: token j of a step is read at latent j of its block (0), or one position before (-1), as in the
            authors' code.
        overflow: steps longer than c are cut (truncate), or run on into the blocks after (spill, as in the authors'
            code: the mean counts all tokens of the steps, also those that find no latent).
        supervision: read all blocks after the last pass (post), or block t alone after iteration t (per_iter, R = K);
            post_all is post but for the auxiliary decoder, which tells all steps from all latents at once.
        step_weight: lambda_step; blocks must show their steps through the model's own head.
        answer_weight: of the written tokens.
    """

    name: ClassVar[str] = "lotus"
    paper: ClassVar[str] = "arXiv 2606.31779"
    summary: ClassVar[str] = "blocks of latents looped in parallel; block i shows step i through the head"
    needs: ClassVar[str] = "question, steps, answer"

    n_blocks: Places = 6
    latents_per_block: Places = 25
    loops_per_block: Loops = 1
    max_loops: Loops | None = None
    last_pass: Literal["kv", "refeed"] = "kv"
    readout_offset: Literal[-1, 0] = -1
    overflow: Literal["truncate", "spill"] = "truncate"
    supervision: Literal["post", "per_iter", "post_all"] = "post"
    step_weight: Weight = 0.05
    answer_weight: Weight = 1.0
    loop: LotusLoop = LotusLoop()
    stop: CommonStop = CommonStop()
    hid: LotusStates = LotusStates()
    aux: LotusDecoder = LotusDecoder()
    curriculum: LotusSchedule = LotusSchedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.curriculum.check(self.last_stage)
        refuse(
            (
                self.loop.residual not in ("none", "sum"),
                "lotus adds what a pass made to the embeddings, or takes it alone: set loop.residual to sum or none",
            ),
            (
                self.supervision == "per_iter" and (self.loops_per_block != 1 or self.max_loops is not None),
                "supervision=per_iter shows block t after iteration t: set loops_per_block to 1, leave max_loops out",
            ),
            (
                self.hid.weight > 0 and self.teacher in (None, "self"),
                "hid.weight needs states to follow: set hid.teacher to the folder of a chain-of-thought run",
            ),
        )

    @property
    def needs_steps(self) -> bool:
        """Blocks show steps, and steps leave the text block by block."""
        shows = self.step_weight > 0 or self.aux.weight > 0
        return shows or self.hid.weight > 0 or self.curriculum.first_stage < self.last_stage

    @property
    def last_stage(self) -> int:
        """The stage with all K blocks."""
        return self.n_blocks

    def n_latents(self, stage: int) -> int:
        """Return K_e c."""
        return min(stage, self.n_blocks) * self.latents_per_block

    def n_injections(self, stage: int) -> int:
        """Return R_e, how often a pass takes in what the pass before it made."""
        if stage == 0:
            return 0
        rounds = self.loops_per_block * min(stage, self.n_blocks)
        if self.max_loops is None:
            return rounds
        return self.max_loops if stage >= self.n_blocks else min(rounds, self.max_loops)

    def n_loops(self, stage: int) -> int:
        """Return R_e, and one more if the last output is fed once more."""
        return self.n_injections(stage) + (self.last_pass == "refeed" and stage > 0)

    def with_loops(self, loops: int) -> "Lotus":
        """Return the method for answering with R = ``loops``; how it was supervised no longer matters."""
        return replace(self, max_loops=loops, supervision="post", loop=replace(self.loop, progressive=0.0))

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out; the steps of the K_e blocks are shown by latents, those after them are written."""
        row, steps = self.prompt(example.question, encoder, stage), encoder.steps(example)
        row.suffix += [*steps[stage:], encoder.answer(example.answer)]
        if self.step_weight > 0:
            self._show(row, steps[:stage], self.n_latents(stage))
        if self.aux.weight > 0:
            row.aux_targets = self._told(row, steps[:stage], self.n_latents(stage))
        if self.hid.weight > 0:
            row.teacher = Row([encoder.question(example.question)], [], [*steps, encoder.answer(example.answer)])
            here, there = row.region_start + self.n_latents(stage), row.teacher.region_start
            gone = sum(len(step.ids) for step in steps[:stage])
            row.hidden_targets = [HiddenTarget(ANSWER_PASS, here + 1, there + gone)]  # + 1: <eot>
        return row

    def _show(self, row: Row, steps: Sequence[Span], n: int) -> None:
        """Say which tokens of the steps that have left the text must be shown where by n latents."""
        c = self.latents_per_block
        every = [
            (block, q + self.readout_offset, token)
            for block, step in enumerate(steps)
            for q, token in enumerate(step.ids[:c] if self.overflow == "truncate" else step.ids, block * c)
        ]
        row.token_targets = [
            TokenTarget(self._pass_of(block, row.n_loops), row.region_start + at, token)
            for block, at, token in every
            if at < n
        ]
        row.n_unread = len(every) - len(row.token_targets)

    def _told(self, row: Row, steps: Sequence[Span], n: int) -> list[AuxTarget]:
        """Return what the auxiliary decoder must tell of the steps that have left the text."""
        if self.supervision == "post_all":
            text = tuple(token for step in steps for token in step.ids)
            return [AuxTarget(0, self._pass_of(0, row.n_loops), 0, n, text)] if text else []
        c = self.latents_per_block
        return [
            AuxTarget(0, self._pass_of(block, row.n_loops), block * c, c, step.ids) for block, step in enumerate(steps)
        ]

    def shown_blocks(self, row: Row, steps: Sequence[Span] = ()) -> list[ShownBlock]:
        """Return where block i shows step i, of which c tokens at most."""
        c = self.latents_per_block
        n_blocks = sum(len(span.ids) for span in row.region) // c
        gold = [step.ids[:c] for step in steps[:n_blocks]] + [()] * (n_blocks - len(steps))
        passes = [self._pass_of(block, row.n_loops) for block in range(n_blocks)]
        return [ShownBlock(passes[block], block * c + self.readout_offset, c, gold[block]) for block in range(n_blocks)]

    def _pass_of(self, block: int, n_loops: int) -> int:
        """Return the pass whose output shows a 0-based block: that of h^(R), or of h^(block + 1)."""
        injections = n_loops - (self.last_pass == "refeed")
        t = block + 1 if self.supervision == "per_iter" else injections
        return ANSWER_PASS if t + 1 > n_loops else t + 1

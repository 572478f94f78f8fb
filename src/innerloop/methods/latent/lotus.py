"""LOTUS (arXiv 2606.31779): K blocks of c latents looped in parallel, each shown by the model's own head to be a step.

h^(0) = f(E | C);  h^(t) = f(E + h^(t-1) | C), t = 1..R. In the library's loop this is residual `sum`: iteration t takes
z_{t-1} = E + h^(t-2) to u_t = h^(t-1), and the last pass, h^(R), is read together with <eot> (lotus.md, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Literal

from innerloop.config.curriculum import Schedule
from innerloop.config.loop import LoopSettings
from innerloop.config.losses import AuxSettings, LossSettings
from innerloop.config.method import LatentMethod
from innerloop.errors import refuse
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, Follow, Piece, Readout, Row, ShownBlock, Told


@dataclass(frozen=True)
class Lotus(LoopSettings, LossSettings, AuxSettings, Schedule, LatentMethod):
    """``[Q][<bot>] | [<lat> x K_e c] | [<eot>][T_{K_e+1}]..[T_m][### A][eos]``; stage e has K_e = e blocks.

    Steps beyond K stay in the text, and are written when answering.

    Args:
        n_blocks: K.
        latents_per_block: c; block i must show the first c tokens of step i.
        loops_per_block: r; stage e loops R_e = r K_e times.
        max_loops: R of the last stage; None: r K.
        inject: a pass reads the latents' embeddings plus what the pass before made (add), or that alone (replace).
        last_pass: the answer sees the pass whose input is E + h^(R-1) (kv), or one more, E + h^(R) (refeed).
        readout_offset: token j of a step is read at latent j of its block (0), or one position before (-1), as in the
            authors' code.
        overflow: steps longer than c are cut (truncate), or run on into the blocks after (spill).
        aux_weight: LOTUS-aux: block i must tell step i to an auxiliary decoder; with step_weight 0 this replaces the
            model's own head.
        supervision: read all blocks after the last pass (post), or block t alone after iteration t (per_iter, R = K).
    """

    name: ClassVar[str] = "lotus"
    paper: ClassVar[str] = "arXiv 2606.31779"
    summary: ClassVar[str] = "blocks of latents looped in parallel; block i shows step i through the head"
    needs: ClassVar[str] = "question, steps, answer"

    step_weight: float = 0.05
    hid_layers: Literal["last", "all", "all+emb"] = "all+emb"
    aux_norm: Literal["per_row", "token_mean"] = "token_mean"
    n_blocks: int = 6
    latents_per_block: int = 25
    loops_per_block: int = 1
    max_loops: int | None = None
    inject: Literal["add", "replace"] = "add"
    last_pass: Literal["kv", "refeed"] = "kv"
    readout_offset: Literal[-1, 0] = -1
    overflow: Literal["truncate", "spill"] = "truncate"
    supervision: Literal["post", "per_iter"] = "post"
    stage_length: int = 1
    reset_optimizer: Literal["stage", "epoch", "never"] = "never"

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        LossSettings.__post_init__(self)
        AuxSettings.__post_init__(self)
        Schedule.__post_init__(self)
        refuse(
            (
                min(self.n_blocks, self.latents_per_block) < 1 or self.loops_per_block < 0,
                "lotus needs n_blocks >= 1, latents_per_block >= 1 and loops_per_block >= 0",
            ),
            (self.max_loops is not None and self.max_loops < 0, "max_loops cannot be negative"),
            (
                self.inject == "replace" and self.residual != "none",
                "inject=replace takes the output alone: leave residual out",
            ),
            (
                self.supervision == "per_iter" and (self.loops_per_block != 1 or self.max_loops is not None),
                "supervision=per_iter shows block t after iteration t: set loops_per_block to 1, leave max_loops out",
            ),
            (
                self.deep_weight > 0 or self.halt_weight > 0,
                "deep_weight and halt_weight decode every iteration's state, which lotus does not: set them to 0",
            ),
            (
                self.solver != "none" and self.supervision == "per_iter" and self.step_weight + self.aux_weight > 0,
                "a solver finds one state: set supervision to post",
            ),
        )

    @cached_property
    def loop(self) -> LoopSettings:
        """What the authors call addition is the residual `sum`, unless another is asked for."""
        settings = LoopSettings(**{f.name: getattr(self, f.name) for f in fields(LoopSettings)})
        is_plain = self.inject == "add" and self.residual == "none"
        return replace(settings, residual="sum") if is_plain else settings

    @property
    def needs_steps(self) -> bool:
        """Blocks show steps, and steps leave the text block by block."""
        shows = self.step_weight > 0 or self.aux_weight > 0
        return shows or self._has_teacher or self.first_stage < self.last_stage

    @property
    def _has_teacher(self) -> bool:
        return self.hid_weight > 0 or self.teacher_weight > 0

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
        return replace(self, max_loops=loops, supervision="post")

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out; the steps of the K_e blocks are shown by latents, those after them are written."""
        row, steps = self.prompt(example.question, spell, stage), spell.steps(example)
        row.suffix += [*steps[stage:], spell.answer(example.answer)]
        c, n = self.latents_per_block, self.n_latents(stage)
        if self.step_weight > 0:
            row.readouts = [
                Readout(self._pass_of(block, row.n_loops), row.region_start + q + self.readout_offset, token)
                for block, step in enumerate(steps[:stage])
                for q, token in enumerate(step.ids[:c] if self.overflow == "truncate" else step.ids, block * c)
                if q < n
            ]
        if self.aux_weight > 0:
            row.told = [
                Told(0, self._pass_of(block, row.n_loops), block * c, c, step.ids)
                for block, step in enumerate(steps[:stage])
            ]
        if self._has_teacher:
            row.teacher = Row([spell.question(example.question)], [], [*steps, spell.answer(example.answer)])
        if self.hid_weight > 0 and row.teacher is not None:
            n_before = spell.n_before_answer(example.answer)
            row.follows = [
                Follow(ANSWER_PASS, row.answer_boundary(n_before), row.teacher.answer_boundary(n_before)),
            ]
        return row

    def shown_blocks(self, row: Row, steps: Sequence[Piece] = ()) -> list[ShownBlock]:
        """Return where block i shows step i, of which c tokens at most."""
        c = self.latents_per_block
        n_blocks = sum(len(piece.ids) for piece in row.region) // c
        gold = [step.ids[:c] for step in steps[:n_blocks]] + [()] * (n_blocks - len(steps))
        passes = [self._pass_of(block, row.n_loops) for block in range(n_blocks)]
        return [ShownBlock(passes[block], block * c + self.readout_offset, c, gold[block]) for block in range(n_blocks)]

    def _pass_of(self, block: int, n_loops: int) -> int:
        """Return the pass whose output shows a 0-based block: that of h^(R), or of h^(block + 1)."""
        injections = n_loops - (self.last_pass == "refeed")
        t = injections if self.supervision == "post" else block + 1
        is_solved = self.solver != "none"  # a fixed point: every later pass shows the same
        return ANSWER_PASS if is_solved or t + 1 > n_loops else t + 1

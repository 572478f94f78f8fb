"""SpiralThinker (arXiv 2511.08983): blocks of iterated latents between steps of text, aligned with an explicit teacher.

    [Q] [<bol>][<lat> x N][<eol>] [<bot>] T_2 [<eot>] [<bol>][<lat> x N][<eol>] [<bot>] T_4 [<eot>] ... [### A][eos]

After every pass the states at the latents go through an adapter and become the latents' inputs, K times. At every pass
the states at <eol> are pulled to those that the teacher, which writes all steps, has at the end of the step that the
block stands for; later passes count more (spiralthinker.md, sections 3 and 4). Pattern `none` is that teacher.

Of our own are the patterns `random` and `labelled`, in which every step is text or a block by itself, whichever it was
drawn or labelled to be, and the model learns to write the marker that begins it: when answering it chooses, step by
step. Labels say which steps a model of pattern `random` can do without text (`step_labels.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from innerloop.checks.values import Loops, Places, Weight
from innerloop.config.curriculum import uniforms
from innerloop.config.loop import LoopSettings, RescaleKind, ResidualKind, Site
from innerloop.config.losses import Distance, HiddenLayers, HiddenSettings
from innerloop.config.method import Labeller, Method
from innerloop.config.stopping import CommonStop
from innerloop.errors import refuse
from innerloop.methods.latent.step_labels import check_labels, label_steps, latent_mask
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, BOL, BOT, EOL, EOT, LAT, Block, HiddenTarget, Kind, Row, Span

ALL_LATENT = -1  # as a number whose bits tell of steps


@dataclass(frozen=True)
class SpiralLoop(LoopSettings):
    """States at the latents become their inputs through an adapter."""

    residual: ResidualKind = "none"
    rescale: RescaleKind = "adapter"
    width: int = 0
    gain: bool = False
    site: Site = "post_norm"
    bptt: int | None = None
    progressive: float = 0.0
    free_loops: tuple[Loops, Loops] = (1, 12)


@dataclass(frozen=True)
class SpiralStates(HiddenSettings):
    """Alignment: states at <eol> are pulled to those that a run of pattern none has at the ends of its steps."""

    weight: float = 0.0
    layers: HiddenLayers = "all"
    distance: Distance = "l1"
    teacher: str | None = None


@dataclass(frozen=True)
class SpiralThinker(Method):
    """Latent blocks in place of every other step of text.

    Args:
        pattern: which steps (1, 2, ..) become blocks: odd, even, either for each example anew (random_parity), all, or
            none: the explicit teacher of stage 1; each step by a coin (random), or those that are labelled so.
        labeller: pattern=labelled: folder of a run of pattern random, whose model labels the training examples; None:
            they bring their labels, a list of true (latent) and false for each, as ``latent`` in their meta.
        latents_per_block: N.
        max_loops: K, the number of updates of a block.
        count_static_pass: K counts the pass over the latents' own embeddings too.
        block_schedule: all blocks are refined together, in passes over everything from the first to the last
            (parallel), or one after the other, as when answering (sequential).
        align_schedule: weight of pass k in the alignment: softmax(alpha k), uniform, or the last alone.
        align_alpha: alpha.
        align_static_pass: pass 0 is aligned too, as the one that counts least ("alignment without iteration" at K = 0).
        ce_passes: text is learned in the last pass, or in all of them, a mean over passes 0..K.
        m0: examples without steps: one block, not aligned, or no block.
        supervise_first_bol: learn to write the first <bol>, which is given when answering.
        force_block_after_text: when answering, a step of text is followed by a block unless the answer begins.
        max_blocks: when answering, the most blocks.
    """

    name: ClassVar[str] = "spiralthinker"
    family: ClassVar[str] = "thought"
    paper: ClassVar[str] = "arXiv 2511.08983"
    summary: ClassVar[str] = "iterated latent blocks between steps of text, aligned with an explicit teacher"
    needs: ClassVar[str] = "question, steps, answer; a teacher of pattern none"

    pattern: Literal["odd", "even", "random_parity", "all", "none", "random", "labelled"] = "odd"
    labeller: str | None = None
    latents_per_block: Places = 5
    max_loops: Loops = 5
    count_static_pass: bool = False
    block_schedule: Literal["parallel", "sequential"] = "parallel"
    align_schedule: Literal["softmax", "uniform", "last"] = "softmax"
    align_alpha: Weight = 1.0
    align_static_pass: bool = False
    ce_passes: Literal["last", "all"] = "last"
    m0: Literal["one_block_no_align", "no_block"] = "one_block_no_align"
    supervise_first_bol: bool = False
    force_block_after_text: bool = False
    max_blocks: Places = 8
    loop: SpiralLoop = SpiralLoop()
    stop: CommonStop = CommonStop()
    hid: SpiralStates = SpiralStates()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.count_static_pass and self.max_loops < 1,
                "count_static_pass counts pass 0: set max_loops to at least 1",
            ),
            (
                self.pattern == "none" and self.hid.weight > 0,
                "pattern=none is the teacher, which follows nobody: set hid.weight to 0",
            ),
            (
                self.hid.weight > 0 and self.teacher in (None, "self"),
                "hid.weight needs states to follow: set hid.teacher to the folder of a run of pattern none",
            ),
            (
                self.hid.weight > 0 and self.n_updates == 0 and not self.align_static_pass,
                "without updates there is only pass 0 to align: set align_static_pass, or hid.weight to 0",
            ),
            (
                self.loop.residual not in ("none", "sum"),
                "a block's states become its inputs, alone or added to embeddings: set loop.residual to none or sum",
            ),
            (
                self.labeller is not None and self.pattern != "labelled",
                "labeller tells which steps are latent: set pattern to labelled, or leave it out",
            ),
        )

    @property
    def needs_steps(self) -> bool:
        """Some are written, and the others aligned."""
        return True

    @property
    def markers(self) -> tuple[str, ...]:
        """<bot> T <eot> is a step of text, <bol> <lat>.. <eol> a block."""
        return (BOT, EOT) if self.pattern == "none" else (BOT, EOT, BOL, EOL, LAT)

    @property
    def written_markers(self) -> tuple[str, ...]:
        """What may be written."""
        return (BOT, EOT) if self.pattern == "none" else (BOT, EOT, BOL)

    @property
    def begins_with_block(self) -> bool:
        """Whether the first block is given with the question, rather than opened by what is written."""
        return self.pattern in ("odd", "random_parity", "all")

    @property
    def is_free(self) -> bool:
        """Whether each step is text or a block by itself; a stage is then a number whose bit i tells of step i."""
        return self.pattern in ("random", "labelled")

    @property
    def n_updates(self) -> int:
        """The number of times a block is written anew."""
        return self.max_loops - self.count_static_pass

    @property
    def learns_every_pass(self) -> bool:
        """Whether text is learned in all passes."""
        return self.ce_passes == "all"

    def n_loops(self, stage: int) -> int:
        """Return the number of updates."""
        return 0 if self.pattern == "none" else self.n_updates

    def with_loops(self, loops: int) -> "SpiralThinker":
        """Return the method for answering with K = ``loops``; what its blocks followed no longer matters."""
        hid, loop = replace(self.hid, weight=0.0), replace(self.loop, progressive=0.0)
        return replace(self, max_loops=loops, hid=hid, loop=loop)

    def stage_of(self, stage: int, n_steps: int, seed: str) -> int:
        """Draw the parity of one example: 0 odd, 1 even; of pattern random, which steps are latent."""
        if self.pattern == "random":
            return int(uniforms(seed)[0] * 2**n_steps)
        return int(uniforms(seed)[0] < 0.5) if self.pattern == "random_parity" else stage

    def stages(self) -> Sequence[int]:
        """Return both parities, if either may be drawn; where steps are free, all in text and all latent."""
        if self.is_free:
            return (0, ALL_LATENT)
        return (0, 1) if self.pattern == "random_parity" else (0,)

    def longest(self, example: Example, encoder: PromptEncoder) -> int:
        """Return the length of the longest row: a step that is free is whichever is longer."""
        if not self.is_free:
            return super().longest(example, encoder)
        latent = (len(step.ids) < self.latents_per_block for step in encoder.steps(example))
        mask = sum(1 << i for i, is_latent in enumerate(latent) if is_latent)
        return self.n_positions(self.lay_out(replace(example, meta={}), encoder, mask))

    @property
    def labeller_source(self) -> str | None:
        """A run of pattern random says which steps may be latent."""
        return self.labeller

    def prepared(self, examples: Sequence[Example], labeller: Labeller | None = None) -> list[Example]:
        """Return the examples with their labels."""
        if labeller is not None:
            return label_steps(labeller, examples)
        return check_labels(examples) if self.pattern == "labelled" else list(examples)

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out; the region goes from the first latent to the last <eol>, with the text between as it is."""
        steps = encoder.steps(example)
        if self.pattern == "labelled":
            stage = latent_mask(example, stage)
        head = row = Row([encoder.question(example.question)])
        if self.hid.weight > 0:
            head.teacher = self._teacher(example, encoder)
        for i, step in enumerate(steps):
            if self._is_latent(i, stage):
                row = self._add_block(row, encoder)
                if head.teacher is not None:
                    row.hidden_targets += self._follows(row, head.teacher, i)
            else:
                row.suffix += self._text(step, encoder)
        if not steps and self.m0 == "one_block_no_align" and self.pattern != "none":
            row = self._add_block(row, encoder)
        row.suffix.append(encoder.answer(example.answer))
        return head

    def prompt(self, question: str, encoder: PromptEncoder, stage: int) -> Row:
        """Return ``[Q]``, with the first block where the pattern begins with one."""
        row = Row([encoder.question(question)])
        return self._add_block(row, encoder) if self.begins_with_block else row

    def block(self, encoder: PromptEncoder) -> Block | None:
        """What happens when <bol> is written."""
        if self.pattern == "none":
            return None
        forced = encoder.answer("") if self.force_block_after_text else None
        return Block(
            opened_by=encoder.marker(BOL).ids[0],
            region=encoder.marker(LAT, self.latents_per_block),
            closing=encoder.marker(EOL),
            n_loops=self.n_updates,
            most=self.max_blocks,
            forced_after=encoder.marker(EOT).ids[0] if forced else None,
            unless=forced.ids[0] if forced else None,
        )

    def _is_latent(self, index: int, stage: int) -> bool:
        match self.pattern:
            case "all":
                return True
            case "none":
                return False
            case "random_parity":
                return index % 2 == stage
            case "random" | "labelled":
                return bool(stage >> index & 1)
        return index % 2 == (self.pattern == "even")

    def _add_block(self, row: Row, encoder: PromptEncoder) -> Row:
        """Append a block and return the row that it is in.

        In parallel, what was written since the last block becomes part of the region; sequentially, a block that is not
        the first begins a next row. A first block directly after the question is opened in the prefix.
        """
        is_first = not row.region and not row.suffix
        is_given = is_first and self.begins_with_block
        begin = Span(encoder.marker(BOL).ids, Kind.MARKER, supervised=not is_given or self.supervise_first_bol)
        if is_first:
            row.prefix.append(begin)
        elif self.block_schedule == "sequential":
            row.suffix.append(begin)
            row.next = Row([])
            row = row.next
        else:
            row.region += [*row.suffix, begin]
            row.suffix = []
        row.region += [encoder.marker(LAT, self.latents_per_block), encoder.marker(EOL)]
        row.n_loops = self.n_updates
        return row

    def _text(self, step: Span, encoder: PromptEncoder) -> list[Span]:
        """Return ``[<bot>] T [<eot>]``, all of it to be written."""
        begin, end = (Span(encoder.marker(text).ids, Kind.MARKER, supervised=True) for text in (BOT, EOT))
        return [begin, step, end]

    def _teacher(self, example: Example, encoder: PromptEncoder) -> Row:
        written = [span for step in encoder.steps(example) for span in self._text(step, encoder)]
        return Row([encoder.question(example.question)], [], [*written, encoder.answer(example.answer)])

    def _follows(self, row: Row, teacher: Row, step: int) -> list[HiddenTarget]:
        """Return how the <eol> that a row has just got follows the teacher's <eot>, pass by pass."""
        at, there = len(row) - 1, teacher.step_ends()[step] + 1
        first = 0 if self.align_static_pass else 1
        weights = pass_weights(self.n_updates, first, self.align_schedule, self.align_alpha)
        return [
            HiddenTarget(ANSWER_PASS if k == self.n_updates else k + 1, at, there, weight)
            for k, weight in enumerate(weights, first)
            if weight > 0
        ]


def pass_weights(n_updates: int, first: int, schedule: str, alpha: float) -> list[float]:
    """Return v_k for k = first..K, which sum to one."""
    passes = range(first, n_updates + 1)
    if schedule == "last":
        return [float(k == n_updates) for k in passes]
    raw = [math.exp(alpha * (k - n_updates)) if schedule == "softmax" else 1.0 for k in passes]
    return [value / sum(raw) for value in raw]

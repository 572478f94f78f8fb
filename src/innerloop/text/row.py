"""From examples to token rows: markers, latent slots, labels, padding and positions (cot.md, section 0).

A row has three parts: the *prefix* is read once, the inner loop refines the *region* (the latent span), the
*suffix* is written.

    [Q][<bot>] | [<lat> x N] | [<eot>][T_s+1]..[T_m][### A][eos]

`PromptEncoder` makes the spans, `Batch` holds rows as tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

IGNORE = -100
BOT, LAT, EOT = "<bot>", "<lat>", "<eot>"
BOL, EOL = "<bol>", "<eol>"
MASK = "<|mask|>"
ANSWER_PASS = 0
"""The number of the pass that reads what the loop left pending, and the suffix; iterations count from 1."""
FED = -1
"""In place of a pass: what was fed as the latents' inputs."""


class Kind(StrEnum):
    """What a position holds."""

    QUESTION = "question"
    MARKER = "marker"
    LATENT = "latent"
    STEP = "step"
    ANSWER = "answer"


@dataclass(frozen=True)
class Span:
    """Some consecutive positions of one kind. ``step`` is the 0-based reasoning step they spell, or -1."""

    ids: tuple[int, ...]
    kind: Kind
    supervised: bool = False
    step: int = -1


@dataclass(frozen=True)
class TokenTarget:
    """In pass ``iteration`` the state at the row's position ``at`` must show ``token`` through the head."""

    iteration: int
    at: int
    token: int


@dataclass(frozen=True)
class HiddenTarget:
    """In a pass the state at the row's position ``at`` (None: the mean of the latents) follows the teacher's.

    ``teacher_at`` is a position of the teacher's row.
    """

    iteration: int
    at: int | None
    teacher_at: int
    weight: float = 1.0


@dataclass(frozen=True)
class AuxTarget:
    """From ``n_latents`` latents of a pass (or FED), beginning with the 0-based ``first``, ``ids`` must be told.

    ``group`` numbers the groups of a row, over which the loss is averaged; one that tells nothing counts, too.
    """

    group: int
    iteration: int
    first: int
    n_latents: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Noise:
    """Which tokens of a row are hidden behind masks, and what each counts in the loss: they alone are learned.

    Attributes:
        hidden: their positions, rising.
        weights: what the loss of each counts.
        mask_id: what is read in their place.
        shift: the position before a token predicts it, as in a decoder; otherwise its own.
        n_counted: what the row adds to the number that the loss of the global batch is divided by.
        blocks: the block of each position, where it sees its own and those before alone; none: it sees all.
        fillers: what is read in place of each hidden token, where that is not the mask.
        ahead: the chance that a later position is seen, and the seed of that draw; None: all are.
        soft: a first pass predicts the hidden tokens, and what is learned is of a second, whose masks are fed that.
    """

    hidden: tuple[int, ...]
    weights: tuple[float, ...]
    mask_id: int
    shift: bool
    n_counted: float
    blocks: tuple[int, ...] = ()
    fillers: tuple[int, ...] = ()
    ahead: tuple[float, str] | None = None
    soft: bool = False


@dataclass(frozen=True)
class ShownBlock:
    """The step that some latents show: in pass ``iteration`` at ``n`` positions, the first of them ``first``.

    Positions count from the region's first. ``gold`` are the step's tokens, as far as they are known.
    """

    iteration: int
    first: int
    n: int
    gold: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """What happens when a row writes a certain token while it answers: latents are read after it and refined.

    Attributes:
        opened_by: the token.
        region: the latents.
        closing: what is read after them.
        n_loops: how often they are refined.
        most: the most blocks of an answer, the one of its prompt included; then the token is not written any more.
        forced_after: after this token the next is ``opened_by``, unless it would be ``unless``.
    """

    opened_by: int
    region: Span
    closing: Span
    n_loops: int
    most: int
    forced_after: int | None = None
    unless: int | None = None

    @property
    def n_read(self) -> int:
        """The positions that are read for it, besides the token that opens it."""
        return len(self.region.ids) + len(self.closing.ids)


@dataclass
class Row:
    """One example laid out.

    The region is refined ``n_loops`` times; text between its latents is read in every pass as it is.
    The position ids of the suffix go on ``skipped`` further.
    A row may go on with a ``next`` segment, which is read after it: without a prefix, its own region refined by itself.
    ``n_unread`` tokens of steps are shown nowhere for lack of latents, and still counted in the mean over shown ones.
    ``teacher`` is the row that a teacher reads, whose states ``hidden_targets`` speak of. ``answer_class`` is the class
    that a classifier must answer. ``n_free`` iterations run first, without a gradient; None: none, and all targets are
    learned. ``noise`` hides tokens of a row that is denoised.
    """

    prefix: list[Span]
    region: list[Span] = field(default_factory=list)
    suffix: list[Span] = field(default_factory=list)
    n_loops: int = 0
    depth: int | None = None
    skipped: int = 0
    token_targets: list[TokenTarget] = field(default_factory=list)
    n_unread: int = 0
    teacher: Row | None = None
    hidden_targets: list[HiddenTarget] = field(default_factory=list)
    aux_targets: list[AuxTarget] = field(default_factory=list)
    answer_class: int = -1
    noise: Noise | None = None
    next: Row | None = None
    n_free: int | None = None

    def going_on(self, n_free: int) -> Row:
        """Return the row with so many free iterations before its own, and nothing to learn but what is written."""
        return replace(
            self,
            n_loops=self.n_loops + n_free if self.n_loops else 0,
            token_targets=[],
            teacher=None,
            hidden_targets=[],
            aux_targets=[],
            next=None if self.next is None else self.next.going_on(n_free),
            n_free=n_free,
        )

    @property
    def spans(self) -> list[Span]:
        """All spans from left to right."""
        return [*self.prefix, *self.region, *self.suffix]

    @property
    def region_start(self) -> int:
        """The position at which the region begins."""
        return sum(len(span.ids) for span in self.prefix)

    def step_ends(self) -> list[int]:
        """Return the position of the last token of each step."""
        ends, position = [], 0
        for span in self.spans:
            position += len(span.ids)
            if span.kind is Kind.STEP:
                ends.append(position - 1)
        return ends

    def answer_boundary(self, n_before: int) -> int:
        """Return the last position before the answer's own tokens, given how many of its span come before them."""
        return len(self) - len(self.spans[-1].ids) + n_before - 1

    def fixed(self) -> list[bool]:
        """Tell of each position of the region whether it is text between latents."""
        has_latents = any(span.kind is Kind.LATENT for span in self.region)
        return [has_latents and span.kind is not Kind.LATENT for span in self.region for _ in span.ids]

    def ids(self) -> list[int]:
        """All token ids."""
        return [i for span in self.spans for i in span.ids]

    def labels(self) -> list[int]:
        """The unshifted labels, IGNORE where nothing is supervised: nothing predicts the first token of a question."""
        labels = [i if span.supervised else IGNORE for span in self.spans for i in span.ids]
        return [IGNORE, *labels[1:]] if labels and self.spans[0].kind is Kind.QUESTION else labels

    def __len__(self) -> int:
        return sum(len(span.ids) for span in self.spans)

    @property
    def n_positions(self) -> int:
        """The most positions that are read at once, by the model or its teacher."""
        return max(sum(map(len, self.segments())) + self.skipped, 0 if self.teacher is None else len(self.teacher))

    def segments(self) -> Iterator[Row]:
        """Return this row and those it goes on with."""
        yield self
        if self.next is not None:
            yield from self.next.segments()

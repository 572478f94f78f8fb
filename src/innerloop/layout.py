"""From examples to token rows: markers, latent slots, labels, padding and positions (cot.md, section 0).

A row is three segments: the *prefix* is read once, the inner loop refines the *region*, the *suffix* is
written.

    [Q][<bot>] | [<lat> x N] | [<eot>][T_s+1]..[T_m][### A][eos]

In a batch the prefix is padded on the left and the other two on the right, so that the region has the same columns in
every row. Labels are unshifted: "token x is supervised" means that the real position before it predicts x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from innerloop.errors import InputError
from innerloop.examples import Example

IGNORE = -100
BOT, LAT, EOT = "<bot>", "<lat>", "<eot>"
ANSWER_PREFIX = "### "


class Kind(StrEnum):
    """What a position holds."""

    QUESTION = "question"
    MARKER = "marker"
    LATENT = "latent"
    STEP = "step"
    ANSWER = "answer"


@dataclass(frozen=True)
class Piece:
    """Some consecutive positions of one kind. ``step`` is the 0-based reasoning step they spell, or -1."""

    ids: tuple[int, ...]
    kind: Kind
    supervised: bool = False
    step: int = -1


@dataclass
class Row:
    """One example laid out.

    ``readouts[t][j]`` is the token that region position ``j`` must show through the head after loop ``t + 1``, or
    IGNORE. ``n_loops`` is how often the region is refined. ``teacher`` is the row a teacher reads, whose state at the
    end of step ``teacher_steps[t]`` is the target of loop ``t + 1``.
    """

    prefix: list[Piece]
    region: list[Piece] = field(default_factory=list)
    suffix: list[Piece] = field(default_factory=list)
    readouts: list[list[int]] = field(default_factory=list)
    n_loops: int = 0
    teacher: Row | None = None
    teacher_steps: list[int | None] = field(default_factory=list)

    @property
    def pieces(self) -> list[Piece]:
        """All pieces from left to right."""
        return [*self.prefix, *self.region, *self.suffix]

    def ids(self) -> list[int]:
        """All token ids."""
        return [i for piece in self.pieces for i in piece.ids]

    def labels(self) -> list[int]:
        """The unshifted labels, IGNORE where nothing is supervised."""
        return [i if piece.supervised else IGNORE for piece in self.pieces for i in piece.ids]

    def __len__(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)


class Speller:
    """Spells the parts of an example in a tokenizer's ids.

    Strings are remembered, because every example is laid out anew at every epoch and stage.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._memory: dict[tuple[str, bool], tuple[int, ...]] = {}
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token before using it")
        self.eos_id: int = tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """What fills padded columns; any id serves, because masks are built from lengths, never from ids."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def marker(self, text: str, n: int = 1) -> Piece:
        """Return ``n`` copies of a marker as one piece: latent slots for <lat>, else a marker."""
        marker_id = self.tokenizer.convert_tokens_to_ids(text)
        return Piece((marker_id,) * n, Kind.LATENT if text == LAT else Kind.MARKER)

    def question(self, text: str) -> Piece:
        """Spell a question, with the beginning-of-sequence token if the tokenizer adds one."""
        ids = self._ids(text + "\n", special=True)
        return Piece(ids[:-1] if ids and ids[-1] == self.eos_id else ids, Kind.QUESTION)

    def step(self, text: str, index: int) -> Piece:
        """Spell step ``index`` (0-based), ended by a newline."""
        return Piece(self._ids(text + "\n", special=False), Kind.STEP, supervised=True, step=index)

    def steps(self, example: Example, first: int = 0) -> list[Piece]:
        """Spell the steps from index ``first`` on."""
        return [self.step(text, i) for i, text in enumerate(example.steps) if i >= first]

    def answer(self, text: str) -> Piece:
        """Spell the answer: ``### A`` and the end-of-sequence token."""
        ids = self._ids(ANSWER_PREFIX + text, special=False)
        return Piece((*ids, self.eos_id), Kind.ANSWER, supervised=True)

    def _ids(self, text: str, special: bool) -> tuple[int, ...]:
        key = (text, special)
        if key not in self._memory:
            self._memory[key] = tuple(
                self.tokenizer.encode(text, add_special_tokens=special, split_special_tokens=True)
            )
        return self._memory[key]


@dataclass
class Batch:
    """Rows as tensors. ``B`` rows, ``S`` columns, ``U`` supervised tokens, ``T`` loops, ``N`` region columns.

    Attributes:
        ids_BS: token ids.
        mask_BS: 1 where real, 0 where padding.
        bounds: the columns at which the region and the suffix begin.
        predict_at_U: flat index into (B, S) of the position that predicts each supervised token, row by row.
        targets_U: the supervised tokens.
        n_targets: how many of them each row has.
        read_at_R: flat index into (T, B, N) of each supervised read-out of the region.
        read_targets_R: the tokens that must be read there.
        n_loops: how often each row's region is refined.
        teacher: what the teacher reads, or None.
        follow_TB: flat index into the teacher's (B, S) of the state that each loop of each row follows, -1 for none.
        is_padded: whether any row has padding in the prefix, region, suffix.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    bounds: tuple[int, int]
    predict_at_U: Tensor
    targets_U: Tensor
    n_targets: list[int]
    read_at_R: Tensor
    read_targets_R: Tensor
    n_loops: list[int]
    is_padded: tuple[bool, ...]
    teacher: Batch | None = None
    follow_TB: Tensor | None = None

    def __len__(self) -> int:
        return self.ids_BS.shape[0]

    def counts(self) -> dict[str, int]:
        """Return the number of supervised items per loss term; asks the host only."""
        n_followed = 0 if self.follow_TB is None else int((self.follow_TB >= 0).sum())
        return {"answer": len(self.targets_U), "step": len(self.read_targets_R), "hid": n_followed, "rows": len(self)}

    def columns(self, segment: int) -> tuple[slice, Tensor | None]:
        """Return the columns of segment 0 (prefix), 1 (region) or 2 (suffix) and its mask, None when all is real."""
        edges = (0, *self.bounds, self.ids_BS.shape[1])
        columns = slice(edges[segment], edges[segment + 1])
        return columns, self.mask_BS[:, columns] if self.is_padded[segment] else None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        teacher = None if self.teacher is None else self.teacher.to(device)
        return Batch(**{**vars(self), **moved, "teacher": teacher})


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows into one batch: prefixes on the left, regions and suffixes on the right."""
    batch = _pad(rows, pad_id)
    teachers = [row.teacher for row in rows if row.teacher is not None]
    if len(teachers) == len(rows) > 0:
        batch.teacher = _pad(teachers, pad_id)
        batch.follow_TB = torch.full((max(row.n_loops for row in rows), len(rows)), -1, dtype=torch.long)
        for r, (row, teacher) in enumerate(zip(rows, teachers)):
            ends = step_ends(teacher)
            real = torch.nonzero(batch.teacher.mask_BS[r])[:, 0].tolist()
            for t, step in enumerate(row.teacher_steps):
                if step is not None:
                    batch.follow_TB[t, r] = r * batch.teacher.ids_BS.shape[1] + real[ends[step]]
    return batch


def step_ends(row: Row) -> list[int]:
    """Return the position of the last token of each step of a row."""
    ends, position = [], 0
    for piece in row.pieces:
        position += len(piece.ids)
        if piece.kind is Kind.STEP:
            ends.append(position - 1)
    return ends


def _pad(rows: Sequence[Row], pad_id: int) -> Batch:
    segments = [
        [[i for piece in segment for i in piece.ids] for segment in (row.prefix, row.region, row.suffix)]
        for row in rows
    ]
    widths = [max(len(row[s]) for row in segments) for s in range(3)]
    ids, mask, predict_at, targets, n_targets = [], [], [], [], []
    for r, (row, (prefix, region, suffix)) in enumerate(zip(rows, segments)):
        gaps = [w - len(s) for w, s in zip(widths, (prefix, region, suffix))]
        row_mask = (
            [0] * gaps[0] + [1] * len(prefix) + [1] * len(region) + [0] * gaps[1] + [1] * len(suffix) + [0] * gaps[2]
        )
        row_ids = [pad_id] * gaps[0] + prefix + region + [pad_id] * gaps[1] + suffix + [pad_id] * gaps[2]
        real = [column for column, m in enumerate(row_mask) if m]
        supervised = [k for k, label in enumerate(row.labels()) if label != IGNORE]
        if supervised and supervised[0] == 0:
            raise InputError("the first token of a row cannot be supervised: nothing comes before it")
        predict_at += [r * sum(widths) + real[k - 1] for k in supervised]
        targets += [row_ids[real[k]] for k in supervised]
        n_targets.append(len(supervised))
        ids.append(row_ids)
        mask.append(row_mask)
    readouts = [
        ((t * len(rows) + r) * widths[1] + j, token)
        for r, row in enumerate(rows)
        for t, labels in enumerate(row.readouts)
        for j, token in enumerate(labels)
        if token != IGNORE
    ]
    return Batch(
        ids_BS=torch.tensor(ids, dtype=torch.long),
        mask_BS=torch.tensor(mask, dtype=torch.long),
        bounds=(widths[0], widths[0] + widths[1]),
        predict_at_U=torch.tensor(predict_at, dtype=torch.long),
        targets_U=torch.tensor(targets, dtype=torch.long),
        n_targets=n_targets,
        read_at_R=torch.tensor([at for at, _ in readouts], dtype=torch.long),
        read_targets_R=torch.tensor([token for _, token in readouts], dtype=torch.long),
        n_loops=[row.n_loops for row in rows],
        is_padded=(*(any(len(row[s]) < width for row in segments) for s, width in enumerate(widths)),),
    )

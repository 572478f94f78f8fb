"""Rows as one batch of tensors: padded, labelled, with the places where passes must show, follow or tell something.

The prefix is padded on the left, the region and the suffix on the right, so that the region has the same columns in
every row. Labels are unshifted: "token x is supervised" means that the real position before it predicts x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from innerloop.errors import InputError
from innerloop.text.halves import Halves, halves_of
from innerloop.text.row import IGNORE, Row


@dataclass
class Targets:
    """Places in one pass of a batch, and what belongs to each of them.

    Attributes:
        iteration: the pass.
        total: the sum of the weights.
        rows_F: the rows.
        columns_F: the columns of the batch; -1 for the mean of the latents.
        targets_F: a token that must be read there, or a flat index into the teacher's (B, S).
        weights_F: what each counts.
    """

    iteration: int
    total: float
    rows_F: Tensor
    columns_F: Tensor
    targets_F: Tensor
    weights_F: Tensor


@dataclass
class AuxTargets:
    """Groups of latents of one pass, and the steps that must be told from them.

    Attributes:
        iteration: the pass, or FED.
        n_latents: c.
        rows_G: the rows.
        first_G: the first latent of each group, 0-based.
        ids_GL: the tokens, padded on the right.
        targets_GL: the same, IGNORE where padded.
        groups_G: the number of each group within its row, by which the loss is averaged.
    """

    iteration: int
    n_latents: int
    rows_G: Tensor
    first_G: Tensor
    ids_GL: Tensor
    targets_GL: Tensor
    groups_G: Tensor


@dataclass
class Batch:
    """Rows as tensors. ``B`` rows, ``S`` columns, ``U`` supervised tokens, ``N`` region columns.

    Attributes:
        ids_BS: token ids.
        mask_BS: 1 where real, 0 where padding.
        bounds: the columns at which the region and the suffix begin.
        predict_at_U: flat index into (B, S) of the position that predicts each supervised token, row by row.
        targets_U: the supervised tokens.
        n_targets: how many of them each row has.
        first_predicting: the leftmost column that predicts one.
        n_loops: how often each row's region is refined.
        is_padded: whether any row has padding in the prefix, region, suffix.
        skipped_B: how many position ids the suffix jumps over; None when no row jumps.
        fixed_BN: 1 where a position of the region is read as it is in every pass; None when all are latents.
        token_targets: which tokens must be read where, pass by pass.
        n_unread: how many more tokens the mean over these counts, which are read nowhere.
        teacher: what the teacher reads, or None.
        taught: the teacher's states after every layer (n_layers + 1, P, D) where they are known already.
        hidden_targets: which of the teacher's states are followed where, pass by pass.
        followed_P: where the teacher's states are that the rows follow, in any segment and pass, each once.
        aux_targets: which steps must be told from which latents, pass by pass.
        aux_K3: of group 0, 1, .., how many rows have it, in how many it tells something, and how many tokens.
        class_B: the class that a classifier must answer.
        depth: how often a pass iterates inside the tokens.
        n_free: how many iterations run first, without a gradient, before what is written alone is learned; None: none,
            and everything is learned.
        weights_U: what each supervised token counts, where they do not count alike, and ``n_counted``, what their sum
            is divided by.
        halves: of rows that are denoised block by block.
        soft_at_U: flat index into (B, S) of the masks that are fed what a first pass predicts; None: there is one pass.
        ahead: the chance that a later position is seen, and the seed of that draw; None: what the method says is seen.
        fed: what the suffix was fed where that is not the embeddings of its tokens (`innerloop.passes.hybrid.Fed`).
        next: what the rows go on with.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    bounds: tuple[int, int]
    predict_at_U: Tensor
    targets_U: Tensor
    n_targets: list[int]
    first_predicting: int
    n_loops: list[int]
    is_padded: tuple[bool, ...]
    skipped_B: Tensor | None = None
    fixed_BN: Tensor | None = None
    token_targets: list[Targets] = field(default_factory=list)
    n_unread: int = 0
    teacher: Batch | None = None
    taught: Tensor | None = None
    hidden_targets: list[Targets] = field(default_factory=list)
    followed_P: Tensor | None = None
    aux_targets: list[AuxTargets] = field(default_factory=list)
    aux_K3: Tensor | None = None
    class_B: Tensor | None = None
    depth: int | None = None
    n_free: int | None = None
    weights_U: Tensor | None = None
    n_counted: float = 0.0
    halves: Halves | None = None
    soft_at_U: Tensor | None = None
    ahead: tuple[float, str] | None = None
    fed: Any = None
    next: Batch | None = None

    def __len__(self) -> int:
        return self.ids_BS.shape[0]

    def counts(self) -> dict[str, Any]:
        """Return how much each term of the loss counts: supervised items, or the weight of what is followed.

        ``aux_targets``, where something must be told, has a line for each group (see ``aux_K3``); all else are numbers.
        """
        segments = list(self.segments())
        target = [segment.aux_K3 for segment in segments if segment.aux_K3 is not None]
        return {
            "answer": sum(
                len(segment.targets_U) if segment.weights_U is None else segment.n_counted for segment in segments
            ),
            "step": sum(segment.n_shown for segment in segments),
            "hid": sum(sites.total for segment in segments for sites in segment.hidden_targets),
            "teacher": 0 if self.teacher is None else len(self.teacher.targets_U),
            "rows": len(self),
            **({"aux": added(target)} if target else {}),
        }

    @property
    def is_noised(self) -> bool:
        """Whether the pass that reads hidden tokens is another than that of written ones."""
        return self.soft_at_U is not None or self.ahead is not None

    @property
    def n_shown(self) -> int:
        """How many tokens the mean over shown ones is divided by."""
        return sum(len(sites.rows_F) for sites in self.token_targets) + self.n_unread

    def segments(self) -> Iterator[Batch]:
        """Return this batch and those its rows go on with."""
        yield self
        if self.next is not None:
            yield from self.next.segments()

    def columns(self, part: int) -> tuple[slice, Tensor | None]:
        """Return the columns of part 0 (prefix), 1 (region) or 2 (suffix) and its mask, None when all is real."""
        edges = (0, *self.bounds, self.ids_BS.shape[1])
        columns = slice(edges[part], edges[part + 1])
        return columns, self.mask_BS[:, columns] if self.is_padded[part] else None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return _moved(self, device)


def collate(rows: Sequence[Row], pad_id: int, states_of: Callable[[Row], dict[int, Tensor]] | None = None) -> Batch:
    """Pad rows into one batch: prefixes on the left, regions and suffixes on the right; segment by segment.

    ``states_of`` gives the teacher's states at the positions that a row follows; without, the teacher must be run.
    """
    batch = _pad(rows, pad_id)
    if all(row.answer_class >= 0 for row in rows):
        batch.class_B = torch.tensor([row.answer_class for row in rows])
    teachers = [row.teacher for row in rows if row.teacher is not None]
    seen: list[list[int]] | list[dict[int, int]] = []
    if states_of is not None and len(teachers) == len(rows):
        batch.taught, seen = _taught([states_of(row) for row in rows])
    elif len(teachers) == len(rows) > 0:
        batch.teacher = _pad(teachers, pad_id)
        n = batch.teacher.ids_BS.shape[1]
        seen = [[r * n + column for column in columns] for r, columns in enumerate(_real_columns(batch.teacher))]
    segment, chained = batch, list(rows)
    while True:
        _place(segment, chained, seen, pad_id)
        if all(row.next is None for row in chained):
            break
        chained = [Row([]) if row.next is None else row.next for row in chained]
        segment.next = _pad(chained, pad_id)
        segment = segment.next
    followed = {
        at for segment in batch.segments() for sites in segment.hidden_targets for at in sites.targets_F.tolist()
    }
    for segment in batch.segments():
        segment.followed_P = torch.tensor(sorted(followed)) if followed else None
    return batch


def _moved(value: Any, device: torch.device) -> Any:
    """Return a value with all tensors in it on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_moved(one, device) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _moved(one, device) for name, one in vars(value).items()})
    return value


def _taught(found: list[dict[int, Tensor]]) -> tuple[Tensor, list[dict[int, int]]]:
    """Put the states of rows (n_layers + 1, D) behind each other: (n_layers + 1, P, D), and where each position is."""
    places: list[dict[int, int]] = []
    n = 0
    for states in found:
        places.append({at: n + i for i, at in enumerate(states)})
        n += len(states)
    every = [state for states in found for state in states.values()]
    return torch.stack(every, dim=1) if every else torch.empty(0, 0, 0), places


def _place(batch: Batch, rows: Sequence[Row], seen: list[list[int]] | list[dict[int, int]], pad_id: int) -> None:
    """Turn the positions that rows speak of into columns; ``seen`` are the teacher's, flat."""
    real = _real_columns(batch) if any(row.token_targets or row.hidden_targets for row in rows) else []
    batch.token_targets = _sites(
        (entry.iteration, r, real[r][entry.at], entry.token, 1.0)
        for r, row in enumerate(rows)
        for entry in row.token_targets
    )
    batch.aux_targets, batch.aux_K3 = _aux_targets(rows, pad_id)
    batch.hidden_targets = _sites(
        (entry.iteration, r, -1 if entry.at is None else real[r][entry.at], seen[r][entry.teacher_at], entry.weight)
        for r, row in enumerate(rows)
        for entry in (row.hidden_targets if seen else ())
    )


def _real_columns(batch: Batch) -> list[list[int]]:
    """Return the columns of each row that are no padding."""
    return [[column for column, m in enumerate(mask) if m] for mask in batch.mask_BS.tolist()]


def added(counts: Sequence[Tensor]) -> Tensor:
    """Add the counts of groups (K, 3), some of which may know fewer groups than others."""
    n_groups = max(map(len, counts))
    return torch.stack([pad(count, (0, 0, 0, n_groups - len(count))) for count in counts]).sum(0)


def _aux_targets(rows: Sequence[Row], pad_id: int) -> tuple[list[AuxTargets], Tensor | None]:
    """Group what must be told by pass, and count it by group, over all passes."""
    every = [target for row in rows for target in row.aux_targets]
    entries = [(r, target) for r, row in enumerate(rows) for target in row.aux_targets if target.ids]
    if not entries:
        return [], None
    counts = torch.zeros(1 + max(target.group for target in every), 3)
    for target in every:
        counts[target.group] += torch.tensor([1, bool(target.ids), len(target.ids)])
    sites = []
    for iteration, c in sorted({(target.iteration, target.n_latents) for _, target in entries}):
        found = [(r, target) for r, target in entries if (target.iteration, target.n_latents) == (iteration, c)]
        longest = max(len(target.ids) for _, target in found)
        gaps = [longest - len(target.ids) for _, target in found]
        sites.append(
            AuxTargets(
                iteration=iteration,
                n_latents=c,
                rows_G=torch.tensor([r for r, _ in found]),
                first_G=torch.tensor([target.first for _, target in found]),
                ids_GL=torch.tensor([[*target.ids, *[pad_id] * gap] for (_, target), gap in zip(found, gaps)]),
                targets_GL=torch.tensor([[*target.ids, *[IGNORE] * gap] for (_, target), gap in zip(found, gaps)]),
                groups_G=torch.tensor([target.group for _, target in found]),
            )
        )
    return sites, counts


def _sites(entries: Iterable[tuple[int, int, int, int, float]]) -> list[Targets]:
    """Group (pass, row, column, target, weight) by pass."""
    by_pass: dict[int, list[tuple[int, int, int, float]]] = {}
    for iteration, *entry in entries:
        by_pass.setdefault(iteration, []).append(tuple(entry))  # type: ignore[arg-type]
    grouped = []
    for iteration, found in sorted(by_pass.items()):
        rows, columns, targets, weights = (torch.tensor(column) for column in zip(*found, strict=True))
        grouped.append(Targets(iteration, weights.sum().item(), rows, columns, targets, weights))
    return grouped


def _pad(rows: Sequence[Row], pad_id: int) -> Batch:
    parts = [[[i for span in part for i in span.ids] for part in (row.prefix, row.region, row.suffix)] for row in rows]
    widths = [max(len(row[s]) for row in parts) for s in range(3)]
    ids, mask, predict_at, targets, n_targets = [], [], [], [], []
    columns: list[list[int]] = []
    soft_at: list[int] = []
    noises = [row.noise for row in rows if row.noise is not None]
    for r, (row, (prefix, region, suffix)) in enumerate(zip(rows, parts)):
        gaps = [w - len(s) for w, s in zip(widths, (prefix, region, suffix))]
        row_mask = (
            [0] * gaps[0] + [1] * len(prefix) + [1] * len(region) + [0] * gaps[1] + [1] * len(suffix) + [0] * gaps[2]
        )
        row_ids = [pad_id] * gaps[0] + prefix + region + [pad_id] * gaps[1] + suffix + [pad_id] * gaps[2]
        real = [column for column, m in enumerate(row_mask) if m]
        supervised, back = [k for k, label in enumerate(row.labels()) if label != IGNORE], 1
        noise = row.noise
        if noise is not None:
            supervised, back = list(noise.hidden), int(noise.shift)
        if supervised and supervised[0] < back:
            raise InputError("the first token of a row cannot be supervised: nothing comes before it")
        predict_at += [r * sum(widths) + real[k - back] for k in supervised]
        targets += [row_ids[real[k]] for k in supervised]
        if noise is not None:
            for k, filler in zip(supervised, noise.fillers or (noise.mask_id,) * len(supervised), strict=True):
                row_ids[real[k]] = filler
            soft_at += [r * sum(widths) + real[k] for k in supervised if noise.soft]
        n_targets.append(len(supervised))
        columns.append(real)
        ids.append(row_ids)
        mask.append(row_mask)
    fixed = [
        [int(is_fixed) for is_fixed in row.fixed()] + [0] * (widths[1] - len(region))
        for row, (_, region, _) in zip(rows, parts)
    ]
    return Batch(
        ids_BS=torch.tensor(ids, dtype=torch.long),
        mask_BS=torch.tensor(mask, dtype=torch.long),
        bounds=(widths[0], widths[0] + widths[1]),
        predict_at_U=torch.tensor(predict_at, dtype=torch.long),
        targets_U=torch.tensor(targets, dtype=torch.long),
        n_targets=n_targets,
        first_predicting=min((at % max(sum(widths), 1) for at in predict_at), default=sum(widths)),
        n_loops=[row.n_loops for row in rows],
        n_unread=sum(row.n_unread for row in rows),
        skipped_B=torch.tensor([row.skipped for row in rows]) if any(row.skipped for row in rows) else None,
        fixed_BN=torch.tensor(fixed) if any(map(any, fixed)) else None,
        depth=rows[0].depth if rows else None,
        n_free=next((row.n_free for row in rows if row.n_free is not None), None),
        weights_U=torch.tensor([w for noise in noises for w in noise.weights]) if noises else None,
        n_counted=sum(noise.n_counted for noise in noises),
        halves=halves_of(rows, columns, sum(widths), pad_id),
        ahead=noises[0].ahead if noises else None,
        soft_at_U=torch.tensor(soft_at, dtype=torch.long) if any(noise.soft for noise in noises) else None,
        is_padded=(*(any(len(row[s]) < width for row in parts) for s, width in enumerate(widths)),),
    )

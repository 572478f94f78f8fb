"""What a batch knows of places in its rows, against brute force over rows that were drawn at random.

Targets are grouped pass by pass, told steps by latents; segments become batches; text between latents
is fixed.
"""

import dataclasses
import itertools
import random

import pytest
import torch

from innerloop.model.step_decoder import aux_weights
from innerloop.text.batch import collate
from innerloop.text.row import ANSWER_PASS, FED, IGNORE, AuxTarget, HiddenTarget, Kind, Row, Span, TokenTarget

PAD = 0
SEEDS = range(12)


def draw(seed: int, n_links: int = 1, n_rows: int = 5, has_teacher: bool = True) -> list[Row]:
    """Rows with spans of all kinds and lengths, and something to read, follow and tell in each."""
    rng = random.Random(seed)

    def span(kind, supervised=False, n=None):
        ids = tuple(rng.randrange(1, 60) for _ in range(rng.randrange(4) if n is None else n))
        return Span(ids, kind, supervised)

    def segment(is_first):
        prefix = [span(Kind.QUESTION, n=1 + rng.randrange(4)), span(Kind.MARKER)] if is_first else []
        region = [span(Kind.LATENT, n=1), span(Kind.STEP, rng.random() < 0.5), span(Kind.LATENT), span(Kind.MARKER)]
        region = [] if rng.random() < 0.2 else region[: rng.randrange(1, 5)]
        suffix = [span(Kind.MARKER, n=1), span(Kind.STEP, True), span(Kind.ANSWER, is_first or rng.random() < 0.7)]
        row = Row(prefix, region, suffix, n_loops=rng.randrange(4))
        for _ in range(rng.randrange(4) if len(row) else 0):
            row.token_targets.append(
                TokenTarget(rng.choice([ANSWER_PASS, 1, 2, 3]), rng.randrange(len(row)), rng.randrange(60))
            )
        for _ in range(rng.randrange(4) if len(row) and has_teacher else 0):
            at = None if rng.random() < 0.3 else rng.randrange(len(row))
            row.hidden_targets.append(HiddenTarget(rng.choice([ANSWER_PASS, 1, 2]), at, rng.randrange(3), rng.random()))
        row.aux_targets = [
            AuxTarget(k, rng.choice([FED, ANSWER_PASS, 1]), 2 * k, rng.choice([1, 2]), span(Kind.STEP).ids)
            for k in range(rng.randrange(4))
        ]
        return row

    rows = []
    for _ in range(n_rows):
        head = row = segment(True)
        for _ in range(rng.randrange(n_links)):
            row.next = row = segment(False)
        if has_teacher:
            head.teacher = Row([span(Kind.QUESTION, n=2)], [], [span(Kind.ANSWER, True, n=1 + rng.randrange(5))])
        rows.append(head)
    return rows


def segments_of(rows):
    """The rows of each link; where a row has ended None."""
    return list(itertools.zip_longest(*(row.segments() for row in rows)))


def cell(batch, row, at):
    """The column of a row's position, by counting real columns."""
    return [column for column, real in enumerate(batch.mask_BS[row].tolist()) if real][at]


def places(sites):
    """The columns of a pass's sites, row by row."""
    return list(zip(*(of.tolist() for of in (sites.rows_F, sites.columns_F, sites.targets_F, sites.weights_F))))


def flat(sites):
    """Targets as a list that can be compared, in any order."""
    return sorted((one.iteration, *place, round(weight, 5)) for one in sites for *place, weight in places(one))


# Links


@pytest.mark.parametrize("seed", SEEDS)
def test_links_are_batches_behind_each_other(seed):
    rows = draw(seed, n_links=4)
    batch, segments = collate(rows, PAD), segments_of(rows)
    assert len(list(batch.segments())) == len(segments)
    for segment, parts in zip(batch.segments(), segments):
        alone = collate([dataclasses.replace(part, next=None) if part else Row([]) for part in parts], PAD)
        for name in ("ids_BS", "mask_BS", "predict_at_U", "targets_U"):
            assert torch.equal(getattr(segment, name), getattr(alone, name))
        assert (segment.bounds, segment.n_targets, segment.n_loops) == (alone.bounds, alone.n_targets, alone.n_loops)
        assert segment.is_padded == alone.is_padded and segment.first_predicting == alone.first_predicting
        assert all(n == m == 0 for n, m, part in zip(segment.n_loops, segment.n_targets, parts) if part is None)
        own, learned = zip(segment.ids_BS, segment.mask_BS.bool()), segment.targets_U.split(segment.n_targets)
        assert [ids[real].tolist() for ids, real in own] == [part.ids() if part else [] for part in parts]
        labels = [[i for i in part.labels() if i != IGNORE] if part else [] for part in parts]
        assert [targets.tolist() for targets in learned] == labels


def test_an_empty_link_does_not_end_a_row():
    last = Row([], [], [Span((7, 8), Kind.STEP, supervised=False)])
    rows = [Row([Span((1, 2), Kind.QUESTION)], next=Row([], next=last)), Row([Span((3,), Kind.QUESTION)])]
    segments = list(collate(rows, PAD).segments())
    assert [segment.ids_BS.tolist() for segment in segments] == [[[1, 2], [0, 3]], [[], []], [[7, 8], [0, 0]]]
    assert segments[2].mask_BS.tolist() == [[1, 1], [0, 0]]
    with pytest.raises(ValueError, match="nothing comes before it"):  # not even the row before
        collate([Row([Span((1,), Kind.QUESTION)], next=Row([], [], [Span((2,), Kind.STEP, supervised=True)]))], PAD)


# Fixed text


@pytest.mark.parametrize("seed", SEEDS)
def test_text_between_latents_is_pinned(seed):
    rows = draw(seed, n_links=3)
    for segment, parts in zip(collate(rows, PAD).segments(), segments_of(rows)):
        expected = torch.zeros(len(rows), segment.bounds[1] - segment.bounds[0], dtype=torch.long)
        for r, part in enumerate(parts):
            kinds = [span.kind for span in part.region for _ in span.ids] if part else []
            for i, kind in enumerate(kinds):
                expected[r, i] = Kind.LATENT in kinds and kind is not Kind.LATENT
        found = torch.zeros_like(expected) if segment.fixed_BN is None else segment.fixed_BN.long()
        assert torch.equal(found, expected)
        assert (segment.fixed_BN is None) == (expected.sum() == 0)


# Targets


@pytest.mark.parametrize("seed", SEEDS)
def test_read_outs_are_sites_pass_by_pass(seed):
    rows = draw(seed, n_links=3)
    batch = collate(rows, PAD)
    for segment, parts in zip(batch.segments(), segments_of(rows)):
        expected = sorted(
            (entry.iteration, r, cell(segment, r, entry.at), entry.token, 1.0)
            for r, part in enumerate(parts)
            for entry in (part.token_targets if part else ())
        )
        assert flat(segment.token_targets) == expected
        loops = [sites.iteration for sites in segment.token_targets]
        assert loops == sorted(set(loops))
        assert [sites.total for sites in segment.token_targets] == [
            len(sites.rows_F) for sites in segment.token_targets
        ]
    assert batch.counts()["step"] == sum(len(segment.token_targets) for row in rows for segment in row.segments())


@pytest.mark.parametrize("seed", SEEDS)
def test_follows_are_sites_that_point_into_the_teachers_rows(seed):
    rows = draw(seed, n_links=3)
    batch = collate(rows, PAD)
    teacher = batch.teacher
    assert torch.equal(teacher.ids_BS, collate([row.teacher for row in rows], PAD).ids_BS)
    n, total = teacher.ids_BS.shape[1], 0.0
    for segment, parts in zip(batch.segments(), segments_of(rows)):
        expected = []
        for r, part in enumerate(parts):
            for entry in part.hidden_targets if part else ():
                column = -1 if entry.at is None else cell(segment, r, entry.at)
                target = r * n + cell(teacher, r, entry.teacher_at)
                expected.append((entry.iteration, r, column, target, round(entry.weight, 5)))
                total += entry.weight
        assert flat(segment.hidden_targets) == sorted(expected)
    assert batch.counts()["hid"] == pytest.approx(total, rel=1e-6)
    assert batch.counts()["teacher"] == len(teacher.targets_U)


@pytest.mark.parametrize("seed", SEEDS)
def test_states_that_are_known_already_take_the_teachers_place(seed):
    """Every site points at the state that a look-up gives for its row and position."""
    rows = draw(seed, n_links=3)

    def states_of(row):
        at = sorted({entry.teacher_at for segment in row.segments() for entry in segment.hidden_targets})
        return {i: torch.full((2, 3), 100.0 * rows.index(row) + i) for i in at}

    batch = collate(rows, PAD, states_of)
    assert batch.teacher is None
    for segment, parts in zip(batch.segments(), segments_of(rows)):
        expected = sorted(
            (entry.iteration, r, 100.0 * r + entry.teacher_at)
            for r, part in enumerate(parts)
            for entry in (part.hidden_targets if part else ())
        )
        found = [
            (sites.iteration, row, batch.taught[1, target, 2].item())
            for sites in segment.hidden_targets
            for row, target in zip(sites.rows_F.tolist(), sites.targets_F.tolist())
        ]
        assert sorted(found) == expected


def test_without_teachers_nothing_is_followed():
    rows = draw(3)
    rows[1].teacher = None
    batch = collate(rows, PAD)
    assert batch.teacher is None and all(segment.hidden_targets == [] for segment in batch.segments())
    assert batch.counts()["hid"] == 0


# Auxiliary targets


@pytest.mark.parametrize("seed", SEEDS)
def test_what_must_be_told_is_grouped_by_pass(seed):
    rows = draw(seed, n_links=2)
    for segment, parts in zip(collate(rows, PAD).segments(), segments_of(rows)):
        entries = [(r, told) for r, part in enumerate(parts) for told in (part.aux_targets if part else ()) if told.ids]
        found = []
        for sites in segment.aux_targets:
            assert sites.ids_GL.shape == sites.targets_GL.shape and (sites.targets_GL >= 0).any(0).all()
            for g, (r, first) in enumerate(zip(sites.rows_G.tolist(), sites.first_G.tolist())):
                targets = sites.targets_GL[g].tolist()
                ids = [i for i in targets if i != IGNORE]
                assert targets == ids + [IGNORE] * (len(targets) - len(ids))
                assert sites.ids_GL[g].tolist() == ids + [PAD] * (len(targets) - len(ids))
                found.append((sites.iteration, sites.n_latents, r, first, tuple(ids)))
        assert sorted(found) == sorted((t.iteration, t.n_latents, r, t.first, t.ids) for r, t in entries)
        keys = [(sites.iteration, sites.n_latents) for sites in segment.aux_targets]
        assert keys == sorted(set(keys))


@pytest.mark.parametrize("seed", SEEDS)
def test_told_groups_are_weighted_over_all_passes(seed):
    """per_row: a mean over groups of means over rows of sums; per_token: of means over tokens.

    A group that tells nothing in any row counts, too.
    """
    rows = draw(seed)
    batch = collate(rows, PAD)
    entries = [told for row in rows for told in row.aux_targets if told.ids]
    groups = {told.group for row in rows for told in row.aux_targets}
    total = 0.0
    for sites in batch.aux_targets:
        per_row_G = aux_weights(sites.groups_G, batch.aux_K3, "per_row")
        per_token_G = aux_weights(sites.groups_G, batch.aux_K3, "token_mean")
        total += per_row_G.sum().item()
        for g, (row, first) in enumerate(zip(sites.rows_G.tolist(), sites.first_G.tolist())):
            (told,) = [t for t in rows[row].aux_targets if t.ids and t.first == first]
            mine = [t for t in entries if t.group == told.group]
            assert per_row_G[g].item() == pytest.approx(1 / len(groups) / len(mine))
            assert per_token_G[g].item() == pytest.approx(1 / len(groups) / sum(len(t.ids) for t in mine))
    if entries:
        share = len({told.group for told in entries}) / len(groups)
        assert total == pytest.approx(share)


# Moving


def test_moving_a_batch_moves_all_of_it():
    """Tensors of every part; on the meta device they can be told from those that stayed."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            for part in vars(value).values():
                yield from tensors(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from tensors(part)

    for states_of in (None, lambda row: {i: torch.zeros(2, 3) for i in range(3)}):
        batch = collate(draw(5, n_links=3), PAD, states_of)
        moved = batch.to(torch.device("meta"))
        assert len(list(tensors(moved))) == len(list(tensors(batch))) > 30
        assert all(tensor.device.type == "meta" for tensor in tensors(moved))
        assert len(list(moved.segments())) == len(list(batch.segments()))
        left, right = ({k: n for k, n in one.counts().items() if k != "aux"} for one in (moved, batch))
        assert left == right

"""Rows spelled out by hand, and what becomes of them in a batch (cot.md, section 0)."""

import pytest
import torch

from innerloop import Coconut, Cot, NoCot, Pause, Slr
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError
from innerloop.text.batch import collate
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import IGNORE, Kind, Piece, Readout, Row
from tests.methods.tools import labels_by_loop
from tests.models import SPELLED, chain_examples, spelled_tokenizer, tiny_model

PAD = 0
X = IGNORE
EXAMPLE = Example("q r", ("s1", "s2 s2", "s3"), "a")


def ids(words: str) -> list[int]:
    """Return the ids of words; ``|`` stands for a newline."""
    return [SPELLED.index(word.replace("|", "\n")) for word in words.split()]


def speller(*arguments, **special) -> Speller:
    return Speller(spelled_tokenizer(*arguments, pad_token="<pad>", **special))


def laid_out(method, stage: int | None = None, example: Example = EXAMPLE) -> Row:
    return method.lay_out(example, speller(), method.curriculum.last_stage if stage is None else stage)


def segments(row: Row) -> list[list[int]]:
    return [[i for piece in segment for i in piece.ids] for segment in (row.prefix, row.region, row.suffix)]


# Rows by hand: method, stage, prefix, region, suffix; what stands after " : " in the suffix is supervised.

ROWS = [
    (NoCot(), 0, "q r |", "", ": ### a <eos>"),
    (Cot(), 0, "q r |", "", ": s1 | s2 s2 | s3 | ### a <eos>"),
    (Cot(with_markers=True), 0, "q r |", "", "<bot> <eot> : s1 | s2 s2 | s3 | ### a <eos>"),
    (Pause(n_pauses=2), 0, "q r | <bot>", "<lat> <lat>", "<eot> : ### a <eos>"),
    (Pause(n_pauses=2, with_markers=False), 0, "q r |", "<lat> <lat>", ": ### a <eos>"),
    (Pause(n_pauses=0, with_markers=False), 0, "q r |", "", ": ### a <eos>"),
    (Pause(n_pauses=2, placement="prepend"), 0, "<bot> <lat> <lat> <eot> q r |", "", ": ### a <eos>"),
    (Pause(n_pauses=2, keep_steps=True), 0, "q r | <bot>", "<lat> <lat>", "<eot> : s1 | s2 s2 | s3 | ### a <eos>"),
    (Pause(n_pauses=3, max_stage=3), 2, "q r | <bot>", "<lat> <lat>", "<eot> : s3 | ### a <eos>"),
    (Coconut(max_stage=2), 0, "q r | <bot>", "", "<eot> : s1 | s2 s2 | s3 | ### a <eos>"),
    (Coconut(max_stage=2), 1, "q r | <bot>", "<lat> <lat>", "<eot> : s2 s2 | s3 | ### a <eos>"),
    (Coconut(max_stage=2), 2, "q r | <bot>", "<lat> <lat> <lat> <lat>", "<eot> : s3 | ### a <eos>"),
    (Coconut(max_stage=2), 3, "q r | <bot>", "<lat> <lat> <lat> <lat>", "<eot> : ### a <eos>"),
    (Coconut(max_stage=4, latents_per_step=1), 4, "q r | <bot>", "<lat> <lat> <lat> <lat>", "<eot> : ### a <eos>"),
    (Coconut(max_stage=4, latents_per_step=0), 5, "q r |", "", ": ### a <eos>"),
    (
        Coconut(max_stage=4, latents_per_step=1, pad_latent_to_max=False),
        5,
        "q r | <bot>",
        "<lat> <lat> <lat>",
        "<eot> : ### a <eos>",
    ),
    (Slr(n_slots=2), 0, "q r | <bot>", "<lat> <lat>", "<eot> : ### a <eos>"),
    (Slr(n_slots=2, max_stage=2), 1, "q r | <bot>", "<lat> <lat>", "<eot> : s2 s2 | s3 | ### a <eos>"),
    (Slr(loop_scope="append", max_loops=2), 0, "q r | <bot>", "<lat> <lat> <lat>", "<eot> : ### a <eos>"),
    (
        Slr(loop_scope="append", max_loops=2, answer_from="kv_last"),
        0,
        "q r | <bot>",
        "<lat> <lat>",
        "<eot> : ### a <eos>",
    ),
]


@pytest.mark.parametrize(("method", "stage", "prefix", "region", "suffix"), ROWS)
def test_a_row_is_spelled_as_its_method_says(method, stage, prefix, region, suffix):
    row = laid_out(method, stage)
    silent, _, supervised = suffix.partition(":")
    assert segments(row) == [ids(prefix), ids(region), ids(silent) + ids(supervised)]
    n_silent = len(ids(prefix) + ids(region) + ids(silent))
    assert row.labels() == [X] * n_silent + ids(supervised)
    assert row.ids() == ids(prefix) + ids(region) + ids(silent) + ids(supervised)
    assert len(row) == len(row.ids()) == len(row.labels())


@pytest.mark.parametrize(("method", "stage", "prefix", "region", "suffix"), ROWS)
def test_a_prompt_is_the_row_up_to_the_first_supervised_token(method, stage, prefix, region, suffix):
    prompt = method.prompt(EXAMPLE.question, speller(), stage)
    row = laid_out(method, stage)
    if isinstance(method, Coconut) and not method.pad_latent_to_max and stage == method.last_stage:
        row = laid_out(Coconut(max_stage=4, latents_per_step=1), stage)  # answering always uses the maximum
    assert segments(prompt)[:2] == segments(row)[:2]
    assert segments(prompt)[2] == ids(suffix.partition(":")[0])
    assert set(prompt.labels()) == {X}


def test_pieces_know_their_kind_and_their_step():
    row = laid_out(Coconut(max_stage=2), 1)
    assert [(piece.kind, piece.step) for piece in row.pieces] == [
        (Kind.QUESTION, -1),
        (Kind.MARKER, -1),
        (Kind.LATENT, -1),
        (Kind.MARKER, -1),
        (Kind.STEP, 1),
        (Kind.STEP, 2),
        (Kind.ANSWER, -1),
    ]


def test_without_steps_cot_equals_no_cot():
    bare = Example("q r", (), "a")
    assert laid_out(Cot(), example=bare) == laid_out(NoCot(), example=bare)


def test_an_example_with_fewer_steps_than_the_stage_has_no_text_left():
    short = Example("q r", ("s1",), "a")
    assert segments(laid_out(Coconut(max_stage=3), 2, short))[2] == ids("<eot> ### a <eos>")


# Spelling


def test_a_tokenizer_that_begins_every_text_does_so_once_a_row():
    spell = speller("<s> $A")
    assert Cot().lay_out(EXAMPLE, spell).ids() == ids("<s> q r | s1 | s2 s2 | s3 | ### a <eos>")
    assert Cot().lay_out(EXAMPLE, spell).labels()[:4] == [X] * 4


def test_a_tokenizer_that_ends_every_text_does_so_only_after_the_answer():
    spell = speller("<s> $A <eos>")
    assert Cot().lay_out(EXAMPLE, spell).ids() == ids("<s> q r | s1 | s2 s2 | s3 | ### a <eos>")


def test_a_tokenizer_without_a_pad_token_pads_with_its_end():
    spell = Speller(spelled_tokenizer())
    assert spell.tokenizer.pad_token_id is None
    assert spell.pad_id == spell.eos_id == SPELLED.index("<eos>")


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(InputError, match="end-of-sequence"):
        Speller(spelled_tokenizer(eos_token=None))


def test_spelling_again_gives_the_same():
    spell = speller()
    assert spell.question("q") == spell.question("q")
    assert list(spell.step("q", 0).ids) == list(spell.question("q").ids) == ids("q |")


def test_the_same_text_is_spelled_differently_as_question_and_as_step():
    spell = speller("<s> $A")
    assert list(spell.question("q").ids) == ids("<s> q |")
    assert list(spell.step("q", 0).ids) == ids("q |")


# Batches


def batch_of_three(pad_id: int = PAD):
    """Rows with 1, 2 and 0 latents, and prefixes and suffixes of three lengths."""
    spell = speller()
    rows = [
        Row([spell.question("q")], [spell.marker("<lat>", 1)], [spell.marker("<eot>"), spell.answer("a")]),
        Row([spell.question("q r r")], [spell.marker("<lat>", 2)], [spell.answer("a a")]),
        Row([spell.question("q r")], [], [spell.step("s1", 0), spell.answer("a")]),
    ]
    return rows, collate(rows, pad_id)


def test_prefixes_are_padded_on_the_left_and_the_rest_on_the_right():
    _, batch = batch_of_three()
    assert batch.ids_BS.tolist() == [
        ids("<pad> <pad> q |      <lat> <pad>     <eot> ### a <eos> <pad>"),
        ids("q     r     r |      <lat> <lat>     ###   a   a <eos> <pad>"),
        ids("<pad> q     r |      <pad> <pad>     s1    |   ### a   <eos>"),
    ]
    assert batch.mask_BS.tolist() == [
        [0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1],
    ]
    assert batch.bounds == (4, 6)
    assert batch.is_padded == (True, True, True)
    assert len(batch) == 3


def test_each_supervised_token_is_predicted_from_the_real_position_before_it():
    _, batch = batch_of_three()
    # Row 0: <eot> -> ### -> a. Row 1: the last latent -> ### -> a -> a. Row 2: across the empty region, the newline of
    # the question -> s1 -> newline -> ### -> a.
    row_1, row_2 = 11, 22
    assert batch.predict_at_U.tolist() == [
        *[6, 7, 8],
        *[row_1 + 5, row_1 + 6, row_1 + 7, row_1 + 8],
        *[row_2 + 3, row_2 + 6, row_2 + 7, row_2 + 8, row_2 + 9],
    ]
    assert batch.targets_U.tolist() == ids("### a <eos>   ### a a <eos>   s1 | ### a <eos>")
    assert batch.n_targets == [3, 4, 5]
    assert batch.counts() == {"answer": 12, "step": 0, "hid": 0, "teacher": 0, "rows": 3}


def test_the_position_that_predicts_is_real_and_is_the_one_before(examples):
    for method in (Cot(), Coconut(max_stage=2), Pause(with_markers=False)):
        model = tiny_model(method)
        mixed = [Example(e.question, e.steps[:n], e.answer) for n, e in enumerate(examples[:4])]
        batch = model.batch([row for stage in (0, method.curriculum.last_stage) for row in model.rows(mixed, stage)])
        mask, flat_ids = batch.mask_BS.flatten(), batch.ids_BS.flatten()
        order = mask.cumsum(0)  # the place among all real positions, row after row
        assert mask[batch.predict_at_U].all()
        for at, target in zip(batch.predict_at_U.tolist(), batch.targets_U.tolist()):
            following = (order == order[at] + 1).nonzero()[0].item()
            assert flat_ids[following] == target
            assert following // batch.ids_BS.shape[1] == at // batch.ids_BS.shape[1]


def test_padding_with_the_end_token_leaves_real_ends_supervised():
    eos = SPELLED.index("<eos>")
    _, plain = batch_of_three()
    _, batch = batch_of_three(pad_id=eos)
    assert batch.ids_BS.eq(eos).sum() == 3 + (1 - plain.mask_BS).sum()
    assert (batch.targets_U == eos).sum() == 3
    for name in ("mask_BS", "predict_at_U", "targets_U"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


def test_the_loss_does_not_depend_on_what_pads(examples):
    model = tiny_model(Coconut())
    rows = model.rows([Example(e.question[: -4 * n], e.steps, e.answer) for n, e in enumerate(examples[:3])], stage=1)
    with torch.no_grad():
        losses = [model(collate(rows, pad_id)).loss for pad_id in (model.spell.pad_id, model.spell.eos_id, 5)]
    assert losses[0] == losses[1] == losses[2]


def test_a_single_row_is_not_padded():
    rows, _ = batch_of_three()
    for row in rows:
        batch = collate([row], PAD)
        assert batch.is_padded == (False, False, False)
        assert batch.ids_BS[0].tolist() == row.ids()
        supervised = [k for k, label in enumerate(row.labels()) if label != X]
        assert batch.predict_at_U.tolist() == [k - 1 for k in supervised]
        assert [batch.columns(n)[1] for n in range(3)] == [None, None, None]


def test_columns_are_those_of_the_segment_with_its_mask_where_it_is_padded():
    rows, batch = batch_of_three()
    assert [batch.columns(n)[0] for n in range(3)] == [slice(0, 4), slice(4, 6), slice(6, 11)]
    assert torch.equal(batch.columns(1)[1], torch.tensor([[1, 0], [1, 1], [0, 0]]))
    partly = collate([rows[0], rows[1]], PAD)  # suffixes of equal length
    assert partly.is_padded == (True, True, False)
    assert partly.columns(2)[1] is None


def test_read_outs_point_at_loop_row_and_slot():
    spell = speller()

    def row(question: str, n_slots: int, readouts: list[Readout], n_loops: int) -> Row:
        region, suffix = [spell.marker("<lat>", n_slots)], [spell.answer("a")]
        return Row([spell.question(question)], region, suffix, n_loops, readouts)

    long, short = row("q q q", 2, [], 2), row("q", 3, [], 1)
    long.readouts = [Readout(1, long.region_start, 7), Readout(2, long.region_start + 1, 8)]
    short.readouts = [Readout(1, short.region_start + 2, 9)]
    batch = collate([long, short], PAD)
    first, second = batch.readouts
    begin = batch.bounds[0]  # both regions begin in the same column
    assert (first.loop, first.rows_F.tolist(), first.columns_F.tolist()) == (1, [0, 1], [begin, begin + 2])
    assert (second.loop, second.rows_F.tolist(), second.columns_F.tolist()) == (2, [0], [begin + 1])
    assert first.targets_F.tolist() + second.targets_F.tolist() == [7, 9, 8]
    assert batch.n_loops == [2, 1]
    assert batch.counts() == {"answer": 6, "step": 3, "hid": 0, "teacher": 0, "rows": 2}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # T = 3 loops over m = 3 steps: loop t shows step t, all slots
        ({}, ["s1 |", "s2 s2 |", "s3 |"]),
        # T = 2 over m = 3: sigma = ceil(t 3 / 2) = 2, 3
        ({"max_loops": 2}, ["s2 s2 |", "s3 |"]),
        # T = 2, one by one: the last loop takes the last step
        ({"max_loops": 2, "step_map": "one2one"}, ["s1 |", "s3 |"]),
        # T = 5, one by one: no target after the steps
        ({"max_loops": 5, "step_map": "one2one"}, ["s1 |", "s2 s2 |", "s3 |", "", ""]),
        # blocks of two slots, round and round: step 1 in slots 0-1, step 2 (cut) in 2-3, step 3 in 0-1
        ({"slots_per_step": 2}, ["s1 |", ". . s2 s2", "s3 |"]),
    ],
)
def test_steps_are_read_out_where_and_when_slr_says(settings, expected):
    row = laid_out(Slr(**{"n_slots": 4, "max_loops": 3, "step_weight": 1.0} | settings))
    spelled = [[X if word == "." else ids(word)[0] for word in words.split()] for words in expected]
    assert labels_by_loop(row) == [words + [X] * (4 - len(words)) for words in spelled]


def test_the_first_token_of_a_row_cannot_be_supervised():
    with pytest.raises(InputError, match="nothing comes before it"):
        collate([Row([], [], [Piece((5,), Kind.ANSWER, supervised=True)])], PAD)


def test_moving_a_batch_keeps_all_of_it():
    _, batch = batch_of_three()
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.ids_BS, batch.ids_BS)
    assert (moved.bounds, moved.n_targets, moved.is_padded) == (batch.bounds, batch.n_targets, batch.is_padded)


# Positions: what the passes of a whole model are told.


@pytest.mark.parametrize("method", [NoCot(), Cot(with_markers=True), Pause(), Coconut()], ids=lambda m: m.name)
def test_every_real_position_is_read_once_and_in_order(method, monkeypatch):
    model = tiny_model(method)
    examples = [
        Example(e.question[: len(e.question) - 4 * n], e.steps[n:], e.answer) for n, e in enumerate(chain_examples(3))
    ]
    stages = (1, 3, 4) if isinstance(method, Coconut) else (0, 0, 0)
    rows = [model.rows([example], stage)[0] for example, stage in zip(examples, stages)]
    read: list[list[int]] = [[] for _ in rows]
    forward = Backbone.forward

    def spy(self, embeds, *, mask=None, positions_BL=None, **options):
        new = torch.ones(len(rows), embeds.shape[1]) if mask is None else mask[:, 0, -1, -embeds.shape[1] :]
        for row, (is_real, positions) in enumerate(zip(new, positions_BL)):
            read[row] += positions[is_real.bool()].tolist()
        return forward(self, embeds, mask=mask, positions_BL=positions_BL, **options)

    monkeypatch.setattr(Backbone, "forward", spy)
    model(model.batch(rows))
    assert read == [list(range(len(row))) for row in rows]


def test_markers_written_in_a_question_are_text():
    model = tiny_model(Coconut(max_stage=1, latents_per_step=2))
    (row,) = model.prompts(["1 <lat> <bot> ; + 2"])
    assert row.ids().count(model.tokenizer.convert_tokens_to_ids("<lat>")) == 2

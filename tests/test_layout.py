"""Rows spelled out by hand, and what becomes of them in a batch (cot.md, section 0)."""

import pytest
import torch

from innerloop import Coconut, Cot, NoCot, Pause, Slr
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError
from innerloop.text.batch import collate
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import IGNORE, Kind, Row, Span
from tests.methods.tools import labels_by_loop
from tests.models import SPELLED, chain_examples, spelled_tokenizer, tiny_model

PAD = 0
X = IGNORE
EXAMPLE = Example("q r", ("s1", "s2 s2", "s3"), "a")


def ids(words: str) -> list[int]:
    """Return the ids of words; ``|`` stands for a newline."""
    return [SPELLED.index(word.replace("|", "\n")) for word in words.split()]


def prompt_encoder(*arguments, **special) -> PromptEncoder:
    return PromptEncoder(spelled_tokenizer(*arguments, pad_token="<pad>", **special))


def laid_out(method, stage: int | None = None, example: Example = EXAMPLE) -> Row:
    return method.lay_out(example, prompt_encoder(), method.last_stage if stage is None else stage)


def segments(row: Row) -> list[list[int]]:
    return [[i for span in segment for i in span.ids] for segment in (row.prefix, row.region, row.suffix)]


def coconut(s_max: int, **fields) -> Coconut:
    return Coconut(curriculum={"max_stage": s_max}, **fields)


# Rows by hand: method, stage, prefix, number of latents, suffix; what stands after " : " in the suffix is supervised.

ASKED, STEPS, ANSWER = "q r | <bot>", "s1 | s2 s2 | s3 |", "### a <eos>"
ROWS = [
    (NoCot(), 0, "q r |", 0, f": {ANSWER}"),
    (Cot(), 0, "q r |", 0, f": {STEPS} {ANSWER}"),
    (Cot(with_markers=True), 0, "q r |", 0, f"<bot> <eot> : {STEPS} {ANSWER}"),
    (Pause(n_pauses=2), 0, ASKED, 2, f"<eot> : {ANSWER}"),
    (Pause(n_pauses=2, with_markers=False), 0, "q r |", 2, f": {ANSWER}"),
    (Pause(n_pauses=0, with_markers=False), 0, "q r |", 0, f": {ANSWER}"),
    (Pause(n_pauses=2, placement="prepend"), 0, "<bot> <lat> <lat> <eot> q r |", 0, f": {ANSWER}"),
    (Pause(n_pauses=2, keep_steps=True), 0, ASKED, 2, f"<eot> : {STEPS} {ANSWER}"),
    (Pause(n_pauses=3, curriculum={"max_stage": 3}), 2, ASKED, 2, f"<eot> : s3 | {ANSWER}"),
    (coconut(2), 0, ASKED, 0, f"<eot> : {STEPS} {ANSWER}"),
    (coconut(2), 1, ASKED, 2, f"<eot> : s2 s2 | s3 | {ANSWER}"),
    (coconut(2), 2, ASKED, 4, f"<eot> : s3 | {ANSWER}"),
    (coconut(2), 3, ASKED, 4, f"<eot> : {ANSWER}"),
    (coconut(4, latents_per_step=1), 4, ASKED, 4, f"<eot> : {ANSWER}"),
    (coconut(4, latents_per_step=0), 5, "q r |", 0, f": {ANSWER}"),
    (coconut(4, latents_per_step=1, pad_latent_to_max=False), 5, ASKED, 3, f"<eot> : {ANSWER}"),
    (Slr(n_slots=2), 0, ASKED, 2, f"<eot> : {ANSWER}"),
    (Slr(n_slots=2, curriculum={"max_stage": 2}), 1, ASKED, 2, f"<eot> : s2 s2 | s3 | {ANSWER}"),
    (Slr(loop_scope="append", max_loops=2), 0, ASKED, 3, f"<eot> : {ANSWER}"),
    (Slr(loop_scope="append", max_loops=2, answer_from="kv_last"), 0, ASKED, 2, f"<eot> : {ANSWER}"),
]


@pytest.mark.parametrize(("method", "stage", "prefix", "n_latents", "suffix"), ROWS)
def test_a_row_is_spelled_as_its_method_says_and_its_prompt_is_what_comes_before_the_supervised(
    method, stage, prefix, n_latents, suffix
):
    row, prompt = laid_out(method, stage), method.prompt(EXAMPLE.question, prompt_encoder(), stage)
    silent, supervised = map(ids, suffix.split(":"))
    latents = ids("<lat> " * n_latents)
    before = ids(prefix) + latents + silent
    assert segments(row) == [ids(prefix), latents, silent + supervised]
    assert row.labels() == [X] * len(before) + supervised
    assert row.ids() == before + supervised and len(row) == len(row.ids())
    if method == coconut(4, latents_per_step=1, pad_latent_to_max=False):
        latents = ids("<lat> " * 4)  # answering always uses the maximum
    assert segments(prompt) == [ids(prefix), latents, silent] and set(prompt.labels()) == {X}


def test_pieces_know_their_kind_and_their_step():
    marker, steps = (Kind.MARKER, -1), [(Kind.STEP, 1), (Kind.STEP, 2)]
    told = [(Kind.QUESTION, -1), marker, (Kind.LATENT, -1), marker, *steps, (Kind.ANSWER, -1)]
    assert [(span.kind, span.step) for span in laid_out(coconut(2), 1).spans] == told


def test_examples_of_few_steps_or_none():
    bare, short = Example("q r", (), "a"), Example("q r", ("s1",), "a")
    assert laid_out(Cot(), example=bare) == laid_out(NoCot(), example=bare)
    assert segments(laid_out(coconut(3), 2, short))[2] == ids(f"<eot> {ANSWER}")  # the stage leaves no text


# Spelling


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A <eos>"])
def test_a_tokenizer_that_begins_and_ends_every_text_does_so_once_a_row(template):
    encoder = prompt_encoder(template)
    row = Cot().lay_out(EXAMPLE, encoder)
    assert row.ids() == ids(f"<s> q r | {STEPS} {ANSWER}") and row.labels()[:4] == [X] * 4
    for _ in range(2):  # the same text is spelled differently as question and as step
        assert (list(encoder.question("q").ids), list(encoder.step("q", 0).ids)) == (ids("<s> q |"), ids("q |"))


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_and_one_without_an_end_is_refused():
    encoder = PromptEncoder(spelled_tokenizer())
    assert encoder.tokenizer.pad_token_id is None
    assert encoder.pad_id == encoder.eos_id == SPELLED.index("<eos>")
    with pytest.raises(InputError, match="end-of-sequence"):
        PromptEncoder(spelled_tokenizer(eos_token=None))


# Batches


def batch_of_three(pad_id: int = PAD):
    """Rows with 1, 2 and 0 latents, and prefixes and suffixes of three lengths."""
    encoder = prompt_encoder()
    rows = [
        Row([encoder.question("q")], [encoder.marker("<lat>", 1)], [encoder.marker("<eot>"), encoder.answer("a")]),
        Row([encoder.question("q r r")], [encoder.marker("<lat>", 2)], [encoder.answer("a a")]),
        Row([encoder.question("q r")], [], [encoder.step("s1", 0), encoder.answer("a")]),
    ]
    return rows, collate(rows, pad_id)


def test_prefixes_are_padded_on_the_left_and_the_rest_on_the_right():
    rows, batch = batch_of_three()
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
    assert (batch.bounds, batch.is_padded, len(batch)) == ((4, 6), (True, True, True), 3)
    assert [batch.columns(n)[0] for n in range(3)] == [slice(0, 4), slice(4, 6), slice(6, 11)]
    assert torch.equal(batch.columns(1)[1], torch.tensor([[1, 0], [1, 1], [0, 0]]))
    partly = collate([rows[0], rows[1]], PAD)  # suffixes of equal length
    assert partly.is_padded == (True, True, False) and partly.columns(2)[1] is None


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
    with pytest.raises(InputError, match="nothing comes before it"):
        collate([Row([], [], [Span((5,), Kind.ANSWER, supervised=True)])], PAD)


def test_the_position_that_predicts_is_real_and_is_the_one_before(examples):
    for method in (Cot(), coconut(2), Pause(with_markers=False)):
        model = tiny_model(method)
        mixed = [Example(e.question, e.steps[:n], e.answer) for n, e in enumerate(examples[:4])]
        batch = model.batch([row for stage in (0, method.last_stage) for row in model.rows(mixed, stage)])
        mask, flat_ids = batch.mask_BS.flatten(), batch.ids_BS.flatten()
        order = mask.cumsum(0)  # the place among all real positions, row after row
        assert mask[batch.predict_at_U].all()
        for at, target in zip(batch.predict_at_U.tolist(), batch.targets_U.tolist()):
            following = (order == order[at] + 1).nonzero()[0].item()
            assert flat_ids[following] == target
            assert following // batch.ids_BS.shape[1] == at // batch.ids_BS.shape[1]


def test_nothing_depends_on_what_pads(examples):
    eos = SPELLED.index("<eos>")
    (_, plain), (_, batch) = batch_of_three(), batch_of_three(pad_id=eos)
    assert batch.ids_BS.eq(eos).sum() == 3 + (1 - plain.mask_BS).sum()
    assert (batch.targets_U == eos).sum() == 3  # real ends stay supervised
    for name in ("mask_BS", "predict_at_U", "targets_U"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    model = tiny_model(Coconut())
    rows = model.rows([Example(e.question[: -4 * n], e.steps, e.answer) for n, e in enumerate(examples[:3])], stage=1)
    with torch.no_grad():
        losses = [model(collate(rows, pad_id)).loss for pad_id in (model.encoder.pad_id, model.encoder.eos_id, 5)]
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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["s1 |", "s2 s2 |", "s3 |"]),  # T = 3 loops over m = 3 steps: loop t shows step t, all slots
        ({"max_loops": 2}, ["s2 s2 |", "s3 |"]),  # T = 2 over m = 3: sigma = ceil(t 3 / 2) = 2, 3
        # T = 2, one by one: the last loop takes the last step
        ({"max_loops": 2, "step_map": "one2one"}, ["s1 |", "s3 |"]),
        # T = 5, one by one: no target after the steps
        ({"max_loops": 5, "step_map": "one2one"}, ["s1 |", "s2 s2 |", "s3 |", "", ""]),
        # blocks of two slots, round and round: step 1 in slots 0-1, step 2 (cut) in 2-3, step 3 in 0-1
        ({"slots_per_step": 2}, ["s1 |", ". . s2 s2", "s3 |"]),
    ],
)
def test_steps_are_read_out_where_and_when_slr_says(fields, expected):
    row = laid_out(Slr(**{"n_slots": 4, "max_loops": 3, "step_weight": 1.0} | fields))
    spelled = [[X if word == "." else ids(word)[0] for word in words.split()] for words in expected]
    assert labels_by_loop(row) == [words + [X] * (4 - len(words)) for words in spelled]


# Positions: what the passes of a whole model are told.


@pytest.mark.parametrize("method", [NoCot(), Cot(with_markers=True), Pause(), Coconut()], ids=lambda m: m.name)
def test_every_real_position_is_read_once_and_in_order(method, monkeypatch):
    model = tiny_model(method)
    chains = enumerate(chain_examples(3))
    examples = [Example(e.question[: len(e.question) - 4 * n], e.steps[n:], e.answer) for n, e in chains]
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
    model = tiny_model(coconut(1))
    (row,) = model.prompts(["1 <lat> <bot> ; + 2"])
    assert row.ids().count(model.tokenizer.convert_tokens_to_ids("<lat>")) == 2

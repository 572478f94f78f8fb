"""SpiralThinker's rows: every pattern, schedule and number of steps, their labels, and what their blocks follow.

A row is drawn as prefix | region | suffix, segments joined by =>; Tn is step n, L a block's latents, * what is learned.
"""

import pytest

from innerloop.errors import InputError
from innerloop.methods import SpiralThinker
from innerloop.methods.latent.spiralthinker import pass_weights
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, Kind
from tests.methods.spiralthinker_reference import ALIGNED, SPIRAL, Spiral, known, student
from tests.methods.tools import MIXED, change
from tests.models import chain_tokenizer, tiny_model

FIVE = ("3 + 4 = 2", "2 * 2", "4", "1 - 1 = 0", "0 + 0")
QUESTION = "3 ; + 4"


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return tiny_model(SpiralThinker()).encoder


def drawn(row, encoder) -> str:
    names = {encoder.marker(text).ids: text for text in ("<bot>", "<eot>", "<bol>", "<eol>")}

    def word(span):
        kinds = {Kind.QUESTION: "Q", Kind.LATENT: "L", Kind.ANSWER: "A", Kind.STEP: f"T{span.step + 1}"}
        return ("*" if span.supervised else "") + kinds.get(span.kind, names.get(span.ids, "?"))

    parts = [(segment.prefix, segment.region, segment.suffix) for segment in row.segments()]
    return " => ".join(" | ".join(" ".join(map(word, part)) for part in segment) for segment in parts)


def laid_out(method, m, encoder, parity=0):
    return method.lay_out(Example(QUESTION, FIVE[:m], "2"), encoder, parity)


T = [f"*<bot> *T{n} *<eot>" for n in range(6)]
ROWS = [
    ("odd", 0, "Q <bol> | L <eol> | *A"),
    ("odd", 2, f"Q <bol> | L <eol> | {T[2]} *A"),
    ("odd", 3, f"Q <bol> | L <eol> {T[2]} *<bol> L <eol> | *A"),
    ("odd", 5, f"Q <bol> | L <eol> {T[2]} *<bol> L <eol> {T[4]} *<bol> L <eol> | *A"),
    ("even", 0, "Q *<bol> | L <eol> | *A"),
    ("even", 1, f"Q |  | {T[1]} *A"),
    ("even", 2, f"Q | {T[1]} *<bol> L <eol> | *A"),
    ("even", 4, f"Q | {T[1]} *<bol> L <eol> {T[3]} *<bol> L <eol> | *A"),
    ("all", 0, "Q <bol> | L <eol> | *A"),
    ("all", 2, "Q <bol> | L <eol> *<bol> L <eol> | *A"),
    ("all", 4, "Q <bol> | L <eol> *<bol> L <eol> *<bol> L <eol> *<bol> L <eol> | *A"),
    ("none", 0, "Q |  | *A"),
    ("none", 1, f"Q |  | {T[1]} *A"),
    # sequentially, a link for every block
    ("odd, sequential", 0, "Q <bol> | L <eol> | *A"),
    ("odd, sequential", 3, f"Q <bol> | L <eol> | {T[2]} *<bol> =>  | L <eol> | *A"),
    ("odd, sequential", 5, f"Q <bol> | L <eol> | {T[2]} *<bol> =>  | L <eol> | {T[4]} *<bol> =>  | L <eol> | *A"),
    ("even, sequential", 2, f"Q |  | {T[1]} *<bol> =>  | L <eol> | *A"),
    ("even, sequential", 4, f"Q |  | {T[1]} *<bol> =>  | L <eol> | {T[3]} *<bol> =>  | L <eol> | *A"),
    ("all, sequential", 2, "Q <bol> | L <eol> | *<bol> =>  | L <eol> | *A"),
    ("none, sequential", 2, f"Q |  | {T[1]} {T[2]} *A"),
]
by_schedule = pytest.mark.parametrize("schedule", ["parallel", "sequential"])
by_pattern = pytest.mark.parametrize("pattern", ["odd", "even", "random_parity", "all", "none"])


@pytest.mark.parametrize(("which", "m", "expected"), ROWS)
def test_a_row_is_one_region_from_the_first_block_to_the_last_or_has_a_link_for_each(which, m, expected, encoder):
    pattern, _, schedule = which.partition(", ")
    method = change(SPIRAL, pattern=pattern, block_schedule=schedule or "parallel")
    assert drawn(laid_out(method, m, encoder), encoder) == expected


def test_random_parity_draws_either_for_each_example_anew(encoder):
    method = change(SPIRAL, pattern="random_parity")
    drawn_parities = [method.stage_of(0, 3, str(i)) for i in range(400)]
    assert 160 < sum(drawn_parities) < 240
    assert drawn_parities == [method.stage_of(0, 3, str(i)) for i in range(400)]
    assert [method.stage_of(0, 3, "") for _ in range(3)] == [0, 0, 0]  # answering and validation
    rows = method.rows(MIXED[:1] * 40, encoder, seed="7")
    assert {drawn(row, encoder)[:8] for row in rows} == {"Q <bol> ", "Q | *<bo"}
    assert {change(SPIRAL, pattern=p).stage_of(0, 3, "a") for p in ("odd", "even", "all")} == {0}


@by_pattern
@by_schedule
@pytest.mark.parametrize("first", [True, False])
def test_tokens_and_labels_are_the_cards(pattern, schedule, first):
    method = change(SPIRAL, pattern=pattern, block_schedule=schedule, supervise_first_bol=first, latents_per_block=3)
    model = student("gpt2", method)
    slow = Spiral(model)
    for example in MIXED:
        for parity in (0, 1) if pattern == "random_parity" else (0,):
            row, expected = method.lay_out(example, model.encoder, parity), slow.lay_out(example, parity)
            assert [i for segment in row.segments() for i in segment.ids()] == expected.ids
            labels = [label for segment in row.segments() for label in segment.labels()]
            assert [at for at, label in enumerate(labels) if label >= 0] == expected.learned
            lat, eol = (model.encoder.marker(text).ids[0] for text in ("<lat>", "<eol>"))
            assert lat not in labels and eol not in labels


@pytest.mark.parametrize(
    ("fields", "m", "expected"),
    [
        ({"m0": "no_block"}, 0, "Q |  | *A"),
        ({"m0": "no_block", "pattern": "even"}, 0, "Q |  | *A"),
        ({"m0": "no_block"}, 2, f"Q <bol> | L <eol> | {T[2]} *A"),
        ({"supervise_first_bol": True}, 1, "Q *<bol> | L <eol> | *A"),
        ({"supervise_first_bol": True}, 3, f"Q *<bol> | L <eol> {T[2]} *<bol> L <eol> | *A"),
    ],
)
def test_rows_without_steps_may_have_no_block_and_the_first_bol_may_be_learned(fields, m, expected, encoder):
    row = laid_out(change(SPIRAL, **fields), m, encoder)
    assert drawn(row, encoder) == expected and row.n_loops == (2 if "L" in expected else 0)


@by_pattern
def test_a_prompt_begins_with_a_block_unless_the_pattern_begins_with_text(pattern, encoder):
    prompt = change(SPIRAL, pattern=pattern).prompt(QUESTION, encoder, 0)
    assert drawn(prompt, encoder).replace(" ", "") in ("Q||" if pattern in ("none", "even") else "Q<bol>|L<eol>|",)
    assert all(label < 0 for label in prompt.labels())
    assert prompt.n_loops == (0 if pattern in ("none", "even") else 2)


def test_n_and_k_are_those_of_every_block(encoder):
    method = SpiralThinker(latents_per_block=4, max_loops=3, block_schedule="sequential")
    segments = list(laid_out(method, 5, encoder).segments())
    assert [len(segment.region[0].ids) for segment in segments] == [4, 4, 4]
    assert [segment.n_loops for segment in segments] == [3, 3, 3]
    assert laid_out(change(method, count_static_pass=True), 5, encoder).n_loops == 2


# What blocks follow


@by_schedule
@pytest.mark.parametrize("pattern", ["odd", "even", "all"])
@pytest.mark.parametrize("m", range(6))
def test_each_end_of_a_block_follows_the_end_of_its_step(m, pattern, schedule, encoder):
    method = change(ALIGNED, pattern=pattern, block_schedule=schedule)
    row = laid_out(method, m, encoder)
    first_stage = laid_out(SpiralThinker(pattern="none"), m, encoder)
    assert drawn(row.teacher, encoder) == drawn(first_stage, encoder)
    ends, at = [], -1
    for span in row.teacher.spans:
        at += len(span.ids)
        ends += [at] if span.ids == encoder.marker("<eot>").ids else []
    wanted = {"odd": range(0, m, 2), "even": range(1, m, 2), "all": range(m)}[pattern]
    found = []
    for segment in row.segments():
        assert all(segment.ids()[follow.at] == encoder.marker("<eol>").ids[0] for follow in segment.hidden_targets)
        found += [(follow.teacher_at, follow.iteration, follow.weight) for follow in segment.hidden_targets]
    weights = pass_weights(3, 1, "softmax", 1.0)
    expected = [(ends[i], loop, v) for i in wanted for loop, v in zip([2, 3, ANSWER_PASS], weights)]
    assert found == expected


@pytest.mark.parametrize(
    ("fields", "loops", "first"),
    [
        ({"align_static_pass": True}, [1, 2, 3, ANSWER_PASS], 0),
        ({"align_static_pass": True, "max_loops": 0}, [ANSWER_PASS], 3),
        ({"align_schedule": "last"}, [ANSWER_PASS], 3),
    ],
)
def test_which_passes_are_aligned_is_an_option(fields, loops, first, encoder):
    row = laid_out(change(ALIGNED, **fields), 1, encoder)
    assert [(f.iteration, f.weight) for f in row.hidden_targets] == list(
        zip(loops, pass_weights(3, first, "softmax", 1.0))
    )


def test_without_alignment_there_is_no_teacher(encoder):
    assert laid_out(SPIRAL, 3, encoder).teacher is None and laid_out(SPIRAL, 3, encoder).hidden_targets == []


# Lengths


@by_schedule
@by_pattern
@pytest.mark.parametrize("m", range(6))
def test_the_longest_row_is_counted_with_all_its_links(m, pattern, schedule, encoder):
    method = change(SPIRAL, pattern=pattern, block_schedule=schedule)
    example = Example(QUESTION, FIVE[:m], "2")
    sizes = [
        sum(len(span.ids) for segment in method.lay_out(example, encoder, parity).segments() for span in segment.spans)
        for parity in (0, 1)
    ]
    assert method.longest(example, encoder) == (max(sizes) if pattern == "random_parity" else sizes[0])


def test_what_the_teacher_reads_counts_towards_the_length(encoder):
    long = Example(QUESTION, (" ".join(["3 + 4"] * 20),), "2")
    teacher = len(laid_out(SpiralThinker(pattern="none"), 0, encoder)) + 2 + len(encoder.step(long.steps[0], 0).ids)
    assert change(ALIGNED, pattern="all").longest(long, encoder) == teacher
    assert change(SPIRAL, pattern="all").longest(long, encoder) < 20


# Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents_per_block": 0}, "latents_per_block is 0, but must be"),
        ({"max_loops": -1}, "max_loops is -1, but must be"),
        ({"max_blocks": 0}, "max_blocks is 0, but must be"),
        ({"max_loops": 0, "count_static_pass": True}, "set max_loops to at least 1"),
        ({"pattern": "none", "hid.weight": 1.0, "hid.teacher": "x"}, "set hid.weight to 0"),
        ({"hid.weight": 1.0}, "set hid.teacher to the folder"),
        ({"max_loops": 0, "hid.weight": 1.0, "hid.teacher": "x"}, "set align_static_pass, or hid.weight to 0"),
        ({"max_loops": 1, "count_static_pass": True, "hid.weight": 1.0, "hid.teacher": "x"}, "set align_static_pass"),
        ({"align_alpha": -0.5}, "align_alpha is -0.5, but must be"),
        ({"hid.weight": -1.0}, "weight is -1.0, but must be"),
        ({"loop.width": -1}, "width is -1, but must be"),
        ({"loop.residual": "A"}, "set loop.residual to none or sum"),
        ({"stop.rule": "halt"}, "needs a loss that this method has not"),
        ({"pattern": "od"}, "pattern is 'od' .did you mean 'odd'"),
        ({"block_schedule": "serial"}, "must be one of parallel, sequential"),
        ({"align_schedule": "first"}, "must be one of softmax, uniform, last"),
        ({"m0": "two"}, "must be one of one_block_no_align, no_block"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(fields, message):
    with pytest.raises(InputError, match=message) as refused:
        change(SPIRAL, **fields)
    assert "\n" not in str(refused.value)


def test_markers_are_read_or_written():
    assert SPIRAL.markers == ("<bot>", "<eot>", "<bol>", "<eol>", "<lat>")
    assert set(SPIRAL.written_markers) == {"<bot>", "<eot>", "<bol>"}
    teacher = change(SPIRAL, pattern="none")
    assert teacher.markers == teacher.written_markers == ("<bot>", "<eot>")
    assert SPIRAL.needs_steps and "<bol>" not in chain_tokenizer().get_vocab()


def test_the_cards_defaults():
    method = SpiralThinker()
    assert (method.pattern, method.latents_per_block, method.max_loops) == ("odd", 5, 5)
    assert (method.loop.rescale, method.loop.width, method.loop.gain) == ("adapter", 0, False)
    assert (method.hid.layers, method.hid.distance) == ("all", "l1")
    assert (method.align_schedule, method.align_alpha, method.count_static_pass) == ("softmax", 1.0, False)
    assert (method.block_schedule, method.m0, method.max_blocks) == ("parallel", "one_block_no_align", 8)
    assert not (method.supervise_first_bol or method.align_static_pass or method.force_block_after_text)
    assert (method.loop.residual, method.loop.site, method.loop.bptt) == ("none", "post_norm", None)
    assert (method.ce_passes, method.stop.rule) == ("last", "none")
    assert known("gpt2").loop.rescale.outer.weight.abs().max() == 0

"""Every setting of LOTUS moves what it should and nothing else; what has no meaning is refused; the curriculum."""

import math

import pytest

from innerloop import InputError
from innerloop.methods import Lotus
from tests.fields import make
from tests.methods.gauges import AT_ONCE, FORWARD, LEARNS, STATES, STOPPING, STOPS, moved_by, table, untried
from tests.methods.tools import MIXED, change
from tests.models import tiny_model

BASE = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5)
HID, AUX = {"hid.weight": 1.0, "hid.teacher": "-"}, {"aux.weight": 0.5}

FIELDS = table(
    (STATES | {"rows", "schedule", "ran", "passes"}, {}, {"n_blocks": 2}),
    (STATES | {"rows", "passes"}, {}, {"latents_per_block": 3}),
    (STATES | {"ran", "passes"}, {}, {"loops_per_block": 2}, {"max_loops": 2}),
    (FORWARD | {"ran", "passes"}, {}, {"last_pass": "refeed"}),  # h^(R) is the same
    (STATES, {}, {"loop.residual": "none"}, {"loop.scale": 0.5}, {"loop.shift": True}),
    (set(), {}, {"loop.progressive": 0.5}),  # for batches of a Trainer alone
    (set(), {"loop.progressive": 0.5}, {"loop.free_loops": (0, 3)}),
    ({"step"} | LEARNS, {}, {"readout_offset": 0}, {"overflow": "spill"}, {"supervision": "per_iter"}),
    ({"schedule"}, {}, {"curriculum.first_stage": 1}, {"curriculum.length": 2}, {"curriculum.unit": "step"},
     {"curriculum.mix": "linear"}),
    (LEARNS, {}, {"answer_weight": 0.5}, {"step_weight": 1.0}),
    ({"hid"} | LEARNS, {}, HID),
    (LEARNS, HID, {"hid.weight": 2.0}),
    ({"aux", "trained"} | LEARNS, {}, AUX),
    (LEARNS, AUX, {"aux.weight": 1.0}),
    ({"aux", "trained"} | LEARNS, AUX, {"aux.layers": 1}),
    ({"aux"} | LEARNS, AUX, {"aux.question": True}, {"supervision": "post_all"}),
    (STOPS, {}, AT_ONCE),
    (STOPS, AT_ONCE, {"stop.threshold": math.inf}, {"stop.min_loops": 2}, {"stop.patience": 2}),
)  # fmt: skip
REFUSED = [
    ({"n_blocks": 0}, "n_blocks is 0, but must be"),
    ({"latents_per_block": 0}, "latents_per_block is 0, but must be"),
    ({"loops_per_block": -1}, "loops_per_block is -1, but must be"),
    ({"max_loops": -1}, "max_loops is -1, but must be"),
    ({"loop.residual": "A"}, "set loop.residual to sum or none"),
    ({"supervision": "per_iter", "loops_per_block": 2}, "set loops_per_block to 1"),
    ({"supervision": "per_iter", "max_loops": 3}, "leave max_loops out"),
    ({"step_weight": -0.1}, "step_weight is -0.1, but must be"),
    ({"aux.weight": -0.1}, "weight is -0.1, but must be"),
    *(({"hid.weight": 1.0, "hid.teacher": teacher}, "set hid.teacher to the folder") for teacher in (None, "self")),
    ({"curriculum.first_stage": 7}, "from 0 to 6"),
    ({"curriculum.length": 0}, "at least 1"),
    *(
        ({field: "nonsense"}, field.rpartition(".")[2])
        for field in ("last_pass", "overflow", "supervision", "readout_offset", "loop.residual", "curriculum.mix")
    ),
]


@pytest.mark.parametrize(("base", "fields", "what"), FIELDS)
def test_a_setting_moves_what_it_should_and_nothing_else(base, fields, what):
    assert moved_by(change(BASE, **base), **fields) == what


def test_no_setting_is_forgotten():
    assert untried(Lotus, FIELDS) <= STOPPING


@pytest.mark.parametrize(("fields", "mend"), REFUSED, ids=str)
def test_impossible_settings_are_refused_in_one_sentence(fields, mend):
    with pytest.raises(InputError, match=mend) as refusal:
        make(Lotus, **fields)
    assert "\n" not in str(refusal.value) and not str(refusal.value).endswith(".")


# The curriculum (lotus.md, section 5)


@pytest.mark.parametrize("length", [1, 3])
def test_epoch_e_has_the_blocks_and_iterations_of_the_card(length):
    """K_e = min(floor(e / E_stage), K), R_e = r K_e."""
    method = Lotus(n_blocks=4, latents_per_block=5, loops_per_block=2, curriculum={"length": length})
    for epoch in range(20):
        blocks = min(epoch // length, 4)
        stage = method.stage_at(step=10 * epoch + 7, steps_per_epoch=10)
        assert (method.n_latents(stage), method.n_loops(stage)) == (5 * blocks, 2 * blocks)
        assert change(method, last_pass="refeed").n_loops(stage) == (2 * blocks + 1 if blocks else 0)


def test_the_most_iterations_hold_in_the_last_stage_and_bound_those_before():
    for most, expected in ((None, [0, 2, 4, 6]), (3, [0, 2, 3, 3]), (9, [0, 2, 4, 9]), (0, [0, 0, 0, 0])):
        method = Lotus(n_blocks=3, loops_per_block=2, max_loops=most)
        assert [method.n_loops(stage) for stage in range(4)] == expected


def test_steps_leave_the_text_block_by_block_and_those_beyond_the_blocks_stay():
    model = tiny_model(BASE)
    lat = model.tokenizer.convert_tokens_to_ids("<lat>")
    for stage in range(4):
        rows = model.rows(MIXED, stage)
        assert [row.ids().count(lat) for row in rows] == [4 * stage] * len(MIXED)  # whatever m
        written = [[span.step for span in row.suffix if span.step >= 0] for row in rows]
        assert written == [list(range(stage, len(example.steps))) for example in MIXED]


def test_examples_need_steps_unless_nothing_is_made_of_them():
    alone = Lotus(step_weight=0.0, curriculum={"first_stage": 6})
    assert not alone.needs_steps
    for fields in ({"step_weight": 0.1}, AUX, HID, {"curriculum.first_stage": 5}):
        assert change(alone, **fields).needs_steps


def test_the_number_of_iterations_may_be_changed_when_answering():
    """lotus.md, section 6; also where each iteration was supervised by itself."""
    for supervision in ("post", "per_iter"):
        model = tiny_model(change(BASE, supervision=supervision))
        costs = [model.generate(["2"], loops=loops, max_new_tokens=2)[0].cost for loops in (0, 1, 5)]
        assert [cost.loops for cost in costs] == [0, 1, 5]

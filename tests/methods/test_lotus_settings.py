"""Every setting of LOTUS moves what it should and nothing else; what has no meaning is refused; the curriculum."""

import dataclasses
import math

import pytest

from innerloop import InputError
from innerloop.methods import Lotus
from tests.fields import make
from tests.methods.gauges import FORWARD, LEARNS, STOPPING, moved_by
from tests.methods.tools import MIXED, change
from tests.models import tiny_model

BASE = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5)
STATES = FORWARD | {"step"}
IN_TRAINING = STATES - {"logits", "beyond"}
STOPS = {"ran", "score", "logits", "beyond"}
HID, AUX, TIME = {"hid.weight": 1.0, "hid.teacher": "self"}, {"aux.weight": 0.5}, {"loop.time": "lookup"}
TAUGHT = {**HID, "teacher_weight": 0.5}
SHARED, LORA = {**AUX, "aux_decoder": "shared"}, {"loop.lora": "per_iter", "loop.lora_rank": 2}
ADAPTER, PROJECT = {"loop.rescale": "adapter"}, {"loop.rescale": "project"}
AT_ONCE = {"stop.rule": "delta", "stop.threshold": -math.inf}
NEVER = {"stop.rule": "kl", "stop.threshold": math.inf}
SOLVED = {"fixed_point.solver": "damped", "fixed_point.tol": 1e-9}
GAIN = {"fixed_point.spectral_weight": 1.0, "fixed_point.spectral_bound": 0.1}


def moves(what: set[str], base: dict | None = None, **fields):
    """One line of the table: on top of ``base``, changing ``fields`` moves ``what``, and nothing else."""
    return pytest.param(base or {}, fields, what, id="-".join(f"{name}={value}" for name, value in fields.items()))


FIELDS = [
    # LOTUS
    moves(STATES | {"rows", "schedule", "ran", "passes"}, n_blocks=2),
    moves(STATES | {"rows", "passes"}, latents_per_block=3),
    moves(STATES | {"ran", "passes"}, loops_per_block=2),
    moves(STATES | {"ran", "passes"}, max_loops=2),
    moves(STATES, inject="replace"),
    moves(FORWARD | {"ran", "passes"}, last_pass="refeed"),  # h^(R) is the same
    moves({"step"} | LEARNS, readout_offset=0),
    moves({"step"} | LEARNS, overflow="spill"),
    moves({"step"} | LEARNS, supervision="per_iter"),
    # the curriculum
    moves({"schedule"}, first_stage=1),
    moves({"schedule"}, stage_length=2),
    moves({"schedule"}, stage_unit="step"),
    moves({"schedule"}, stage_mix="linear"),
    moves({"schedule"}, uniform_prob=0.5),
    moves({"schedule"}, reset_optimizer="stage"),
    # the loss
    moves(LEARNS, answer_weight=0.5),
    moves(LEARNS, step_weight=1.0),
    moves({"hid", "passes"} | LEARNS, **HID),
    moves(LEARNS, HID, hid_weight=2.0),
    moves({"hid"} | LEARNS, HID, hid_layers="last"),
    moves({"hid"} | LEARNS, HID, hid_distance="l2"),
    moves({"hid", "passes"} | LEARNS, HID, teacher="another"),  # whose passes are not counted
    moves({"teacher"} | LEARNS, HID, teacher_weight=0.5),
    moves({"teacher", "passes"} | LEARNS, teacher="self", teacher_weight=0.5),
    moves({"passes"}, TAUGHT, teacher_passes=2),
    *(moves(set(), **fields) for fields in ({"deep.schedule": "softmax"}, {"halt.prior": 0.5}, {"halt.beta": 1.0})),
    # LOTUS-aux
    moves({"aux", "trained"} | LEARNS, **AUX),
    moves(LEARNS, AUX, aux_weight=1.0),
    moves({"aux", "trained", "passes"} | LEARNS, AUX, aux_decoder="shared"),
    moves({"aux", "trained"} | LEARNS, AUX, aux_layers=1),
    moves({"aux"} | LEARNS, AUX, aux_embed="own"),
    moves({"aux"} | LEARNS, AUX, aux_question=True),
    moves({"aux"} | LEARNS, AUX, aux_position=1),
    moves({"aux"} | LEARNS, AUX, aux_norm="per_row"),
    moves({"gradient"}, AUX, aux_detach=True),
    moves({"trained"}, AUX, aux_trains="base"),
    moves({"trained", "gradient"}, AUX, aux_trains="decoder"),
    moves({"aux", "trained"} | LEARNS, SHARED, aux_lora_rank=2),
    # SLR's stabilisers
    moves(STATES, residual="A"),
    moves(STATES, {"loop.residual": "A"}, alpha=0.3),
    moves(STATES | {"trained"}, {"loop.residual": "A"}, alpha_learn="per_iter"),
    moves(STATES | {"trained"}, {"loop.residual": "C"}, gate_shape="channel"),
    moves(STATES, {"loop.residual": "C"}, gate_kind="sigmoid"),
    moves(STATES, rescale="rms"),
    moves(STATES | {"trained"}, ADAPTER, adapter_width=8),
    moves(STATES | {"trained"}, ADAPTER, adapter_gain=True),
    moves(IN_TRAINING, PROJECT, project_dropout=0.5),
    moves(STATES | {"trained"}, PROJECT, project_norm=False),
    moves(STATES, feedback_scale=0.5),
    moves(STATES, shift=True),
    moves(STATES, feedback_site="pre_norm"),
    moves(STATES | {"trained"}, **TIME),
    moves(STATES | {"passes"}, TIME, time_inject="token"),
    moves(STATES, {"loop.time": "sinusoidal"}, time_norm=True),
    moves(IN_TRAINING, noise=0.5),
    moves(STATES | {"trained"}, {**TIME, "loop.noise": 0.5}, noise_level="injected"),
    moves(STATES | {"trained"}, **LORA),
    moves(STATES | {"trained"}, LORA, lora_rank=3),
    moves(STATES, LORA, lora_gamma=1.0),
    moves(STATES | {"trained"}, LORA, lora_targets=("c_attn",)),
    moves({"beyond"}, LORA, lora_beyond="off"),
    # stopping
    moves(STOPS, **AT_ONCE),
    moves(STOPS, AT_ONCE, stop_threshold=math.inf),
    moves(STOPS, AT_ONCE, min_loops=2),
    moves(STOPS, AT_ONCE, patience=2),
    moves({"score"}, NEVER, stop_agg="max"),
    moves({"score"}, NEVER, stop_site="answer"),
    # gradients, fixed points
    moves({"gradient"}, bptt=1),
    moves({"gradient"}, detach=True),
    moves(STATES | {"passes"}, **SOLVED),
    moves({"gradient", "passes"}, SOLVED, solver_gradient="phantom"),
    moves(STATES | {"ran", "passes"}, SOLVED, solver_tol=1e9),
    moves({"gain", "passes"} | LEARNS, **GAIN),
    moves({"gain"} | LEARNS, GAIN, spectral_bound=0.0),
]  # fmt: skip
REFUSED = [
    ({"n_blocks": 0}, "n_blocks >= 1"),
    ({"latents_per_block": 0}, "latents_per_block >= 1"),
    ({"loops_per_block": -1}, "loops_per_block >= 0"),
    ({"max_loops": -1}, "max_loops cannot be negative"),
    ({"inject": "replace", "loop.residual": "A"}, "leave residual out"),
    ({"supervision": "per_iter", "loops_per_block": 2}, "set loops_per_block to 1"),
    ({"supervision": "per_iter", "max_loops": 3}, "leave max_loops out"),
    ({"deep.weight": 0.1}, "set them to 0"),
    ({"halt.weight": 0.1}, "set them to 0"),
    ({"supervision": "per_iter", "fixed_point.solver": "plain"}, "set supervision to post"),
    (
        {"supervision": "per_iter", "fixed_point.solver": "plain", "step_weight": 0.0, "aux.weight": 1.0},
        "set supervision to post",
    ),
    ({"fixed_point.solver": "plain", "loop.time": "lookup"}, "iterations must be alike"),
    ({"step_weight": -0.1}, "cannot be negative"),
    ({"aux.weight": -0.1}, "cannot be negative"),
    ({"hid.weight": 1.0}, "set teacher"),
    ({"teacher_weight": 1.0}, "set teacher to self"),
    ({"aux_decoder": "shared", "aux.layers": 1}, "set aux_decoder to copy"),
    ({"aux.lora_rank": 1}, "set aux_decoder to shared"),
    ({"aux.source": "runs/other"}, "aux_embed to own"),
    ({"aux_decoder": "shared", "aux.trains": "decoder"}, "set aux_trains to both"),
    ({"aux_decoder": "shared", "aux.embed": "own"}, "set aux_embed to base"),
    ({"aux_decoder": "shared", "aux.weight": 1.0, "aux.detach": True}, "set aux_decoder to copy"),
    ({"aux.trains": "decoder"}, "set aux_weight above 0"),
    ({"curriculum.first_stage": 7}, "from 0 to 6"),
    ({"curriculum.length": 0}, "at least 1"),
    ({"curriculum.uniform_prob": 1.5}, "between 0 and 1"),
    ({"loop.alpha": 1.5}, "between 0 and 1"),
    *(
        ({field: "nonsense"}, field)
        for field in ("inject", "last_pass", "overflow", "supervision", "readout_offset", "aux_norm", "stage_mix")
    ),
]


@pytest.mark.parametrize(("base", "fields", "what"), FIELDS)
def test_a_setting_moves_what_it_should_and_nothing_else(base, fields, what):
    assert moved_by(change(BASE, **base), **fields) == what


def test_no_setting_is_forgotten():
    refused = {name for fields, _ in REFUSED for name in fields}
    moved = {name for row in FIELDS for name in row.values[1]}
    moved |= {"hid_width"} | STOPPING  # test_codi.py, test_halting_*.py
    assert {field.name for field in dataclasses.fields(Lotus)} - moved <= refused == refused | {"deep_weight"}


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
        written = [[piece.step for piece in row.suffix if piece.step >= 0] for row in rows]
        assert written == [list(range(stage, len(example.steps))) for example in MIXED]


def test_examples_need_steps_unless_nothing_is_made_of_them():
    alone = Lotus(step_weight=0.0, curriculum={"first_stage": 6})
    assert not alone.needs_steps
    for fields in (
        {"step_weight": 0.1},
        {"aux.weight": 0.1},
        {"curriculum.first_stage": 5},
        HID,
        {**TAUGHT, "hid.weight": 0.0},
    ):
        assert change(alone, **fields).needs_steps


def test_the_number_of_iterations_may_be_changed_when_answering():
    """lotus.md, section 6; also where each iteration was supervised by itself."""
    for supervision in ("post", "per_iter"):
        model = tiny_model(change(BASE, supervision=supervision))
        costs = [model.generate(["2"], loops=loops, max_new_tokens=2)[0].cost for loops in (0, 1, 5)]
        assert [cost.loops for cost in costs] == [0, 1, 5]

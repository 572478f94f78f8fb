"""Every setting of SLR moves what it should and nothing else; test_slr_settings.py tests what they move it to."""

import dataclasses
import math

import pytest

from innerloop import Slr
from tests.methods.gauges import FORWARD, LEARNS, STOPPING, moved_by
from tests.methods.tools import WITH_LORA, change

BASE = Slr(n_slots=4, max_loops=3, step_weight=0.5, slots_per_step=2)
STATES = FORWARD | {"step"}
IN_TRAINING = STATES - {"logits", "beyond"}
STOPS = {"ran", "score", "logits", "beyond"}
ALONE = {"step_weight": 0.0}
HID, TAUGHT = {"hid.weight": 1.0, "teacher": "-"}, {"teacher": "self", "teacher_weight": 0.5}
TOLD = {**HID, "teacher_thinks": "latents"}
NO_PARTS = {"loop.time": "none"}
AUX = {**NO_PARTS, "aux.weight": 0.5}
SHARED = {**AUX, "aux_decoder": "shared"}
DEEP, HALT = {"deep.weight": 0.5}, {"stop.rule": "halt", "stop.threshold": math.inf, "halt.weight": 0.5}
GATED, ADAPTER, PROJECT = {"loop.residual": "C"}, {"loop.rescale": "adapter"}, {"loop.rescale": "project"}
SINES = {"loop.time": "sinusoidal"}
AT_ONCE = {"stop.rule": "delta", "stop.threshold": -math.inf}
NEVER = {"stop.rule": "kl", "stop.threshold": math.inf}
SOLVED = {**ALONE, "loop.time": "none", "fixed_point.solver": "damped", "fixed_point.tol": 1e-9}
GAIN = {"fixed_point.spectral_weight": 1.0, "fixed_point.spectral_bound": 0.01}
STAGES = {"curriculum.max_stage": 2}
OWN = {**ALONE, "decoder.kind": "separate"}
CHOICE = {**ALONE, "decoder.kind": "linear", "decoder.classes": tuple("01234")}


def moves(what: set[str], base: dict | None = None, **fields):
    """One line of the table: on top of ``base``, changing ``fields`` moves ``what``, and nothing else."""
    return pytest.param(base or {}, fields, what, id="-".join(f"{name}={value}" for name, value in fields.items()))


FIELDS = [
    # what is refined, and what the answer sees
    moves(FORWARD | {"rows", "passes"}, ALONE, loop_scope="all"),
    moves(FORWARD | {"rows", "passes"}, {**ALONE, "n_slots": 2}, loop_scope="append"),
    moves(STATES | {"rows", "passes"}, n_slots=6),
    moves(STATES | {"trained"}, distinct_slots=True),
    moves(STATES | {"ran", "passes", "trained"}, max_loops=2),
    moves(STATES | {"passes"}, h0="forward"),
    moves(FORWARD | {"passes"}, answer_from="kv_last"),
    moves(STATES | {"passes"}, WITH_LORA, prefix_kv="per_iter"),
    moves(FORWARD, WITH_LORA, decode_lora=True),
    moves(set(), loop_sampling="uniform"),  # for batches of a Trainer alone
    # the curriculum; all that is measured here is its last stage
    moves({"schedule"}, max_stage=2),
    *(
        moves({"schedule"}, STAGES, **fields)
        for fields in (
            {"curriculum.first_stage": 1},
            {"curriculum.length": 2},
            {"curriculum.unit": "step"},
            {"curriculum.mix": "linear"},
            {"curriculum.uniform_prob": 0.5},
            {"curriculum.reset_optimizer": "stage"},
        )
    ),
    moves(set(), STAGES, write_steps=False),
    moves(set(), STAGES, loops_per_stage=1),
    # who answers
    moves(FORWARD | {"trained", "passes"}, ALONE, decoder="separate"),
    moves(FORWARD | {"trained"}, OWN, decoder_layers=1),
    moves(FORWARD, OWN, decoder_reads="state_and_prompt"),
    moves(FORWARD | {"trained"}, OWN, decoder_table="own"),
    moves({"answer", "trained"} | LEARNS, CHOICE, classes=tuple("012345")),
    # the loss
    moves(LEARNS, answer_weight=0.5),
    moves(LEARNS, step_weight=1.0),
    moves({"step"} | LEARNS, slots_per_step=1),
    moves({"step"} | LEARNS, step_map="one2one"),
    moves({"hid"} | LEARNS, **HID),
    moves(LEARNS, HID, hid_weight=2.0),
    moves({"hid"} | LEARNS, HID, hid_layers="all"),
    moves({"hid"} | LEARNS, HID, hid_distance="cosine"),
    moves({"hid"} | LEARNS, HID, hid_site="last"),
    moves({"hid", "passes"} | LEARNS, HID, teacher="self"),
    moves({"hid"} | LEARNS, HID, teacher_thinks="latents"),  # the passes that these take are those of another model
    moves({"kd"} | LEARNS, TOLD, kd_weight=0.5),
    moves({"kd"} | LEARNS, {**TOLD, "kd.weight": 0.5}, kd_temperature=1.0),
    moves({"teacher", "passes"} | LEARNS, **TAUGHT),
    moves(LEARNS, TAUGHT, teacher_weight=1.0),
    moves({"passes"}, TAUGHT, teacher_passes=2),
    moves({"deep", "passes"} | LEARNS, **DEEP),
    moves({"deep"} | LEARNS, DEEP, deep_schedule="softmax"),
    moves({"halt", "passes"} | LEARNS, {**HALT, "halt.weight": 0.0}, halt_weight=0.5),
    moves({"halt"} | LEARNS, HALT, halt_prior=0.5),
    moves({"halt"} | LEARNS, HALT, halt_beta=1.0),
    moves({"aux", "trained"} | LEARNS, NO_PARTS, aux_weight=0.5),
    moves(LEARNS, AUX, aux_weight=1.0),
    moves({"aux", "trained", "passes"} | LEARNS, AUX, aux_decoder="shared"),
    moves({"aux", "trained"} | LEARNS, AUX, aux_layers=1),
    moves({"aux"} | LEARNS, AUX, aux_embed="own"),
    moves({"aux"} | LEARNS, AUX, aux_position=1),
    moves({"aux"} | LEARNS, AUX, aux_question=True),
    moves({"aux"} | LEARNS, AUX, aux_norm="token_mean"),
    moves({"gradient"}, AUX, aux_detach=True),
    moves({"trained"}, AUX, aux_trains="base"),
    moves({"trained", "gradient"}, AUX, aux_trains="decoder"),
    moves({"aux", "trained"} | LEARNS, SHARED, aux_lora_rank=2),
    # stabilisers
    moves(STATES, residual="B"),
    moves(STATES, alpha=0.3),
    moves(STATES | {"trained"}, alpha_learn="per_iter"),
    moves(STATES | {"trained"}, GATED, gate_shape="channel"),
    moves(STATES, GATED, gate_kind="sigmoid"),
    moves(STATES | {"trained"}, GATED, gate_kind="attention"),
    moves(STATES, rescale="none"),
    moves(STATES | {"trained"}, ADAPTER, adapter_width=8),
    moves(STATES | {"trained"}, ADAPTER, adapter_gain=True),
    moves(IN_TRAINING, PROJECT, project_dropout=0.5),
    moves(STATES | {"trained"}, PROJECT, project_norm=False),
    moves(STATES, feedback_scale=0.5),
    moves(STATES, shift=True),
    moves(STATES, {"loop.rescale": "none"}, feedback_site="pre_norm"),
    moves(STATES | {"trained"}, time="none"),
    moves(STATES | {"passes"}, time_inject="token"),
    moves(STATES, SINES, time_norm=True),
    moves(IN_TRAINING, noise=0.5),
    moves(STATES | {"trained"}, noise_level="delta"),
    moves(STATES | {"trained"}, **WITH_LORA),
    moves(STATES | {"trained"}, WITH_LORA, lora_rank=3),
    moves(STATES, WITH_LORA, lora_gamma=1.0),
    moves(STATES | {"trained"}, WITH_LORA, lora_targets=("c_attn",)),
    moves({"beyond"}, WITH_LORA, lora_beyond="off"),
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
    moves(FORWARD | {"passes"}, {**ALONE, "loop.time": "none"}, solver="damped"),
    moves({"gradient", "passes"}, SOLVED, solver_gradient="phantom"),
    moves(FORWARD | {"ran", "passes"}, SOLVED, solver_tol=1e9),
    moves({"gain", "passes"} | LEARNS, **GAIN),
    moves({"gain"} | LEARNS, GAIN, spectral_bound=0.0),
]  # fmt: skip


@pytest.mark.parametrize(("base", "fields", "what"), FIELDS)
def test_a_setting_moves_what_it_should_and_nothing_else(base, fields, what):
    assert moved_by(change(BASE, **base), **fields) == what


def test_no_setting_is_forgotten():
    moved = {name for row in FIELDS for name in row.values[1]}
    elsewhere = {"aux_source", "hid_width"} | STOPPING  # test_simcot_decoder.py, test_codi.py
    assert {field.name for field in dataclasses.fields(Slr)} - moved == elsewhere

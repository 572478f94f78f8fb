"""LOTUS equals its slow reference, batches equal single rows, and answering equals training (lotus.md, 3 to 6).

The invariants of section 9: test_lotus_invariants.py. Settings and curriculum: test_lotus_settings.py. LOTUS-aux:
test_lotus_aux.py. Read-outs: test_lotus_readout.py.
"""

import pytest

from innerloop.methods import Lotus
from tests.methods.reference_lotus import LotusReference
from tests.methods.slowly import assert_batch_is_its_rows, assert_decodes_as_forced, assert_terms_of_the_reference
from tests.methods.tools import (
    MIXED,
    WITH_LORA,
    assert_rows_do_as_alone,
    base,
    by_arch,
    change,
    choices,
    halting,
    on,
    rows_at,
    sharp_model,
)

BASE = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5)  # MIXED has 3, 0, 1, 4, 2, 0 steps of 3 to 8 tokens
STAGES = [3, 0, 1, 2, 3, 1]
HID = {"hid.weight": 1.0, "hid.teacher": "-"}
LOOPS = [
    {"loop.residual": "none"},
    {"loop.shift": True},
    {"loop.scale": 0.5},
    {"loop.residual": "none", "loop.shift": True, "loop.scale": 2.0},
    {"loop.rescale": "rms"},
    {"loop.site": "pre_norm"},
    {"max_loops": 0},
    {"max_loops": 5},
    {"loops_per_block": 2},
    {"loops_per_block": 0, "last_pass": "refeed"},
    HID,
    {**HID, "answer_weight": 0.0, "last_pass": "refeed"},
]
STABLE = {"loop.time": "lookup", **WITH_LORA}


def lotus(arch, fields):
    """LOTUS on an architecture; where it follows a run's states, those of the same weights."""
    model = on(arch, change(BASE, **fields))
    model._frozen["teacher"] = base(arch)
    return model


@choices(
    last_pass=["kv", "refeed"],
    readout_offset=[-1, 0],
    overflow=["truncate", "spill"],
    supervision=["post", "per_iter"],
)
@by_arch
def test_the_terms_of_a_mixed_batch_equal_the_reference(arch, settings):
    model = lotus(arch, settings)
    assert_terms_of_the_reference(model, LotusReference(model), STAGES)


@pytest.mark.parametrize("fields", LOOPS, ids=str)
@by_arch
def test_other_loops_equal_the_reference(arch, fields):
    model = lotus(arch, fields)
    assert_terms_of_the_reference(model, LotusReference(model), STAGES)


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        *[(arch, {}) for arch in ("gpt2", "llama", "qwen2", "qwen3")],
        *[("gpt2", fields) for fields in LOOPS],
        ("gpt2", {**STABLE, "loop.time_inject": "token"}),
        ("llama", {**STABLE, "loop.shift": True, "supervision": "per_iter"}),
    ],
    ids=str,
)
def test_fewer_steps_than_blocks_more_and_none_in_one_batch_do_as_alone(arch, fields):
    model = lotus(arch, fields)
    rows = rows_at(model, MIXED, [3, 0, 3, 3, 2, 3])
    assert_batch_is_its_rows(model, rows, apart={"hid"})  # whose unit is the spread in the batch


@pytest.mark.parametrize("stop", ["kl", "delta"])
@by_arch
def test_stabilisers_of_slr_work_in_batches_whose_rows_stop_at_different_times(arch, stop):
    method = change(BASE, latents_per_block=2, loops_per_block=2, stop={"rule": stop}, step_weight=0.05, **STABLE)
    assert_rows_do_as_alone(halting(arch, method))


@pytest.mark.parametrize("fields", [{}, {"last_pass": "refeed"}, {"max_loops": 0}, {"loop.residual": "none"}], ids=str)
@by_arch
def test_answering_takes_the_passes_of_the_card_and_equals_teacher_forcing(arch, fields):
    """One pass for the question, R + 1 over the latents (the last with <eot>), one for each token but the first."""
    model = sharp_model(change(BASE, **fields), arch)
    n_before = 0 if model.method.n_loops(3) == 0 else 1 + model.method.n_loops(3)
    assert_decodes_as_forced(model, LotusReference(model), n_before)

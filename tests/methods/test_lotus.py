"""LOTUS equals its slow reference, batches equal single rows, and answering equals training (lotus.md, 3 to 6).

The invariants of section 9: test_lotus_invariants.py. Settings and curriculum: test_lotus_settings.py. LOTUS-aux:
test_lotus_aux.py. Read-outs: test_lotus_readout.py.
"""

from collections import Counter

import pytest
import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Lotus
from tests.methods.reference_lotus import LotusReference
from tests.methods.slowly import assert_decodes_as_forced, assert_terms_of_the_reference
from tests.methods.tools import (
    MIXED,
    ROUNDED,
    assert_causal,
    assert_close,
    assert_learns_by_heart,
    assert_rows_do_as_alone,
    by_arch,
    change,
    choices,
    halting,
    logits_of,
    on,
    rows_at,
    sharp_model,
)
from tests.models import answers_of, moved, saved, tiny_model

BASE = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5)  # MIXED has 3, 0, 1, 4, 2, 0 steps of 3 to 8 tokens
STAGES = [3, 0, 1, 2, 3, 1]
LOOPS = [
    {"inject": "replace"},
    {"shift": True},
    {"feedback_scale": 0.5},
    {"inject": "replace", "shift": True, "feedback_scale": 2.0},
    {"residual": "A", "rescale": "rms"},
    {"feedback_site": "pre_norm"},
    {"max_loops": 0},
    {"max_loops": 5},
    {"loops_per_block": 2},
    {"loops_per_block": 0, "last_pass": "refeed"},
    {"hid_weight": 1.0, "teacher": "self"},
    {"hid_weight": 1.0, "teacher": "self", "answer_weight": 0.0, "last_pass": "refeed"},
]
STABLE = {"time": "lookup", "lora": "per_iter", "lora_rank": 2}

by_loop = pytest.mark.parametrize("fields", LOOPS, ids=str)


# The reference, and single rows


@choices(
    last_pass=["kv", "refeed"],
    readout_offset=[-1, 0],
    overflow=["truncate", "spill"],
    supervision=["post", "per_iter"],
)
@by_arch
def test_the_terms_of_a_mixed_batch_equal_the_reference(arch, settings):
    model = on(arch, change(BASE, **settings))
    assert_terms_of_the_reference(model, LotusReference(model), STAGES)


@by_loop
@by_arch
def test_other_loops_equal_the_reference(arch, fields):
    model = on(arch, change(BASE, **fields))
    assert_terms_of_the_reference(model, LotusReference(model), STAGES)


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        *[(arch, {}) for arch in ("gpt2", "llama", "qwen2", "qwen3")],
        *[("gpt2", fields) for fields in LOOPS],
        ("gpt2", {**STABLE, "time_inject": "token"}),
        ("llama", {**STABLE, "shift": True, "supervision": "per_iter"}),
    ],
    ids=str,
)
def test_fewer_steps_than_blocks_more_and_none_in_one_batch_do_as_alone(arch, fields):
    model = on(arch, change(BASE, **fields))
    rows = rows_at(model, MIXED, [3, 0, 3, 3, 2, 3])
    whole, sums, n = model(model.batch(rows)).terms, Counter(), Counter()
    for row, logits in zip(rows, logits_of(model, rows)):
        assert_close(logits, logits_of(model, [row])[0], ROUNDED)
        alone = model.batch([row])
        for name, mean in model(alone).terms.items():
            sums[name] += mean * alone.counts()[name]
            n[name] += alone.counts()[name]
    for name in whole.keys() - {"hid"}:  # whose unit is the spread in the batch
        assert_close(whole[name], sums[name] / n[name], ROUNDED)


@pytest.mark.parametrize("stop", ["kl", "delta"])
@by_arch
def test_stabilisers_of_slr_work_in_batches_whose_rows_stop_at_different_times(arch, stop):
    assert_rows_do_as_alone(
        halting(arch, Lotus(n_blocks=3, latents_per_block=2, loops_per_block=2, stop=stop, **STABLE))
    )


def test_a_token_changes_no_logits_before_it():
    assert_causal(sharp_model(BASE), MIXED[0])


# Answering


@pytest.mark.parametrize("fields", [{}, {"last_pass": "refeed"}, {"max_loops": 0}, {"inject": "replace"}], ids=str)
@by_arch
def test_answering_takes_the_passes_of_the_card_and_equals_teacher_forcing(arch, fields):
    """One pass for the question, R + 1 over the latents (the last with <eot>), one for each token but the first."""
    model = sharp_model(change(BASE, **fields), arch)
    n_before = 0 if model.method.n_loops(3) == 0 else 1 + model.method.n_loops(3)
    assert_decodes_as_forced(model, LotusReference(model), n_before)


@pytest.mark.parametrize("fields", [{}, {**STABLE, "last_pass": "refeed", "shift": True}], ids=str)
@by_arch
def test_a_saved_model_gives_the_same_answers(tmp_path, arch, fields):
    model = moved(tiny_model(change(BASE, **fields), arch))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == model.method
    assert torch.equal(answers_of(loaded), answers_of(model))
    assert loaded.loss(MIXED).terms == model.loss(MIXED).terms


@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(examples):
    assert_learns_by_heart(Lotus(n_blocks=2, latents_per_block=1), examples)

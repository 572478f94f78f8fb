"""LOTUS equals its slow reference, and batches equal single rows; LOTUS-aux; answering (lotus.md, 3 to 6).

The invariants of section 9: test_lotus_invariants.py. Settings and curriculum: test_lotus_settings.py. Read-outs:
test_lotus_readout.py.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Lotus
from innerloop.model.step_decoder import aux_loss
from tests.methods.reference_lotus import LotusReference, shortened
from tests.methods.slowly import assert_batch_is_its_rows, assert_decodes_as_forced, assert_terms_of_the_reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    WITH_LORA,
    assert_close,
    assert_rows_do_as_alone,
    assert_same_gradients,
    base,
    by_arch,
    change,
    choices,
    gradients,
    halting,
    on,
    rows_at,
    sharp_model,
)
from tests.models import answers_of, moved, saved, tiny_model

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
    assert_batch_is_its_rows(model, rows)


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


# LOTUS-aux: blocks must tell their steps to an auxiliary decoder, which is left out when answering (lotus.md, 4).
# The decoder itself, its head, its copies and low-rank updates: test_simcot_decoder.py.

HOST = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.0)
AUX = change(HOST, aux={"weight": 0.5})
SHARED = {"aux.lora_rank": 2}
DECODERS = [
    {},
    SHARED,
    {"aux.layers": 1},
    {"aux.embed": "own", "aux.norm": "per_row", "aux.position": 3},
    {"step_weight": 0.5, "loop.site": "pre_norm"},
    {"aux.question": True},
    {"supervision": "post_all", "aux.norm": "per_row"},
    {**SHARED, "aux.question": True, "aux.position": 2},
]

by_decoder = pytest.mark.parametrize("fields", DECODERS, ids=str)


@by_decoder
@by_arch
def test_the_terms_with_a_decoder_equal_the_reference(arch, fields):
    model = on(arch, change(AUX, **fields))
    assert_terms_of_the_reference(model, LotusReference(model), STAGES)


@choices(
    supervision=["post", "per_iter", "post_all"], last_pass=["kv", "refeed"], **{"loop.site": ["post_norm", "pre_norm"]}
)
def test_what_is_told_comes_from_the_pass_of_h(settings):
    """post: h^(R), post_all at once; per_iter: block i from h^(i); after the final norm, whichever pass computes it."""
    model = on("gpt2", change(AUX, **settings))
    assert_close(model.loss(MIXED).terms["aux"], LotusReference(model).terms(list(MIXED))["aux"].detach())


@torch.no_grad()
def test_what_spills_over_the_last_latent_is_divided_by_but_not_read():
    """Position K c, the last latent, reads one token more, as in the authors' code; of each step all tokens count."""
    model = on("gpt2", Lotus(n_blocks=1, latents_per_block=2, step_weight=1.0, overflow="spill"))
    (example,) = [one for one in MIXED if len(one.steps) == 1]
    (row,), ids = model.rows([example]), model.encoder.steps(example)[0].ids
    assert [target.at - row.region_start for target in row.token_targets] == [-1, 0, 1]
    assert row.n_unread == len(ids) - 3 > 0
    slow = LotusReference(model)
    logits = slow.run(example.question, 1).logits[-1]
    total = cross_entropy(logits, torch.tensor(ids[:3]), reduction="sum")
    assert_close(model.loss([example]).terms["step"], total / len(ids))


def test_where_there_are_no_steps_nothing_is_told():
    assert "aux" not in on("gpt2", AUX).loss([MIXED[1], MIXED[5]]).terms  # and there is no division by zero


@by_decoder
@by_arch
def test_the_gradient_reaches_the_latents_of_every_block_that_has_a_step(arch, fields):
    model = on(arch, change(AUX, **{**fields, "step_weight": 0.0}))
    batch = model.batch(model.rows(MIXED[2:3] + MIXED[4:5]))  # one step and two
    thought = model.think(batch)
    model.written_logits(batch, thought)
    thought.answer = tuple(state.detach().requires_grad_() for state in thought.answer)
    aux_loss(model.loss_inputs(batch, thought), model.step_decoder, model.loop).backward()
    reached = thought.answer[-1].grad[:, :12].abs().amax(2).unflatten(1, (3, 4)) > 0
    told = [[True] * 3] * 2 if model.method.supervision == "post_all" else [[True, False, False], [True, True, False]]
    assert reached.all(2).tolist() == reached.any(2).tolist() == told
    model.zero_grad()


@pytest.mark.parametrize("fields", [*DECODERS, WITH_LORA, {**WITH_LORA, **SHARED}], ids=str)
@by_arch
def test_answers_and_their_cost_are_the_hosts(arch, fields):
    """Beside low-rank updates of the loop too, those of a decoder that shares the model are its own."""
    model = on(arch, change(AUX, **fields))
    host = on(arch, change(HOST, **{name: value for name, value in fields.items() if not name.startswith("aux")}))
    host.loop.load_state_dict(model.loop.state_dict())
    for one, other in zip(model.answer_logits(MIXED), host.answer_logits(MIXED)):
        assert torch.equal(one, other)
    answers = [twin.generate(QUESTIONS, max_new_tokens=5) for twin in (model, host)]
    assert [one.text for one in answers[0]] == [one.text for one in answers[1]]
    assert [one.cost.passes for one in answers[0]] == [one.cost.passes for one in answers[1]]


def test_making_a_decoder_draws_nothing():
    draws = []
    for method in (HOST, AUX):
        torch.manual_seed(3)
        assert (on("gpt2", method, stirred=False).step_decoder is None) == (method is HOST)
        draws.append(torch.rand(1))
    assert torch.equal(*draws)


@pytest.mark.parametrize("n_layers", [1, 2, 9])
@by_arch
@torch.no_grad()
def test_a_copy_begins_as_the_first_layers_of_the_model(arch, n_layers):
    model = on(arch, change(AUX, aux={"layers": n_layers}), stirred=False)
    x = torch.randn(2, 7, model.backbone.width, dtype=torch.float64)
    expected = shortened(model.backbone.lm, min(n_layers, 2))(inputs_embeds=x).logits
    assert_close(model.step_decoder.own.head(model.step_decoder.own(x)), expected, ROUNDED)
    assert len(model.step_decoder.own.layers) == min(n_layers, 2) and len(model.backbone.layers) == 2


@pytest.mark.parametrize("fields", [{}, {"aux.layers": 1, "aux.question": True}], ids=str)
@by_arch
def test_a_saved_model_gives_the_same_answers_and_tells_the_same(tmp_path, arch, fields):
    model = moved(tiny_model(change(AUX, **fields), arch))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert torch.equal(answers_of(loaded), answers_of(model))
    assert loaded.loss(MIXED).terms == model.loss(MIXED).terms
    without = LatentModel.from_pretrained(tmp_path / "run", method=HOST, device="cpu")
    assert without.step_decoder is None and torch.equal(answers_of(without), answers_of(model))


def test_gradients_do_not_change_when_passes_are_checkpointed():
    model = on("llama", change(AUX, step_weight=0.5, **SHARED, **WITH_LORA)).train()
    kept = gradients(model, model.loss(MIXED).loss)
    model.checkpoint_passes = True
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), kept)

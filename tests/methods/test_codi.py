"""CODI: it equals the slow reference, and the invariants of its card (codi.md, section 9).

1.  No projection, beta = gamma = 0 == Coconut's last stage: tests/test_one_loop.py.
2.  alpha = beta = 0 == CoT SFT on the teacher's rows.
3.  k = 0, beta = gamma = 0 == No-CoT with markers: tests/test_one_loop.py.
4.  Where student and teacher read the same, L_KD = 0.
5.  L_KD of l1 and l2 has no scale, that of smooth_l1 has.
6.  No gradient runs through the teacher.
7.  z_(k+1) is used by nothing.
8.  L_S of a batch is that of its rows, L_KD differs by the spread alone.
9.  Cached == uncached, answering == teacher forcing.
10. The Jacobi form with k iterations is the same: test_pccot.py, tests/test_one_loop.py.
"""

import copy
import dataclasses
import math

import pytest
import torch

from innerloop import Coconut, Cot, Example, InputError
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Codi, Lotus
from innerloop.model.losses import follow_loss
from innerloop.text.row import ANSWER_PASS, Follow, Kind, Row
from tests.methods.gauges import FORWARD, LEARNS, moved_by
from tests.methods.reference_codi import CodiReference
from tests.methods.slowly import assert_decodes_as_forced, assert_terms_of_the_reference
from tests.methods.tools import (
    MIXED,
    ROUNDED,
    assert_causal,
    assert_close,
    assert_learns_by_heart,
    assert_rows_do_as_alone,
    assert_same_gradients,
    by_arch,
    change,
    choices,
    gradients,
    halting,
    logits_of,
    on,
    passes,
    same_weights,
    sharp_model,
    states,
)
from tests.models import answers_of, moved, saved, tiny_model

BASE = Codi(n_latents_total=3)
FOLLOWS = {"teacher": "self", "hid_weight": 1.0, "step_weight": 0.0, "max_loops": 1}
DISTANCES = ["smooth_l1", "l1", "l1_sum", "l2", "cosine"]
TERMS = {"answer", "hid", "teacher"}
STATES = FORWARD | {"hid"}
STOPS = {"ran", "score", "logits", "beyond"}
TIME, LORA, ADAPTER = {"time": "lookup"}, {"lora": "per_iter", "lora_rank": 2}, {"rescale": "adapter"}
AT_ONCE = {"stop": "delta", "stop_threshold": -math.inf}
NEVER = {"stop": "kl", "stop_threshold": math.inf}
GAIN = {"spectral_weight": 1.0, "spectral_bound": 0.1}

by_distance = pytest.mark.parametrize("hid_distance", DISTANCES)


# The reference


@choices(hid_distance=DISTANCES, hid_layers=["last", "all", "all+emb"])
@by_arch
def test_all_terms_and_their_gradients_equal_the_reference(arch, settings):
    model = on(arch, change(BASE, **settings))
    assert_terms_of_the_reference(model, CodiReference(model))


@pytest.mark.parametrize(
    "fields",
    [
        {"n_latents_total": 0},
        {"n_latents_total": 1},
        {"n_latents_total": 6, "include_last_step": True},
        {"project_norm": False, "adapter_width": 8},
        {"rescale": "none"},
        {"answer_weight": 0.5, "hid_weight": 20.0, "teacher_weight": 2.0},
        {"hid_weight": 0.0},
        {"teacher_weight": 0.0},
        {"hid_weight": 0.0, "teacher_weight": 0.0},
        {"teacher_passes": 2},
        {"feedback_site": "pre_norm"},
    ],
    ids=str,
)
@by_arch
def test_other_settings_equal_the_reference(arch, fields):
    model = on(arch, change(BASE, **fields))
    assert_terms_of_the_reference(model, CodiReference(model))


@pytest.mark.parametrize("passes_of_teacher", [1, 2])
def test_a_second_pass_of_the_teacher_has_a_dropout_of_its_own(passes_of_teacher):
    """codi.md, section 3: one pass and detach is equal when dropout is off."""
    fields = {"resid_pdrop": 0.3, "num_hidden_layers": 2}
    model = tiny_model(change(BASE, teacher_passes=passes_of_teacher), "gpt2", **fields).train()
    once = tiny_model(BASE, "gpt2", **fields).train()
    once.load_state_dict(model.state_dict())
    terms = []
    for twin in (model, once):
        torch.manual_seed(5)
        with passes(twin) as seen:
            terms.append(twin.loss(MIXED).terms)
        assert len(seen) == 1 + 2 + 1 + (passes_of_teacher if twin is model else 1)
    assert torch.equal(terms[0]["teacher"], terms[1]["teacher"])
    assert torch.equal(terms[0]["hid"], terms[1]["hid"]) == (passes_of_teacher == 1)


# The layout (codi.md, section 2)


def test_the_teacher_reads_all_steps_but_the_last_and_both_stand_before_the_answers_digits():
    model = on("gpt2", BASE)
    for example, row in zip(MIXED, model.rows(MIXED)):
        read = [piece.step for piece in row.teacher.pieces if piece.kind is Kind.STEP]
        assert read == list(range(len(example.steps) - 1))
        (follow,) = row.follows
        assert (follow.loop, follow.weight) == (ANSWER_PASS, 1.0)
        mine, taught = row.ids(), row.teacher.ids()
        assert mine[follow.at] == taught[follow.teacher_at] == model.tokenizer.encode("###")[-1]
        assert (
            mine[follow.at + 1 :]
            == taught[follow.teacher_at + 1 :]
            == [
                *model.tokenizer.encode(example.answer, add_special_tokens=False),
                model.tokenizer.eos_token_id,
            ]
        )
        assert row.teacher.labels()[: len(row.teacher.prefix[0].ids)] == [-100] * len(row.teacher.prefix[0].ids)
    kept = on("gpt2", change(BASE, include_last_step=True)).rows(MIXED)
    assert [len(row.teacher.step_ends()) for row in kept] == [len(example.steps) for example in MIXED]


@pytest.mark.parametrize("answer", ["3", "-3", "3 0", "+ 4 ; 1"])
def test_the_boundary_is_before_the_first_token_of_any_answer(answer):
    model = on("gpt2", BASE)
    example = Example("2 ; + 3", ("2 + 3 = 0",), answer)
    (row,) = model.rows([example])
    (follow,) = row.follows
    digits = model.tokenizer.encode(answer, add_special_tokens=False)
    assert row.ids()[follow.at + 1 :] == [*digits, model.tokenizer.eos_token_id]


@pytest.mark.parametrize("method", [BASE, Lotus(n_blocks=60, latents_per_block=1, **FOLLOWS)], ids=lambda one: one.name)
def test_what_the_teacher_reads_must_fit_the_context_too(method):
    model = on("gpt2", method)
    example = Example("2 ; + 3", ("2 + 3 = 0",) * 60, "0")
    assert model.method.longest(example, model.spell) > model.backbone.context_length
    with pytest.raises(InputError, match="reads at most 256"):
        model.loss([example])


def test_a_teacher_in_a_folder_may_be_the_same_model_or_for_the_last_layer_another_but_not_of_another_width(tmp_path):
    own = tiny_model(change(BASE, teacher_weight=0.0), "gpt2", num_hidden_layers=2)
    folders = [saved(own, tmp_path / "same")]
    for name, fields in (("deep", {"num_hidden_layers": 3}), ("wide", {"hidden_size": 48})):
        folders.append(saved(tiny_model(Cot(), "gpt2", **{"num_hidden_layers": 2, **fields}), tmp_path / name))
    same, deep, wide = (change(own.method, teacher=str(folder)) for folder in folders)
    twin = LatentModel(own.backbone, own.tokenizer, same).eval()
    twin.loop.load_state_dict(own.loop.state_dict())
    assert_close(twin.loss(MIXED).terms["hid"], own.loss(MIXED).terms["hid"], 1e-6)
    for method in (deep, wide, change(wide, hid_layers="last")):
        with pytest.raises(InputError, match="set teacher to a run of the same model"):
            LatentModel(own.backbone, own.tokenizer, method).loss(MIXED)
    assert LatentModel(own.backbone, own.tokenizer, change(deep, hid_layers="last")).loss(MIXED).terms["hid"] > 0


def test_a_wider_teacher_is_followed_after_a_learned_projection(tmp_path):
    wide = tiny_model(Cot(), "gpt2", num_hidden_layers=2, hidden_size=48)
    method = change(BASE, teacher_weight=0.0, teacher=str(saved(wide, tmp_path / "wide")), hid_width=48)
    student = tiny_model(method, "gpt2", num_hidden_layers=2)
    out = student.loss(MIXED)
    out.loss.backward()
    assert student.follower.weight.shape == (48, student.backbone.width)
    assert student.follower.weight.grad.abs().max() > 0
    # with the identity as projection, a teacher of the same width is followed as without one
    same = change(method, teacher=str(saved(student, tmp_path / "same")), hid_width=student.backbone.width)
    projected = LatentModel(student.backbone, student.tokenizer, same)
    torch.nn.init.eye_(projected.follower.weight)
    plain = LatentModel(student.backbone, student.tokenizer, change(same, hid_width=0))
    for part, name in ((projected.loop, "loop"), (plain.loop, "loop")):
        part.load_state_dict(getattr(student, name).state_dict())
    assert_close(projected.eval().loss(MIXED).terms["hid"], plain.eval().loss(MIXED).terms["hid"], 1e-6)
    projected.save_pretrained(tmp_path / "saved")
    again = LatentModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.follower.weight, projected.follower.weight)
    with pytest.raises(InputError, match="hid_width is the width of another model's states"):
        change(BASE, hid_width=48)


# 2


@pytest.mark.parametrize("last", [False, True])
@by_arch
def test_2_the_teachers_term_alone_is_cot_on_its_rows(arch, last):
    model = on(arch, change(BASE, answer_weight=0.0, hid_weight=0.0, include_last_step=last))
    read = [example if last else dataclasses.replace(example, steps=example.steps[:-1]) for example in MIXED]
    cot = same_weights(model, Cot())
    one, other = model.loss(MIXED).loss, cot.loss(read).loss
    assert_close(one, other)
    mine = {name: g for name, g in gradients(model, one).items() if name.startswith("backbone")}
    assert_same_gradients(mine, gradients(cot, other))


# 4, 5, 6: L_KD


@by_distance
@by_arch
def test_4_the_distance_is_zero_where_student_and_teacher_read_the_same(arch, hid_distance):
    """No steps, no latents, and here no markers either."""
    model = on(arch, Codi(n_latents_total=0, hid_distance=hid_distance))
    rows = []
    for row in model.rows([MIXED[1], MIXED[5], MIXED[2]]):  # of one step, the last, nothing is left
        (follow,) = row.follows
        twin = Row(row.prefix[:1], [], row.suffix[1:], teacher=row.teacher)
        twin.follows = [Follow(ANSWER_PASS, follow.at - 2, follow.teacher_at)]
        assert twin.ids() == row.teacher.ids()
        rows.append(twin)
    assert model(model.batch(rows)).terms["hid"].abs() < 1e-6
    assert model.loss([MIXED[1], MIXED[5]]).terms["hid"] > 1e-3


@by_distance
@torch.no_grad()
def test_5_a_common_scale_of_student_and_teacher_changes_smooth_l1_alone(hid_distance):
    model = on("gpt2", change(BASE, hid_distance=hid_distance, hid_layers="last"))
    batch = model.batch(model.rows(MIXED))
    thought = model.think(batch)
    model.written_logits(batch, thought)
    targets = tuple(torch.randn(*batch.teacher.ids_BS.shape, 32, dtype=torch.float64) for _ in range(3))
    answer, distances = thought.answer, []
    for scale in (1.0, 7.0):
        thought.answer = tuple(state * scale for state in answer)
        distances.append(
            follow_loss(
                model.loss_inputs(batch, thought), tuple(target * scale for target in targets), model.method.losses
            ).item()
        )
    assert (distances[1] == pytest.approx(distances[0], rel=1e-5)) == (hid_distance != "smooth_l1")


@by_distance
def test_6_no_gradient_runs_through_the_teacher(hid_distance):
    """The same gradient as with a teacher whose weights are a copy, which gets none."""
    fields = {"hid_distance": hid_distance, "answer_weight": 0.0}
    own = on("llama", change(BASE, teacher_weight=0.0, **fields))
    apart = same_weights(own, change(BASE, teacher="-", teacher_weight=0.0, **fields))
    apart._frozen["teacher"] = copy.deepcopy(own)
    by_kd = gradients(own, own.loss(MIXED).loss)
    other = gradients(apart, apart.loss(MIXED).loss)
    assert all(torch.equal(by_kd[name], other[name]) for name in by_kd)
    assert all(p.grad is None for p in apart.teacher.parameters())
    # and with what the teacher learns itself, the sum of both
    learning = same_weights(own, change(BASE, teacher_weight=2.0, **fields))
    alone = same_weights(own, change(BASE, teacher_weight=2.0, hid_weight=0.0, **fields))
    by_cot = gradients(alone, alone.loss(MIXED).loss)
    both = gradients(learning, learning.loss(MIXED).loss)
    assert_same_gradients(both, {name: by_kd[name] + by_cot[name] for name in by_kd})


# 7


@pytest.mark.parametrize("k", [1, 2, 4])
def test_7_what_the_last_latent_makes_is_used_by_no_term(k):
    model = on("gpt2", change(BASE, n_latents_total=k))
    with states(model) as seen:
        model.loss(MIXED).loss.backward()
    model.zero_grad()
    *thought, answer, _ = seen  # the last pass is the teacher's
    assert answer.grad[:, 0].abs().max() == 0 < answer.grad[:, 1:].abs().max()
    assert len(thought) == k and all(state.grad[:, -1].abs().max() > 0 for state in thought)


# 8


@pytest.mark.parametrize("k", [0, 1, 3])
@by_arch
def test_8_a_batch_is_the_mean_of_its_rows(arch, k):
    model = on(arch, change(BASE, n_latents_total=k, hid_distance="cosine"))  # which has no unit
    rows = model.rows(MIXED)
    whole = model(model.batch(rows)).terms
    for row, logits in zip(rows, logits_of(model, rows)):
        assert_close(logits, logits_of(model, [row])[0], ROUNDED)
    for name in TERMS:
        alone = [(model.batch([row]).counts()[name], model(model.batch([row])).terms[name]) for row in rows]
        assert_close(whole[name], sum(n * term for n, term in alone) / sum(n for n, _ in alone), ROUNDED)


@pytest.mark.parametrize("hid_distance", ["smooth_l1", "l1", "l1_sum", "l2"])
def test_8_the_distance_of_a_batch_differs_by_its_spread_alone(hid_distance):
    model = on("gpt2", change(BASE, hid_distance=hid_distance, hid_layers="last"))
    slow, power = CodiReference(model), 2 if hid_distance == "l2" else 1
    taught = []
    for example in MIXED:
        read, _ = slow.taught(example)
        taught.append(slow.states(slow.embed(read), len(read) - len(slow.answer(example)))[-1].detach())
    raw = [model.loss([e]).terms["hid"] * t.std() ** power for e, t in zip(MIXED, taught)]
    whole = model.loss(MIXED).terms["hid"] * torch.stack(taught).std() ** power
    assert_close(whole, torch.stack(raw).mean(), 1e-5)


def test_8_a_global_batch_in_parts_has_its_mean():
    model = on("gpt2", change(BASE, hid_distance="cosine"))
    whole = model.loss(MIXED).terms
    parts = [model.batch(model.rows(part)) for part in (MIXED[:2], MIXED[2:])]
    counts = {name: sum(part.counts()[name] for part in parts) for name in parts[0].counts()}
    outs = [model(part, n_items=counts).terms for part in parts]
    for name in TERMS:
        assert_close(outs[0][name] + outs[1][name], whole[name])


# 9


@pytest.mark.parametrize("fields", [{"stop": "delta"}, {"stop": "kl", "residual": "B", **TIME, **LORA}], ids=str)
@by_arch
def test_stabilisers_of_slr_work_in_batches_whose_rows_stop_at_different_times(arch, fields):
    assert_rows_do_as_alone(halting(arch, change(BASE, n_latents_total=5, **fields)))


@pytest.mark.parametrize("k", [0, 1, 4])
@by_arch
def test_9_answering_takes_the_passes_of_the_card_and_equals_teacher_forcing(arch, k):
    model = sharp_model(change(BASE, n_latents_total=k), arch)
    assert_decodes_as_forced(model, CodiReference(model), passes_before=k)


def test_the_number_of_latents_may_be_changed_when_answering():
    """codi.md, section 6: another k than in training is the same as that k."""
    model = on("gpt2", change(BASE, **LORA))
    for k in (1, 2, 6):
        other = same_weights(model, change(BASE, n_latents_total=k))
        other.loop = model.loop
        answers = [one.generate([MIXED[0].question], max_new_tokens=4, **options)[0]
                   for one, options in ((model, {"loops": k - 1}), (other, {}))]  # fmt: skip
        assert answers[0].text == answers[1].text and answers[0].cost.loops == answers[1].cost.loops == k - 1
        assert answers[0].cost.passes == answers[1].cost.passes
        assert answers[0].cost.thought_tokens == answers[1].cost.thought_tokens


@pytest.mark.parametrize("k", [0, 1, 4])
def test_training_takes_k_plus_one_passes_and_one_of_the_teacher(k):
    model = on("gpt2", change(BASE, n_latents_total=k))
    with passes(model) as seen:
        model.loss(MIXED)
    assert len(seen) == k + 1 + 1


def test_a_token_changes_no_logits_before_it():
    assert_causal(sharp_model(BASE), MIXED[0])


@by_arch
def test_a_saved_model_gives_the_same_answers(tmp_path, arch):
    model = moved(tiny_model(change(BASE, adapter_width=8), arch))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == model.method
    assert torch.equal(answers_of(loaded), answers_of(model))
    assert loaded.loss(MIXED).terms == model.loss(MIXED).terms


def test_gradients_do_not_change_when_passes_are_checkpointed():
    model = on("llama", BASE).train()
    kept = gradients(model, model.loss(MIXED).loss)
    model.checkpoint_passes = True
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), kept)


@pytest.mark.slow
def test_eight_examples_are_learnt_by_heart(examples):
    assert_learns_by_heart(Codi(n_latents_total=2, hid_weight=0.0, teacher_weight=0.0), examples)


# Settings


@pytest.mark.parametrize(
    ("base", "fields", "what"),
    [
        ({}, {"n_latents_total": 2}, FORWARD | {"hid", "rows", "ran", "passes"}),
        ({}, {"include_last_step": True}, {"hid", "teacher", "passes"} | LEARNS),
        ({}, {"rescale": "none"}, FORWARD | {"hid", "trained"}),
        ({}, {"project_norm": False}, FORWARD | {"hid", "trained"}),
        ({}, {"project_dropout": 0.5}, {"answer", "hid"} | LEARNS),
        ({}, {"answer_weight": 0.5}, LEARNS),
        ({}, {"hid_weight": 20.0}, LEARNS),
        ({}, {"hid_layers": "all"}, {"hid"} | LEARNS),
        ({}, {"hid_distance": "l1"}, {"hid"} | LEARNS),
        ({}, {"teacher_weight": 2.0}, LEARNS),
        ({}, {"teacher_passes": 2}, {"passes"}),
        ({"teacher_weight": 0.0}, {"teacher": "another"}, {"hid", "passes"} | LEARNS),
        ({}, {"hid_weight": 0.0}, {"hid"} | LEARNS),
        # SLR's stabilisers and stop rules
        ({}, {"adapter_width": 8}, STATES | {"trained"}),
        (ADAPTER, {"adapter_gain": True}, STATES | {"trained"}),
        ({}, {"feedback_scale": 0.5}, STATES),
        ({}, {"feedback_site": "pre_norm"}, STATES),
        ({}, {"residual": "A"}, STATES),
        ({"residual": "A"}, {"alpha": 0.3}, STATES),
        ({"residual": "A"}, {"alpha_learn": "per_iter"}, STATES | {"trained"}),
        ({"residual": "C"}, {"gate_shape": "channel"}, STATES | {"trained"}),
        ({"residual": "C"}, {"gate_kind": "sigmoid"}, STATES),
        ({}, TIME, STATES | {"trained"}),
        (TIME, {"time_inject": "concat"}, STATES | {"trained"}),
        ({"time": "sinusoidal"}, {"time_norm": True}, STATES),
        ({}, {"noise": 0.5}, {"answer", "hid"} | LEARNS),
        ({**TIME, "noise": 0.5}, {"noise_level": "injected"}, STATES | {"trained"}),
        ({}, LORA, STATES | {"trained"}),
        (LORA, {"lora_rank": 3}, STATES | {"trained"}),
        (LORA, {"lora_gamma": 1.0}, STATES),
        (LORA, {"lora_targets": ("c_attn",)}, STATES | {"trained"}),
        (LORA, {"lora_beyond": "off"}, {"beyond"}),
        ({}, AT_ONCE, STOPS),
        (AT_ONCE, {"stop_threshold": math.inf}, STOPS),
        (AT_ONCE, {"min_loops": 2}, STOPS),
        (AT_ONCE, {"patience": 2}, STOPS),
        (NEVER, {"stop_agg": "max"}, set()),  # of one latent
        (NEVER, {"stop_site": "answer"}, {"score"}),
        ({}, {"bptt": 1}, {"gradient"}),
        ({}, {"detach": True}, {"gradient"}),
        ({}, GAIN, {"gain", "passes"} | LEARNS),
        (GAIN, {"spectral_bound": 0.0}, {"gain"} | LEARNS),
    ],
    ids=str,
)
def test_a_setting_moves_what_it_should_and_nothing_else(base, fields, what):
    assert moved_by(change(BASE, **base), **fields) == what


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"n_latents_total": -1}, "cannot be negative"),
        ({"step_weight": 0.1}, "set step_weight"),
        ({"deep_weight": 0.1}, "set step_weight"),
        ({"halt_weight": 0.1}, "set step_weight"),
        ({"solver": "plain"}, "set solver to none"),
        ({"hid_weight": -1.0}, "cannot be negative"),
        ({"teacher": None}, "set teacher"),
        ({"teacher": "runs/cot"}, "set teacher to self"),
        ({"teacher": "runs/cot", "teacher_weight": 0.0, "teacher_passes": 2}, "set teacher to self"),
        ({"project_dropout": 1.0}, "below 1"),
        ({"rescale": "rms", "project_norm": False}, "rescale=project"),
        ({"teacher_passes": 3}, "teacher_passes"),
        ({"hid_distance": "huber"}, "hid_distance"),
        ({"hid_layers": "first"}, "hid_layers"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_in_one_sentence(fields, mend):
    with pytest.raises(InputError, match=mend) as refusal:
        Codi(**fields)
    assert "\n" not in str(refusal.value)


def test_latents_one_after_the_other_cannot_be_shifted_nor_have_a_position_for_the_time():
    with pytest.raises(InputError, match="set shift to false"):
        on("gpt2", change(BASE, shift=True))
    for method in (BASE, Coconut()):
        with pytest.raises(InputError, match=r"which .* has not here: set it to add"):
            on("gpt2", change(method, **TIME, time_inject="token"))


@pytest.mark.parametrize("fields", [{}, {"hid_weight": 0.0}, {"teacher_weight": 0.0}], ids=str)
def test_steps_are_needed_by_the_teacher_alone(fields):
    assert change(BASE, **fields).needs_steps
    assert not change(BASE, hid_weight=0.0, teacher_weight=0.0).needs_steps

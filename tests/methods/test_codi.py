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
from itertools import product

import pytest
import torch

from innerloop import Cot, Example, InputError
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Codi, Lotus
from innerloop.model.losses import follow_loss
from innerloop.text.row import ANSWER_PASS, HiddenTarget, Kind, Row
from tests.fields import make
from tests.methods.reference_codi import CodiReference
from tests.methods.slowly import assert_batch_is_its_rows, assert_decodes_as_forced, assert_terms_of_the_reference
from tests.methods.tools import (
    MIXED,
    assert_close,
    assert_same_gradients,
    by_arch,
    change,
    gradients,
    on,
    passes,
    same_weights,
    sharp_model,
    states,
)
from tests.models import saved, tiny_model

BASE = Codi(n_latents_total=3)
DISTANCES = ["smooth_l1", "smooth_l1_raw", "l1", "l1_sum", "l2", "cosine"]
TERMS = {"answer", "hid", "teacher"}
LORA = {"loop.lora": "per_iter", "loop.lora_rank": 2}
STABLE = {**LORA, "loop.residual": "B", "loop.time": "lookup", "loop.rescale": "adapter"}

by_distance = pytest.mark.parametrize("distance", DISTANCES)
by_k = pytest.mark.parametrize("k", [0, 1, 4])


# The reference


@pytest.mark.parametrize(
    "fields",
    [
        *({"hid.distance": d, "hid.layers": layers} for d, layers in product(DISTANCES, ["last", "all", "all+emb"])),
        {"n_latents_total": 0},
        {"n_latents_total": 1},
        {"n_latents_total": 6, "include_last_step": True},
        {"loop.norm": False, "loop.width": 8},
        {"loop.rescale": "none"},
        {"answer_weight": 0.5, "hid.weight": 20.0, "teacher_weight": 2.0},
        {"hid.weight": 0.0},
        {"teacher_weight": 0.0},
        {"hid.weight": 0.0, "teacher_weight": 0.0},
        {"teacher_passes": 2},
        {"loop.site": "pre_norm"},
    ],
    ids=str,
)
@by_arch
def test_all_terms_and_their_gradients_equal_the_reference(arch, fields):
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


SIGNED = tuple(Example("2 ; + 3", ("2 + 3 = 0",), answer) for answer in ("-3", "3 0", "+ 4 ; 1"))


def test_the_teacher_reads_all_steps_but_the_last_and_both_stand_before_the_answers_own_tokens():
    model, examples = on("gpt2", BASE), MIXED + SIGNED
    for example, row in zip(examples, model.rows(examples)):
        read = [span.step for span in row.teacher.spans if span.kind is Kind.STEP]
        assert read == list(range(len(example.steps) - 1))
        (follow,) = row.hidden_targets
        assert (follow.iteration, follow.weight) == (ANSWER_PASS, 1.0)
        mine, taught, n_asked = row.ids(), row.teacher.ids(), len(row.teacher.prefix[0].ids)
        assert mine[follow.at] == taught[follow.teacher_at] == model.tokenizer.encode("###")[-1]
        own = [*model.tokenizer.encode(example.answer, add_special_tokens=False), model.tokenizer.eos_token_id]
        assert mine[follow.at + 1 :] == taught[follow.teacher_at + 1 :] == own
        assert row.teacher.labels()[:n_asked] == [-100] * n_asked
    kept = on("gpt2", change(BASE, include_last_step=True)).rows(MIXED)
    assert [len(row.teacher.step_ends()) for row in kept] == [len(example.steps) for example in MIXED]


LOTUS = Lotus(n_blocks=60, latents_per_block=1, max_loops=1, hid={"weight": 1.0, "teacher": "-"})


@pytest.mark.parametrize("method", [BASE, LOTUS], ids=lambda one: one.name)
def test_what_the_teacher_reads_must_fit_the_context_too(method):
    model, example = on("gpt2", method), Example("2 ; + 3", ("2 + 3 = 0",) * 60, "0")
    assert model.method.longest(example, model.encoder) > model.backbone.context_length
    with pytest.raises(InputError, match="reads at most 256"):
        model.loss([example])


def test_a_teacher_in_a_folder_may_be_the_same_model_or_for_the_last_layer_another_but_not_of_another_width(tmp_path):
    own = tiny_model(change(BASE, teacher_weight=0.0), "gpt2", num_hidden_layers=2)
    folders = [saved(own, tmp_path / "same")]
    for name, fields in (("deep", {"num_hidden_layers": 3}), ("wide", {"hidden_size": 48})):
        folders.append(saved(tiny_model(Cot(), "gpt2", **{"num_hidden_layers": 2, **fields}), tmp_path / name))
    same, deep, wide = (change(own.method, hid={"teacher": str(folder)}) for folder in folders)
    twin = LatentModel(own.backbone, own.tokenizer, same).eval()
    twin.loop.load_state_dict(own.loop.state_dict())
    assert_close(twin.loss(MIXED).terms["hid"], own.loss(MIXED).terms["hid"], 1e-6)
    for method in (deep, wide, change(wide, hid={"layers": "last"})):
        with pytest.raises(InputError, match="set teacher to a run of the same model"):
            LatentModel(own.backbone, own.tokenizer, method).loss(MIXED)
    assert LatentModel(own.backbone, own.tokenizer, change(deep, hid={"layers": "last"})).loss(MIXED).terms["hid"] > 0


@pytest.mark.parametrize("last", [False, True])
@by_arch
def test_2_the_teachers_term_alone_is_cot_on_its_rows(arch, last):
    model = on(arch, change(BASE, answer_weight=0.0, hid={"weight": 0.0}, include_last_step=last))
    read = [example if last else dataclasses.replace(example, steps=example.steps[:-1]) for example in MIXED]
    cot = same_weights(model, Cot())
    one, other = model.loss(MIXED).loss, cot.loss(read).loss
    assert_close(one, other)
    mine = {name: g for name, g in gradients(model, one).items() if name.startswith("backbone")}
    assert_same_gradients(mine, gradients(cot, other))


@by_distance
@by_arch
def test_4_the_distance_is_zero_where_student_and_teacher_read_the_same(arch, distance):
    """No steps, no latents, and here no markers either."""
    model = on(arch, Codi(n_latents_total=0, hid={"distance": distance}))
    rows = []
    for row in model.rows([MIXED[1], MIXED[5], MIXED[2]]):  # of one step, the last, nothing is left
        (follow,) = row.hidden_targets
        twin = Row(row.prefix[:1], [], row.suffix[1:], teacher=row.teacher)
        twin.hidden_targets = [HiddenTarget(ANSWER_PASS, follow.at - 2, follow.teacher_at)]
        assert twin.ids() == row.teacher.ids()
        rows.append(twin)
    assert model(model.batch(rows)).terms["hid"].abs() < 1e-6
    assert model.loss([MIXED[1], MIXED[5]]).terms["hid"] > 1e-3


@by_distance
@torch.no_grad()
def test_5_a_common_scale_of_student_and_teacher_changes_smooth_l1_alone(distance):
    model = on("gpt2", change(BASE, hid={"distance": distance, "layers": "last"}))
    batch = model.batch(model.rows(MIXED))
    thought = model.think(batch)
    model.written_logits(batch, thought)
    targets = tuple(torch.randn(*batch.teacher.ids_BS.shape, 32, dtype=torch.float64) for _ in range(3))
    answer, distances = thought.answer, []
    for scale in (1.0, 7.0):
        thought.answer = tuple(state * scale for state in answer)
        scaled = tuple(target * scale for target in targets)
        distances.append(follow_loss(model.loss_inputs(batch, thought), scaled, model.method.hid).item())
    assert (distances[1] == pytest.approx(distances[0], rel=1e-5)) == (not distance.startswith("smooth_l1"))


@by_distance
def test_6_no_gradient_runs_through_the_teacher(distance):
    """The same gradient as with a teacher whose weights are a copy, which gets none."""
    fields = {"hid.distance": distance, "answer_weight": 0.0}
    own = on("llama", change(BASE, teacher_weight=0.0, **fields))
    apart = same_weights(own, change(BASE, hid={"teacher": "-"}, teacher_weight=0.0, **fields))
    apart._frozen["teacher"] = copy.deepcopy(own)
    by_kd = gradients(own, own.loss(MIXED).loss)
    other = gradients(apart, apart.loss(MIXED).loss)
    assert all(torch.equal(by_kd[name], other[name]) for name in by_kd)
    assert all(p.grad is None for p in apart.teacher.parameters())
    # and with what the teacher learns itself, the sum of both
    learning = same_weights(own, change(BASE, teacher_weight=2.0, **fields))
    alone = same_weights(own, change(BASE, teacher_weight=2.0, hid={"weight": 0.0}, **fields))
    by_cot = gradients(alone, alone.loss(MIXED).loss)
    both = gradients(learning, learning.loss(MIXED).loss)
    assert_same_gradients(both, {name: by_kd[name] + by_cot[name] for name in by_kd})


@pytest.mark.parametrize("k", [1, 2, 4])
def test_7_what_the_last_latent_makes_is_used_by_no_term(k):
    model = on("gpt2", change(BASE, n_latents_total=k))
    with states(model) as seen:
        model.loss(MIXED).loss.backward()
    model.zero_grad()
    *thought, answer, _ = seen  # the last pass is the teacher's
    assert answer.grad[:, 0].abs().max() == 0 < answer.grad[:, 1:].abs().max()
    assert len(thought) == k and all(state.grad[:, -1].abs().max() > 0 for state in thought)


@pytest.mark.parametrize("fields", [{"n_latents_total": 0}, {"n_latents_total": 1}, {}, STABLE], ids=str)
@by_arch
def test_8_a_batch_is_the_mean_of_its_rows(arch, fields):
    model = on(arch, change(BASE, **{"hid.distance": "cosine"}, **fields))  # which has no unit
    assert model.loss(MIXED).terms.keys() == TERMS
    assert_batch_is_its_rows(model, model.rows(MIXED))


@pytest.mark.parametrize("distance", ["smooth_l1", "l1", "l1_sum", "l2"])
def test_8_the_distance_of_a_batch_differs_by_its_spread_alone(distance):
    model = on("gpt2", change(BASE, hid={"distance": distance, "layers": "last"}))
    slow, power = CodiReference(model), 2 if distance == "l2" else 1
    taught = []
    for example in MIXED:
        read, _ = slow.taught(example)
        taught.append(slow.states(slow.embed(read), len(read) - len(slow.answer(example)))[-1].detach())
    raw = [model.loss([e]).terms["hid"] * t.std() ** power for e, t in zip(MIXED, taught)]
    whole = model.loss(MIXED).terms["hid"] * torch.stack(taught).std() ** power
    assert_close(whole, torch.stack(raw).mean(), 1e-5)


def test_8_a_global_batch_in_parts_has_its_mean():
    model = on("gpt2", change(BASE, hid={"distance": "cosine"}))
    whole = model.loss(MIXED).terms
    parts = [model.batch(model.rows(part)) for part in (MIXED[:2], MIXED[2:])]
    counts = {name: sum(part.counts()[name] for part in parts) for name in parts[0].counts()}
    outs = [model(part, n_items=counts).terms for part in parts]
    for name in TERMS:
        assert_close(outs[0][name] + outs[1][name], whole[name])


@by_k
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
        found = [one.generate([MIXED[0].question], max_new_tokens=4, **options)[0]
                 for one, options in ((model, {"loops": k - 1}), (other, {}))]  # fmt: skip
        one, same = ((g.text, g.cost.loops, g.cost.passes, g.cost.thought_tokens) for g in found)
        assert one == same and one[1] == k - 1


def test_gradients_do_not_change_when_passes_are_checkpointed():
    model = on("llama", BASE).train()
    kept = gradients(model, model.loss(MIXED).loss)
    model.checkpoint_passes = True
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), kept)


# Settings


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"n_latents_total": -1}, "n_latents_total is -1, but must be"),
        ({"hid.weight": -1.0}, "weight is -1.0, but must be"),
        ({"hid.teacher": None}, "set hid.teacher"),
        ({"hid.teacher": "runs/cot"}, "set hid.teacher to self"),
        ({"hid.teacher": "runs/cot", "teacher_weight": 0.0, "teacher_passes": 2}, "set hid.teacher to self"),
        ({"loop.rescale": "rms", "loop.norm": False}, "rescale=project"),
        ({"teacher_passes": 3}, "teacher_passes"),
        ({"hid.distance": "huber"}, "distance"),
        ({"hid.layers": "first"}, "layers"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_in_one_sentence(fields, mend):
    with pytest.raises(InputError, match=mend) as refusal:
        make(Codi, **fields)
    assert "\n" not in str(refusal.value)


def test_steps_are_needed_by_the_teacher_alone():
    alone = change(BASE, hid={"weight": 0.0}), change(BASE, teacher_weight=0.0)
    assert all(one.needs_steps for one in (BASE, *alone)) and not change(alone[0], teacher_weight=0.0).needs_steps

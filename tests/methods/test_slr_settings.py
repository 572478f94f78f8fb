"""Every setting of Slr does something, and only what it says; what has no meaning is refused."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import InputError, LatentModel, Slr
from innerloop.config.loop import LoopSettings
from innerloop.loop.loop import InnerLoop
from innerloop.loop.stabilize import TIME_WIDTH, sines
from innerloop.model.losses import distance
from innerloop.text.row import Kind
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    RAMP,
    RAMP_STAGES,
    ROUNDED,
    SHOWN,
    SMALL,
    WITH_LORA,
    assert_close,
    base,
    change,
    gradients,
    logits_of,
    rows_at,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_model


@pytest.mark.parametrize(
    "fields",
    [
        {"n_slots": 3},
        {"max_loops": 2},
        {"loop_scope": "append"},
        {"h0": "forward"},
        {"answer_from": "kv_last"},
        {"residual": "none"},
        {"residual": "sum"},
        {"residual": "B"},
        {"alpha": 0.3},
        {"rescale": "none"},
        {"time": "none"},
        {"rescale": "none", "feedback_site": "pre_norm"},
    ],
    ids=str,
)
def test_every_field_of_the_loop_changes_the_answer(fields):
    model = sharp_model(SMALL)
    other = under(model, change(SMALL, **fields))
    assert (model.answer_logits(MIXED[:1])[0] - other.answer_logits(MIXED[:1])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [{"step_weight": 1.0}, {"slots_per_step": 1}, {"step_map": "one2one"}], ids=str)
def test_every_field_of_the_loss_changes_the_loss(fields):
    model = sharp_model(change(SMALL, **SHOWN))
    other = under(model, change(SMALL, **{**SHOWN, **fields}))
    assert abs(model.loss(MIXED[3:4]).loss - other.loss(MIXED[3:4]).loss) > 1e-3


def test_the_number_of_iterations_and_of_steps_left_follows_the_stage():
    method = Slr(n_slots=2, max_loops=5, max_stage=3, loops_per_stage=2)
    model = tiny_model(method)
    rows = [model.rows(MIXED[3:4], stage)[0] for stage in range(5)]
    assert [row.n_loops for row in rows] == [0, 2, 4, 5, 5]
    in_text = [[piece.step for piece in row.pieces if piece.step >= 0] for row in rows]
    assert in_text == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3], []]
    assert [change(method, loops_per_stage=0).n_loops(stage) for stage in range(5)] == [5] * 5
    assert [change(method, loop_scope="append").n_latents(stage) for stage in range(5)] == [1, 3, 5, 6, 6]
    kv_last = change(method, loop_scope="append", answer_from="kv_last")
    assert [kv_last.n_latents(stage) for stage in range(5)] == [0, 2, 4, 5, 5]


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"max_loops": -1}, "max_loops >= 0"),
        ({"n_slots": 0}, "n_slots >= 1"),
        ({"loops_per_stage": -1}, "loops_per_stage >= 0"),
        ({"answer_from": "kv_last", "max_loops": 0}, "max_loops to at least 1"),
        ({"slots_per_step": 9}, "n_slots=8"),
        ({"slots_per_step": -1}, "slots"),
        ({"step_weight": 0.1, "loop_scope": "append"}, "loop_scope=slots"),
        ({"step_weight": 0.1, "max_loops": 0}, "max_loops >= 1"),
        ({"alpha": -0.1}, "between 0 and 1"),
        ({"max_stage": -1}, "at least 0"),
    ],
)
def test_impossible_settings_are_refused_with_the_way_to_mend_them(fields, mend):
    with pytest.raises(InputError, match=mend):
        Slr(**fields)


REFUSED = [
    # LoopSettings
    ({"noise": -1.0}, "cannot be negative"),
    ({"spectral_weight": -1.0}, "cannot be negative"),
    ({"spectral_bound": -1.0}, "cannot be negative"),
    ({"lora_rank": 0}, "set lora to none"),
    ({"min_loops": 0}, "at least 1"),
    ({"stop_site": "answer"}, "set stop to kl, entropy, argmax"),
    *(
        ({"stop": stop, "stop_site": "answer"}, "set stop to kl, entropy, argmax")
        for stop in ("delta", "delta_undamped", "cos", "halt")
    ),
    ({"patience": 0}, "at least 1"),
    ({"bptt": -1}, "none for all"),
    ({"time": "none", "noise_level": "delta"}, "set time to lookup"),
    ({"time": "none", "time_inject": "concat"}, "set time to lookup"),
    ({"noise_level": "injected"}, "set noise above 0"),
    ({"alpha_learn": "shared", "residual": "none"}, "residual A or B"),
    ({"alpha_learn": "per_iter", "residual": "C"}, "residual A or B"),
    ({"time_norm": True}, "time=sinusoidal"),
    ({"solver": "plain"}, "set time to none"),
    ({"solver": "plain", "time": "none", "lora": "per_iter"}, "shared"),
    ({"solver": "plain", "time": "none", "noise": 0.1}, "noise to 0"),
    ({"solver": "plain", "time": "none", "stop": "delta"}, "stop to none"),
    ({"solver": "plain", "time": "none", "alpha_learn": "per_iter"}, "alpha_learn to fixed"),
    ({"solver": "plain", "time": "none", "bptt": 1}, "leave bptt and detach out"),
    ({"solver": "plain", "time": "none", "detach": True}, "leave bptt and detach out"),
    ({"residual": "C", "gate_kind": "attention", "gate_shape": "channel"}, "gate_shape to scalar"),
    # LossSettings
    ({"deep_weight": -1.0}, "cannot be negative"),
    ({"halt_prior": 0.0}, "between 0 and 1"),
    ({"halt_prior": 1.0}, "between 0 and 1"),
    ({"hid_weight": 1.0}, "set teacher"),
    # Slr
    ({"prefix_kv": "per_iter", "loop_scope": "all"}, "slots or last"),
    ({"prefix_kv": "per_iter", "loop_scope": "append"}, "slots or last"),
    ({"distinct_slots": True, "loop_scope": "last"}, "loop_scope=slots"),
    ({"time_inject": "token", "loop_scope": "all"}, "loop_scope=slots"),
    ({"decode_lora": True}, "set lora"),
    ({"loops_per_stage": 1}, "max_stage"),
    ({"hid_weight": 1.0, "teacher": "-", "loop_scope": "append"}, "slots, all or last"),
    ({"hid_weight": 1.0, "teacher": "-", "max_loops": 0}, "max_loops >= 1"),
    ({"deep_weight": 1.0, "answer_from": "kv_last"}, "answer_from=refeed"),
    ({"deep_weight": 1.0, "loop_scope": "append"}, "slots, all or last"),
    ({"deep_weight": 1.0, "solver": "plain", "time": "none"}, "solver to none"),
    ({"halt_weight": 1.0}, "set stop=halt"),
    ({"solver": "plain", "time": "none", "loop_scope": "append"}, "slots, all or last"),
    ({"solver": "plain", "time": "none", "answer_from": "kv_last"}, "refeed"),
    ({"solver": "plain", "time": "none", "step_weight": 1.0}, "step_weight"),
    ({"loop_sampling": "lognormal_poisson", "max_loops": 0}, "max_loops"),
    ({"write_steps": False}, "set max_stage"),
    ({"aux_weight": 1.0, "loop_scope": "last"}, "loop_scope=slots"),
    ({"aux_weight": 1.0, "max_loops": 0}, "max_loops >= 1"),
    ({"aux_weight": 1.0, "solver": "plain", "time": "none"}, "solver to none"),
]


@pytest.mark.parametrize(("fields", "mend"), REFUSED, ids=lambda one: str(one))
def test_every_combination_without_a_meaning_is_refused(fields, mend):
    with pytest.raises(InputError, match=mend):
        Slr(**fields)


def stirred(method: Slr, fields: dict, train: bool = False):
    """Return a model of the same backbone and, as far as they fit, the same parts that are not zero."""
    model = LatentModel(base("llama").backbone, base("llama").tokenizer, change(method, **fields)).double()
    for name, parameter in model.loop.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.train(train)


SINES = {"time": "sinusoidal"}
STOPS = {"stop": "delta", "stop_threshold": 0.2}
SOLVER = {"time": "none", "solver": "plain", "solver_tol": 1e-9, "residual": "A", "alpha": 0.3, "max_loops": 4}


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ({}, {"residual": "C"}),
        ({"residual": "C"}, {"gate_shape": "channel"}),
        ({"residual": "C"}, {"gate_kind": "sigmoid"}),
        ({"residual": "C"}, {"gate_kind": "attention"}),
        ({"residual": "C"}, {"alpha": 0.2}),
        ({}, {"alpha_learn": "shared"}),
        ({"alpha_learn": "shared"}, {"alpha_learn": "per_iter"}),
        ({}, {"rescale": "adapter"}),
        ({}, SINES),
        ({}, {"time_inject": "concat"}),
        ({}, {"time_inject": "token"}),
        (SINES, {"time_norm": True}),
        ({}, {"noise_level": "delta"}),
        ({}, WITH_LORA),
        ({"lora": "shared"}, {"lora": "per_iter"}),
        (WITH_LORA, {"lora_rank": 3}),
        (WITH_LORA, {"lora_gamma": 1.0}),
        (WITH_LORA, {"lora_targets": ("q_proj",)}),
        (WITH_LORA, {"decode_lora": True}),
        (WITH_LORA, {"prefix_kv": "per_iter"}),
        ({}, {"distinct_slots": True}),
        ({}, {"loop_scope": "all"}),
        ({}, {"loop_scope": "last"}),
        ({}, {"stop": "delta", "stop_threshold": -1e9}),
        ({"stop": "delta", "stop_threshold": -1e9}, {"stop_threshold": 1e9}),
        ({"stop": "delta", "stop_threshold": -1e9}, {"min_loops": 2}),
        ({"stop": "delta", "stop_threshold": -1e9}, {"patience": 2}),
        (SOLVER, {"solver": "anderson"}),
        (SOLVER, {"solver": "damped"}),
        (SOLVER, {"solver_tol": 1e3}),
    ],
    ids=str,
)
def test_every_setting_of_the_stabilisers_changes_the_answer(setting, fields):
    one, other = stirred(SMALL, setting), stirred(SMALL, {**setting, **fields})
    gap = max((a - b).abs().max().item() for a, b in zip(one.answer_logits(MIXED), other.answer_logits(MIXED)))
    assert gap > 1e-5


@pytest.mark.parametrize("agg", ["last", "max"])
def test_the_aggregate_of_a_score_changes_the_score(agg):
    traces = []
    for fields in (STOPS, {**STOPS, "stop_agg": agg}):
        traces.append(stirred(SMALL, fields).loss(MIXED[:1], trace=True).trace.iterations[0])
    assert torch.equal(traces[0].delta, traces[1].delta)
    assert (traces[0].score - traces[1].score).abs() > 1e-4


@pytest.mark.parametrize("stop", ["kl", "entropy"])
def test_the_site_of_a_score_changes_the_score(stop):
    traces = []
    for site in ("latents", "answer"):
        fields = {"stop": stop, "stop_site": site, "stop_threshold": torch.inf}
        traces.append(stirred(SMALL, fields).loss(MIXED[:1], trace=True).trace.iterations[1])
    assert torch.equal(traces[0].delta, traces[1].delta)
    assert (traces[0].score - traces[1].score).abs() > 1e-4


@pytest.mark.parametrize("beyond", ["cycle", "off"])
def test_lora_beyond_changes_what_follows_the_trained_iterations_alone(beyond):
    one, other = (stirred(SMALL, {**WITH_LORA, "lora_beyond": name}) for name in ("clamp", beyond))
    other.loop.load_state_dict(one.loop.state_dict())
    for n_loops, same in ((3, True), (5, False)):
        rows = one.rows(MIXED[:2])
        for row in rows:
            row.n_loops = n_loops
        assert torch.equal(logits_of(one, rows)[0], logits_of(other, rows)[0]) == same


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ({}, {"bptt": 1}),
        ({}, {"bptt": 0}),
        ({}, {"detach": True}),
        ({**SOLVER, "max_loops": 60}, {"solver_gradient": "phantom"}),
    ],
    ids=str,
)
def test_settings_of_the_gradient_change_the_gradient_alone(setting, fields):
    one, other = stirred(SMALL, setting, train=True), stirred(SMALL, {**setting, **fields}, train=True)
    losses = one.loss(MIXED).loss, other.loss(MIXED).loss
    tolerance = 1e-4 if setting else 0
    assert abs(losses[0] - losses[1]) <= tolerance
    left, right = gradients(one, losses[0]), gradients(other, losses[1])
    assert max((left[name] - right[name]).abs().max().item() for name in left) > 1e-5


@pytest.mark.parametrize("scope", ["slots", "all", "last"])
def test_a_solver_agrees_with_the_unrolled_loop_once_converged_and_not_before(scope):
    for max_loops, agrees in ((40, True), (2, False)):
        setting = {**SOLVER, "alpha": 0.1, "max_loops": max_loops, "loop_scope": scope}
        one, other = (stirred(SMALL, {**setting, "solver_gradient": kind}) for kind in ("implicit", "unroll"))
        left, right = (gradients(model, model.loss(MIXED[:2]).loss) for model in (one, other))
        scale = max(grad.abs().max().item() for grad in right.values())
        gap = max((left[name] - right[name]).abs().max().item() for name in left) / scale
        assert (gap < 1e-4) == agrees, gap


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        ({}, {"noise": 0.5}),
        ({"noise": 0.5}, {"noise": 0.1}),
        ({"noise": 0.5}, {"noise_level": "injected"}),
        ({}, {"deep_weight": 1.0}),
        ({"deep_weight": 1.0}, {"deep_schedule": "softmax"}),
        ({"stop": "halt"}, {"halt_weight": 1.0}),
        ({"stop": "halt", "halt_weight": 1.0}, {"halt_prior": 0.9}),
        ({"stop": "halt", "halt_weight": 1.0}, {"halt_beta": 1.0}),
        ({}, {"spectral_weight": 1.0, "spectral_bound": 0.01}),
        ({"spectral_weight": 1.0, "spectral_bound": 0.01}, {"spectral_bound": 0.0}),
    ],
    ids=str,
)
def test_settings_of_training_change_its_loss_and_no_answer(setting, fields):
    losses, answers = [], []
    for chosen in (setting, {**setting, **fields}):
        model = stirred(SMALL, chosen, train=True)
        torch.manual_seed(0)
        losses.append(model.loss(MIXED).loss.item())
        answers.append(model.eval().answer_logits(MIXED[:1])[0])
    assert abs(losses[0] - losses[1]) > 1e-5
    if fields.get("noise_level") != "injected":  # which adds a part that is not zero here
        assert torch.equal(*answers)


@pytest.mark.parametrize("sampling", ["uniform", "lognormal_poisson"])
@pytest.mark.slow
def test_sampled_numbers_of_iterations_follow_their_law_and_are_for_training_alone(sampling):
    method = change(SMALL, max_loops=8, loop_sampling=sampling)
    model = stirred(method, {})
    assert [row.n_loops for row in model.rows(MIXED)] == [8] * len(MIXED)
    drawn = [method.sampled(str(i)).max_loops for i in range(600)]
    assert drawn[:20] == [method.sampled(str(i)).max_loops for i in range(20)]
    mean = sum(drawn) / len(drawn)
    if sampling == "uniform":
        assert set(drawn) == set(range(1, 9))
        assert mean == pytest.approx(4.5, abs=0.4)
    else:  # E[Poisson(e^n)] + 1 with E[e^n] = exp(ln 8 - 1/8 + 1/8) = 8
        assert min(drawn) == 1 and max(drawn) > 16
        assert mean == pytest.approx(9.0, abs=0.8)
    rows = model.rows(MIXED, seed="7")
    assert len({row.n_loops for row in rows}) == 1  # one draw for a batch
    assert len({model.rows(MIXED[:1], seed=str(i))[0].n_loops for i in range(30)}) > 3


@pytest.mark.parametrize("answer_from", ["refeed", "kv_last"])
@pytest.mark.parametrize(
    "fields", [{"time_inject": "token"}, {**WITH_LORA, "decode_lora": True}], ids=["token", "decode"]
)
def test_rows_at_several_stages_equal_single_rows_with_every_stabiliser(answer_from, fields):
    model = stirred(RAMP, {"answer_from": answer_from, **fields})
    rows = rows_at(model, MIXED, RAMP_STAGES)
    for row, together in zip(rows, logits_of(model, rows)):
        assert_close(together, logits_of(model, [row])[0], ROUNDED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fields",
    [{"residual": "C"}, {"rescale": "adapter"}, SINES, {"time_inject": "concat"}, {**STOPS, "stop": "halt"}, WITH_LORA],
    ids=str,
)
def test_parts_in_fp32_serve_a_backbone_in_half_precision(dtype, fields):
    base = tiny_model(Slr(), "llama", num_hidden_layers=2)
    model = LatentModel(type(base.backbone)(base.backbone.lm.to(dtype)), base.tokenizer, change(SMALL, **fields)).eval()
    assert model.loop.rescale.tau.dtype == torch.float32
    logits = model.answer_logits(MIXED)[0]
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("inject", ["add", "concat", "token"])
def test_noise_is_added_to_what_is_fed_and_not_to_what_the_timestep_makes_of_it(inject):
    settings = LoopSettings(time="lookup", time_inject=inject, noise=0.5)
    loop = InnerLoop(settings, width=4, max_loops=2, tau=torch.tensor(3.0)).train()
    with torch.no_grad():
        for parameter in loop.parameters():
            parameter += 1.0
    state = torch.linspace(-1, 1, 24).view(2, 3, 4)
    torch.manual_seed(0)
    noisy = loop.inject(state, 1)
    torch.manual_seed(0)
    expected, error = loop.time(state, 1), 1.5 * torch.randn_like(state)
    assert_close(noisy[:, -3:], expected[:, -3:] + error)
    assert torch.equal(noisy[:, :-3], expected[:, :-3])  # the timestep's own position


@pytest.mark.parametrize(("time_norm", "times"), [(False, [1.0, 3.0, 6.0]), (True, [0.25, 0.75, 1.5])])
def test_the_sines_see_t_or_t_over_max_loops(time_norm, times):
    settings = LoopSettings(time="sinusoidal", time_norm=time_norm)
    time = InnerLoop(settings, width=4, max_loops=4, tau=torch.ones(())).time
    torch.nn.init.normal_(time.mlp[-1].weight)
    for loop, told in zip((1, 3, 6), times):
        assert_close(time.vector(loop, None), time.mlp(sines(torch.tensor([told]), TIME_WIDTH))[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"step_weight": 1.0},
        {"aux_weight": 1.0, "aux_trains": "decoder"},
        {"loop_sampling": "uniform"},
        {"deep_weight": 1.0},
        {"stop": "halt", "halt_weight": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("loops", [0, 6])
def test_whatever_it_was_trained_for_a_model_answers_with_any_number_of_iterations(fields, loops):
    model = stirred(SMALL, {"stop": fields.get("stop", "none")})
    trained = stirred(SMALL, fields)
    trained.loop.load_state_dict(model.loop.state_dict())
    plain, ours = (m.generate(QUESTIONS[:2], max_new_tokens=6, loops=loops) for m in (model, trained))
    assert [one.text for one in plain] == [one.text for one in ours]
    assert [one.cost.loops for one in plain] == [one.cost.loops for one in ours]


def test_a_ramp_of_iterations_needs_no_steps_in_the_text():
    method = Slr(n_slots=2, max_loops=4, max_stage=3, first_stage=1, loops_per_stage=1, write_steps=False)
    model = tiny_model(method)
    rows = [model.rows(MIXED[3:4], stage)[0] for stage in range(1, 5)]
    assert [row.n_loops for row in rows] == [1, 2, 3, 4]
    assert not any(piece.kind is Kind.STEP for row in rows for piece in row.pieces)
    assert len({tuple(row.ids()) for row in rows}) == 1
    assert not method.needs_steps and change(method, write_steps=True).needs_steps
    classes = tuple(str(i) for i in range(5))
    (row,) = tiny_model(change(method, decoder="linear", classes=classes)).rows(MIXED[3:4], 1)
    assert row.answer_class == 0 and not row.suffix[-1].supervised
    shown = change(method, step_weight=1.0, slots_per_step=1)  # all steps are shown, whatever the stage
    firsts = [{readout.token for readout in tiny_model(shown).rows(MIXED[3:4], stage)[0].readouts} for stage in (1, 4)]
    assert len(firsts[0]) == 1 and len(firsts[1]) > 1


def test_the_optimizer_is_kept_over_stages_unless_told_otherwise():
    assert Slr().reset_optimizer == "never"


@pytest.mark.parametrize("site", ["mean", "last"])
@pytest.mark.parametrize("scope", ["slots", "all", "last"])
def test_the_teacher_is_followed_by_the_mean_of_the_latents_or_by_the_last(site, scope):
    model = sharp_model(change(SMALL, loop_scope=scope, hid_weight=1.0, teacher="-", hid_site=site))
    model._frozen["teacher"] = base("gpt2")
    example, total = MIXED[0], []
    with states(model) as seen, torch.no_grad():
        term = model.loss([example]).terms["hid"]
    passes = seen[scope != "all" :][:3]
    (row,) = model.rows([example])
    with torch.no_grad():
        targets = model.teacher(model.teacher.embed(torch.tensor([row.teacher.ids()])))[0, row.teacher.step_ends()]
    for u_1ND, target in zip(passes, targets):  # three iterations, three steps
        student = u_1ND.mean(1) if site == "mean" else u_1ND[:, -1]
        total.append(distance(student.float(), target[None].float(), "smooth_l1", targets.float().std()))
    assert term.item() == pytest.approx(torch.cat(total).mean().item(), rel=1e-5)


def test_each_iteration_tells_its_step_to_an_auxiliary_decoder():
    model = sharp_model(change(SMALL, aux_weight=0.5, slots_per_step=2))
    example, told = MIXED[0], []
    with states(model) as seen, torch.no_grad():
        out = model.loss([example])
    for step, first, u_1ND in zip(example.steps, (0, 2, 0), seen[1:4]):
        ids = torch.tensor(model.spell.told(step))
        fed = torch.cat([u_1ND[0, first : first + 2], model.backbone.embed(ids[:-1])])
        with torch.no_grad():
            logits = model.backbone.lm(inputs_embeds=fed[None]).logits[0, 1:]  # the decoder starts as a copy
        told.append(cross_entropy(logits.float(), ids, reduction="sum"))
    assert out.terms["aux"].item() == pytest.approx(torch.stack(told).mean().item(), rel=1e-4)
    plain = under(model, SMALL)
    assert out.loss.item() == pytest.approx((plain.loss([example]).loss + 0.5 * out.terms["aux"]).item(), rel=1e-5)
    assert torch.equal(model.answer_logits([example])[0], plain.answer_logits([example])[0])


@pytest.mark.parametrize("field", ["loop_scope", "h0", "answer_from", "residual", "rescale", "time", "step_map"])
def test_an_unknown_choice_is_refused(field):
    with pytest.raises(InputError, match=field):
        Slr(**{field: "nonsense"})

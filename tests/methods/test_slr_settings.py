"""Every setting of SLR moves what it should and nothing else, and does what it says; what has no meaning is refused."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import InputError, LatentModel, Slr
from innerloop.loop.loop import InnerLoop
from innerloop.loop.stabilize import TIME_WIDTH, sines
from innerloop.model.losses import distance
from innerloop.text.row import Kind
from tests.fields import FullLoop, make
from tests.methods.gauges import (
    AT_ONCE,
    FORWARD,
    LEARNS,
    NEVER,
    STATES,
    STOPPING,
    STOPS,
    moved_by,
    table,
    untried,
)
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    RAMP,
    RAMP_STAGES,
    ROUNDED,
    SMALL,
    WITH_LORA,
    assert_close,
    base,
    by_answer,
    by_region,
    change,
    gradients,
    logits_of,
    on,
    rows_at,
    sharp_model,
    states,
    under,
)
from tests.models import tiny_model

# Every field

BASE = change(SMALL, step_weight=0.5, slots_per_step=2)
IN_TRAINING = STATES - {"logits", "beyond"}
ALONE, STAGES = {"step_weight": 0.0}, {"curriculum.max_stage": 2}
HID = {"hid.weight": 1.0, "teacher": "-"}
TOLD = {**HID, "teacher_thinks": "latents"}
TIMELESS, SINES = {"loop.time": "none"}, {"loop.time": "sinusoidal"}
AUX = {**TIMELESS, "aux.weight": 0.5}
DEEP, HALT = {"deep.weight": 0.5}, {"stop.rule": "halt", "stop.threshold": torch.inf, "halt.weight": 0.5}
GATED, ADAPTER = {"loop.residual": "C"}, {"loop.rescale": "adapter"}
ATTENTION = {**GATED, "loop.gate_kind": "attention"}
SOLVED = {**ALONE, **TIMELESS, "fixed_point.solver": "damped", "fixed_point.tol": 1e-9}
GAIN = {"fixed_point.spectral_weight": 1.0, "fixed_point.spectral_bound": 0.01}
OWN = {**ALONE, "decoder.kind": "separate"}
CHOICE = {**ALONE, "decoder.kind": "linear", "decoder.classes": tuple("01234")}

FIELDS = table(
    # what is refined, and what the answer sees
    (FORWARD | {"rows", "passes"}, ALONE, {"loop_scope": "all"}, {"loop_scope": "last"}),
    (FORWARD | {"rows", "passes"}, {**ALONE, "n_slots": 2}, {"loop_scope": "append"}),
    (STATES | {"rows", "passes"}, {}, {"n_slots": 6}),
    (STATES | {"ran", "passes", "trained"}, {}, {"max_loops": 2}),
    (STATES | {"trained"}, {}, {"distinct_slots": True}),
    (STATES | {"passes"}, {}, {"h0": "forward"}),
    (FORWARD | {"passes"}, {}, {"answer_from": "kv_last"}),
    (STATES | {"passes"}, WITH_LORA, {"prefix_kv": "per_iter"}),
    (FORWARD, WITH_LORA, {"decode_lora": True}),
    (set(), {}, {"loop_sampling": "uniform"}, {"loop.progressive": 0.5}),  # for batches of a Trainer alone
    (set(), {"loop.progressive": 0.5}, {"loop.free_loops": (0, 3)}),
    # the curriculum; all that is measured here is its last stage
    ({"schedule"}, {}, STAGES),
    ({"schedule"}, STAGES, {"curriculum.first_stage": 1}, {"curriculum.length": 2}, {"curriculum.unit": "step"},
     {"curriculum.reset_optimizer": "stage"}),
    (set(), STAGES, {"write_steps": False}, {"loops_per_stage": 1}),
    # who answers
    (FORWARD | {"trained", "passes"}, ALONE, {"decoder.kind": "separate"}),
    (FORWARD | {"trained"}, OWN, {"decoder.layers": 1}, {"decoder.table": "own"}),
    (FORWARD, OWN, {"decoder.reads": "state_and_prompt"}),
    ({"answer", "trained"} | LEARNS, CHOICE, {"decoder.classes": tuple("012345")}),
    # the loss
    (LEARNS, {}, {"step_weight": 1.0}),
    ({"step"} | LEARNS, {}, {"slots_per_step": 1}, {"step_map": "one2one"}),
    ({"hid"} | LEARNS, {}, HID),
    (LEARNS, HID, {"hid.weight": 2.0}),
    ({"hid"} | LEARNS, HID, {"hid.layers": "all"}, {"hid.distance": "cosine"}, {"hid.site": "last"},
     {"teacher_thinks": "latents"}),  # the passes that these take are another model's
    ({"hid", "passes"} | LEARNS, HID, {"teacher": "self"}),
    ({"kd"} | LEARNS, TOLD, {"kd.weight": 0.5}),
    ({"kd"} | LEARNS, {**TOLD, "kd.weight": 0.5}, {"kd.temperature": 1.0}),
    ({"deep", "passes"} | LEARNS, {}, DEEP),
    ({"deep"} | LEARNS, DEEP, {"deep.schedule": "softmax"}),
    ({"halt", "passes"} | LEARNS, {**HALT, "halt.weight": 0.0}, {"halt.weight": 0.5}),
    ({"halt"} | LEARNS, HALT, {"halt.prior": 0.5}, {"halt.beta": 1.0}),
    ({"aux", "trained"} | LEARNS, TIMELESS, {"aux.weight": 0.5}),
    (LEARNS, AUX, {"aux.weight": 1.0}),
    ({"aux", "trained"} | LEARNS, AUX, {"aux.layers": 1}),
    # stabilisers
    (STATES, {}, *({"loop.residual": kind} for kind in ("none", "sum", "B")), {"loop.alpha": 0.3},
     {"loop.rescale": "none"}, {"loop.shift": True}),
    (STATES | {"trained"}, {}, GATED, ADAPTER, TIMELESS, SINES, WITH_LORA, {"loop.alpha_learn": "shared"},
     {"loop.time_inject": "concat"}, {"loop.noise_level": "delta"}),
    (STATES | {"trained"}, {"loop.alpha_learn": "shared"}, {"loop.alpha_learn": "per_iter"}),
    (STATES, GATED, {"loop.alpha": 0.2}, {"loop.gate_kind": "sigmoid"}),
    (STATES | {"trained"}, GATED, {"loop.gate_shape": "channel"}, ATTENTION),
    (STATES | {"trained"}, ADAPTER, {"loop.width": 8}),
    (STATES | {"passes"}, {}, {"loop.time_inject": "token"}),
    (STATES, SINES, {"loop.time_norm": True}),
    (IN_TRAINING, {}, {"loop.noise": 0.5}, {"loop.random_starts": 1.0}),
    (STATES | {"trained"}, {"loop.noise": 0.5}, {"loop.noise_level": "injected"}),
    (STATES | {"trained"}, WITH_LORA, {"loop.lora": "shared"}, {"loop.lora_rank": 3},
     {"loop.lora_targets": ("c_attn",)}),
    (STATES, WITH_LORA, {"loop.lora_gamma": 1.0}),
    ({"beyond"}, WITH_LORA, {"loop.lora_beyond": "off"}, {"loop.lora_beyond": "cycle"}),
    # stopping
    (STOPS, {}, AT_ONCE),
    (STOPS, AT_ONCE, {"stop.threshold": torch.inf}, {"stop.min_loops": 2}, {"stop.patience": 2}),
    ({"score"}, NEVER, {"stop.agg": "max"}, {"stop.agg": "last"}, {"stop.site": "answer"}),
    ({"score"}, {**NEVER, "stop.rule": "entropy"}, {"stop.site": "answer"}),
    # gradients, fixed points
    ({"gradient"}, {}, {"loop.bptt": 1}, {"loop.bptt": 0}, {"loop.detach": True}),
    (FORWARD | {"passes"}, {**ALONE, **TIMELESS}, {"fixed_point.solver": "damped"}),
    (FORWARD, SOLVED, {"fixed_point.solver": "anderson"}),
    ({"gradient", "passes"}, SOLVED, {"fixed_point.gradient": "phantom"}),
    (FORWARD | {"ran", "passes"}, SOLVED, {"fixed_point.tol": 1e9}),
    ({"gain", "passes"} | LEARNS, {}, GAIN),
    ({"gain"} | LEARNS, GAIN, {"fixed_point.spectral_bound": 0.0}),
)  # fmt: skip
ELSEWHERE = {"hid.width"} | STOPPING  # of a wider teacher: tests/test_distillation.py


@pytest.mark.parametrize(("base", "fields", "what"), FIELDS)
def test_a_setting_moves_what_it_should_and_nothing_else(base, fields, what):
    assert moved_by(change(BASE, **base), **fields) == what


def test_no_setting_is_forgotten():
    assert untried(Slr, FIELDS) == ELSEWHERE


PLAIN = {"fixed_point.solver": "plain", **TIMELESS}
REFUSED = [
    # the loop
    ({"max_loops": -1}, "max_loops is -1, but must be"),
    ({"n_slots": 0}, "n_slots is 0, but must be"),
    ({"loops_per_stage": -1}, "loops_per_stage is -1, but must be"),
    ({"answer_from": "kv_last", "max_loops": 0}, "max_loops to at least 1"),
    ({"loop_sampling": "lognormal_poisson", "max_loops": 0}, "max_loops to at least 1"),
    *(({"prefix_kv": "per_iter", "loop_scope": scope}, "loop_scope to slots or last") for scope in ("all", "append")),
    ({"distinct_slots": True, "loop_scope": "last"}, "loop_scope=slots"),
    ({"loop.time_inject": "token", "loop_scope": "all"}, "loop_scope=slots"),
    *(({"loop.shift": True, **other}, "side by side") for other in ({"loop_scope": "all"}, {"prefix_kv": "per_iter"})),
    ({"decode_lora": True}, "set loop.lora"),
    ({"loops_per_stage": 1}, "set curriculum.max_stage"),
    ({"write_steps": False}, "set curriculum.max_stage"),
    ({"curriculum.max_stage": -1}, "at least 0"),
    # stabilisers
    ({"loop.alpha": -0.1}, "between 0 and 1"),
    ({"loop.noise": -1.0}, "noise is -1.0, but must be"),
    ({"loop.width": 8}, "rescale=adapter or project"),
    ({"loop.lora_rank": 0}, "set lora to none"),
    ({"loop.bptt": -1}, "bptt is -1, but must be"),
    *(({**TIMELESS, **told}, "set time to lookup") for told in ({"loop.noise_level": "delta"},
                                                                {"loop.time_inject": "concat"})),
    ({"loop.noise_level": "injected"}, "set noise above 0"),
    ({"loop.alpha_learn": "shared", "loop.residual": "none"}, "residual A or B"),
    ({"loop.alpha_learn": "per_iter", **GATED}, "residual A or B"),
    ({"loop.time_norm": True}, "time=sinusoidal"),
    ({**ATTENTION, "loop.gate_shape": "channel"}, "gate_shape to scalar"),
    # fixed points
    *(({f"fixed_point.spectral_{name}": -1.0}, f"spectral_{name} is -1.0") for name in ("weight", "bound")),
    ({"fixed_point.solver": "plain"}, "loop.time to none"),
    ({**PLAIN, "loop.lora": "per_iter"}, "none or shared"),
    *(({**PLAIN, f"loop.{name}": 0.1}, "noise and loop.random_starts to 0") for name in ("noise", "random_starts")),
    ({"loop.random_starts": 0.5, "loop_scope": "all"}, "are for loop_scope=slots"),
    ({**PLAIN, "stop.rule": "delta"}, "stop.rule to none"),
    ({**PLAIN, "loop.alpha_learn": "per_iter"}, "alpha_learn to fixed"),
    *(({**PLAIN, **cut}, "leave loop.bptt and loop.detach out") for cut in ({"loop.bptt": 1}, {"loop.detach": True})),
    ({**PLAIN, "loop_scope": "append"}, "slots, all or last"),
    ({**PLAIN, "answer_from": "kv_last"}, "answer_from to refeed"),
    *(({**PLAIN, "teacher": "-", name: 1.0}, "step_weight and hid.weight to 0") for name in
      ("step_weight", "hid.weight")),
    # stopping
    *(({f"stop.{name}": 0}, "at least 1") for name in ("min_loops", "patience")),
    *(({"stop.rule": stop, "stop.site": "answer"}, "set stop.rule to kl, entropy, argmax")
      for stop in ("none", "delta", "delta_undamped", "cos", "halt")),
    # the loss
    ({"slots_per_step": 9}, "n_slots=8"),
    ({"slots_per_step": -1}, "slots"),
    ({"step_weight": 0.1, "loop_scope": "all"}, "loop_scope to slots or append"),
    ({"aux.weight": 0.1, "loop_scope": "last"}, "loop_scope=slots"),
    *(({name: 0.1, "teacher": "-", "max_loops": 0}, "max_loops >= 1")
      for name in ("step_weight", "aux.weight", "hid.weight", "deep.weight")),
    ({"hid.weight": 1.0}, "set teacher"),
    ({**HID, "loop_scope": "append"}, "slots, all or last"),
    ({"deep.weight": -1.0}, "weight is -1.0, but must be"),
    ({"deep.weight": 1.0, "answer_from": "kv_last"}, "answer_from=refeed"),
    ({"deep.weight": 1.0, "loop_scope": "append"}, "slots, all or last"),
    *(({**PLAIN, name: 1.0}, "fixed_point.solver to none") for name in ("deep.weight", "aux.weight")),
    *(({"halt.prior": prior}, "between 0 and 1") for prior in (0.0, 1.0)),
    ({"halt.weight": 1.0}, "set stop.rule=halt"),
    ({"ponder_weight": 1.0}, "set stop.rule=act"),
    *(({name: "nonsense"}, name.rpartition(".")[2]) for name in ("loop_scope", "h0", "answer_from", "step_map",
                                                                 "loop.residual", "loop.rescale", "loop.time")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "mend"), REFUSED, ids=str)
def test_what_has_no_meaning_is_refused_with_the_way_to_mend_it(fields, mend):
    with pytest.raises(InputError, match=mend):
        make(Slr, **fields)


# What fields say


def test_the_number_of_iterations_and_of_steps_left_follows_the_stage():
    method = Slr(n_slots=2, max_loops=5, curriculum={"max_stage": 3}, loops_per_stage=2)
    model = tiny_model(method)
    rows = [model.rows(MIXED[3:4], stage)[0] for stage in range(5)]
    assert [row.n_loops for row in rows] == [0, 2, 4, 5, 5]
    in_text = [[span.step for span in row.spans if span.step >= 0] for row in rows]
    assert in_text == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3], []]
    assert [change(method, loops_per_stage=0).n_loops(stage) for stage in range(5)] == [5] * 5
    assert [change(method, loop_scope="append").n_latents(stage) for stage in range(5)] == [1, 3, 5, 6, 6]
    kv_last = change(method, loop_scope="append", answer_from="kv_last")
    assert [kv_last.n_latents(stage) for stage in range(5)] == [0, 2, 4, 5, 5]


def test_a_ramp_of_iterations_needs_no_steps_in_the_text():
    curriculum = {"max_stage": 3, "first_stage": 1}
    method = Slr(n_slots=2, max_loops=4, curriculum=curriculum, loops_per_stage=1, write_steps=False)
    model = tiny_model(method)
    rows = [model.rows(MIXED[3:4], stage)[0] for stage in range(1, 5)]
    assert [row.n_loops for row in rows] == [1, 2, 3, 4]
    assert not any(span.kind is Kind.STEP for row in rows for span in row.spans)
    assert len({tuple(row.ids()) for row in rows}) == 1
    assert not method.needs_steps and change(method, write_steps=True).needs_steps
    classes = tuple(str(i) for i in range(5))
    (row,) = tiny_model(change(method, decoder={"kind": "linear", "classes": classes})).rows(MIXED[3:4], 1)
    assert row.answer_class == 0 and not row.suffix[-1].supervised
    shown = change(method, step_weight=1.0, slots_per_step=1)  # all steps are shown, whatever the stage
    firsts = [
        {readout.token for readout in tiny_model(shown).rows(MIXED[3:4], stage)[0].token_targets} for stage in (1, 4)
    ]
    assert len(firsts[0]) == 1 and len(firsts[1]) > 1


@by_region
def test_a_solver_agrees_with_the_unrolled_loop_once_converged_and_not_before(scope):
    for max_loops, agrees in ((40, True), (2, False)):
        method = change(SMALL, loop_scope=scope, max_loops=max_loops, loop={"time": "none", "alpha": 0.1})
        left, right = (
            gradients(model, model.loss(MIXED[:2]).loss)
            for kind in ("implicit", "unroll")
            for model in [on("llama", change(method, fixed_point={"solver": "plain", "tol": 1e-9, "gradient": kind}))]
        )
        scale = max(grad.abs().max().item() for grad in right.values())
        gap = max((left[name] - right[name]).abs().max().item() for name in left) / scale
        assert (gap < 1e-4) == agrees, gap


@pytest.mark.parametrize("sampling", ["uniform", "lognormal_poisson"])
@pytest.mark.slow
def test_sampled_numbers_of_iterations_follow_their_law_and_are_for_training_alone(sampling):
    method = change(SMALL, max_loops=8, loop_sampling=sampling)
    model = on("llama", method)
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


@by_answer
@pytest.mark.parametrize(
    "fields", [{"loop.time_inject": "token"}, {**WITH_LORA, "decode_lora": True}], ids=["token", "decode"]
)
def test_rows_at_several_stages_equal_single_rows_with_every_stabiliser(answer_from, fields):
    model = on("llama", change(RAMP, answer_from=answer_from, **fields))
    rows = rows_at(model, MIXED, RAMP_STAGES)
    for row, together in zip(rows, logits_of(model, rows)):
        assert_close(together, logits_of(model, [row])[0], ROUNDED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fields", [GATED, ADAPTER, SINES, {"loop.time_inject": "concat"}, {"stop.rule": "halt"}, WITH_LORA], ids=str
)
def test_parts_in_fp32_serve_a_backbone_in_half_precision(dtype, fields):
    base = tiny_model(Slr(), "llama", num_hidden_layers=2)
    model = LatentModel(type(base.backbone)(base.backbone.lm.to(dtype)), base.tokenizer, change(SMALL, **fields)).eval()
    assert model.loop.rescale.tau.dtype == torch.float32
    logits = model.answer_logits(MIXED)[0]
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("inject", ["add", "concat", "token"])
def test_noise_is_added_to_what_is_fed_and_not_to_what_the_timestep_makes_of_it(inject):
    settings = FullLoop(time="lookup", time_inject=inject, noise=0.5)
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
    settings = FullLoop(time="sinusoidal", time_norm=time_norm)
    time = InnerLoop(settings, width=4, max_loops=4, tau=torch.ones(())).time
    torch.nn.init.normal_(time.mlp[-1].weight)
    for loop, told in zip((1, 3, 6), times):
        assert_close(time.vector(loop, None), time.mlp(sines(torch.tensor([told]), TIME_WIDTH))[0])


TRAINED = [{"step_weight": 1.0}, {"aux.weight": 1.0, "aux.trains": "decoder"}, {"loop_sampling": "uniform"}, DEEP]


@pytest.mark.parametrize("fields", [*TRAINED, {"stop.rule": "halt", "halt.weight": 1.0}], ids=str)
@pytest.mark.parametrize("loops", [0, 6])
def test_whatever_it_was_trained_for_a_model_answers_with_any_number_of_iterations(fields, loops):
    model = on("llama", change(SMALL, stop={"rule": fields.get("stop.rule", "none")}))
    trained = on("llama", change(SMALL, **fields))
    trained.loop.load_state_dict(model.loop.state_dict())
    plain, ours = (m.generate(QUESTIONS[:2], max_new_tokens=6, loops=loops) for m in (model, trained))
    assert [one.text for one in plain] == [one.text for one in ours]
    assert [one.cost.loops for one in plain] == [one.cost.loops for one in ours]


@pytest.mark.parametrize("site", ["mean", "last"])
@by_region
def test_the_teacher_is_followed_by_the_mean_of_the_latents_or_by_the_last(site, scope):
    model = sharp_model(change(SMALL, loop_scope=scope, hid={"weight": 1.0, "site": site}, teacher="-"))
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
    model = sharp_model(change(SMALL, aux={"weight": 0.5}, slots_per_step=2))
    example, told = MIXED[0], []
    with states(model) as seen, torch.no_grad():
        out = model.loss([example])
    for step, first, u_1ND in zip(example.steps, (0, 2, 0), seen[1:4]):
        ids = torch.tensor(model.encoder.aux_target(step))
        fed = torch.cat([u_1ND[0, first : first + 2], model.backbone.embed(ids[:-1])])
        with torch.no_grad():
            logits = model.backbone.lm(inputs_embeds=fed[None]).logits[0, 1:]  # the decoder starts as a copy
        told.append(cross_entropy(logits.float(), ids, reduction="sum"))
    assert out.terms["aux"].item() == pytest.approx(torch.stack(told).mean().item(), rel=1e-4)
    plain = under(model, SMALL)
    assert out.loss.item() == pytest.approx((plain.loss([example]).loss + 0.5 * out.terms["aux"]).item(), rel=1e-5)
    assert torch.equal(model.answer_logits([example])[0], plain.answer_logits([example])[0])
